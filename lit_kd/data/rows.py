"""Rows of inputs, fetched many at a time, and the data set that puts our labels and indices beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from lit_kd.data.splits import Positions
from lit_kd.types import Batch

Inputs = Tensor | Mapping[str, Tensor]
T = TypeVar("T")
Moved = dict[tuple[int, torch.device], Tensor]
"""Copies of tensors on devices, by the identity of the original."""


class Rows(Protocol):
    """Inputs that can be fetched by position."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def fetch(self, positions: list[int]) -> Inputs:
        """Return the inputs at `positions`, batched: a tensor ``(B, ...)``, or a mapping of such tensors."""
        ...


class TensorRows:
    """Rows of one tensor in memory.

    Args:
        x: Tensor ``(n, ...)``.
        transform: Called on each fetched batch ``(B, ...)``, e.g. to turn bytes into floats and to augment.
            Module-level, so that loader workers can be sent it.
    """

    def __init__(self, x: Tensor, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.x = x
        self.transform = transform

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, positions: list[int]) -> Tensor:
        """Return the transformed rows at `positions`, shape ``(B, ...)``."""
        x = self.x[torch.as_tensor(positions, dtype=torch.int64)]
        return x if self.transform is None else self.transform(x)

    def to(self, device: torch.device, moved: Moved) -> TensorRows:
        """Return the same rows with the tensor on a device."""
        key = id(self.x), device
        if key not in moved:
            moved[key] = self.x.to(device)
        return TensorRows(moved[key], self.transform)


class ItemRows:
    """Rows of a map-style data set of ``(x, y)`` items; its own ``y`` is dropped, as ours takes its place.

    Args:
        dataset: Has ``__len__`` and ``__getitem__``.
        collate: Makes of a list of items a batch ``(x, y)``.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any] = default_collate) -> None:
        self.dataset = dataset
        self.collate = collate

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, position: int) -> Any:
        """Return one item ``(x, y)`` of the data set."""
        return self.dataset[position]

    def fetch(self, positions: list[int]) -> Inputs:
        """Return the collated inputs at `positions`."""
        return self.merge([self.item(p) for p in positions])

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
        """Return the inputs at `positions` in their order, whichever side each comes from."""
        n = len(self.first)
        sides = [p >= n for p in positions]
        if not any(sides):
            return self.first.fetch(positions)
        if all(sides):
            return self.second.fetch([p - n for p in positions])
        if isinstance(self.first, ItemRows) and isinstance(self.second, ItemRows):
            # Items, not batches, are merged: texts of unequal length are padded only by the collate function.
            second = self.second
            return self.first.merge([second.item(p - n) if p >= n else self.first.item(p) for p in positions])
        a = self.first.fetch([p for p in positions if p < n])
        b = self.second.fetch([p - n for p in positions if p >= n])
        # The rows come out sorted by side: undo that.
        back = torch.tensor(sides).int().argsort(stable=True).argsort()
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return torch.cat([a, b])[back]
        pairs = cast(Mapping[str, Tensor], a), cast(Mapping[str, Tensor], b)
        return {key: torch.cat([pairs[0][key], pairs[1][key]])[back] for key in pairs[0]}

    def to(self, device: torch.device, moved: Moved) -> JoinedRows:
        """Return the same rows with their tensors on a device."""
        return JoinedRows(*(_on(device, rows, moved) for rows in (self.first, self.second)))


def _on(device: torch.device, rows: Rows, moved: Moved) -> Rows:
    if isinstance(rows, (TensorRows, JoinedRows)):
        return rows.to(device, moved)
    raise ValueError(
        f"expected rows of tensors in memory with on_device, found {type(rows).__name__}, which are read one by one: "
        "set on_device=false"
    )


def in_memory(rows: Rows) -> list[Tensor]:
    """Return the tensors in memory that rows are made of; none where they come from elsewhere."""
    if isinstance(rows, JoinedRows):
        return in_memory(rows.first) + in_memory(rows.second)
    return [rows.x] if isinstance(rows, TensorRows) else []


class Indexed(Dataset[Batch]):
    """Some rows, with labels and indices: what the loaders read.

    Args:
        rows: The inputs.
        positions: Which of the rows, shape ``(n,)``.
        labels: Label of each chosen row, int64, shape ``(n,)``.
        indices: Index in the training set of each chosen row, int64, shape ``(n,)``; None if they have none.
    """

    def __init__(self, rows: Rows, positions: Positions, labels: Tensor, indices: Tensor | None) -> None:
        self.rows = rows
        self.positions = positions
        self.labels = labels
        self.indices = indices

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device, moved: Moved) -> Indexed:
        """Return the same rows with all tensors on a device.

        Args:
            device: Where.
            moved: Inputs that are there already; others are added.

        Raises:
            ValueError: If the inputs are no tensors in memory.
        """
        indices = None if self.indices is None else self.indices.to(device)
        return Indexed(_on(device, self.rows, moved), self.positions, self.labels.to(device), indices)

    def __getitems__(self, items: list[int]) -> Batch:
        """Return a whole batch: a `DataLoader` asks for all its rows at once."""
        x = self.rows.fetch(self.positions[items].tolist())
        taken = torch.as_tensor(items, dtype=torch.int64)  # once
        return Batch(x, self.labels[taken], None if self.indices is None else self.indices[taken])

    def __getitem__(self, item: int) -> Batch:
        """Return one sample, without a batch axis."""
        x, y, index = self.__getitems__([item])
        one = x[0] if isinstance(x, Tensor) else {key: value[0] for key, value in x.items()}
        return Batch(one, y[0], None if index is None else index[0])


def as_is(batch: T) -> T:
    """Return the batch: the collate function of a data set that hands out whole batches."""
    return batch
