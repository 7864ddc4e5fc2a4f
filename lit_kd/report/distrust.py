"""Which training labels a method has learned to distrust, and what these samples look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lit_kd.data import UNLABELED, DataModule, ItemRows
from lit_kd.data.rows import Indexed, JoinedRows
from lit_kd.data.table import SampleTable
from lit_kd.types import Inputs

LARGEST = 96
"""Pixels of a picture's longer side; larger ones are made smaller."""


@dataclass(frozen=True)
class Suspect:
    """A training sample, and what is believed about it.

    Attributes:
        index: In the training set.
        label: The given label.
        believed: The student's most probable class.
        probability: Of that class.
        weight: The learned weight of the label.
        distrust: From 0, the label is believed, to 1.
        true: The true class, where it is known; else `lit_kd.data.UNLABELED`.
    """

    index: int
    label: int
    believed: int
    probability: float
    weight: float
    distrust: float
    true: int


def distrust(table: SampleTable, size: int) -> Tensor:
    """How little each label of the first ``size`` rows is believed, in [0, 1], ``(size,)``.

    It is 1 - ``clean_probability`` where the method estimates that, else the label's weight tells: 0 for the largest
    one, 1 for none.
    """
    if "clean_probability" in table:
        return (1 - table["clean_probability"][:size]).clamp(0, 1)
    weights = table["weights"][:size, 0]
    return 1 - weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)


def most_distrusted(table: SampleTable, data: DataModule, count: int | None = None) -> Tensor:
    """Indices of training samples that have a label, the most distrusted one first; of equal ones the lighter label.

    Args:
        table: The learned table.
        data: Its data, set up.
        count: How many; ``None``: all.
    """
    size = data.train_size
    value, weight = distrust(table, size).cpu().numpy(), table["weights"][:size, 0].cpu().numpy()
    order = torch.from_numpy(np.lexsort((weight, -value)))
    return order[data.labels[order] != UNLABELED][:count]


def rows_of(data: DataModule, index: Tensor) -> Indexed:
    """Training samples, not augmented."""
    return Indexed(data.parts.plain, data.parts.positions["train"][index.numpy()], data.labels[index], index)


def suspects(table: SampleTable, data: DataModule, index: Tensor, logits: Tensor) -> list[Suspect]:
    """What is believed about samples.

    Args:
        table: The learned table.
        data: Its data, set up.
        index: The samples, ``(n,)``.
        logits: What the student says of them, ``(n, C)``.
    """
    probability, believed = logits.float().softmax(-1).max(-1)
    true = data.clean_labels[index] if knows_truth(data) else torch.full_like(index, UNLABELED)
    weight, doubt = table["weights"][:, 0].cpu()[index], distrust(table, data.train_size).cpu()[index]
    columns = (index, data.labels[index], believed, probability, weight, doubt, true)
    return [Suspect(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def any_distrusted(found: Sequence[Suspect]) -> bool:
    """Whether one of the samples is believed less than another could be; early in a training none is."""
    return any(one.distrust > 1e-6 for one in found)


def knows_truth(data: DataModule) -> bool:
    """Whether the data module made the label noise or took labels away, so that the true labels are known."""
    return data.noise_matrix() is not None or bool((data.labels != data.clean_labels).any())


def noise_auc(
    weights: npt.NDArray[np.float32], label: npt.NDArray[np.int64], noisy: npt.NDArray[np.bool_]
) -> float | None:
    """How well a low weight of the label tells wrong labels from right ones; missing labels do not count.

    Args:
        weights: Of the label, ``(N,)``.
        label: Given labels, ``(N,)``.
        noisy: Which of them are wrong, ``(N,)``.

    Returns:
        The area under the ROC curve; ``None`` where not both kinds are there.
    """
    known = label != UNLABELED
    if not noisy.any() or noisy[known].all():
        return None
    return round(float(roc_auc_score(noisy[known], -weights[known])), 6)


def as_pictures(x: Inputs) -> npt.NDArray[np.uint8] | None:
    """Inputs as pictures ``(n, H, W, 3)``, each stretched over all brightnesses; ``None`` if they are none.

    Pictures are tensors ``(n, 1, H, W)`` or ``(n, 3, H, W)``, on whatever scale they are normalised to.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 2:
        return None
    scale = LARGEST / max(x.shape[2:])
    x = x.float().cpu()
    if scale < 1:
        size = [max(1, round(side * scale)) for side in x.shape[2:]]
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    x = (x - low) / (high - low).clamp(min=1e-12)
    shown: npt.NDArray[np.uint8] = (255 * x).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return shown


def file_names(data: DataModule) -> list[str] | None:
    """The file of each training sample, where the data are files."""
    rows = data.parts.plain
    rows = rows.first if isinstance(rows, JoinedRows) else rows  # validation rows follow
    files: Sequence[tuple[str | Path, int]] | None = getattr(getattr(rows, "dataset", None), "samples", None)
    if not isinstance(rows, ItemRows) or files is None:
        return None
    return [str(files[position][0]) for position in data.parts.positions["train"]]


def class_name(names: Sequence[str] | None, label: int) -> str:
    """A class as people call it."""
    return names[label] if names else str(label)
