"""What the items of other people's data sets say of their labels."""

from collections.abc import Iterable
from functools import partial
from textwrap import shorten
from typing import Any, get_args

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lit_kd.data.labels import Labels, TaskName
from lit_kd.data.rows import ItemRows, padded
from lit_kd.types import IGNORED, UNLABELED, Batch, as_batch, check_choice

PROBED = 256
"""So many items must have the labels that their data set gives for all."""


def as_theirs_say(batch: Any, task: str, ignore_index: int | None = None, **read: Any) -> Batch:
    """`as_batch` for a task, with `IGNORED` for their own number of what counts for nothing."""
    found = as_batch(batch, **(read | {"keep_shape": task != "classification"}))
    if isinstance(batch, Batch) or ignore_index is None:
        return found
    return found.with_labels(found.y.masked_fill(found.y == ignore_index, IGNORED))


def task_of(inner: Any, task: str | None) -> str:
    """The task of a data module, unless the user says which; what is none of ours, others call so by chance."""
    known = get_args(TaskName)
    if task is not None:
        check_choice("task", task, known)
        return task
    found = getattr(inner, "task", None)
    return found if isinstance(found, str) and found in known else "classification"


def classes_of(labels: Iterable[Tensor | Labels | None], task: str) -> int:
    """How many classes, or numbers, labels tell of."""
    given = [torch.as_tensor(y) for y in labels if y is not None]
    if task == "dense":
        raise ValueError("expected num_classes of pixels, found none: give it, as masks are read while training only")
    if task in ("multilabel", "regression") or given[0].is_floating_point():
        return given[0].shape[1]
    return 1 + max(int(y.max()) if y.numel() else -1 for y in given)


def read_labels(rows: ItemRows, name: str, task: str = "classification") -> Tensor:
    """The label that each item has by itself: class numbers ``(n,)``, or probabilities ``(n, C)`` to train with.

    They are as the data set gives them, if many items agree with that; or all items are read. Of other tasks see
    `lit_kd.terms.tasks`; tokens have `IGNORED` up to the longest row. Masks are not read, as they take much memory, and
    random crops change them: zeros ``(n, 1, 1)`` stand for them.
    """
    n, known = len(rows), _known(rows.dataset) if task == "classification" else None
    if task == "dense":
        with isolate_rng():
            for i in range(min(n, 1)):
                _element_label(rows, i, name, task)
        return torch.zeros(n, 1, 1, dtype=torch.int64)
    _label = _class_label if task == "classification" else partial(_element_label, task=task)
    with isolate_rng():  # items may be augmented
        some = np.unique(np.linspace(0, n - 1, num=min(n, PROBED)).astype(int)).tolist()
        seen = {i: _label(rows, i, name) for i in some}
        if known is not None and len(known) == n and all(torch.equal(known[[i]], y) for i, y in seen.items()):
            return known
        walk = track(range(n), description=f"Reading labels of the {name} data", disable=n <= 2000)
        labels = [seen[i] if i in seen else _label(rows, i, name) for i in walk]
    return padded(labels) if labels else torch.empty(0, dtype=torch.int64)


def _known(dataset: Any) -> Tensor | None:
    """Labels that the data set gives without reading items, in torchvision's attributes or a tensor; or None."""
    if isinstance(dataset, Subset):
        whole = _known(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels for labels in map(_known, dataset.datasets) if labels is not None]
        return torch.cat(parts) if len(parts) == len(dataset.datasets) else None
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[1] if len(dataset.tensors) == 2 else None
    else:
        found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if found is None:
        return None
    try:
        labels: Labels = np.asarray(found.cpu() if isinstance(found, Tensor) else found)
    except ValueError:  # a ragged list, e.g. of boxes
        return None
    return torch.from_numpy(labels.astype(np.int64)) if labels.ndim == 1 and labels.dtype.kind in "iu" else None


def _class_label(rows: ItemRows, i: int, name: str) -> Tensor:
    """The label of a batch of one item, ``(1,)`` or ``(1, C)``."""
    y = rows.read([i]).y
    soft = name == "train" and y.dim() == 2 and bool((y >= 0).all()) and float(y.sum()) <= 1 + 1e-3
    if len(y) != 1 or (not soft if y.is_floating_point() else y.dim() != 1):
        raise TypeError(
            f"expected class numbers as labels of the {name} data set, or probabilities to train with, found "
            f"{shorten(str(y.tolist()), 60)} in row {i}. Let its items be (x, y), y an integer."
        )
    return y


SHAPES = {
    "multilabel": "(C,), a 0 or 1 for each class",
    "dense": "(H, W), a class for each pixel",
    "tokens": "(T,), a class for each token",
    "regression": "(D,), floating-point numbers",
}


def _element_label(rows: ItemRows, i: int, name: str, task: str) -> Tensor:
    """The label of a batch of one item, of another task than classification, ``(1, ...)``."""
    y = rows.read([i]).y
    whole = y.is_floating_point() and task == "multilabel" and bool((y == y.round()).all())
    if len(y) != 1 or y.dim() != 2 + (task == "dense") or y.is_floating_point() != (whole or task == "regression"):
        found = f"{tuple(y.shape[1:])} and {y.dtype}"
        raise TypeError(
            f"expected labels of the task {task} in items of the {name} data set, {SHAPES[task]}, found {found} in row "
            f"{i}: correct the items, or the task"
        )
    return y if task == "regression" else y.long()


def class_numbers(labels: Tensor) -> Labels:
    """The most probable class where labels are probabilities; a row of zeros has none."""
    if labels.is_floating_point():
        labels = labels.argmax(1).where(labels.sum(1) > 0, UNLABELED)
    return labels.numpy()
