"""The ``lit-kd`` command. Each command imports what it needs, so that help and version stay quick."""

import os
import re
import select
import sys
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name

from lit_kd.version import __version__

HELP = """usage: lit-kd COMMAND ...

Distil a student when labels or teacher cannot be trusted.

  fit, validate, test, predict        train and use a method on data: LightningCLI; lit-kd fit --help
  predict CHECKPOINT IMAGES           classify a directory of images, into a csv file
  compare RECIPE                      train a recipe's methods side by side
  trust TEACHER ... --data CLASS      is a teacher worth it? before any training
  audit RUN, audit --data DATA        tell which labels are wrong, by a run or by one training
  samples RUN                         write what a run learned about each training sample
  export CHECKPOINT --format FORMAT   write the student alone, for ONNX, torch.export or safetensors
  schema                              print a JSON schema, by which editors complete and check configs

lit-kd COMMAND --help tells the options, lit-kd fit --model.help KD those of a method, lit-kd --version the version.
lit-kd --print_completion bash (or zsh) prints what a shell needs to complete all of this.
"""
TRACEBACK = "LIT_KD_TRACEBACK"
LIGHTNING = ("fit", "validate", "test", "predict")
OURS = {
    "audit": "lit_kd.cli.audit:main",
    "compare": "lit_kd.cli.compare:main",
    "export": "lit_kd.cli.students:export",
    "samples": "lit_kd.cli.samples:samples",
    "schema": "lit_kd.cli.schema:schema",
    "trust": "lit_kd.cli.trust:trust",
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
        if sys.stdout is not None:
            sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not is_read():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain when it ends
            sys.exit(1)
        expected = isinstance(error, (ValueError, OSError, ImportError, TypeError, RuntimeError))
        expected = expected or type(error).__name__ == "MisconfigurationException"  # Lightning's, not imported here
        if not expected or os.environ.get(TRACEBACK) == "1":
            raise
        told = "\n".join([f"lit-kd: error: {sentence(error)}", *getattr(error, "__notes__", [])])
        sys.exit(f"{told}\n({TRACEBACK}=1 shows where this was raised)")


def is_read() -> bool:
    """Whether somebody reads what is printed; not so after ``lit-kd schema | head``."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)  # for errors alone
    return not stdout.poll(0)


def sentence(error: BaseException) -> str:
    """What an error says; of a parser's list of all that it tried in vain, what the class that was meant said."""
    cause = error.__cause__
    listed = cause is not None and str(cause) and f"- {str(cause).splitlines()[0]}" in str(error)
    return sentence(cause) if cause is not None and listed else str(error)


def _run(args: list[str] | None) -> None:
    line = sys.argv[1:] if args is None else args
    command = line[0] if line else "--help"
    if line == ["--version"]:
        print(f"lit-kd {__version__}")
    elif command == "--print_completion":
        resolve_name("lit_kd.cli.completion:main")(line[1:])
    elif command in ("--help", "-h"):
        print(HELP, end="")
    elif command == "predict" and line[1:] and not line[1].startswith("-"):
        resolve_name("lit_kd.cli.students:predict")(line[1:])
    elif command in OURS:
        resolve_name(OURS[command])(line[1:])
    elif command in LIGHTNING or command.startswith("-"):
        line = with_paths(line)
        if args is None:  # Lightning reads them itself, and starts other processes with them
            sys.argv[1:] = line
        resolve_name("lit_kd.cli.lightning:run")(None if args is None else line)
    else:
        raise ValueError(f"expected a command, found {command}: lit-kd --help lists them")


def find_config(name: str | Path, *kinds: str) -> Path:
    """A config file: the path itself if it exists, else one that comes with this package, as ``methods/kd.yaml``.

    Of a shipped one ``configs/``, ``.yaml`` and the folders `kinds` may be left out.
    """
    installed = Path(__file__).parents[1] / "configs"
    shipped = installed if installed.is_dir() else Path(__file__).parents[2] / "configs"  # of the repository
    path = Path(os.path.expanduser(name))  # Path's own fails for an unknown user
    if path.is_file():
        return path
    known = {file.relative_to(shipped).with_suffix("").as_posix(): file for file in sorted(shipped.glob("*/*.yaml"))}
    wanted = path.as_posix().removeprefix("configs/").removesuffix(".yaml")
    for each in (wanted, *(f"{kind}/{wanted}" for kind in kinds)):
        if each in known:
            return known[each]
    raise FileNotFoundError(f"no config at {name}: expected a YAML file, or one of lit_kd's: {', '.join(known)}")


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
