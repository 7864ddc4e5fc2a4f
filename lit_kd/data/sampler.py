"""The order in which rows come, and which of them a distributed sampler repeats."""

from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from lit_kd.data.labels import Positions, Weights
from lit_kd.data.resume import Place, random_state, set_random_state
from lit_kd.data.seeds import seed_epoch
from lit_kd.types import Batch


class EpochSampler(DistributedSampler[int]):
    """Shuffles anew each epoch, in an order that depends on the seed and the epoch alone.

    Rank ``r`` of ``R`` takes every ``R``-th row from the ``r``-th on, so the ``k``-th batches of all ranks together are
    the ``k``-th batch of one process. Lightning calls `set_epoch`; your own loop must call it too.

    Args:
        size: Number of rows to draw from.
        length: Number of draws per epoch; default `size`. More draws than rows come from several permutations.
        num_replicas: Number of processes ``R``. The draws are padded, from their start, to a multiple of it.
        rank: This process, in ``[0, R)``.
        seed: Seed, at least 0.
        rows: Returns at each epoch's start the rows below `size` to draw from, int64, or None for all.
        weights: How often to draw each row, with replacement, up to a factor. Default: no row twice before all others.
    """

    def __init__(
        self,
        size: int,
        length: int | None = None,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        rows: Callable[[], Positions | None] | None = None,
        weights: Weights | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"expected at least one row to draw from, found {size}. Give a non-empty data set.")
        self.size = size
        self.length = size if length is None else length
        self.rows = rows
        self.weights = weights
        super().__init__(range(self.length), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]

    def order(self) -> Positions:
        """The rows that all ranks together draw this epoch, in order, padding included."""
        rows = self.chosen()
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.weights is None:
            rounds = -(-self.length // len(rows))
            draws = np.concatenate([rows[rng.permutation(len(rows))] for _ in range(rounds)])[: self.length]
        else:
            draws = rng.choice(rows, self.length, p=self.weights[rows] / self.weights[rows].sum())
        return np.resize(draws, self.total_size)

    def chosen(self) -> Positions:
        """The rows that this epoch draws from, ascending."""
        asked = None if self.rows is None else self.rows()
        if asked is None:
            return np.arange(self.size)
        if asked.ndim != 1 or asked.dtype.kind not in "iu" or (asked < 0).any():
            raise ValueError(
                f"expected rows to draw from as integers of at least 0, found {asked.dtype} of shape {asked.shape}: "
                "give indices, of a mask mask.nonzero().squeeze(1)"
            )
        rows = np.unique(asked[asked < self.size])
        rows = rows if self.weights is None else rows[self.weights[rows] > 0]
        if not len(rows):
            raise ValueError(
                f"expected at least one row to draw from, found none of the {self.size} training rows chosen: give the "
                "data more labels, or let the method's training_rows choose some"
            )
        return rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[self.rank :: self.num_replicas].tolist())


class EpochLoader(DataLoader[Batch]):
    """Seeds and starts its workers at the first `next`; resumed in mid-epoch, it goes on where it was.

    It then draws the epoch's batches again and drops those that are done, so that workers repeat their random numbers,
    too. After that torch's go on as they did; in several processes they are those of seed, epoch and process.

    Args:
        *args: See torch's DataLoader.
        place: Where the epoch is; ``None``: the loader is never resumed.
        name: Of this loader, in the place.
        **options: See torch's DataLoader.
    """

    def __init__(self, *args: Any, place: Place | None = None, name: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.place, self.name = place, name

    def __iter__(self) -> Any:
        # Lightning makes the iterator before it tells a resumed sampler its epoch and sets the epoch's seed
        place, now = self.place, random_state()
        if place is None:
            yield from super().__iter__()
            return
        start, sampler = place.resumed.get("starts", {}).pop(self.name, None), cast(EpochSampler, self.sampler)
        done = 0 if start is None else place.done
        if done and sampler.num_replicas > 1:  # a checkpoint is of one of them
            seed_epoch(sampler.epoch, sampler.rank)
        elif done:
            set_random_state(start)
        place.starts[self.name] = random_state()
        batches = super().__iter__()
        for _ in range(done):
            next(batches)
        if done and sampler.num_replicas == 1:  # of several loaders side by side the first goes back to the checkpoint
            set_random_state(place.resumed.pop("now", now))
        yield from batches

    def state_dict(self) -> dict[str, Any]:
        """Nothing, as the data module has it: Lightning restores no loader that was made for a schedule's length."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


def own_rows(loaders: Any, which: int, seen: int, rows: int) -> int:
    """How many of a batch's first `rows` rows, of loader `which`, are not repeated; `seen` rows came before it."""
    several = list(loaders.values()) if isinstance(loaders, dict) else loaders
    loader = several[which] if isinstance(several, (list, tuple)) else several
    sampler = loader.sampler if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return rows
    own = len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))
    return max(0, min(rows, own - seen))
