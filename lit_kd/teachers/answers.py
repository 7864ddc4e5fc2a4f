"""What a teacher said of rows, by their ids: tables that people write, and folders of arrays as the cache does."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_kd.models.files import read_columns, write_whole
from lit_kd.teachers.likeliest import LEAST, SLACK, Answers, Floats, Source, as_logits, column_of, of_tokens, spread

LOGITS = "logits"


class Options(NamedTuple):
    """Which columns to read, see `lit_kd.teachers.FileTeacher`."""

    id: str | None = None
    label: str | None = None
    confidence: str | None = None
    probabilities: str = "prob_*"


def write_arrays(folder: Path, ids: Sequence[str], arrays: Mapping[str, Tensor]) -> None:
    """Write what a teacher gives for rows of these ids, ``(F, ...)`` each; logits last, as they tell that all is there.

    `read_arrays` reads it, and `lit_kd.teachers.FileTeacher` the logits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {"ids": np.array(ids)} | {name: arrays[name].numpy() for name in sorted(arrays, key=LOGITS.__eq__)}
    for name, array in found.items():
        write_whole(folder / f"{name}.npy", partial(np.save, arr=array))


def read_arrays(folder: Path, names: Sequence[str] = (LOGITS,)) -> tuple[list[str], dict[str, Tensor]]:
    """The ids, and arrays that stay in their files."""
    # mode c: torch wants an array that it may write to; the file stays as it is
    arrays = {name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c")) for name in names}
    return np.load(folder / "ids.npy").tolist(), arrays


def is_answers(path: Any) -> bool:
    """Whether a path is of a table, by its ending, or of a folder of the cache."""
    return isinstance(path, (str, Path)) and (
        Path(path).suffix in (".csv", ".parquet")
        or all((Path(path) / f"{name}.npy").is_file() for name in (LOGITS, "ids"))
    )


def read_answers(source: Source, options: Options) -> Answers:
    """What a file says; rows without an answer are left out. A ValueError for what cannot be read."""
    if source.path.is_dir():
        ids, arrays = read_arrays(source.path)
        logits = arrays[LOGITS]
        expected = len(ids), *logits.shape[1:2] * source.tokens, source.num_classes
        if logits.shape != expected:
            raise source.error(f"logits of shape {expected}", f"{tuple(logits.shape)}: is the file of other data?")
        if not logits.isfinite().all():
            raise source.error("logits that are finite", "nan or infinity")
        return Answers(ids, logits.float())
    columns = read_columns(source.path)
    rows = len(next(iter(columns.values()), []))
    if not rows:
        raise source.error("a table with a head and rows", "an empty one")
    name = column_of(source, columns, options.id, ("id", "file"), "the ids of the data's rows: id='...'")
    ids = [str(cell) for cell in columns[name]]
    if len(set(ids)) < rows:
        raise source.error("each id once", f"{Counter(ids).most_common(1)[0][0]!r} again: keep one answer a row")
    if source.tokens:
        if options[1:] != Options()[1:]:
            raise source.error(
                "neither label, confidence nor probabilities for tokens", f"{options[1:]}: leave them out"
            )
        return of_tokens(source, columns, ids)
    matched = [column for column in columns if fnmatchcase(str(column), options.probabilities)]
    top = [column for column in columns if re.fullmatch(r"logprob_\d+", str(column))]
    read: Callable[..., tuple[npt.NDArray[np.bool_], Answers]]
    if options.label is None and (matched or options.probabilities != "prob_*"):
        read = partial(_distributions, matched=matched, pattern=options.probabilities)
    elif options.label is None and top:
        read = partial(_likeliest, numbers=[column.removeprefix("logprob_") for column in top])
    else:
        read = partial(_labels, options=options)
    said, answers = read(source, columns, ids)
    kept = np.flatnonzero(said)
    if not len(kept):
        raise source.error("answers", f"none in {rows} rows")
    at, (_, values, classes, rest, _) = torch.from_numpy(kept), answers
    others = (None if part is None else part[at] for part in (classes, rest))
    return Answers([ids[row] for row in kept], values[at], *others)


def _blank(cell: Any) -> bool:
    return cell is None or cell != cell or str(cell).strip() in ("", "-1", "-1.0")


def _numbers(source: Source, cells: Sequence[Any], ids: Sequence[str], what: str, most: float) -> Floats:
    """A column of numbers; nan where a cell is blank."""
    found = np.full(len(cells), np.nan)
    for row, cell in enumerate(cells):
        if cell is None or str(cell).strip().lower() in ("", "nan"):
            continue
        try:
            found[row] = float(cell)
        except (TypeError, ValueError):
            found[row] = np.inf
        if not found[row] <= most:
            raise source.error(what, f"{cell!r} in the row {ids[row]!r}")
    return found


def _distributions(
    source: Source, columns: Mapping[str, Any], ids: list[str], matched: list[str], pattern: str
) -> tuple[npt.NDArray[np.bool_], Answers]:
    """A probability for each class."""
    before, star, after = pattern.partition("*")
    if not star or "*" in after or not matched:
        raise source.error(f"columns {pattern}, one star for the class", ", ".join(map(str, columns)))
    classes = [source.class_of(name[len(before) : len(name) - len(after)]) for name in matched]
    if sorted(classes) != list(range(source.num_classes)):
        raise source.error(f"a column {pattern} for each of {source.num_classes} classes", ", ".join(matched))
    what = f"as {pattern} numbers from 0 to 1"
    table = np.stack([_numbers(source, columns[name], ids, what, 1 + SLACK) for name in matched], axis=1)
    said = np.logical_not(np.isnan(table).all(1))
    total = table.sum(1)
    right = np.logical_and(np.abs(total - 1) <= SLACK, (table >= 0).all(1))
    wrong = np.logical_and(said, ~right)
    if wrong.any():
        row = int(wrong.argmax())
        raise source.error(
            f"probabilities {pattern} of at least 0 that sum to 1",
            f"{', '.join(f'{p:g}' for p in table[row][:8])} of sum {total[row]:.4g} in the row {ids[row]!r}",
        )
    table = (table / np.where(said, total, 1)[:, None])[:, np.argsort(classes)]
    least = np.where(table > 0, table, LEAST).min(1, keepdims=True, initial=LEAST)
    return said, Answers(ids, as_logits(table, least))


def _labels(
    source: Source, columns: Mapping[str, Any], ids: list[str], options: Options
) -> tuple[npt.NDArray[np.bool_], Answers]:
    """A class, and how sure the teacher is of it; the rest is for the others."""
    what = "classes, columns prob_* with probabilities, or class_1, logprob_1, ...: label='...'"
    cells = columns[column_of(source, columns, options.label, ("label", "class"), what)]
    said = np.array([not _blank(cell) for cell in cells])
    classes = np.zeros((len(ids), 1), dtype=np.int64)
    classes[said, 0] = source.classes_of([cell for cell, told in zip(cells, said, strict=True) if told])
    sure = np.ones(len(ids))
    usual = ("confidence", "probability")
    # of several columns of labels none can tell which the usual one is of
    if options.confidence is not None or (options.label is None and any(name in columns for name in usual)):
        name = column_of(source, columns, options.confidence, usual, "how sure each label is")
        sure = _numbers(source, columns[name], ids, f"as {name} numbers from 0 to 1", 1)
        wrong = said & ~(sure >= 0)
        if wrong.any():
            row = int(wrong.argmax())
            raise source.error(f"as {name} numbers from 0 to 1", f"{columns[name][row]!r} in the row {ids[row]!r}")
    rest = (1 - sure) / (source.num_classes - 1)
    return said, Answers(ids, as_logits(sure[:, None]), torch.from_numpy(classes), as_logits(rest))


def _likeliest(
    source: Source, columns: Mapping[str, Any], ids: list[str], numbers: list[str]
) -> tuple[npt.NDArray[np.bool_], Answers]:
    """Log-probabilities of the likeliest classes; what is left is for the others."""
    numbers = sorted(numbers, key=int)
    classes = np.zeros((len(ids), len(numbers)), dtype=np.int64)
    logs = np.full(classes.shape, np.nan)
    for at, number in enumerate(numbers):
        cells = columns[column_of(source, columns, f"class_{number}", (), f"the class of logprob_{number}")]
        logs[:, at] = _numbers(source, columns[f"logprob_{number}"], ids, "as logprob_* numbers of at most 0", SLACK)
        told = ~np.isnan(logs[:, at])
        classes[told, at] = source.classes_of([cells[row] for row in np.flatnonzero(told)])
    said, *parts = spread(source, classes, logs, lambda row: ids[row])
    return said, Answers(ids, *parts)
