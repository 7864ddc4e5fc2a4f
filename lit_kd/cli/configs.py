"""What is told about a command line before torch and Lightning are imported, which takes seconds."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from lit_kd.cli.options import Mention, check_options, in_config, in_word
from lit_kd.models.files import CHECKPOINTS, parse_yaml, read_yaml

TEACHER = ("--model.teacher", "--model.init_args.teacher")
SHOW = ("--help", "-h", "--print_config")
"""Options of a line that trains nothing."""


def shipped_configs() -> Path:
    """The folder of the configs that come with this package: ``methods``, ``data`` and ``recipes``."""
    here = Path(__file__).parents[1]
    # beside the package where that is used from its repository
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def find_config(name: str | Path, kind: str = "") -> Path | None:
    """A config file: that path, or else one that comes with this package, as ``methods/kd.yaml``.

    Args:
        name: The path; for a shipped one ``configs/`` before it and ``.yaml`` behind it may be there or not.
        kind: The folder of shipped ones to look into as well, e.g. ``recipes``.

    Returns:
        The file; None if there is none.

    Examples:
        >>> [find_config(name).stem for name in ("configs/methods/kd.yaml", "data/digits")]
        ['kd', 'digits']
    """
    path = Path(os.path.expanduser(name))  # Path's own fails for a user that is not there
    if path.exists() or path.is_absolute() or ".." in path.parts:
        return path if path.is_file() else None
    shipped = shipped_configs()
    relative = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    for folder in (shipped, shipped / kind):
        for found in (folder / relative, folder / f"{relative}.yaml"):
            if found.is_file():
                return found
    return None


def missing_config(name: str | Path, what: str, *kinds: str) -> FileNotFoundError:
    """The error of a config that is neither there nor shipped; names shipped ones of these kinds."""
    known = [f"{kind}/{path.name}" for kind in kinds for path in sorted((shipped_configs() / kind).glob("*.yaml"))]
    stems = {Path(each).stem: each for each in known}
    near = [stems[stem] for stem in difflib.get_close_matches(Path(name).stem, stems, n=3)]
    told = f"; did you mean {', '.join(near)}?" if near else f", or one that comes with lit_kd: {', '.join(known)}"
    return FileNotFoundError(f"no {what} at {name}: expected a YAML file{told}")


def check_line(line: Sequence[str]) -> list[str]:
    """Check a line for Lightning's commands, as far as that is quick, and put shipped configs' paths into it.

    Args:
        line: The arguments, the command first.

    Returns:
        The arguments, with the path of each config that comes with this package in place of its name.

    Raises:
        FileNotFoundError: If a config, the checkpoint or, of a training, the teacher is not there.
        ValueError: If a config is not YAML, or an option, a class or a value is certainly wrong.
    """
    checked = [word for joined in line for word in _split(joined)]
    names = [word.partition("=")[0] for word in line]
    shows = any(name in SHOW or name.endswith(".help") for name in names)
    trains = "fit" in line[:1] and not shows
    mentions: list[Iterator[Mention]] = []
    for i, (option, value) in enumerate(zip(checked, [*checked[1:], ""], strict=True)):
        mentions.append(in_word(option, value))
        if option in ("--config", "-c") and value:
            checked[i + 1], content = _check_config(value)
            mentions.append(in_config(content, f"{'--config' if ': ' in value else value}: "))
        elif option == "--ckpt_path":
            check_ckpt_path(value)
        elif trains and option in TEACHER and Path(value).suffix in CHECKPOINTS and not Path(value).exists():
            raise FileNotFoundError(f"no checkpoint at {value}: expected a .ckpt file that a lit_kd run wrote")
    if line and not line[0].startswith("-"):
        check_options(line[0], chain.from_iterable(mentions), whole=not shows)
    return checked


def check_ckpt_path(path: str) -> None:
    """Refuse a path for Lightning's ``--ckpt_path`` that does not exist; words such as ``best``, and addresses, pass.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    words = ("best", "last", "hpc", "null")
    if not (path in words or path.startswith("registry") or "://" in path or Path(path).exists()):
        raise FileNotFoundError(f"no checkpoint at {path}: expected a .ckpt file that a lit_kd run wrote")


def _split(word: str) -> list[str]:
    """``--config=a`` and ``-ca`` as two words."""
    if word.startswith("-c") and len(word) > 2:
        return ["-c", word[2:].removeprefix("=")]
    option, equals, value = word.partition("=")
    return [option, value] if equals and option in ("--config", "--ckpt_path", *TEACHER) else [word]


def _check_config(value: str) -> tuple[str, Any]:
    """A config's path, and its content."""
    path = None if "\n" in value else find_config(value)
    if path is None and (": " in value or "\n" in value or value.lstrip().startswith("{")):
        return value, parse_yaml(value, "--config")  # YAML itself, in place of a path
    if path is None:
        raise missing_config(value, "config", "methods", "data")
    return str(path), read_yaml(path)
