"""The one shape in which every method sees data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

UNLABELED = -1
"""The label of a sample whose label is missing."""


class Batch(NamedTuple):
    """A batch of samples.

    Attributes:
        x: What the models read: a tensor whose first axis is the batch, or a mapping of such tensors, which is
            passed to a model as keyword arguments.
        y: Labels, int64, shape ``(B,)``; `UNLABELED` marks a missing one.
        index: Position of each sample in the training set, int64, shape ``(B,)``: stable under shuffling,
            subsets and several processes. ``None`` where the loader does not tell.
    """

    x: Tensor | Mapping[str, Tensor]
    y: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # tuple.index is of no use here

    def to(self, device: torch.device | str | int, non_blocking: bool | None = None) -> Batch:
        """The batch on a device. Lightning calls this, which takes it less time than to search a batch for tensors.

        Args:
            device: Where to.
            non_blocking: Whether not to wait for copies; ``None``: as Lightning does, unless they go to the CPU or MPS.
        """
        device = torch.device(device)
        if non_blocking is None:
            non_blocking = device.type not in ("cpu", "mps")

        def move(part: Any) -> Any:
            if isinstance(part, Tensor):
                return part.to(device, non_blocking=non_blocking)
            return part if part is None else move_data_to_device(part, device)

        return self._replace(x=move(self.x), y=move(self.y), index=move(self.index))


def as_batch(batch: Any) -> Batch:
    """Read what a loader gives, ours or a foreign one, as a `Batch`.

    Args:
        batch: A `Batch`, or a pair ``(x, y)``, or a triple ``(x, y, index)``.

    Returns:
        The same tensors as a `Batch`.

    Raises:
        TypeError: If it is none of these.

    Examples:
        >>> import torch
        >>> as_batch((torch.zeros(2, 3), torch.tensor([0, 1]))).index is None
        True
    """
    if isinstance(batch, Batch):
        return batch
    if (
        isinstance(batch, (tuple, list))
        and len(batch) in (2, 3)
        and isinstance(batch[0], (Tensor, Mapping))
        and all(isinstance(part, Tensor) for part in batch[1:])
    ):
        x, y, *index = batch
        # of any integer type: losses want int64
        return Batch(x, y if y.is_floating_point() else y.long(), *index)
    found = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        found += f" of {[type(part).__name__ for part in batch]}"
    raise TypeError(
        f"expected a batch (x, y) or (x, y, index), x a tensor or a mapping of tensors, y a tensor; found {found}. "
        "Let the dataset or its collate_fn return such pairs."
    )
