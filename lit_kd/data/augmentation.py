"""Whether a foreign data set augments its items, and how validation items can be augmented alike."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils._pytree import tree_leaves
from torch.utils.data import Subset


def with_transform_of(train: Any, val: Any) -> Any:
    """Return `val` with the `transform` of `train`, also through `Subset`; None if they do not both have one.

    Args:
        train: A map-style data set.
        val: Another; it is copied, not changed.
    """
    inner = train
    while isinstance(inner, Subset):
        inner = inner.dataset
    if isinstance(val, Subset):
        whole = with_transform_of(inner, val.dataset)
        return None if whole is None else Subset(whole, val.indices)
    if getattr(inner, "transform", None) is None or not hasattr(val, "transform") or type(inner) is not type(val):
        return None
    augmented = copy.copy(val)
    augmented.transform = inner.transform
    # torchvision's data sets apply this one, made of the former
    if hasattr(inner, "transforms"):
        augmented.transforms = inner.transforms
    return augmented


def is_random(dataset: Any) -> bool:
    """Whether items differ when they are read again; the global random numbers are left as they were."""
    with isolate_rng():
        for item in range(min(2, len(dataset))):
            once, again = (tree_leaves(dataset[item][0]) for _ in range(2))
            if not all(_equal(a, b) for a, b in zip(once, again, strict=True)):
                return True
    return False


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(np.array_equal(a, b))
