"""ALM-KD's meta-step through all layers of the student in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.func import functional_call

from lit_kd.data.table import all_rows, all_sum
from lit_kd.models.taps import Replay
from lit_kd.trust import exact
from lit_kd.types import Batch, evaluating, index_of
from lit_kd.weightings.base import Align
from lit_kd.weightings.lookahead import LookAhead, Seen

if TYPE_CHECKING:
    from lit_kd.methods.almkd import ALMKD

ROWS_AT_A_TIME = 32
"""Of the rows whose validation gradient is taken: a smaller graph takes less memory."""


class Exact(LookAhead):
    """Through all layers, on the meta batch of the same step: rows of earlier ones would cost passes of their own."""

    forward_mode: ClassVar[bool] = True

    def __init__(self, module: ALMKD) -> None:
        super().__init__(module)
        # there is one learning rate for all parameters
        self.parameter = [p for p in module.student.parameters() if p.requires_grad][-1]

    def before(self) -> None:
        """Keep what the pass depends on."""
        self.replay = Replay(self.module.student, tuple(self.module.tapped_student.layers))

    def check(self, seen: Seen) -> None:
        """Do student and terms support the derivative, and can the pass be repeated?"""
        self.lr()
        self._derivative(seen, self.replay.parameters)
        found = self.replay(self.module.tapped_student.laid_out(seen.train.x)).of(seen.train).logits
        logits = seen.student.logits
        if (found - logits).norm() > 0.05 * logits.norm():
            rank_zero_warn(
                f"a second pass of {type(self.module.student).__name__} over a batch gives other logits, though "
                "buffers and random numbers are the same: the meta-gradient is that of another pass"
            )

    def _derivative(self, seen: Seen, direction: exact.Named) -> Tensor:
        """Of the batch's terms, ``(B, S + 1)``, by the student's parameters along a direction; buffers stay."""
        x, terms = self.module.tapped_student.laid_out(seen.train.x), self.module.terms

        def function(theta: exact.Named) -> Tensor:
            student, values = self.replay(x, theta).of(seen.train), []
            for term, source in zip(terms.weighted, [None, *seen.sources], strict=True):
                own = {**dict(term.named_parameters()), **dict(term.named_buffers())}
                copies = {name: value.detach().to(student.logits, copy=True) for name, value in own.items()}
                value = functional_call(term, copies, (student, source, seen.train))
                values.append(term.scaled(value, source, seen.train))
            return torch.stack(self.module.of_distilled(values, seen.train), dim=1)

        if self.forward_mode:
            return exact.exact_derivative(function, self.replay.parameters, direction)
        # GPUs may round float32 in convolutions
        return exact.central_derivative(function, self.replay.parameters, direction, double=bool(self.replay.gpus))

    def align(self, seen: Seen) -> Align:
        """By one directional derivative of the terms."""
        meta, used = self.module.meta_batch, all_rows(index_of(seen.train))
        keep, every = ~torch.isin(index_of(meta), used), torch.ones_like(index_of(seen.train), dtype=torch.bool)
        trainable = {name: p for name, p in self.module.student.named_parameters() if p.requires_grad}

        def align(weights: Tensor, lr: float) -> Tensor:
            theta = self.replay.parameters
            if lr:
                total = (weights * torch.stack(seen.losses, dim=1)).sum()
                step = exact.mean(exact.gradient(total, trainable), every.sum().view(1), all_sum)
                theta = {name: value - lr * step[name] for name, value in theta.items()}
            v = self._validation_gradient(meta, keep, theta)
            if self.train_share:
                own = self._validation_gradient(seen.train, every, theta)
                v = {name: value.lerp(own[name], self.train_share) for name, value in v.items()}
            return self._derivative(seen, v)

        # the graph of the losses is there, though the caller takes no gradients
        return torch.enable_grad()(align)

    def _validation_gradient(self, batch: Batch, keep: Tensor, theta: exact.Named) -> dict[str, Tensor]:
        """The gradient of the mean loss of the rows that count, with the network in evaluation mode."""
        leaves = {name: value.detach().requires_grad_() for name, value in theta.items()}
        student, x = self.module.student, self.module.tapped_student.laid_out(batch.x)
        mixed = any(getattr(m, "track_running_stats", True) is False for m in student.modules())
        size = len(keep) if mixed or not isinstance(x, Tensor) else ROWS_AT_A_TIME
        sums: dict[str, Tensor] = {}
        with evaluating(student):
            replay = Replay(student)
            for part in [slice(first, first + size) for first in range(0, len(keep), size)]:
                outputs = replay(x[part] if isinstance(x, Tensor) else x, leaves)
                self.check_meta(outputs, batch.y[part])
                losses = self.module.task.label_loss(outputs.logits, batch.y[part])
                found = exact.gradient(losses.where(keep[part], 0), leaves)
                sums = {name: sums[name] + value if sums else value for name, value in found.items()}
        return exact.mean(sums, keep.sum().view(1), all_sum)


class Central(Exact):
    """The same by central differences, for operators that have no forward mode."""

    forward_mode = False
