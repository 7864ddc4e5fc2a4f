"""Rows of inputs, fetched many at a time, and the data set that adds our labels and indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, default_collate

from lit_kd.data.labels import Positions
from lit_kd.types import Batch, Inputs

Move = Callable[[Tensor], Tensor]
"""Brings inputs to a device, the same tensor only once."""


class Rows(Protocol):
    """Inputs that can be fetched by position."""

    def __len__(self) -> int:
        """The number of rows."""

    def fetch(self, positions: list[int]) -> Inputs:
        """The inputs at `positions`, batched: a tensor ``(B, ...)``, or a mapping of such tensors."""


@dataclass(eq=False)
class TensorRows:
    """Rows of one tensor ``(n, ...)`` in memory.

    `transform` is called on each fetched batch ``(B, ...)``, e.g. to augment it; loader workers must pickle it.
    """

    x: Tensor
    transform: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, positions: list[int]) -> Tensor:
        """The transformed rows at `positions`, ``(B, ...)``."""
        x = self.x[torch.as_tensor(positions, dtype=torch.int64)]
        return x if self.transform is None else self.transform(x)


@dataclass(eq=False)
class ItemRows:
    """Inputs of a map-style data set of ``(x, y)`` items, collated to such batches; our labels replace its own."""

    dataset: Any
    collate: Callable[[list[Any]], Any] = default_collate

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, positions: list[int]) -> Inputs:
        """The collated inputs at `positions`."""
        batch = self.collate([self.dataset[p] for p in positions])
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TypeError(f"expected the collate_fn to return a batch (x, y), found {type(batch).__name__}")
        return cast(Inputs, batch[0])


@dataclass(eq=False)
class JoinedRows:
    """See `joined`."""

    first: Rows
    second: Rows

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
        a, b = self.first.fetch(front), self.second.fetch(back)
        # undo that the front rows come first now
        order = torch.tensor([p >= n for p in positions]).int().argsort(stable=True).argsort()
        if isinstance(a, Tensor):
            return torch.cat([a, cast(Tensor, b)])[order]
        return {key: torch.cat([a[key], cast(Mapping[str, Tensor], b)[key]])[order] for key in a}


def joined(first: Rows, second: Rows) -> Rows:
    """Two `Rows`, one after the other."""
    if isinstance(first, ItemRows) and isinstance(second, ItemRows):
        # one data set: only the collate function can pad texts of unequal length
        return ItemRows(ConcatDataset([first.dataset, second.dataset]), first.collate)
    return JoinedRows(first, second)


def on_device(rows: Rows, move: Move) -> Rows:
    """The same rows with their tensors on a device; a ValueError if they are not made of tensors in memory."""
    if isinstance(rows, JoinedRows):
        return JoinedRows(on_device(rows.first, move), on_device(rows.second, move))
    if isinstance(rows, TensorRows):
        return TensorRows(move(rows.x), rows.transform)
    raise ValueError(f"expected rows of tensors in memory with on_device, found {type(rows).__name__}: set it to false")


def in_memory(rows: Rows) -> list[Tensor]:
    """The tensors in memory that rows are made of."""
    if isinstance(rows, JoinedRows):
        return in_memory(rows.first) + in_memory(rows.second)
    return [rows.x] if isinstance(rows, TensorRows) else []


def equal_inputs(a: Any, b: Any) -> bool:
    """Whether two inputs hold the same values: tensors, arrays, or mappings and lists of them."""
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(equal_inputs(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(equal_inputs, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    return bool(np.array_equal(a, b))


@dataclass(eq=False)
class Indexed(Dataset[Batch]):
    """The rows at some positions ``(n,)``, with int64 labels ``(n,)`` or ``(n, C)`` and, if any, indices ``(n,)``."""

    rows: Rows
    positions: Positions
    labels: Tensor
    indices: Tensor | None

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device, move: Move) -> Indexed:
        """The same rows with all tensors on a device, the inputs by `move`; see `on_device`."""
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


def as_is(batch: Any) -> Any:
    """Return the batch: the collate function of a data set that gives whole batches."""
    return batch
