"""The ``lit-kd`` command. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
import traceback
from argparse import ArgumentError
from collections.abc import Sequence

from lit_kd.version import __version__


def main(args: Sequence[str] | None = None) -> None:
    """Run ``lit-kd``: fit, validate, test, predict (Lightning's command line), compare, or samples.

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
    first = list(sys.argv[1:] if args is None else args)
    if first == ["--version"]:
        print(f"lit-kd {__version__}")
    elif first[:1] == ["compare"]:
        from lit_kd.compare import main as compare

        compare(first[1:])
    elif first[:1] == ["samples"]:
        from lit_kd.samples_command import main as samples

        samples(first[1:])
    else:
        from lit_kd.lightning_cli import run

        run(None if args is None else first)


def raised_here(error: BaseException | None) -> BaseException | None:
    """The error, or its cause, that the parser or a check of this package raised: it says all there is to say."""
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))  # none, in what stands for another process's traceback
        if isinstance(error, ArgumentError) or (frames and _is_ours(frames[-1][0].f_globals.get("__name__"))):
            return error
        error = error.__cause__
    return None


def _is_ours(module: object) -> bool:
    return str(module).startswith("lit_kd.")
