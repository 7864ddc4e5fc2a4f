"""Recipes: which teachers and which methods to compare, on which data."""

import copy
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import dict_to_namespace

import lit_kd
from lit_kd.models.files import parse_yaml, read_yaml
from lit_kd.report.runs import TEACHER, Config, Job, slug

_PARTS = {"model", "data", "trainer"}


@dataclass(frozen=True)
class Recipe:
    """A recipe file, read. A row is a teacher or a method, which trains once a seed."""

    name: str  # of the folder that results go to
    seeds: list[int]
    configs: dict[str, Config]  # of each row, teachers first
    teachers: list[str]  # the rows of teachers; a teacher comes after those that it learns from
    taught_by: dict[str, tuple[str, ...]]  # by row, the teachers that it learns from: rows, or names of given ones
    given: dict[str, Any]  # teachers that are there already, as lit-kd fit takes them: files, or a class with options

    def jobs(self, folder: Path, seeds: Sequence[int], overrides: Config, project: str | None = None) -> Iterator[Job]:
        """Every training in a folder, the teachers first; overrides count more than what the recipe says."""
        waves: dict[str, int] = dict.fromkeys(self.given, -1)
        for row, own in self.configs.items():
            is_teacher, teachers = row in self.teachers, self.taught_by[row]
            waves[row] = 1 + max((waves[t] for t in teachers), default=-1) if is_teacher else len(self.teachers)
            for seed in dict.fromkeys(seeds):  # two trainings would write into one folder
                config = merge(own, overrides) | {"seed_everything": seed}
                trained = [str(folder / slug(teacher) / f"seed-{seed}" / "best.ckpt") for teacher in teachers]
                files = [self.given.get(teacher, path) for teacher, path in zip(teachers, trained, strict=True)]
                if files:
                    config["model"].setdefault("init_args", {})["teacher"] = files if len(files) > 1 else files[0]
                own_folder = folder / slug(row) / f"seed-{seed}"
                yield Job(row, seed, own_folder, config, is_teacher, teachers, waves[row], project)


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe: YAML with ``seeds``, ``defaults``, ``teacher`` or ``teachers``, and ``methods``.

    ``teacher``, and each entry of ``teachers`` and ``methods``, holds what differs from the defaults, in the form of a
    config for ``lit-kd fit``. Of several teachers an entry may name its ``teacher``, or a list of them; a teacher may
    name those above it. A method that takes a teacher learns from all, or from those that it names; ``teacher: []``:
    from none. Wherever a teacher stands it may be a file, such as ``gpt.csv``, or a class with its options.
    """
    content = _mapping(read_yaml(path), {"name", "seeds", "defaults", TEACHER, "teachers", "methods"}, f"{path}")
    defaults = _mapping(content.get("defaults") or {}, _PARTS, f"{path}, defaults")
    teacher, named = content.get(TEACHER), content.get("teachers")
    if teacher is not None and named is not None:
        raise ValueError(f"{path}: expected either teacher or teachers, found both: name the one among the others")
    for key in ("methods", *(["teachers"] if "teachers" in content else [])):
        if not isinstance(content.get(key), Mapping) or not content[key]:
            raise ValueError(f"{path}: expected {key}, a mapping of names to configs; found {content.get(key)!r}")
    given = {_called(one): one for one in _as_list(teacher) if _is_given(one) or isinstance(teacher, list)}
    single = {} if teacher is None or given else {TEACHER: teacher}
    teachers = single or {f"{TEACHER} {name}": part for name, part in (named or {}).items()}
    known = {name: name for name in given}  # each teacher so far, by the name that others call it
    for row in [row for row, part in teachers.items() if _is_given(part)]:
        given[row] = teachers.pop(row)
        known[row.removeprefix(f"{TEACHER} ")] = row
    for one in given.values():
        if not _is_given(one) or (isinstance(one, str) and not Path(one).exists()):
            raise ValueError(f"{path}: expected as teacher a config, or files that are there; found {one!r}")
    rows = teachers | {str(name): part for name, part in content["methods"].items()}
    names = [*dict.fromkeys([TEACHER, *teachers]), *map(str, content["methods"])]
    if len({slug(name) for name in names}) < len(names):
        raise ValueError(f"{path}: expected names that differ in letters and digits, found {names}")

    configs: dict[str, Config] = {}
    taught_by: dict[str, tuple[str, ...]] = {}
    for row, part in rows.items():
        where = f"{path}, {row}"
        own = _mapping(part, {*_PARTS, TEACHER}, where)
        asked = own.pop(TEACHER, None)
        configs[row] = merge(defaults, own)
        taught_by[row] = _teachers(configs[row], asked, known, given, row in teachers, where)
        if row in teachers:
            known[row.removeprefix(f"{TEACHER} ")] = row
    seeds = content.get("seeds", [0, 1, 2])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{path}: expected seeds, a list of whole numbers; found {seeds!r}")
    return Recipe(str(content.get("name", path.stem)), seeds, configs, list(teachers), taught_by, given)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_given(teacher: Any) -> bool:
    """Whether a teacher is there already: a path, or a class with its options."""
    return isinstance(teacher, str) or (isinstance(teacher, Mapping) and "class_path" in teacher)


def _called(teacher: Any) -> str:
    """The name of such a teacher: the path, and the values of options."""
    options = teacher.get("init_args", teacher) if isinstance(teacher, Mapping) else {"path": teacher}
    return " ".join(map(str, options.values()))


def _mapping(content: Any, keys: set[str], where: str) -> Config:
    unknown = sorted(map(str, set(content) - keys)) if isinstance(content, Mapping) else [content]
    if unknown:
        raise ValueError(f"{where}: expected a mapping with the keys {', '.join(sorted(keys))}; found {unknown}")
    return dict(content)


def _teachers(
    config: Config, asked: Any, known: Mapping[str, str], given: Config, is_teacher: bool, where: str
) -> tuple[str, ...]:
    """The teachers that a training learns from: those asked for, else all known; a teacher from none.

    Files that are asked for are added to those that are given.
    """
    model = config.get("model", {})
    if "class_path" not in model:
        raise ValueError(f"{where}: expected a model.class_path such as KD; found none")
    path = model["class_path"]
    name = path.split(".")[-1]
    ours = getattr(lit_kd, name, None) if path == name or path.startswith("lit_kd.") else None
    takes = ours is None or TEACHER in inspect.signature(ours).parameters
    learns = takes and TEACHER not in model.get("init_args", {})
    if asked is None:
        return tuple(known.values()) if learns and not is_teacher else ()
    if asked == [] and not getattr(ours, "needs_teacher", False):
        return ()
    if not learns:
        raise ValueError(f"{where}: expected no teacher for {name} or beside init_args.teacher; found {asked!r}")
    asked, found = _as_list(asked), []
    for one in asked:
        name = known.get(str(one))
        if name is None and _is_given(one) and (not isinstance(one, str) or Path(one).exists()):
            name = _called(one)
            given[name] = one
        found.append(name)
    if not asked or None in found:
        raise ValueError(
            f"{where}: expected as teacher one or some of {list(known)}, those above it, or a file; found {asked!r}"
        )
    return tuple(found)


def read_overrides(options: Sequence[str]) -> Config:
    """Options of every training: ``KEY=VALUE``, the key such as ``data.init_args.labeled``, the value in YAML."""
    overrides = dict_to_namespace({})
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or not re.fullmatch(rf"({'|'.join(_PARTS)})(\.[^.]+)+", key):
            expected = "KEY=VALUE with a key of model, data or trainer, such as data.init_args.labeled=50"
            raise ValueError(f"expected {expected}; found {option!r}")
        overrides[key] = parse_yaml(value, repr(option))
    return dict(overrides.as_dict())


def merge(base: Config, own: Config) -> Config:
    """Nested mappings merged; where both have a value, ``own`` counts, and options of another class do not."""
    another = {"class_path"} <= base.keys() & own.keys() and base["class_path"] != own["class_path"]
    merged = {} if another else copy.deepcopy(base)
    for key, value in own.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else copy.deepcopy(value)
    return merged
