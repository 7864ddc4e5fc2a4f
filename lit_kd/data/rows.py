"""Rows of inputs, fetched many at a time, and the data set that adds our labels and indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import ConcatDataset, Dataset, default_collate

from lit_kd.data.labels import Positions
from lit_kd.types import IGNORED, Batch, Inputs, as_batch

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
    """Inputs of a map-style data set, collated to batches that `unpack` reads; our labels replace its own.

    If `labels` are given, those that items have by themselves, ``(n,)`` or ``(n, ...)``, collated labels must equal
    them: the labels that replace them belong to the same rows. Labels of tokens and pixels are not replaced, `own`, as
    they are cropped or padded together with the inputs; they must equal the given ones but for what is `IGNORED`.
    """

    dataset: Any
    collate: Callable[[list[Any]], Any] = default_collate
    unpack: Callable[[Any], Batch] = as_batch
    labels: Tensor | None = None
    own: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, positions: list[int]) -> Inputs:
        """The collated inputs at `positions`."""
        return self.labelled(positions)[0]

    def labelled(self, positions: list[int]) -> tuple[Inputs, Tensor | None]:
        """The collated inputs, and the labels if they are not replaced."""
        batch = self.read(positions)
        if self.labels is not None:
            self._check(batch.y, positions, self.labels[positions])
        return batch.x, batch.y if self.own else None

    def read(self, positions: list[int]) -> Batch:
        """The collated inputs and labels at `positions`."""
        items = [self.dataset[p] for p in positions]
        missing = [p for p, item in zip(positions, items, strict=True) if item is None]
        if missing:
            name = type(self.dataset).__name__
            raise ValueError(f"expected items in rows {missing} of {name}, found None: leave them out with a Subset")
        return self.unpack(self.collate(items))

    def followed_by(self, other: ItemRows) -> ItemRows:
        """These rows, then others, read as these are."""
        known = self.labels is not None and other.labels is not None and self.labels.dim() == other.labels.dim()
        labels = padded([self.labels, other.labels]) if known else None  # type: ignore[list-item]
        return ItemRows(ConcatDataset([self.dataset, other.dataset]), self.collate, self.unpack, labels, self.own)

    def _check(self, y: Tensor, positions: list[int], expected: Tensor) -> None:
        collate = getattr(self.collate, "__qualname__", type(self.collate).__name__)
        if len(y) != len(expected):
            raise ValueError(
                f"expected {len(expected)} rows from the collate function {collate}, found {len(y)}: let it keep all, "
                "and leave rows out of the data set, with a Subset"
            )
        if self.own:
            both = padded([y, expected])
            both = both.gather(1, (both == IGNORED).int().argsort(dim=1, stable=True))  # the others first, in order
            y, expected = both[: len(y)], both[len(y) :]
        if y.shape != expected.shape or not torch.equal(y, expected):
            row = (y != expected).view(len(y), -1).any(1).int().argmax() if y.shape == expected.shape else 0
            raise ValueError(
                f"expected in a batch the label that row {positions[row]} of {type(self.dataset).__name__} has, "
                f"{expected[row].tolist()}, found {y[row].tolist()}. If the collate function {collate} mixes rows, let "
                "the method do so, mix='mixup' or 'cutmix', or train without the wrapper. If items have other labels "
                "than the attribute targets or labels of their data set, rename that. Else let an item's label never "
                "change"
            )


def padded(labels: Sequence[Tensor]) -> Tensor:
    """Labels ``(n, ...)`` one after the other; those of tokens, ``(n, T)``, up to the longest, with `IGNORED`."""
    longest = max(y.shape[-1] for y in labels) if labels[0].dim() == 2 else 0
    return torch.cat([pad(y, (0, longest - y.shape[-1]), value=IGNORED) if longest else y for y in labels])


def labelled(rows: Rows, positions: list[int]) -> tuple[Inputs, Tensor | None]:
    """The inputs at `positions`, and the batch's own labels where they are not replaced."""
    if isinstance(rows, (ItemRows, JoinedRows)):
        return rows.labelled(positions)
    return rows.fetch(positions), None


@dataclass(eq=False)
class JoinedRows:
    """Two `Rows`, one after the other."""

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def fetch(self, positions: list[int]) -> Inputs:
        """The inputs at `positions`, in their order."""
        return self.labelled(positions)[0]

    def labelled(self, positions: list[int]) -> tuple[Inputs, Tensor | None]:
        """The inputs, and the labels if they are not replaced."""
        n = len(self.first)
        front, back = [p for p in positions if p < n], [p - n for p in positions if p >= n]
        if not back:
            return labelled(self.first, front)
        if not front:
            return labelled(self.second, back)
        if isinstance(self.first, ItemRows) and isinstance(self.second, ItemRows):
            # only a collate function can pad texts of unequal length
            return self.first.followed_by(self.second).labelled(positions)
        a, b = self.first.fetch(front), self.second.fetch(back)
        # undo that the front rows come first now
        order = torch.tensor([p >= n for p in positions]).int().argsort(stable=True).argsort()
        if isinstance(a, Tensor):
            return torch.cat([a, cast(Tensor, b)])[order], None
        return {key: torch.cat([a[key], cast(Mapping[str, Tensor], b)[key]])[order] for key in a}, None


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
        x, own = labelled(self.rows, self.positions[items].tolist())
        taken = torch.as_tensor(items, dtype=torch.int64)
        return Batch(
            x, self.labels[taken] if own is None else own, None if self.indices is None else self.indices[taken]
        )

    def __getitem__(self, item: int) -> Batch:
        """One sample, without a batch axis."""
        x, y, index = self.__getitems__([item])
        one = x[0] if isinstance(x, Tensor) else {key: value[0] for key, value in x.items()}
        return Batch(one, y[0], None if index is None else index[0])


def as_is(batch: Any) -> Any:
    """Return the batch: the collate function of a data set that gives whole batches."""
    return batch
