"""``lit-kd --print_completion``: what a shell completes."""

import argparse
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pkgutil import resolve_name
from typing import Any

from lit_kd.cli.main import LIGHTNING, OURS
from lit_kd.cli.schema import fit_schema

_PATHS = {"--config", "--ckpt_path", "--output", "--model.teacher"}


def main(args: Sequence[str]) -> None:
    """Run ``lit-kd --print_completion`` with the command line after it.

    jsonargparse's own script lists the options of every class within every class, 19 MB for ``lit-kd fit`` alone. This
    one knows each option of a method, a data module, the trainer and the callbacks once.
    """
    try:
        import shtab
    except ImportError as error:
        raise ImportError("expected shtab, which writes completions: pip install 'lit_kd[completion]'") from error
    parser = argparse.ArgumentParser("lit-kd --print_completion", description="Print a script that a shell reads.")
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    print(shtab.complete(_everything(shtab.FILE), parser.parse_args(args).shell))


def _everything(path: Any) -> argparse.ArgumentParser:
    """The whole command line as one parser, only to be listed; ``path`` says to complete files."""
    top = argparse.ArgumentParser("lit-kd")
    top.add_argument("--version", action="store_true")
    commands = top.add_subparsers()
    options = list(_lightning())
    for command in (*LIGHTNING, *OURS):
        parser = commands.add_parser(command, help=command)
        if command != "schema":
            parser.add_argument("path", nargs="*").complete = path  # type: ignore[attr-defined]
        for name, choices in options if command in LIGHTNING else _of_help(OURS[command]):
            if choices == []:
                parser.add_argument(name, action="store_true")
            elif name in _PATHS:
                parser.add_argument(name).complete = path  # type: ignore[attr-defined]
            else:
                parser.add_argument(name, choices=choices)
    return top


def _lightning() -> Iterator[tuple[str, list[str] | None]]:
    """The options of Lightning's commands, with the names of methods and data modules."""
    schema = fit_schema()
    yield from ((name, None) for name in ("--config", "--print_config", "--model.help", "--data.help"))
    for group, found in schema["properties"].items():
        base = {"model": "Distiller", "data": "DataModule"}.get(group, "")
        classes = [one["properties"] for one in schema["$defs"].get(base, {}).get("anyOf", ()) if "properties" in one]
        known = [one for one in classes if "enum" in one["class_path"]]
        if known or "properties" not in found:
            yield f"--{group}", [one["class_path"]["enum"][0] for one in known] or None
        names = [one["init_args"]["properties"] for one in known] or [found.get("properties", {})]
        yield from ((f"--{group}.{name}", None) for name in sorted(set().union(*names)))


def _of_help(place: str) -> Iterator[tuple[str, list[str] | None]]:
    """The options of a command of ours, as its help tells them: an empty list where an option takes no value."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        resolve_name(place)(["--help"])
    for name, value in re.findall(r"^  (--\w+)\b(?! ?\.)( \S)?", text.getvalue(), re.MULTILINE):
        yield name, None if value else []
