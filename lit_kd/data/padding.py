"""Rows that a distributed sampler repeats to give all processes equally many."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

from torch.utils.data import DataLoader, DistributedSampler


def own_rows(loaders: Any, which: int, seen: int, rows: int) -> int:
    """How many of a batch's first `rows` rows are not repeated.

    The batch comes from loader `which` of the trainer's loader or loaders; `seen` rows came before it.
    """
    loader = loaders[which] if isinstance(loaders, (list, tuple)) else loaders
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return rows
    own = len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))
    return max(0, min(rows, own - seen))
