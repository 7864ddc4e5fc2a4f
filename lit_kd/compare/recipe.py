"""Recipes: which teacher and which methods to compare, on which data."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Config = dict[str, Any]
TEACHER = "teacher"
_PARTS = {"model", "data", "trainer"}


@dataclass(frozen=True)
class Job:
    """One training: a method at a seed.

    Attributes:
        method: Name in the recipe; `TEACHER` for the teacher.
        seed: Of split, noise, order and initial weights.
        folder: Where everything about it is written.
        config: A config for ``lit-kd fit``.
    """

    method: str
    seed: int
    folder: Path
    config: Config


@dataclass(frozen=True)
class Recipe:
    """A recipe file, read.

    Attributes:
        name: Of the folder that results go to.
        seeds: Each trains its own teacher.
        defaults: ``model``, ``data`` and ``trainer`` of every training.
        teacher: What differs for the teacher; ``None``: there is no teacher.
        methods: What differs for each method, by name.
    """

    name: str
    seeds: list[int]
    defaults: Config
    teacher: Config | None
    methods: dict[str, Config]

    def jobs(self, folder: Path, seeds: Sequence[int], overrides: Config) -> Iterator[Job]:
        """Every training: the teachers first, then method by method.

        Args:
            folder: The comparison's folder.
            seeds: At which seeds.
            overrides: Counts more than what the recipe says.
        """
        teacher = {} if self.teacher is None else {TEACHER: self.teacher}
        for method, own in (teacher | self.methods).items():
            yield from (self._job(folder, method, merge(own, overrides), seed) for seed in seeds)

    def _job(self, folder: Path, method: str, own: Config, seed: int) -> Job:
        path = folder / slug(method) / f"seed-{seed}"
        config = merge(self.defaults, own) | {"seed_everything": seed}
        model = config["model"]
        if self.teacher is not None and method != TEACHER and model["class_path"].split(".")[-1] != "Supervised":
            teacher = folder / TEACHER / f"seed-{seed}" / "best.ckpt"
            model["init_args"] = {"teacher": str(teacher)} | model.get("init_args", {})
        return Job(method, seed, path, config)


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Args:
        path: A YAML file with ``seeds``, ``defaults``, ``teacher`` and ``methods``; the last two hold what differs from
            the defaults, in the form of a config for ``lit-kd fit``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it does not have this form.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}: expected a YAML file such as configs/recipes/digits_pair.yaml")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: expected a mapping with methods, found {type(content).__name__}")
    unknown = set(content) - {"name", "seeds", "defaults", "teacher", "methods"}
    if unknown:
        raise ValueError(f"{path}: expected name, seeds, defaults, teacher, methods; found also {sorted(unknown)}")
    methods, defaults, teacher = content.get("methods"), content.get("defaults") or {}, content.get("teacher")
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError(f"{path}: expected methods, a mapping of names to configs; found {methods!r}")
    methods = {str(name): part for name, part in methods.items()}
    seeds = check_seeds(content.get("seeds", [0, 1, 2]), f"{path}: seeds")
    for where, part in {"defaults": defaults, TEACHER: teacher or {}, **methods}.items():
        if not isinstance(part, Mapping) or set(part) - _PARTS:
            raise ValueError(f"{path}, {where}: expected the keys model, data or trainer; found {part!r}")
    for where, part in {**({} if teacher is None else {TEACHER: teacher}), **methods}.items():
        if "class_path" not in merge(dict(defaults), dict(part)).get("model", {}):
            raise ValueError(f"{path}, {where}: expected a model.class_path such as KD; found none")
    slugs = [slug(name) for name in [TEACHER, *methods]]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"{path}: expected method names that differ in letters and digits, found {list(methods)}")
    return Recipe(str(content.get("name", path.stem)), seeds, dict(defaults), teacher, methods)


def check_seeds(seeds: Any, where: str) -> list[int]:
    """Refuse what are not seeds, and a seed that is named twice: two trainings would write into one folder."""
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ValueError(f"{where}: expected a list of whole numbers, found {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: expected each seed once, found {seeds!r}")
    return seeds


def merge(base: Config, own: Config) -> Config:
    """Nested mappings merged; where both have a value, ``own`` counts.

    Example:
        >>> merge({"a": {"x": 1, "y": 1}}, {"a": {"y": 2}})
        {'a': {'x': 1, 'y': 2}}
    """
    merged = copy.deepcopy(base)
    for key, value in own.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else copy.deepcopy(value)
    return merged


def slug(name: str) -> str:
    """A method's name as a folder's.

    Example:
        >>> slug("KD 0.5 + meta")
        'kd-0.5-meta'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
