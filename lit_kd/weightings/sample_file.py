"""The weights of samples as files: written after one training, read to start another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_kd.data import DataModule
from lit_kd.data.table import SampleTable
from lit_kd.models.checkpoint import read_checkpoint
from lit_kd.models.files import TABLES, read_columns, write_columns
from lit_kd.report.distrust import knows_truth


def write_samples(path: str | Path, table: SampleTable, data: DataModule, overwrite: bool = False) -> None:
    """Write what was learned about each training sample, a row each, in the order of their indices.

    Columns: index, label (-1 where there is none), label_weight, teacher_weight (teacher_weight_0, ... for several
    teachers), clean_probability if the rule estimates it, clean_label and is_noisy if the data module made the label
    noise or took labels away, so that they are known. The trusted meta rows, whose indices follow, are left out. Floats
    are read back exactly.

    Args:
        path: A .csv file, or a .parquet file (needs the extra ``parquet``).
        table: ``model.table`` of a trained `lit_kd.ALMKD`, or another method with one.
        data: The data module that it was trained with, set up.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: If the file is there, and may not be overwritten.
        ValueError: If the table belongs to other data, or the path is of another kind.
    """
    write_columns(
        Path(path), {name: column.tolist() for name, column in sample_columns(table, data).items()}, overwrite
    )


def sample_columns(table: SampleTable, data: DataModule) -> dict[str, Tensor]:
    """The columns of `write_samples`, ``(N,)`` each.

    Raises:
        ValueError: If the table belongs to other data.
    """
    table.check(len(data.labels), data.fingerprint)
    rows = slice(data.train_size)
    weights = table["weights"][rows]
    found = {"index": torch.arange(data.train_size), "label": data.labels[rows]}
    found |= dict(zip(_weight_names(weights.shape[1] - 1), weights.T, strict=True))
    if "clean_probability" in table:
        found["clean_probability"] = table["clean_probability"][rows]
    if knows_truth(data):
        found |= {"clean_label": data.clean_labels[rows], "is_noisy": data.noisy[rows]}
    return found


def starting_weights(source: float | str, teachers: int, data: DataModule) -> Tensor:
    """Weights of all training samples before the first update.

    Args:
        source: The teachers' share w, which gives ``(1 - w, w / K, ...)``; or a file: a checkpoint with a sample table,
            or a table with the columns ``index`` and either ``noise``, the probability that the label is wrong, used as
            w, or ``label_weight`` and ``teacher_weight`` (``teacher_weight_0``, ... for several teachers), as
            `write_samples` writes it. Its other columns are ignored.
        teachers: K.
        data: The data, set up.

    Returns:
        ``(N, K + 1)``, label first.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, or does not tell, for every training sample exactly once, weights of at least 0.
    """
    if not isinstance(source, str) and 0 <= source <= 1:
        return _shared(np.full(data.train_size, float(source)), teachers)
    if not isinstance(source, str) or Path(source).suffix not in (*TABLES, ".ckpt"):
        raise ValueError(
            "expected as start_weights the teachers' share in [0, 1], or the path of a .csv, .parquet or .ckpt file; "
            f"found {source!r}"
        )
    path = Path(source)
    if path.suffix == ".ckpt":
        table = read_table(path)
        table.check(len(data.labels), data.fingerprint)
        found = table["weights"].shape[1] - 1
        if found != teachers:
            raise ValueError(f"{path}: expected the weights of {teachers} teachers, found those of {found}")
        return table["weights"][: data.train_size]
    columns = read_columns(path)
    names = _columns_for(path, columns, teachers)
    index = _numbers(path, "index", columns["index"])
    _check_index(path, index, data.train_size)
    values = np.stack([_numbers(path, name, columns[name]) for name in names], axis=1)
    highest = 1 if names == ["noise"] else math.inf
    wrong = np.argwhere((values < 0) | (values > highest))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(
            f"{path}: expected {names[column]} {'in [0, 1]' if names == ['noise'] else 'of at least 0'}, found "
            f"{values[row, column]} in row {row + 1}, index {int(index[row])}"
        )
    ordered = values[index.argsort()]
    return _shared(ordered[:, 0], teachers) if names == ["noise"] else torch.from_numpy(ordered).float()


def read_table(path: Path) -> SampleTable:
    """The sample table of a checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or one without a sample table.
    """
    checkpoint = read_checkpoint(path)
    if "sample_table" not in checkpoint:
        raise ValueError(f"{path}: expected a checkpoint with a sample table, found none in it: give one of ALMKD's")
    table = SampleTable.from_state_dict(checkpoint["sample_table"])
    if "weights" not in table:
        raise ValueError(
            f"{path}: expected a sample table with weights, found {sorted(table.columns)}: give a checkpoint of "
            "ALMKD's or PosteriorDistillation's"
        )
    return table


def _weight_names(teachers: int) -> list[str]:
    return ["label_weight", *(["teacher_weight"] if teachers == 1 else _numbered(teachers))]


def _numbered(teachers: int) -> list[str]:
    return [f"teacher_weight_{k}" for k in range(teachers)]


def _shared(share: npt.NDArray[np.float64], teachers: int) -> Tensor:
    """``(N, K + 1)``: the teachers divide their share equally."""
    column = torch.from_numpy(share).unsqueeze(1)
    return torch.cat([1 - column, (column / teachers).expand(-1, teachers)], dim=1).float()


def _columns_for(path: Path, columns: dict[str, list[Any]], teachers: int) -> list[str]:
    """Which columns hold the weights."""
    found = {name for name in columns if name == "label_weight" or name.startswith("teacher_weight")}
    if "index" in columns and ("noise" in columns) != bool(found):
        names = ["noise"] if "noise" in columns else _weight_names(teachers)
        if found <= set(names) <= set(columns):
            return names
    raise ValueError(
        f"{path}: expected the columns index and either noise or {', '.join(_weight_names(teachers))} (for "
        f"{teachers} teacher{'s' if teachers > 1 else ''}), found {', '.join(columns) or 'none'}"
    )


def _numbers(path: Path, name: str, values: Sequence[Any]) -> npt.NDArray[np.float64]:
    """A column as finite numbers."""
    numbers = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            numbers[row] = float(value)
        except (TypeError, ValueError):
            numbers[row] = math.nan
        if not math.isfinite(numbers[row]):
            raise ValueError(f"{path}: expected a finite number as {name}, found {value!r} in row {row + 1}")
    return numbers


def _check_index(path: Path, index: npt.NDArray[np.float64], size: int) -> None:
    """Each of the training set's indices once."""
    told = f"{path}: expected each index of the training set, 0 to {size - 1}, once; found"
    unknown = np.flatnonzero((index != np.floor(index)) | (index < 0) | (index >= size))
    if len(unknown):
        raise ValueError(f"{told} {index[unknown[0]]:.17g} in row {unknown[0] + 1}")
    again = np.setdiff1d(np.arange(len(index)), np.unique(index, return_index=True)[1])
    if len(again):
        raise ValueError(f"{told} {int(index[again[0]])} again in row {again[0] + 1}")
    missing = np.setdiff1d(np.arange(size), index)
    if len(missing):
        raise ValueError(f"{told} no row for {missing[0]} ({len(missing)} such)")
