"""Rows that a distributed sampler repeats, so that all processes have equally many."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

from torch.utils.data import DataLoader, DistributedSampler


def own_rows(loaders: Any, which: int, seen: int, rows: int) -> int:
    """How many of a batch's first rows are no repetition.

    Args:
        loaders: A loader, or a list of them, as the trainer has them.
        which: Which of them the batch is from.
        seen: Rows of its batches before.
        rows: Of the batch.
    """
    loader = loaders[which] if isinstance(loaders, (list, tuple)) else loaders
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return rows
    own = len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))
    return max(0, min(rows, own - seen))
