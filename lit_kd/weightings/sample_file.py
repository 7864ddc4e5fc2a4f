"""Weights of samples that an earlier training or another program wrote, to start a training with."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
    """Weights of all training samples before the first update, ``(N, K + 1)``, label first.

    The source is the teachers' share w, which gives ``(1 - w, w / K, ...)``; or a checkpoint with a sample table; or a
    table with the columns ``index`` and either ``noise``, the probability that the label is wrong, used as w, or
    `weight_columns`, as ``lit-kd samples`` writes it. A ValueError unless it gives every sample weights of at least 0.
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
    index, known = _numbers(path, "index", columns["index"]), np.arange(data.train_size)
    if not np.array_equal(np.sort(index), known):
        missing, unknown = np.setdiff1d(known, index), np.setdiff1d(index, known)
        raise ValueError(
            f"{path}: expected each index of the training set, 0 to {data.train_size - 1}, once; found {len(index)} "
            f"rows, {len(missing)} indices missing {missing[:3].tolist()}, {len(unknown)} unknown "
            f"{unknown[:3].tolist()}"
        )
    order = index.argsort()
    if names == ["noise"]:
        return _divided(_numbers(path, "noise", columns["noise"], most=1)[order], teachers)
    return torch.from_numpy(np.stack([_numbers(path, name, columns[name])[order] for name in names], axis=1)).float()


def read_table(path: Path) -> SampleTable:
    """The sample table of a checkpoint; a ValueError if it has none with weights."""
    state = read_checkpoint(path).get("sample_table")
    if state is None or "weights" not in state["columns"]:
        raise ValueError(
            f"{path}: expected a checkpoint with weights of samples, found none: give one of a method that learns "
            "them, such as ALMKD or LossDivider"
        )
    return SampleTable.from_state_dict(state)


def weight_columns(teachers: int) -> list[str]:
    """The names of a table's columns of weights, label first.

    Examples:
        >>> weight_columns(1), weight_columns(2)
        (['label_weight', 'teacher_weight'], ['label_weight', 'teacher_weight_0', 'teacher_weight_1'])
    """
    several = [f"teacher_weight_{k}" for k in range(teachers)]
    return ["label_weight", *(["teacher_weight"] if teachers == 1 else several)]


def _divided(share: npt.NDArray[np.float64], teachers: int) -> Tensor:
    """``(N, K + 1)``: the teachers divide their share equally."""
    return torch.from_numpy(np.stack([1 - share, *[share / teachers] * teachers], axis=1)).float()


def _columns_to_read(path: Path, columns: Mapping[str, Sequence[Any]], teachers: int) -> list[str]:
    weights = weight_columns(teachers)
    names = ["noise"] if "noise" in columns else weights
    found = {name for name in columns if name == "label_weight" or name.startswith("teacher_weight")}
    if "index" in columns and found == set(names) - {"noise"}:
        return names
    raise ValueError(
        f"{path}: expected the columns index and either noise or {', '.join(weights)} (for "
        f"{teachers} teacher{'s' if teachers > 1 else ''}), found {', '.join(columns) or 'none'}"
    )


def _numbers(path: Path, name: str, values: Sequence[Any], most: float = math.inf) -> npt.NDArray[np.float64]:
    """A column of finite numbers from 0 to `most`."""
    numbers = np.full(len(values), math.nan)
    for row, value in enumerate(values):
        with suppress(TypeError, ValueError):
            numbers[row] = float(value)
        if not (math.isfinite(numbers[row]) and 0 <= numbers[row] <= most):
            expected = "a finite number of at least 0" if most == math.inf else f"a number in [0, {most}]"
            raise ValueError(f"{path}: expected {expected} as {name}, found {value!r} in row {row + 1}")
    return numbers
