"""The ``lit-kd`` command. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import difflib
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from opcode import opmap
from types import TracebackType

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
LIGHTNING = ("fit", "validate", "test", "predict")
OURS = {
    "compare": "lit_kd.cli.compare",
    "export": "lit_kd.cli.export",
    "inspect": "lit_kd.cli.inspect",
    "samples": "lit_kd.cli.samples",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``lit-kd``: a command of Lightning's command line or of ours, see `HELP`.

    Args:
        args: Command line without the program's name; ``None`` reads ``sys.argv`` and prints errors of ours without a
            traceback.
    """
    if args is not None:
        return _run(args)
    try:
        _run(None)
    except Exception as error:
        ours = raised_here(error)
        if ours is None:
            raise
        sys.exit(f"lit-kd: error: {ours}")


def _run(args: Sequence[str] | None) -> None:
    line = list(sys.argv[1:] if args is None else args)
    command = line[0] if line else "--help"
    if line == ["--version"]:
        print(f"lit-kd {__version__}")
    elif command in ("--help", "-h"):
        print(HELP, end="")
    elif command in OURS:
        import_module(OURS[command]).main(line[1:])
    elif command == "predict" and line[1:] and not line[1].startswith("-"):
        import_module("lit_kd.cli.predict").main(line[1:])
    elif command in LIGHTNING or command.startswith("-"):
        from lit_kd.cli.configs import check_line

        line = check_line(line)
        if args is None:  # Lightning reads them itself, and starts other processes with them
            sys.argv[1:] = line
        import_module("lit_kd.cli.lightning").run(None if args is None else line)
    else:
        near = difflib.get_close_matches(command, [*LIGHTNING, *OURS], n=1)
        told = f"did you mean {near[0]}?" if near else "lit-kd --help lists them"
        raise ValueError(f"expected a command, found {command}: {told}")


def raised_here(error: BaseException | None) -> BaseException | None:
    """The error, or its cause, that the parser or a check of this package raised: it says all there is to say.

    One that happened here without a ``raise``, such as an index out of range, is a bug and keeps its traceback.
    """
    while error is not None:
        last = error.__traceback__  # none, in what stands for another process's traceback
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        check = last is not None and _is_check(last) and not isinstance(error, AssertionError)  # an assert raises too
        if check or isinstance(error, ArgumentError):
            return error
        error = error.__cause__
    return None


def _is_check(where: TracebackType) -> bool:
    """Whether it is a ``raise`` statement of this package."""
    code = where.tb_frame.f_code.co_code
    ours = str(where.tb_frame.f_globals.get("__name__")).startswith("lit_kd.")
    return ours and code[where.tb_lasti] == opmap["RAISE_VARARGS"]
