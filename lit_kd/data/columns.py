"""Columns of tables: the classes, ids, marks and numbers in them, each checked. Rows count from 1 in messages."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_kd.data.labels import Labels
from lit_kd.models.files import TABLES, read_columns
from lit_kd.types import UNLABELED

Numbers = npt.NDArray[np.float64]
MARKS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False, "": False}


@dataclass(eq=False)
class Table:
    """Columns of equal length by name, and what messages call them."""

    name: str
    columns: Mapping[str, Sequence[Any]]

    @classmethod
    def read(cls, path: str | Path) -> Table:
        """Read a .csv or .parquet file; a ValueError if it is empty."""
        file = Path(path).expanduser()
        if file.suffix not in TABLES:
            raise ValueError(f"expected a table's path that ends in {' or '.join(TABLES)}, found {path}")
        table = cls(str(file), read_columns(file))
        if not table.columns:
            raise ValueError(f"{file}: expected the names of columns, and rows, found an empty file")
        return table

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def listed(self) -> str:
        """The names of the columns, for messages."""
        return shorten(", ".join(self.columns), 200)

    def column(self, name: str, option: str) -> list[Any]:
        """A column that an option names."""
        if name not in self.columns:
            raise ValueError(
                f"{self.name}: expected the column {name!r}, found {self.listed()}: set {option} to one of them"
            )
        return list(self.columns[name])

    def classes(self, label: str) -> list[str]:
        """The classes in the column of labels, sorted: whole numbers by value, names by alphabet."""
        cells = {as_text(cell) for cell in self.column(label, "label")} - {"", str(UNLABELED)}
        if len(cells) < 2:
            raise ValueError(
                f"{self.name}: expected two or more classes in the column {label!r}, found {sorted(cells)}: set label "
                f"to the column of labels, in which an empty cell and {UNLABELED} mean none"
            )
        numbers = all(re.fullmatch(r"-?\d+", cell) for cell in cells)
        return sorted(cells, key=int if numbers else str)

    def labels(self, label: str, classes: Sequence[str], missing: bool = False) -> Labels:
        """Class numbers, ``(n,)``: positions in `classes`, and `UNLABELED` where a label is and may be `missing`."""
        numbers = {name: number for number, name in enumerate(classes)}
        none = {"": UNLABELED, str(UNLABELED): UNLABELED}
        cells = [as_text(cell) for cell in self.column(label, "label")]
        unknown = [row for row, cell in enumerate(cells) if cell not in numbers and not (missing and cell in none)]
        if unknown:
            cell, known = cells[unknown[0]], shorten(", ".join(classes), 80)
            raise ValueError(
                f"{self.name}: expected as {label!r} a class of the training data ({known}), found "
                f"{'none' if cell in none else repr(cell)} in row {unknown[0] + 1} ({len(unknown)} such rows): correct "
                "or remove them"
            )
        return np.array([(none | numbers)[cell] for cell in cells], dtype=np.int64)

    def ids(self, name: str | None) -> list[str] | None:
        """The name of each row, if a column has them."""
        if name is None:
            return None
        ids = ["" if cell is None else str(cell) for cell in self.column(name, "id")]
        if "" in ids:
            raise ValueError(f"{self.name}: expected an id in each row of {name!r}, found none in {ids.index('') + 1}")
        return ids

    def marked(self, name: str) -> npt.NDArray[np.bool_]:
        """Which rows are marked, by true, yes or 1, ``(n,)``."""
        cells = [as_text(cell) for cell in self.column(name, "trusted")]
        for row, cell in enumerate(cells):
            if cell.lower() not in MARKS:
                raise ValueError(f"{self.name}: expected true or false in {name!r}, found {cell!r} in row {row + 1}")
        return np.array([MARKS[cell.lower()] for cell in cells])

    def numeric(self, patterns: Sequence[str] | None, others: set[str]) -> list[str]:
        """The columns whose names match a pattern; by default all with numbers in them, but for the `others`."""
        if patterns is None:
            return [
                name
                for name, cells in self.columns.items()
                if name not in others and np.isfinite(as_numbers(list(cells))).any()
            ]
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self.columns):
                raise ValueError(
                    f"{self.name}: expected a column of the name {pattern!r}, found {self.listed()}: correct features"
                )
        found = [name for name in self.columns if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if others & {*found}:
            raise ValueError(
                f"{self.name}: expected features other than label, id and trusted, found {sorted(others & {*found})}"
            )
        return found

    def numbers(self, names: Sequence[str]) -> Numbers:
        """Columns beside each other, ``(n, d)``: numbers, or lists of equally many; a ValueError if one is missing."""
        blocks = []
        for name in names:
            cells = self.column(name, "features")
            block = as_numbers(cells)
            bad = ~np.isfinite(block).reshape(len(cells), -1).all(axis=1)
            if bad.any():
                row = int(bad.argmax())
                raise ValueError(
                    f"{self.name}: expected a finite number in each row of {name!r}, found "
                    f"{shorten(repr(cells[row]), 40)} in row {row + 1} ({bad.sum()} such rows): fill or remove them, "
                    "or name the columns to use by features"
                )
            blocks.append(block.reshape(len(cells), -1))
        return np.concatenate(blocks, axis=1)


def as_text(cell: Any) -> str:
    """A label or mark as text: none is empty; 3.0, as programs write whole numbers beside empty cells, is 3.

    Examples:
        >>> [as_text(cell) for cell in (None, float("nan"), " cat", 3.0, "-1.0", True)]
        ['', '', 'cat', '3', '-1', 'True']
    """
    missing = cell is None or cell != cell  # as NaN
    return "" if missing else re.sub(r"^(-?\d+)\.0+$", r"\1", str(cell).strip())


def class_number(cell: Any, names: Sequence[str] | None, num_classes: int) -> int | None:
    """The number of a class that a cell names, or numbers from 0; names that are numbers are names. None: no class.

    Examples:
        >>> [class_number(cell, ["cat", "dog"], 2) for cell in ("dog", 1.0, "0", "2", "")]
        [1, 1, 0, None, None]
        >>> [class_number(cell, ["1.0", "2.0"], 2) for cell in ("1.0", "2.0", "0")]
        [0, 1, None]
    """
    known = list(names or ())
    for text in (" ".join(str(cell).split()), as_text(cell)):
        if text in known:
            return known.index(text)
    numbered = all(re.fullmatch(r"-?\d+(\.\d+)?", name) for name in known or ["a"])
    number = int(text) if re.fullmatch(r"\d+", text) and not numbered else num_classes
    return number if number < num_classes else None


def as_numbers(cells: Sequence[Any]) -> Numbers:
    """Cells as numbers, or lists of equally many of them; NaN for what is none."""
    try:
        return np.asarray(cells, dtype=np.float64)
    except (TypeError, ValueError):
        return np.array([_number(cell) for cell in cells])


def _number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
