"""Configs that come with lit_kd, by their short names."""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path


def shipped_configs() -> Path:
    """The folder of the configs that come with this package: ``methods``, ``data`` and ``recipes``."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"  # of the repository


def find_config(name: str | Path, *kinds: str) -> Path:
    """A config file: the path itself if it exists, else one that comes with this package, as ``methods/kd.yaml``.

    Of a shipped one ``configs/``, ``.yaml`` and the folders `kinds` may be left out. If there is none, a
    FileNotFoundError names similar ones.

    Examples:
        >>> [find_config(name).stem for name in ("configs/methods/kd.yaml", "data/digits")]
        ['kd', 'digits']
    """
    path, shipped = Path(os.path.expanduser(name)), shipped_configs()  # Path's own fails for an unknown user
    if path.is_file():
        return path
    short = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    known = {file.relative_to(shipped).with_suffix("").as_posix(): file for file in sorted(shipped.glob("*/*.yaml"))}
    wanted = short.as_posix().removesuffix(".yaml")
    for each in (wanted, *(f"{kind}/{wanted}" for kind in kinds)):
        if each in known:
            return known[each]
    near = difflib.get_close_matches(path.stem, {file.stem for file in known.values()}, n=3)
    names = [f"{each}.yaml" for each, file in known.items() if file.stem in near or not near]
    hint = f"; did you mean {', '.join(names)}?" if near else f", or one that comes with lit_kd: {', '.join(names)}"
    raise FileNotFoundError(f"no config at {name}: expected a YAML file{hint}")


def with_paths(line: Sequence[str]) -> list[str]:
    """A command line with the paths of configs in place of their names; YAML in place of a path stays as it is."""
    found = list(line)
    for place, word in enumerate(line):
        if word.startswith("--config="):
            found[place] = f"--config={_path(word.removeprefix('--config='))}"
        elif word in ("--config", "-c") and place + 1 < len(line):
            found[place + 1] = _path(line[place + 1])
    return found


def _path(value: str) -> str:
    is_name = re.fullmatch(r"[^\s:{}]+", value)
    return str(find_config(value, "methods", "data")) if is_name else value
