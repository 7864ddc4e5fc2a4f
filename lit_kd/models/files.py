"""Files that are written whole or not at all, and columns in .csv and .parquet files."""

import contextlib
import csv
import errno
import io
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

TABLES = (".csv", ".parquet")
EXPORTS = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}
"""Suffixes of exported students by format."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CHECKPOINTS = {".ckpt", ".pt", ".pth"}


def write_whole(path: Path, content: str | bytes | memoryview | Callable[[BinaryIO], object]) -> None:
    """Write bytes, a text or what a function writes to an open file: whole or not at all, even in a power cut."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # beside it, as only there a rename is atomic
    try:
        with part.open("w+b") as file:  # to one for writing alone numpy writes by itself, and may miss a full disk
            if callable(content):
                content(file)
            else:
                # file names in a text may be no UTF-8
                file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        kept = "the file that is there is as it was" if path.exists() else "no file was left"
        kept += "; make room, and run it again" if error.errno in FULL else ""
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}; {kept}") from error


def read_yaml(path: Path) -> Any:
    """Read the plain values of a YAML file, see `parse_yaml`."""
    return parse_yaml(path.read_bytes(), str(path))


def parse_yaml(text: str | bytes, name: str) -> Any:
    """Parse the plain values of YAML, without running code; a ValueError for a mistake begins with the name."""
    import yaml

    try:
        return yaml.safe_load(text)
    except (RecursionError, ValueError, yaml.YAMLError) as error:  # a ValueError for a date that is none
        raise ValueError(f"{name}: expected YAML, found a mistake: {error}") from error


def check_unused(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError if a path is taken, unless it may be overwritten."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: give another path, or allow it (--overwrite, overwrite=True)")


def check_new(path: Path, overwrite: bool) -> None:
    """Refuse a table's path before the work that fills it: another suffix, an existing file, no pyarrow."""
    if path.suffix not in TABLES:
        raise ValueError(f"expected a path that ends in {' or '.join(TABLES)}, found {path}")
    check_unused(path, overwrite)
    if path.suffix == ".parquet":
        optional("pyarrow.parquet", "parquet", "a .parquet file")


def write_columns(path: Path, columns: Mapping[str, Sequence[Any]], overwrite: bool = False) -> None:
    """Write columns of equal length, floats in full precision; see `check_new`."""
    check_new(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow as pa

        write_whole(path, lambda file: pa.parquet.write_table(pa.table(dict(columns)), file))
    else:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        write_whole(path, text.getvalue())


def read_columns(path: Path) -> dict[str, list[Any]]:
    """Read the columns of a .csv file, as strings, or of a .parquet file."""
    if path.suffix == ".parquet":
        parquet = optional("pyarrow.parquet", "parquet", "a .parquet file")
        found: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
        return found
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole response's tokens
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a byte order mark
        reader = csv.reader(file)
        try:
            names, rows = next(reader, []), [row for row in reader if row]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a table in UTF-8, found another file ({error}): convert it") from error
    odd = next((place for place, row in enumerate(rows) if len(row) != len(names)), None)
    if odd is not None or len(set(names)) < len(names):
        what = f"the names {', '.join(names)}" if odd is None else f"{len(rows[odd])} in row {odd + 1}"
        raise ValueError(f"{path}: expected {len(names)} columns, each with a name of its own, found {what}")
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def optional(module: str, extra: str, what: str) -> Any:
    """Import a module of one of lit_kd's extras, which `what` needs."""
    package = module.split(".")[0]
    try:
        import_module(package)
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{what} needs {package}, which is not installed: pip install 'lit_kd[{extra}]'") from error
