"""The ``lit-kd`` command. Each command imports what it needs, so that help and version stay quick."""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from lit_kd.version import __version__

HELP = """usage: lit-kd COMMAND ...

Distil a student when labels or teacher cannot be trusted.

  fit, validate, test, predict        train and use a method on data: LightningCLI; lit-kd fit --help
  predict CHECKPOINT IMAGES           classify a directory of images, into a csv file
  compare RECIPE                      train a recipe's methods side by side
  inspect RUN                         rank training samples by learned distrust
  samples                             write what a run learned about each training sample
  export CHECKPOINT --format FORMAT   write the student alone, for ONNX, torch.export or safetensors

lit-kd COMMAND --help tells the options, lit-kd fit --model.help KD those of a method, lit-kd --version the version.
"""
TRACEBACK = "LIT_KD_TRACEBACK"
LIGHTNING = ("fit", "validate", "test", "predict")
OURS = {
    "compare": "lit_kd.cli.compare:main",
    "export": "lit_kd.cli.export:main",
    "inspect": "lit_kd.cli.samples:inspect",
    "samples": "lit_kd.cli.samples:samples",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``lit-kd``, see `HELP`.

    Without ``args`` it reads ``sys.argv`` and turns errors into one message and exit code 1, unless the environment
    variable ``LIT_KD_TRACEBACK`` is 1.
    """
    if args is not None:
        return _run(list(args))
    try:
        _run(None)
    except (ValueError, OSError, ImportError, TypeError) as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        told = "\n".join([f"lit-kd: error: {error}", *getattr(error, "__notes__", [])])
        sys.exit(f"{told}\n({TRACEBACK}=1 shows where this was raised)")


def _run(args: list[str] | None) -> None:
    line = sys.argv[1:] if args is None else args
    command = line[0] if line else "--help"
    if line == ["--version"]:
        print(f"lit-kd {__version__}")
    elif command in ("--help", "-h"):
        print(HELP, end="")
    elif command == "predict" and line[1:] and not line[1].startswith("-"):
        _load("lit_kd.cli.predict:main")(line[1:])
    elif command in OURS:
        _load(OURS[command])(line[1:])
    elif command in LIGHTNING or command.startswith("-"):
        line = _load("lit_kd.cli.configs:with_paths")(line)
        if args is None:  # Lightning reads them itself, and starts other processes with them
            sys.argv[1:] = line
        _load("lit_kd.cli.lightning:run")(None if args is None else line)
    else:
        near = difflib.get_close_matches(command, [*LIGHTNING, *OURS], n=1)
        hint = f"did you mean {near[0]}?" if near else "lit-kd --help lists them"
        raise ValueError(f"expected a command, found {command}: {hint}")


def _load(path: str) -> Callable[[list[str] | None], Any]:
    module, _, name = path.partition(":")
    function: Callable[[list[str] | None], Any] = getattr(import_module(module), name)
    return function
