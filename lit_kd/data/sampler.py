"""The order in which the training rows come."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lit_kd.data.rows import Indexed, as_is
from lit_kd.types import Batch


class EpochSampler(DistributedSampler[int]):
    """Shuffles anew each epoch, in an order that depends on the seed and the epoch alone.

    The number of processes does not change the order: rank ``r`` of ``R`` takes every ``R``-th row from the
    ``r``-th, so that the ``k``-th batches of all ranks together are the ``k``-th batch of one process with
    their summed batch size. A resumed run sees what an uninterrupted one would have. It is a
    `DistributedSampler`, hence Lightning keeps it instead of putting one of its own in its place, and calls
    `set_epoch` (in a loop of your own, call it).

    Args:
        size: Number of rows to draw from.
        length: Number of draws an epoch; default `size`. Permutations of all rows follow one another until
            they suffice, so a stream of few rows can be exactly as long as one of many.
        num_replicas: Number of processes ``R``. Every one draws equally often: the draws are padded, from
            their start, to a multiple of it.
        rank: This process, in ``[0, R)``.
        seed: Seed, at least 0.
        rows: Asked when an epoch's first row is drawn: which rows the epoch draws from, int64; each counts once, in
            whatever order, and those of `size` or more, which are not in this stream, do not. None: all rows.

    Raises:
        ValueError: If there is no row to draw from.

    Examples:
        >>> sampler = EpochSampler(3, length=5, seed=0)
        >>> draws = list(sampler)
        >>> len(draws), sorted(draws[:3])
        (5, [0, 1, 2])
    """

    def __init__(
        self,
        size: int,
        length: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        rows: Callable[[], npt.NDArray[np.int64] | None] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"expected at least one row to draw from, found {size}. Give a non-empty data set.")
        self.size = size
        self.length = size if length is None else length
        self.rows = rows
        super().__init__(range(self.length), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]

    def order(self) -> npt.NDArray[np.int64]:
        """Return the rows that all ranks together draw this epoch, in order, padding included."""
        rows = self.chosen()
        rng = np.random.default_rng([self.seed, self.epoch])
        rounds = -(-self.length // len(rows))
        draws = np.concatenate([rows[rng.permutation(len(rows))] for _ in range(rounds)])[: self.length]
        return np.resize(draws, self.total_size)

    def chosen(self) -> npt.NDArray[np.int64]:
        """Return the rows that this epoch draws from, ascending."""
        asked = None if self.rows is None else self.rows()
        if asked is None:
            return np.arange(self.size)
        if asked.ndim != 1 or asked.dtype.kind not in "iu" or (asked < 0).any():
            raise ValueError(
                f"expected rows to draw from as integers of at least 0, found {asked.dtype} of shape {asked.shape}: "
                "give indices, of a mask mask.nonzero().squeeze(1)"
            )
        rows = np.unique(asked)
        rows = rows[: np.searchsorted(rows, self.size)]
        if not len(rows):
            raise ValueError(
                f"expected at least one row to draw from, found none of the {self.size} training rows chosen: give the "
                "data more labels, or let the method's training_rows choose some"
            )
        return rows

    def __iter__(self) -> Iterator[int]:
        draws: list[int] = self.order()[self.rank :: self.num_replicas].tolist()
        return iter(draws)


class EpochLoader(DataLoader[Batch]):
    """Seeds and starts its workers when the first batch is wanted, not when the iterator is made.

    Lightning may make the iterator long before: then a resumed run has not told the sampler its epoch yet, nor the
    method drawn the epoch's seed.

    Where it has no workers, and pins no memory, it does at once what torch's does between notes for its profiler, which
    take longer than to cut a small batch out of tensors.
    """

    dataset: Indexed

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self.num_workers or self.pin_memory or self.batch_sampler is None or self.collate_fn is not as_is:
            yield from super().__iter__()
            return
        batches = iter(self.batch_sampler)
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)  # torch's draws a seed, for workers or not
        for items in batches:
            yield self.dataset.__getitems__(items)
