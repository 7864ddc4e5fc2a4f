"""What a teacher said of rows as arrays, and how the likeliest classes of a row or token become logits of all."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_kd.data.columns import class_number
from lit_kd.types import IGNORED

LEAST = 1e-6  # in the place of a probability of 0, or the least other one of the row: logits stay finite
SLACK = 0.01  # of a sum of probabilities, which may be rounded
Floats = npt.NDArray[np.float64]


class Answers(NamedTuple):
    """What was said of F rows: k classes of each, with logits up to a constant, and that of every other class.

    Of tokens there is as much for each of the S tokens of all rows, one after the other.
    """

    ids: list[str]
    values: Tensor  # (F, k), or (S, k); of folders of tokens (F, T, C)
    classes: Tensor | None = None  # int64 (F, k); None: all, in order
    rest: Tensor | None = None  # (F,)
    lengths: Tensor | None = None  # of tokens: how many each row has, (F,)


class Source(NamedTuple):
    """A file, and the classes of the data that its answers are of."""

    path: Path
    num_classes: int
    names: list[str] | None  # of the classes
    tokens: bool = False  # whether a row has many

    def error(self, expected: str, found: str) -> ValueError:
        """In one sentence."""
        return ValueError(f"{self.path}: expected {expected}, found {found}")

    def class_of(self, cell: Any) -> int:
        """The number of a class that is named, or numbered from 0; names that are numbers are names."""
        number, names = class_number(cell, self.names, self.num_classes), self.names or []
        if number is not None:
            return number
        raise self.error(
            f"the classes of the data, {', '.join(names[:20]) + ' or ' if names else ''}0 to {self.num_classes - 1}",
            f"{str(cell).strip()!r}: write them as the data do",
        )

    def classes_of(self, cells: Sequence[Any]) -> npt.NDArray[np.int64]:
        """Of many cells."""
        known = {cell: self.class_of(cell) for cell in dict.fromkeys(cells)}
        return np.array([known[cell] for cell in cells], dtype=np.int64)


def column_of(source: Source, columns: Mapping[str, Any], given: str | None, usual: Sequence[str], what: str) -> str:
    """The column of that name, else of a usual one."""
    wanted = usual if given is None else (given,)
    found = next((name for name in wanted if name in columns), None)
    if found is None:
        raise source.error(f"a column {' or '.join(wanted)} with {what}", ", ".join(map(str, columns)))
    return found


def of_tokens(source: Source, columns: Mapping[str, Any], ids: Sequence[str]) -> Answers:
    """The likeliest tokens at each place of a response: lists of lists, in a .csv file as JSON."""
    wanted = {"tokens": "token numbers", "logprobs": "their log-probabilities"}
    whats = [(name, f"{what}, lists of them for each token of a response") for name, what in wanted.items()]
    given = [columns[column_of(source, columns, None, (name,), what)] for name, what in whats]
    most = source.num_classes - 1
    expected = f"in tokens and logprobs lists of lists, of numbers from 0 to {most} and of as many numbers of at most 0"
    rows = [row for row, cell in enumerate(given[0]) if cell is not None and str(cell).strip() not in ("", "[]")]
    places: list[tuple[int, Floats]] = []  # of a row, and what is said at one of its tokens, (2, k)
    for row in rows:
        try:
            both = [json.loads(cells[row]) if isinstance(cells[row], str) else cells[row] for cells in given]
            said = [np.array(pair, dtype=np.float64) for pair in zip(*both, strict=True)]
            right = all(
                pair.ndim == 2
                and pair.size
                and ((pair[0] % 1 == 0) & (pair[0] >= 0) & (pair[0] <= most) & (pair[1] <= SLACK)).all()
                for pair in said
            )
        except (TypeError, ValueError):
            right = False
        if not right:
            raise source.error(expected, f"{given[0][row]!r:.80} and {given[1][row]!r:.80} in the row {ids[row]!r}")
        places += [(row, pair) for pair in said]
    if not places:
        raise source.error("answers", f"none in {len(ids)} rows")
    table = np.full((2, len(places), max(pair.shape[1] for _, pair in places)), np.nan)
    for at, (_, pair) in enumerate(places):
        table[:, at, : pair.shape[1]] = pair
    told = spread(source, np.nan_to_num(table[0]).astype(np.int64), table[1], lambda at: ids[places[at][0]])
    lengths = Counter(row for row, _ in places)
    return Answers([ids[row] for row in rows], *told[1:], torch.tensor([lengths[row] for row in rows]))


def as_columns(batches: Sequence[tuple[Tensor, Tensor]], most: int, as_text: bool) -> dict[str, list[Any]]:
    """What `of_tokens` reads, for so many of the likeliest: from logits ``(B, T, C)`` and labels ``(B, T)``."""
    columns: dict[str, list[Any]] = {"tokens": [], "logprobs": []}
    for logits, y in batches:
        logs, tokens = logits.double().log_softmax(-1).topk(min(most, logits.shape[-1]))
        for name, part in (("tokens", tokens), ("logprobs", logs)):
            rows = [row[kept].tolist() for row, kept in zip(part, y != IGNORED, strict=True)]
            columns[name] += [json.dumps(row) for row in rows] if as_text else rows
    return columns


def spread(
    source: Source, classes: npt.NDArray[np.int64], logs: Floats, name: Callable[[int], str]
) -> tuple[npt.NDArray[np.bool_], Tensor, Tensor, Tensor]:
    """Which rows say something; logits of the told classes, these, and of every other class, which share the rest.

    Classes and log-probabilities are ``(F, k)``, nan where none is told.
    """
    told = ~np.isnan(logs)
    said: npt.NDArray[np.bool_] = np.any(told, axis=1)
    given = np.exp(np.where(told, logs, -np.inf))
    order = np.sort(np.where(told, classes, -1 - np.arange(classes.shape[1])), axis=1)
    total = given.sum(1)
    wrong = said & ((total > 1 + SLACK) | (total <= 0) | (np.diff(order, axis=1) == 0).any(1))
    if wrong.any():
        row = int(wrong.argmax())
        raise source.error(
            "classes that differ, whose probabilities exp(logprob_*) sum to more than 0, at most 1",
            f"classes {classes[row][told[row]].tolist()} of sum {total[row]:.4g} in the row {name(row)!r}",
        )
    left = source.num_classes - told.sum(1)
    rest = (1 - total).clip(min=LEAST) / left.clip(min=1)  # together: a large vocabulary has many others
    least = np.where(given > 0, given, LEAST).min(1, keepdims=True, initial=LEAST)
    first = told.argmax(1)[:, None]  # stands for those that are not told
    classes, given = (np.where(told, part, np.take_along_axis(part, first, 1)) for part in (classes, given))
    return said, as_logits(given, least), torch.from_numpy(classes), as_logits(rest, 0.0)


def as_logits(probabilities: Floats, least: Floats | float = LEAST) -> Tensor:
    """Logits of probabilities, of which the least is as given."""
    return torch.from_numpy(np.log(np.maximum(np.nan_to_num(probabilities), least))).float()
