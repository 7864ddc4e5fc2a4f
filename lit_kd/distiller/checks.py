"""What is refused before it does damage, and what a checkpoint can hold."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_kd.data import DataModule
from lit_kd.types import UNLABELED, Batch, Outputs

if TYPE_CHECKING:
    from lit_kd.distiller.base import Distiller


def check_batch(batch: Batch, outputs: Mapping[str, Outputs], num_classes: int, lowest: int) -> None:
    """Refuse labels and class counts that do not fit; reads values, which stalls an accelerator.

    Args:
        batch: A batch of B samples.
        outputs: What each model gives for it, by the model's name.
        num_classes: C.
        lowest: The lowest label that is allowed.

    Raises:
        ValueError: If labels are not integers ``(B,)`` in ``[lowest, C)``, or logits not ``(B, C)``, or B is 0.
    """
    if batch.y.dim() != 1 or batch.y.dtype != torch.int64:
        raise ValueError(
            f"expected labels of shape (batch,) and an integer type, found {tuple(batch.y.shape)} and {batch.y.dtype}: "
            "give class numbers"
        )
    for name, given in outputs.items():
        if given.logits.shape != (len(batch.y), num_classes):
            raise ValueError(
                f"expected {name}'s logits of shape {(len(batch.y), num_classes)} (batch, num_classes), found "
                f"{tuple(given.logits.shape)}: student, teacher and num_classes must agree on the classes"
            )
    if not len(batch.y):
        raise ValueError("expected batches of at least one row, found an empty one: let the loader leave it out")
    low, high = (int(label) for label in batch.y.aminmax())
    if high >= num_classes or low < lowest:
        raise ValueError(
            f"expected labels in [0, {num_classes}), found {low} to {high}: correct the labels or num_classes"
        )


def check_finite(totals: Mapping[str, Tensor]) -> None:
    """Refuse what is not finite; reads values, which stalls an accelerator.

    Args:
        totals: By name, the sum of some values: one value that is not finite makes it so.

    Raises:
        ValueError: If a sum is not finite.

    Examples:
        >>> check_finite({"train/loss": torch.tensor(0.7)})
    """
    for name, total in totals.items():
        if not math.isfinite(total):
            cure = "check its weights" if name.startswith("teacher") else "lower the learning rate"
            raise ValueError(
                f"expected finite numbers in {name}, found nan or infinity: check that the inputs are finite, or {cure}"
            )


def check_meta(module: Distiller) -> None:
    """Refuse data without meta rows, for a method that learns from them how far to trust teachers on unlabeled rows.

    Raises:
        ValueError: If there is no data module of ours, or it has no meta rows.
    """
    data, method = module.data, type(module).__name__
    data.require_meta(method)
    if (data.labels != UNLABELED).all():
        rank_zero_warn(
            f"all training rows have a label: {method} hears its teacher only on those without. Set the data's "
            "argument labeled, e.g. labeled=100"
        )


def is_plain(value: Any) -> bool:
    """Whether a checkpoint that is loaded with ``weights_only`` can hold a value: no module, no function.

    Examples:
        >>> is_plain({"lr": 0.1, "widths": [1, 2]}), is_plain(print)
        (True, False)
    """
    if isinstance(value, Mapping):
        return all(is_plain(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, (str, int, float, bool))


def keep_plain(values: MutableMapping[str, Any]) -> None:
    """Remove what `is_plain` refuses; paths and numpy's numbers become strings and numbers."""
    for name, value in list(values.items()):
        if isinstance(value, os.PathLike):
            values[name] = os.fspath(value)
        elif isinstance(value, np.generic):
            values[name] = value.item()
        elif not is_plain(value):
            del values[name]


def data_of(module: LightningModule, meta: bool) -> DataModule:
    """The data module of lit_kd that a method is trained on.

    Args:
        module: The method.
        meta: Whether it also needs a meta split.

    Raises:
        ValueError: If there is none, or another one.
    """
    data = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, DataModule):
        needs = "sample indices" + (" and a meta split of the validation data" if meta else "")
        raise ValueError(
            f"{type(module).__name__} needs {needs}: "
            "pass a data module of lit_kd.data, or wrap your own in lit_kd.data.DistillationDataModule(inner); "
            f"found {'none' if data is None else type(data).__name__}"
        )
    return data


def stalls(device: torch.device) -> bool:
    """Whether to read a value is to wait for all work that the device was given."""
    return device.type != "cpu"
