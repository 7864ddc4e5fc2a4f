"""ALM-KD's meta-step on the student in training: at its last layer, or through all its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_kd.data.table import all_sum
from lit_kd.models import last_linear
from lit_kd.models.replay import Replay
from lit_kd.models.taps import Tapped
from lit_kd.trust import exact
from lit_kd.trust.meta import Head, MetaRows, alignment, last_layer_derivative, look_ahead
from lit_kd.types import PENULTIMATE, Batch, Outputs, evaluating

if TYPE_CHECKING:
    from lit_kd.methods.almkd import ALMKD

Align = Callable[[Tensor, float], Tensor]
"""From weights ``(B, S + 1)`` and the look-ahead's learning rate to `lit_kd.trust.meta.alignment`."""
ROWS_AT_A_TIME = 32
"""Of the meta rows whose validation gradient is taken through all layers."""


class LookAhead(ABC):
    """How the meta-step looks ahead.

    Args:
        module: The method, set up.
        meta_rows: Over how many meta rows of each process the validation loss is taken.
        train_share: The training loss's part in it.
    """

    taps: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: ALMKD, meta_rows: float, train_share: float) -> None:
        self.module = module
        self.meta_rows = meta_rows
        self.train_share = train_share

    @property
    @abstractmethod
    def parameter(self) -> Tensor:
        """Whose learning rate the look-ahead takes."""

    def on_epoch(self) -> None:  # noqa: B027 - not all need it
        """An epoch starts."""

    def before(self) -> None:  # noqa: B027
        """The student is about to see a training batch."""

    @abstractmethod
    def check(self, train: Batch, student: Outputs, sources: list[Outputs]) -> None:
        """Refuse a student that it is not made for: once, before the first update."""

    @abstractmethod
    def align(
        self, train: Batch, student: Outputs, sources: list[Outputs], losses: list[Tensor], meta: Batch, used: Tensor
    ) -> Align:
        """How well each term agrees with the validation gradient.

        Args:
            train: The training batch.
            student: What the student gave for it, with its graph.
            sources: What the terms compare it with.
            losses: The terms, ``S + 1`` of ``(B,)``, with their graph.
            meta: The meta batch of the same step.
            used: Sample indices of the training batches of all processes: a row must not vouch for itself.
        """


class LastLayer(LookAhead):
    """At the last layer, on features of the meta batches of the latest steps."""

    taps = (PENULTIMATE,)

    def __init__(self, module: ALMKD, meta_rows: float, train_share: float) -> None:
        super().__init__(module, meta_rows, train_share)
        self.path, self.layer = last_linear(module.student)
        self._rows: deque[tuple[Tensor, Tensor, Tensor]] = deque()

    @property
    def parameter(self) -> Tensor:
        """The layer's weight."""
        return self.layer.weight

    def on_epoch(self) -> None:
        """Meta rows of the last epoch are gone, as they are for a run that is resumed here."""
        self._rows.clear()

    def check(self, train: Batch, student: Outputs, sources: list[Outputs]) -> None:
        """Is the layer taken for the last one really the one that gives the logits?"""
        if not Head.of(self.layer).gives(student.logits, student.features.get(PENULTIMATE)):
            raise ValueError(
                f"expected the student's logits to be the output of its last linear layer, {self.path!r}; found "
                "others. The meta-gradient is taken at that layer: let the student end in torch.nn.Linear, or use "
                "meta_gradient: exact"
            )

    def align(
        self, train: Batch, student: Outputs, sources: list[Outputs], losses: list[Tensor], meta: Batch, used: Tensor
    ) -> Align:
        """In closed form."""
        assert meta.index is not None
        with evaluating(self.module.student):  # so that the meta rows leave no trace in running statistics
            seen = Tapped(self.module.student, self.taps)(self.module.laid_out(meta).x)
        self._rows.append((seen.features[PENULTIMATE].float(), meta.y, meta.index))
        held = sum(len(y) for _, y, _ in self._rows)
        while held - len(self._rows[0][1]) >= self.meta_rows:
            held -= len(self._rows.popleft()[1])
        kept, y, index = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        rows = MetaRows(kept, y, keep=~torch.isin(index, used))
        features, head = student.features[PENULTIMATE].detach().float(), Head.of(self.layer)
        own = MetaRows(features, train.y, keep=torch.ones_like(train.index, dtype=torch.bool))
        gradients = torch.stack(
            [exact.gradient(loss, {"logits": student.logits})["logits"].float() for loss in losses], dim=1
        )

        def align(weights: Tensor, lr: float) -> Tensor:
            pull = torch.einsum("bk,bkc->bc", weights, gradients)
            ahead = look_ahead(head, features, pull, lr, all_sum) if lr else head
            derivative = partial(
                last_layer_derivative, ahead, features, loss=self.module.task.label_loss, all_sum=all_sum
            )
            moved = derivative(rows)
            if self.train_share:
                moved = torch.lerp(moved, derivative(own), self.train_share)
            return alignment(gradients, moved)

        return align


class WholeNetwork(LookAhead):
    """Through all layers, on the meta batch of the same step: rows of earlier ones would cost passes of their own."""

    @staticmethod
    def derivative(replay: Replay, function: exact.Function, direction: exact.Named) -> tuple[Tensor, Tensor]:
        """By forward-mode differentiation."""
        return exact.exact_derivative(function, replay.parameters, direction)

    @property
    def parameter(self) -> Tensor:
        """The last one: there is one learning rate for all of them."""
        return [parameter for parameter in self.module.student.parameters() if parameter.requires_grad][-1]

    def before(self) -> None:
        """Keep what the pass depends on."""
        self.replay = Replay(self.module.student, tuple(self.module.tapped_student.layers))

    def check(self, train: Batch, student: Outputs, sources: list[Outputs]) -> None:
        """Do student and terms support the derivative, and can the pass be repeated?"""
        function = self._terms(train, sources)
        self.derivative(self.replay, function, self.replay.parameters)
        found, logits = self.replay(self.module.laid_out(train).x).logits, student.logits
        if (found - logits).norm() > 0.05 * logits.norm():
            rank_zero_warn(
                f"a second pass of {type(self.module.student).__name__} over a batch gives other logits, though buffers "
                "and random numbers are the same: the meta-gradient is that of another pass than the student learns from"
            )

    def _terms(self, train: Batch, sources: list[Outputs]) -> exact.Function:
        """The batch's terms, ``(B, S + 1)``, as a function of the student's parameters."""
        x = self.module.laid_out(train).x
        return lambda theta: torch.stack(self.module.losses(self.replay(x, theta), sources, train)[0], dim=1)

    def align(
        self, train: Batch, student: Outputs, sources: list[Outputs], losses: list[Tensor], meta: Batch, used: Tensor
    ) -> Align:
        """By one directional derivative of the terms."""
        assert meta.index is not None
        keep, every = ~torch.isin(meta.index, used), torch.ones(len(train.y), dtype=torch.bool, device=train.y.device)
        trainable = {name: p for name, p in self.module.student.named_parameters() if p.requires_grad}
        function = self._terms(train, sources)

        def align(weights: Tensor, lr: float) -> Tensor:
            theta = self.replay.parameters
            if lr:
                total = (weights * torch.stack(losses, dim=1)).sum()
                step = exact.mean(exact.gradient(total, trainable), every.sum().view(1), all_sum)
                theta = {name: value - lr * step[name] for name, value in theta.items()}
            v = self._validation_gradient(meta, keep, theta)
            if self.train_share:
                own = self._validation_gradient(train, every, theta)
                v = {name: torch.lerp(value, own[name], self.train_share) for name, value in v.items()}
            return self.derivative(self.replay, function, v)[1]

        # the graph of `losses` is there, though the caller takes no gradients
        return torch.enable_grad()(align)

    def _validation_gradient(self, batch: Batch, keep: Tensor, theta: exact.Named) -> dict[str, Tensor]:
        """The gradient of the mean loss of the rows that count, with the network in evaluation mode."""
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        student, x = self.module.student, self.module.laid_out(batch).x
        mixes = any(getattr(m, "track_running_stats", True) is False for m in student.modules())
        whole = mixes or not isinstance(
            x, Tensor
        )  # else each row's logits are its own: a part's graph takes less memory
        size = len(keep) if whole else ROWS_AT_A_TIME
        sums: dict[str, Tensor] = {}
        with evaluating(student):
            replay = Replay(student)
            for part in [slice(first, first + size) for first in range(0, len(keep), size)]:
                logits = replay(x if whole else x[part], leaves).logits  # type: ignore[index]
                losses = self.module.task.label_loss(logits, batch.y[part])
                found = exact.gradient(losses.where(keep[part], 0), leaves)
                sums = {name: sums[name] + value if sums else value for name, value in found.items()}
        return exact.mean(sums, keep.sum().view(1), all_sum)


class CentralDifferences(WholeNetwork):
    """The same for operators that have no forward mode."""

    @staticmethod
    def derivative(replay: Replay, function: exact.Function, direction: exact.Named) -> tuple[Tensor, Tensor]:
        """By central differences."""
        return exact.central_derivative(function, replay.parameters, direction, double=bool(replay.gpus))


LOOK_AHEADS: dict[str, type[LookAhead]] = {
    "last_layer": LastLayer,
    "exact": WholeNetwork,
    "central": CentralDifferences,
}
