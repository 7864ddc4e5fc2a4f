"""The ``lit-kd`` command. What is heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from lit_kd.version import __version__


def main(args: Sequence[str] | None = None) -> None:
    """Run ``lit-kd``: fit, validate, test, predict (Lightning's command line), or compare.

    Args:
        args: Command line without the program's name; ``None`` reads ``sys.argv`` and prints errors of ours without a
            traceback.
    """
    if args is not None:
        return _run(args)
    try:
        _run(None)
    except Exception as error:
        ours = _raised_here(error)
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
    else:
        from lit_kd.lightning_cli import run

        run(None if args is None else first)


def _raised_here(error: BaseException | None) -> BaseException | None:
    """The error, or its cause, that a check of this package raised: it says all there is to say."""
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        if str(frames[-1][0].f_globals.get("__name__", "")).startswith("lit_kd."):
            return error
        error = error.__cause__
    return None
