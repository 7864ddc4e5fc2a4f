"""Rows of inputs, fetched many at a time, and the data set that puts our labels and indices beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lit_kd.data.splits import Positions
from lit_kd.types import Batch, Inputs

T = TypeVar("T")
Move = Callable[[Tensor], Tensor]
"""Brings inputs to a device, the same tensor only once."""


class Rows(Protocol):
    """Inputs that can be fetched by position."""

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def fetch(self, positions: list[int]) -> Inputs:
        """The inputs at `positions`, batched: a tensor ``(B, ...)``, or a mapping of such tensors."""
        ...


class TensorRows:
    """Rows of one tensor in memory.

    Args:
        x: Tensor ``(n, ...)``.
        transform: Called on each fetched batch ``(B, ...)``, e.g. to turn bytes into floats and to augment. It must
            be picklable, for loader workers.
    """

    def __init__(self, x: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.x = x
        self.transform = transform

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, positions: list[int]) -> Tensor:
        """The transformed rows at `positions`, ``(B, ...)``."""
        x = self.x[torch.as_tensor(positions, dtype=torch.int64)]
        return x if self.transform is None else self.transform(x)


class ItemRows:
    """Rows of a map-style data set of ``(x, y)`` items; its own ``y`` is dropped, as ours takes its place.

    Args:
        dataset: Has ``__len__`` and ``__getitem__``.
        collate: Turns a list of items into a batch ``(x, y)``.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] = default_collate) -> None:
        self.dataset = dataset
        self.collate = collate

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, positions: list[int]) -> Inputs:
        """The collated inputs at `positions`."""
        return self.merge([self.dataset[p] for p in positions])

    def merge(self, items: list[Any]) -> Inputs:
        """Collate items and keep the inputs."""
        batch = self.collate(items)
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(
                f"expected the collate_fn to return a batch (x, y), found {type(batch).__name__}. "
                "Let it return such a pair; x may be a tensor or a mapping of tensors."
            )
        return cast(Inputs, batch[0])


class JoinedRows:
    """Two `Rows`, one after the other."""

    def __init__(self, first: Rows, second: Rows) -> None:
        self.first = first
        self.second = second

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def fetch(self, positions: list[int]) -> Inputs:
        """The inputs at `positions`, in their order."""
        n = len(self.first)
        front, back = [p for p in positions if p < n], [p - n for p in positions if p >= n]
        if not back:
            return self.first.fetch(front)
        if not front:
            return self.second.fetch(back)
        if isinstance(self.first, ItemRows) and isinstance(self.second, ItemRows):
            # Merge items, not batches: only the collate function can pad texts of unequal length.
            first, second = self.first, self.second
            return first.merge([second.dataset[p - n] if p >= n else first.dataset[p] for p in positions])
        a, b = self.first.fetch(front), self.second.fetch(back)
        # The front rows come first now: undo that.
        order = torch.tensor([p >= n for p in positions]).int().argsort(stable=True).argsort()
        if isinstance(a, Tensor):
            return torch.cat([a, cast(Tensor, b)])[order]
        return {key: torch.cat([a[key], cast(Mapping[str, Tensor], b)[key]])[order] for key in a}


def on_device(rows: Rows, move: Move) -> Rows:
    """The same rows with their tensors on a device; raises a ValueError if they are not made of tensors in memory."""
    if isinstance(rows, JoinedRows):
        return JoinedRows(on_device(rows.first, move), on_device(rows.second, move))
    if isinstance(rows, TensorRows):
        return TensorRows(move(rows.x), rows.transform)
    raise ValueError(
        f"expected rows of tensors in memory with on_device, found {type(rows).__name__}, which are read one by one: "
        "set on_device=false"
    )


def in_memory(rows: Rows) -> list[Tensor]:
    """The tensors in memory that rows are made of; none where they come from elsewhere."""
    if isinstance(rows, JoinedRows):
        return in_memory(rows.first) + in_memory(rows.second)
    return [rows.x] if isinstance(rows, TensorRows) else []


class Indexed(Dataset[Batch]):
    """Some rows, with labels and indices: what the loaders read.

    Args:
        rows: The inputs.
        positions: Which of the rows, ``(n,)``.
        labels: Labels of each chosen row, int64, ``(n,)`` or ``(n, C)``.
        indices: Index in the training set of each chosen row, int64, ``(n,)``; None if they have none.
    """

    def __init__(self, rows: Rows, positions: Positions, labels: Tensor, indices: Tensor | None) -> None:
        self.rows = rows
        self.positions = positions
        self.labels = labels
        self.indices = indices

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device, move: Move) -> Indexed:
        """The same rows with all tensors on a device, the inputs by `move`; raises as `on_device`."""
        indices = None if self.indices is None else self.indices.to(device)
        return Indexed(on_device(self.rows, move), self.positions, self.labels.to(device), indices)

    def __getitems__(self, items: list[int]) -> Batch:
        """A whole batch: a `DataLoader` asks for all its rows at once."""
        x = self.rows.fetch(self.positions[items].tolist())
        taken = torch.as_tensor(items, dtype=torch.int64)
        return Batch(x, self.labels[taken], None if self.indices is None else self.indices[taken])

    def __getitem__(self, item: int) -> Batch:
        """One sample, without a batch axis."""
        x, y, index = self.__getitems__([item])
        one = x[0] if isinstance(x, Tensor) else {key: value[0] for key, value in x.items()}
        return Batch(one, y[0], None if index is None else index[0])


def as_is(batch: T) -> T:
    """Return the batch: the collate function of a data set that hands out whole batches."""
    return batch
