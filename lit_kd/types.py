"""What all rooms share: batches, outputs and how a model is called. Imports torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

UNLABELED = -1
"""Marks a missing label."""
IGNORED = -100
"""Marks a pixel or token that counts for nothing, such as padding."""
PENULTIMATE = "penultimate"
"""The tap on the input of the last linear layer."""
CLASS_MAPS = "class maps of "
"""Before another tap: what the last linear layer, without its bias, makes of the features at each place."""
LABELS = ("labels", "label", "y")
"""Where a batch that is a mapping may hold its labels."""
Inputs = Tensor | Mapping[str, Tensor]
"""A tensor whose first axis is the batch, or a mapping of such tensors, passed as keyword arguments."""


class Pairs(NamedTuple):
    """Which rows a batch of mixed inputs is made of: P pairs of an input and a row, each with the row's own label."""

    inputs: Tensor  # which input, (P,)
    rows: Tensor  # which row of the batch before it was mixed, (P,)
    share: Tensor  # the row's share in the input, times P / B: so the mean over pairs is one over inputs, (P,)
    main: Tensor  # for each row its pair of the greatest share, (B,)


def reads_head(taps: Iterable[str]) -> bool:
    """Whether some of the taps depend on which layer is the last linear one."""
    return any(tap == PENULTIMATE or tap.startswith(CLASS_MAPS) for tap in taps)


class Batch(NamedTuple):
    """A batch of samples.

    Attributes:
        x: What the models read.
        y: Labels, int64 ``(B,)``, or probabilities ``(B, C)``; for other tasks see `lit_kd.terms.tasks`.
        index: Position of each sample in the training set, behind which meta, validation and test rows follow, int64
            ``(B,)``, if the loader gives it: stable under shuffling, subsets and several processes.
    """

    x: Inputs
    y: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # tuple.index is of no use here

    def with_labels(self, y: Tensor) -> Batch:
        """The batch with other labels."""
        return self._replace(y=y)

    def by_share(self, values: Tensor) -> Tensor:
        """A value of each label, ``(B,)``, times the row's share where inputs are mixed."""
        return values if self.pairs is None else values * self.pairs.share

    @property
    def pairs(self) -> Pairs | None:
        """Where inputs are mixed, of what: then there is a label and an index for each pair, ``(P,)``."""
        return None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Batch:
        """The batch on a device; Lightning calls this."""

        def move(part: Any) -> Any:
            if isinstance(part, Mapping):
                return {name: move(value) for name, value in part.items()}
            return part.to(device, non_blocking=non_blocking) if isinstance(part, Tensor) else part

        return Batch(move(self.x), move(self.y), move(self.index))


class MixedBatch(Batch):
    """A batch of mixed inputs, a label and an index for each pair."""

    parts: Pairs

    def with_labels(self, y: Tensor) -> Batch:
        """The batch with other labels."""
        made = self._replace(y=y)
        made.parts = self.parts
        return made

    @property
    def pairs(self) -> Pairs:
        """Of what inputs are mixed."""
        return self.parts


class Outputs(NamedTuple):
    """A model's logits for a batch, and features by tap: a layer's output, or see `PENULTIMATE`."""

    logits: Tensor  # (B, C); of other tasks as `lit_kd.terms.tasks` says
    features: Mapping[str, Tensor]
    known: Tensor | None = None  # which rows a teacher speaks of, bool (B,): other logits mean nothing; None: of all

    @property
    def speaks(self) -> Tensor:
        """Which rows it speaks of, bool ``(B,)``."""
        return self.logits.new_ones(len(self.logits), dtype=torch.bool) if self.known is None else self.known

    def of(self, batch: Batch) -> Outputs:
        """The outputs for each label of the batch: where inputs are mixed, for each pair."""
        if (pairs := batch.pairs) is None:
            return self
        return Outputs(self.logits[pairs.inputs], {tap: found[pairs.inputs] for tap, found in self.features.items()})


def as_batch(
    batch: Any, label_key: str | int | None = None, input_key: str | int | None = None, keep_shape: bool = False
) -> Batch:
    """Read what a loader gives as a `Batch`.

    That is a `Batch`, a pair ``(x, y)``, a triple ``(x, y, index)``, or a mapping of tensors: the labels are one of
    them, and the others are the inputs. Labels ``(B, 1)`` of an integer type become ``(B,)``.

    Args:
        batch: What the loader gives.
        label_key: Where the labels are: a key of a mapping, a position in a tuple. Default: the key `LABELS` that there
            is, or position 1.
        input_key: Where the only input is; all else is then left out. Default: all but the labels, or position 0.
        keep_shape: Whether labels ``(B, 1)`` stay as they are, and numbers ``(B,)`` become ``(B, 1)``.
    """
    if isinstance(batch, Batch):
        return batch
    x, y, *index = _parts(batch, label_key, input_key)
    known = isinstance(x, (Tensor, Mapping)) and isinstance(y, Tensor)
    if not known or not all(isinstance(i, Tensor) and i.dtype == torch.int64 and i.shape == y.shape[:1] for i in index):
        found = type(batch).__name__
        if isinstance(batch, Mapping):
            found += f" of { ({name: type(part).__name__ for name, part in batch.items()}) }"
        elif isinstance(batch, (tuple, list)):
            found += f" of {[type(part).__name__ for part in batch]}"
        raise TypeError(
            "expected a batch (x, y) or (x, y, index), x a tensor or a mapping of tensors, y a tensor; or a mapping of "
            f"tensors, the labels being one of {', '.join(LABELS)}; found {found}. Let the dataset or its collate_fn "
            "return such batches, or say where labels and inputs are: label_key and input_key of DistillationDataModule"
        )
    if not y.dim():
        raise ValueError("expected batches of rows, found a row alone: pass a DataLoader, not its data set")
    if not y.is_floating_point():  # losses want int64
        y = y.long() if keep_shape or y.dim() != 2 else y.long().squeeze(1)
    elif keep_shape and y.dim() == 1:
        y = y.unsqueeze(1)
    return Batch(x, y, *index)


def label_name(batch: Mapping[Any, Any], label_key: str | int | None = None) -> str | int | None:
    """The key of the labels in a batch that is a mapping; None if there is none."""
    names = [name for name in LABELS if name in batch]
    if label_key is None and len(names) > 1:
        raise TypeError(f"expected labels under one key, found {names}: pass label_key to DistillationDataModule")
    return next(iter(names), None) if label_key is None else label_key


def _parts(batch: Any, label_key: str | int | None, input_key: str | int | None) -> Sequence[Any]:
    """Inputs, labels and, if any, indices; None for what is not there."""
    if isinstance(batch, (tuple, list)):
        if label_key is None and input_key is None:
            return batch if len(batch) in (2, 3) else (None, None)
        batch, input_key = dict(enumerate(batch)), input_key or 0
        label_key = 1 if label_key is None else label_key
    if not isinstance(batch, Mapping):
        return None, None
    name = label_name(batch, label_key)
    if input_key is not None:
        return batch.get(input_key), batch.get(name)
    x = {key: part for key, part in batch.items() if key != name}
    return x if x and all(isinstance(part, Tensor) for part in x.values()) else None, batch.get(name)


def index_of(batch: Batch) -> Tensor:
    """The sample indices of a batch, ``(B,)``; a ValueError where it has none."""
    if batch.index is None:
        raise ValueError(
            "expected batches with sample indices, (x, y, index), found one without: use a data module of lit_kd.data, "
            "and keep the index in hooks that change batches"
        )
    return batch.index


class Pair(tuple[Any, ...]):
    """``(x, y)``, and behind it the batch that it is of, and the meta batch of ALM-KD."""

    whole: Batch
    meta: Batch | None


class Named(dict[Any, Any]):
    """The same as a mapping of inputs and labels."""

    whole: Batch
    meta: Batch | None
    input_key: str | int | None = None  # where the only input is


def as_theirs(whole: Batch, meta: Batch | None, label_key: Any, input_key: Any = None) -> Pair | Named:
    """What a user's own steps see of a batch: `as_batch` backwards."""
    seen: Pair | Named = Pair(whole[:2])
    if isinstance(whole.x, Mapping):
        seen = Named({**whole.x, label_key: whole.y})
    elif input_key is not None:
        seen = Named({input_key: whole.x, label_key: whole.y})
        seen.input_key = input_key
    seen.whole, seen.meta = whole, meta
    return seen


def as_ours(batch: Any) -> Any:
    """The batch behind what `as_theirs` gave, with inputs that were changed in place; others as they are."""
    if isinstance(batch, Named) and isinstance(batch.whole.x, Mapping) and batch.keys() >= batch.whole.x.keys():
        return batch.whole._replace(x={name: batch[name] for name in batch.whole.x})
    if isinstance(batch, Named) and batch.input_key in batch:
        return batch.whole._replace(x=batch[batch.input_key])
    return getattr(batch, "whole", batch)


def run_model(model: Callable[..., Any], x: Inputs) -> Any:
    """Call a model with a tensor, or with a mapping as keyword arguments."""
    return model(**x) if isinstance(x, Mapping) else model(x)


def read_logits(model: Callable[..., Any], out: Any) -> Tensor:
    """The logits in what a model returned, a tensor or an object with ``.logits``."""
    place = getattr(model, "lit_kd_logits", None)  # see `lit_kd.models.adapt`
    try:
        logits = getattr(out, "logits", out) if place is None or isinstance(out, Tensor) else out[place]
    except (LookupError, TypeError):  # nothing is there
        logits = out
    if not isinstance(logits, Tensor):
        found = type(logits).__name__ + (f" with {list(logits)}" if isinstance(logits, Mapping) else "")
        raise TypeError(
            f"expected {type(model).__name__} to return logits, a tensor, or an object with .logits; found {found}: "
            "say where they are, lit_kd.models.adapt(model, logits=0) or logits='out'"
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
        if not model.training or not any(layer.training for layer in model.modules() if not list(layer.children())):
            model.train()
            for part in model.modules():
                if not any(p.requires_grad for p in part.parameters()) and any(True for _ in part.parameters()):
                    part.eval()


def class_labels(y: Tensor) -> Tensor:
    """Class numbers ``(B,)``: of soft labels ``(B, C)`` the most probable class, or `UNLABELED` where all are 0."""
    return y.argmax(-1).where(y.any(-1), UNLABELED) if y.is_floating_point() else y


def distributions(y: Tensor, classes: int) -> Tensor:
    """Labels, ``(B,)`` or ``(B, C)``, as distributions ``(B, C)``; zeros where one is missing."""
    if y.is_floating_point():
        return y
    return nn.functional.one_hot(y.clamp(min=0), classes) * (y != UNLABELED).unsqueeze(-1)


def full(tensor: Tensor) -> Tensor:
    """A tensor in at least float32."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise a ValueError for an option's value that is not one of those allowed."""
    if value not in allowed:
        raise ValueError(f"expected as {name} one of {list(allowed)}, found {value!r}")
