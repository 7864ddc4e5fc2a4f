"""Labels of a foreign data set, without loading its inputs where that can be avoided."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lit_kd.data.splits import Labels


def read_labels(dataset: Any, name: str) -> Labels:
    """Read the class number of every ``(x, y)`` item of a map-style data set, ``(n,)``; messages call it `name`.

    They come from ``dataset.targets``, ``dataset.labels`` or the second tensor of a `TensorDataset`, also through
    `Subset` and `ConcatDataset`, if a few items confirm them. Otherwise every item is read once.
    """
    n = len(dataset)
    known = _known(dataset)
    with isolate_rng():  # items may be augmented
        some = np.unique(np.linspace(0, n - 1, num=min(n, 8)).astype(int))
        seen = [_label(dataset, int(i), name) for i in some]
        if known is not None and len(known) == n and known[some].tolist() == seen:
            return known
        walk = track(range(n), description=f"Reading labels of the {name} data", disable=n <= 2000)
        return np.array([_label(dataset, i, name) for i in walk], dtype=np.int64)


def _known(dataset: Any) -> Labels | None:
    """Labels that the data set gives without reading items, or None."""
    if isinstance(dataset, Subset):
        whole = _known(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels for labels in map(_known, dataset.datasets) if labels is not None]
        return np.concatenate(parts) if len(parts) == len(dataset.datasets) else None
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[1] if len(dataset.tensors) == 2 else None
    else:
        found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if found is None:
        return None
    try:
        labels = np.asarray(found.cpu() if isinstance(found, torch.Tensor) else found)
    except ValueError:  # a ragged list, e.g. of boxes
        return None
    return labels.astype(np.int64) if labels.ndim == 1 and labels.dtype.kind in "iu" else None


def _label(dataset: Any, i: int, name: str) -> int:
    item = dataset[i]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        found = type(item).__name__ + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
        raise TypeError(
            f"expected items (x, y) of the {name} data set, found a {found}. "
            "Let its __getitem__ return such a pair; x may be a mapping."
        )
    try:
        return operator.index(item[1])
    except (TypeError, ValueError):
        raise TypeError(
            f"expected class numbers as labels of the {name} data set, found {item[1]!r} in item {i}. "
            "Let its items be (x, y), y an integer."
        ) from None
