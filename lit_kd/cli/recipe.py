"""Recipes: which teachers and which methods to compare, on which data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_kd.models.files import parse_yaml, read_yaml
from lit_kd.report.runs import TEACHER, Config, Job, slug

_PARTS = {"model", "data", "trainer"}


@dataclass(frozen=True)
class Recipe:
    """A recipe file, read.

    Attributes:
        name: Of the folder that results go to.
        seeds: Each trains its own teachers.
        defaults: ``model``, ``data`` and ``trainer`` of every training.
        teachers: What differs for each teacher, by the name of its row in the results; a teacher comes after those that
            it learns from.
        methods: What differs for each method, by name.
        taught_by: By teacher and method, the teachers that it learns from.
    """

    name: str
    seeds: list[int]
    defaults: Config
    teachers: dict[str, Config]
    methods: dict[str, Config]
    taught_by: dict[str, tuple[str, ...]]

    def jobs(self, folder: Path, seeds: Sequence[int], overrides: Config) -> Iterator[Job]:
        """Every training: the teachers first, then method by method.

        Args:
            folder: The comparison's folder.
            seeds: At which seeds.
            overrides: Counts more than what the recipe says.
        """
        waves: dict[str, int] = {}
        for method, own in (self.teachers | self.methods).items():
            is_teacher, teachers = method in self.teachers, self.taught_by[method]
            waves[method] = 1 + max((waves[t] for t in teachers), default=-1) if is_teacher else len(self.teachers)
            for seed in seeds:
                config = merge(merge(self.defaults, own), overrides) | {"seed_everything": seed}
                files = [str(folder / slug(teacher) / f"seed-{seed}" / "best.ckpt") for teacher in teachers]
                if files:
                    config["model"].setdefault("init_args", {})["teacher"] = files if len(files) > 1 else files[0]
                where = folder / slug(method) / f"seed-{seed}"
                yield Job(method, seed, where, config, is_teacher, teachers, waves[method])


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Args:
        path: A YAML file with ``seeds``, ``defaults``, ``teacher`` or ``teachers``, and ``methods``. ``teacher``, and
            each entry of ``teachers`` and ``methods``, holds what differs from the defaults, in the form of a config
            for ``lit-kd fit``. Where there are several teachers, an entry may also name its ``teacher``, or a list of
            them; a teacher may name those above it. A method that names none learns from all.

    Raises:
        ValueError: If it does not have this form.
    """
    content = read_yaml(path)
    known_keys = ["name", "seeds", "defaults", TEACHER, "teachers", "methods"]
    if not isinstance(content, Mapping) or set(content) - set(known_keys):
        found = sorted(set(content) - set(known_keys)) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"{path}: expected a mapping with the keys {', '.join(known_keys)}; found {found}")
    defaults = content.get("defaults") or {}
    if not isinstance(defaults, dict) or set(defaults) - _PARTS:
        raise ValueError(f"{path}, defaults: expected the keys model, data or trainer; found {defaults!r}")
    teacher, named = content.get(TEACHER), content.get("teachers")
    if teacher is not None and named is not None:
        raise ValueError(f"{path}: expected either teacher or teachers, found both: name the one among the others")
    for key in ("methods", *(["teachers"] if "teachers" in content else [])):
        if not isinstance(content.get(key), Mapping) or not content[key]:
            raise ValueError(f"{path}: expected {key}, a mapping of names to configs; found {content.get(key)!r}")
    teachers = {f"{TEACHER} {name}": part for name, part in (named or {}).items()}
    if teacher is not None:
        teachers = {TEACHER: teacher}
    methods = {str(name): part for name, part in content["methods"].items()}
    names = [*dict.fromkeys([TEACHER, *teachers]), *methods]
    if len({slug(name) for name in names}) < len(names):
        raise ValueError(f"{path}: expected names that differ in letters and digits, found {names}")

    known: dict[str, str] = {}  # the row of each teacher so far, by the name that others call it
    configs: dict[str, Config] = {}
    taught_by: dict[str, tuple[str, ...]] = {}
    for row, part in (teachers | methods).items():
        default = () if row in teachers else tuple(known.values())
        configs[row], taught_by[row] = _read_part(part, defaults, known, default, f"{path}, {row}")
        if row in teachers:
            known[row.removeprefix(f"{TEACHER} ")] = row
    return Recipe(
        name=str(content.get("name", path.stem)),
        seeds=check_seeds(content.get("seeds", [0, 1, 2]), f"{path}: seeds"),
        defaults=defaults,
        teachers={row: configs[row] for row in teachers},
        methods={row: configs[row] for row in methods},
        taught_by=taught_by,
    )


def _read_part(
    part: Any, defaults: Config, known: Mapping[str, str], default: tuple[str, ...], where: str
) -> tuple[Config, tuple[str, ...]]:
    """The config of one teacher or method, and the rows of its teachers.

    Args:
        part: Its entry in the recipe.
        defaults: Those of the recipe.
        known: The teachers that it may name, and their rows.
        default: The rows of those that it learns from if it names none.
        where: For messages.
    """
    if not isinstance(part, Mapping) or set(part) - {*_PARTS, TEACHER}:
        raise ValueError(f"{where}: expected the keys model, data, trainer or teacher; found {part!r}")
    config = {key: value for key, value in part.items() if key != TEACHER}
    model = merge(defaults, config).get("model", {})
    if "class_path" not in model:
        raise ValueError(f"{where}: expected a model.class_path such as KD; found none")
    learns = model["class_path"].split(".")[-1] != "Supervised" and TEACHER not in model.get("init_args", {})
    asked = part.get(TEACHER)
    if asked is None:
        return config, default if learns else ()
    if not learns:
        raise ValueError(f"{where}: expected no teacher for Supervised or beside init_args.teacher; found {asked!r}")
    asked = asked if isinstance(asked, list) else [asked]
    if not asked or not all(str(name) in known for name in asked):
        raise ValueError(f"{where}: expected as teacher one or some of {list(known)}, those above it; found {asked!r}")
    return config, tuple(known[str(name)] for name in asked)


def read_overrides(options: Sequence[str]) -> Config:
    """Options of every training, from the command line.

    Args:
        options: ``KEY=VALUE``, the key with dots, the value in YAML.

    Raises:
        ValueError: If one does not have this form, or is about neither model, data nor trainer.

    Examples:
        >>> read_overrides(["data.init_args.labeled=50", "trainer.max_epochs=3"])
        {'data': {'init_args': {'labeled': 50}}, 'trainer': {'max_epochs': 3}}
    """
    overrides: Config = {}
    for option in options:
        key, equals, value = option.partition("=")
        names = key.split(".")
        if not equals or len(names) < 2 or not all(names) or names[0] not in _PARTS:
            raise ValueError(
                "expected KEY=VALUE with a key of model, data or trainer, such as data.init_args.labeled=50; "
                f"found {option!r}"
            )
        nested = parse_yaml(value, repr(option))
        for name in reversed(names):
            nested = {name: nested}
        overrides = merge(overrides, nested)
    return overrides


def check_seeds(seeds: Any, where: str) -> list[int]:
    """Refuse what are not seeds, and a seed that is named twice: two trainings would write into one folder."""
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) and s >= 0 for s in seeds):
        raise ValueError(f"{where}: expected a list of whole numbers, found {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{where}: expected each seed once, found {seeds!r}")
    return seeds


def merge(base: Config, own: Config) -> Config:
    """Nested mappings merged; where both have a value, ``own`` counts.

    Examples:
        >>> merge({"a": {"x": 1, "y": 1}}, {"a": {"y": 2}})
        {'a': {'x': 1, 'y': 2}}
    """
    merged = copy.deepcopy(base)
    for key, value in own.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else copy.deepcopy(value)
    return merged
