"""What all rooms share: batches, outputs and how a model is called. Imports torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

UNLABELED = -1
"""Marks a missing label."""
PENULTIMATE = "penultimate"
"""The tap on the input of the last linear layer."""
Inputs = Tensor | Mapping[str, Tensor]
"""A tensor whose first axis is the batch, or a mapping of such tensors, passed as keyword arguments."""


class Batch(NamedTuple):
    """A batch of samples.

    Attributes:
        x: What the models read.
        y: Labels, int64 ``(B,)``, or probabilities ``(B, C)``; with several labels a sample, 0 or 1, ``(B, C)``.
        index: Position of each sample in the training set, int64 ``(B,)``, if the loader gives it: stable under
            shuffling, subsets and several processes.
    """

    x: Inputs
    y: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # tuple.index is of no use here

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Batch:
        """The batch on a device; Lightning calls this."""

        def move(part: Any) -> Any:
            if isinstance(part, Mapping):
                return {name: move(value) for name, value in part.items()}
            return part.to(device, non_blocking=non_blocking) if isinstance(part, Tensor) else part

        return Batch(move(self.x), move(self.y), move(self.index))


class Outputs(NamedTuple):
    """A model's logits ``(B, C)`` for a batch, and features by tap: a layer's output, or see `PENULTIMATE`."""

    logits: Tensor
    features: Mapping[str, Tensor]


def as_batch(batch: Any) -> Batch:
    """Read what a loader gives as a `Batch`: a `Batch`, a pair ``(x, y)`` or a triple ``(x, y, index)``."""
    if isinstance(batch, Batch):
        return batch
    if (
        isinstance(batch, (tuple, list))
        and len(batch) in (2, 3)
        and isinstance(batch[0], (Tensor, Mapping))
        and all(isinstance(part, Tensor) for part in batch[1:])
    ):
        x, y, *index = batch
        return Batch(x, y if y.is_floating_point() else y.long(), *index)  # losses want int64
    found = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        found += f" of {[type(part).__name__ for part in batch]}"
    raise TypeError(
        f"expected a batch (x, y) or (x, y, index), x a tensor or a mapping of tensors, y a tensor; found {found}. "
        "Let the dataset or its collate_fn return such pairs."
    )


def index_of(batch: Batch) -> Tensor:
    """The sample indices of a batch, ``(B,)``; a ValueError where it has none."""
    if batch.index is None:
        raise ValueError(
            "expected batches with sample indices, (x, y, index), found one without: use a data module of lit_kd.data, "
            "and keep the index in hooks that change batches"
        )
    return batch.index


def run_model(model: Callable[..., Any], x: Inputs) -> Any:
    """Call a model with a tensor, or with a mapping as keyword arguments."""
    return model(**x) if isinstance(x, Mapping) else model(x)


def read_logits(model: Callable[..., Any], out: Any) -> Tensor:
    """The logits in what a model returned, a tensor or an object with ``.logits``."""
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"expected {type(model).__name__} to return logits, a tensor, or an object with .logits; "
            f"found {type(out).__name__}. Wrap the model in a module that returns its logits."
        )
    return logits


def logits_of(model: Callable[..., Any], x: Inputs) -> Tensor:
    """A model's logits for a batch."""
    return read_logits(model, run_model(model, x))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while, then each of its parts back into its own mode."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def wake(*models: nn.Module) -> None:
    """Put models that came wholly in evaluation mode into training mode, except for parts that are frozen.

    Where one layer is in training mode, others are not on purpose, such as BatchNorm of a frozen part.
    """
    for model in models:
        if not any(layer.training for layer in model.modules() if not list(layer.children())):
            model.train()
            for part in model.modules():
                if not any(p.requires_grad for p in part.parameters()) and any(True for _ in part.parameters()):
                    part.eval()


def full(tensor: Tensor) -> Tensor:
    """A tensor in at least float32."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise a ValueError for an option's value that is not one of those allowed."""
    if value not in allowed:
        raise ValueError(f"expected as {name} one of {list(allowed)}, found {value!r}")
