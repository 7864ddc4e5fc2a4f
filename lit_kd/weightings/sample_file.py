"""Weights of samples that an earlier training or another program wrote, to start a training with."""

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
from lit_kd.models.files import TABLES, read_columns


def starting_weights(source: float | str, teachers: int, data: DataModule) -> Tensor:
    """Weights of all training samples before the first update.

    Args:
        source: The teachers' share w, which gives ``(1 - w, w / K, ...)``; or a checkpoint with a sample table; or a
            table with the columns ``index`` and either ``noise``, the probability that the label is wrong, used as w,
            or `weight_columns`, as ``lit-kd samples`` writes it. Other columns are ignored.
        teachers: K.
        data: The data, set up.

    Returns:
        ``(N, K + 1)``, label first.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, or does not give weights of at least 0 for every training sample exactly once.
    """
    if isinstance(source, (int, float)) and 0 <= source <= 1:
        return _divided(np.full(data.train_size, float(source)), teachers)
    if isinstance(source, (int, float)) or Path(source).suffix not in (*TABLES, ".ckpt"):
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
    names = _columns_to_read(path, columns, teachers)
    index = _numbers(path, "index", columns["index"])
    known = np.arange(data.train_size)
    if not np.array_equal(np.sort(index), known):
        missing, unknown = np.setdiff1d(known, index), np.setdiff1d(index, known)
        raise ValueError(
            f"{path}: expected each index of the training set, 0 to {data.train_size - 1}, once; found {len(index)} "
            f"rows, {len(missing)} indices missing {missing[:3].tolist()}, {len(unknown)} unknown "
            f"{unknown[:3].tolist()}"
        )
    values = np.stack([_numbers(path, name, columns[name]) for name in names], axis=1)
    limit, expected = (1, "in [0, 1]") if names == ["noise"] else (math.inf, "of at least 0")
    for row, column in np.argwhere((values < 0) | (values > limit)):
        where = f"in row {row + 1}, index {int(index[row])}"
        raise ValueError(f"{path}: expected {names[column]} {expected}, found {values[row, column]} {where}")
    ordered = values[index.argsort()]
    return _divided(ordered[:, 0], teachers) if names == ["noise"] else torch.from_numpy(ordered).float()


def read_table(path: Path) -> SampleTable:
    """The sample table of a checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, or one without a table of weights.
    """
    state = read_checkpoint(path).get("sample_table")
    table = None if state is None else SampleTable.from_state_dict(state)
    if table is None or "weights" not in table:
        found = "none" if table is None else f"one with {sorted(table.columns)}"
        raise ValueError(
            f"{path}: expected a checkpoint with a sample table with weights, found {found}: give one of a method that "
            "learns weights, such as ALMKD or PosteriorDistillation"
        )
    return table


def weight_columns(teachers: int) -> list[str]:
    """The names of a table's columns of weights, label first.

    Examples:
        >>> weight_columns(1), weight_columns(2)
        (['label_weight', 'teacher_weight'], ['label_weight', 'teacher_weight_0', 'teacher_weight_1'])
    """
    return [
        "label_weight",
        *(["teacher_weight"] if teachers == 1 else [f"teacher_weight_{k}" for k in range(teachers)]),
    ]


def _divided(share: npt.NDArray[np.float64], teachers: int) -> Tensor:
    """``(N, K + 1)``: the teachers divide their share equally."""
    column = torch.from_numpy(share).unsqueeze(1)
    return torch.cat([1 - column, (column / teachers).expand(-1, teachers)], dim=1).float()


def _columns_to_read(path: Path, columns: dict[str, list[Any]], teachers: int) -> list[str]:
    found = {name for name in columns if name == "label_weight" or name.startswith("teacher_weight")}
    if "index" in columns and ("noise" in columns) != bool(found):
        names = ["noise"] if "noise" in columns else weight_columns(teachers)
        if found <= set(names) <= set(columns):
            return names
    raise ValueError(
        f"{path}: expected the columns index and either noise or {', '.join(weight_columns(teachers))} (for "
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
