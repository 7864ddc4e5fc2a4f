"""What a rule of ALM-KD is, what it sees, and who tells it of validations."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_kd.data import DataModule
from lit_kd.data.table import SampleTable, all_sum
from lit_kd.terms import TASKS
from lit_kd.trust import belief
from lit_kd.trust.meta import meta_gradient
from lit_kd.types import Batch, Pairs

Align = Callable[[Tensor, float], Tensor]
"""From weights ``(B, S + 1)`` to `lit_kd.trust.meta.alignment`, ``(B, S + 1)``, after a look-ahead step with them and a
learning rate; a rate of 0 takes none."""


@dataclass
class MetaStep:
    """A training batch, and how its terms agree with the validation gradient; without gradients, in float32."""

    index: Tensor  # of the samples, (B,)
    y: Tensor  # given labels, (B,), or (B, C) for several a sample
    logits: Tensor  # of the student, (B, C)
    teachers: list[Tensor]  # their logits, K of (B, C)
    alignment: Align
    lr: float  # the student's, now
    batch_size: int  # rows of the batch over all processes
    known: Tensor | None = None  # which rows each teacher speaks of, bool (B, K); None: all

    def gradient(self, weights: Tensor) -> Tensor:
        """``dL_val / d weights`` through one look-ahead step at the current learning rate, ``(B, K + 1)``."""
        return meta_gradient(self.alignment(weights, self.lr), self.lr, self.batch_size)

    def of_rows(self, pairs: Pairs | None) -> "MetaStep":
        """Of mixed inputs the step of their rows, each seen in the input of which it is the greatest part."""
        if pairs is None:
            return self
        main, part = pairs.main, len(pairs.main) / len(pairs.rows)

        def aligned(weights: Tensor, lr: float) -> Tensor:
            found = self.alignment(weights[pairs.rows], lr)
            return part * found.new_zeros(weights.shape).index_add(0, pairs.rows, found)

        outputs = self.logits[main], [logits[main] for logits in self.teachers]
        known = self.known if self.known is None else self.known[main]
        size = round(part * self.batch_size)
        return MetaStep(self.index[main], self.y[main], *outputs, aligned, self.lr, size, known)


class Rule(ABC):
    """Keeps the column ``weights`` of a sample table, ``(N, K + 1)``: label first, then each teacher.

    A training batch first passes `observe`, in the epochs in which the rule is `active`; then the student learns with
    the weights that the table holds. After an epoch's last batch every process has the same table and calls `renew`,
    and `validated` after each validation.
    """

    trains_on_meta: ClassVar[bool] = False
    """Whether the meta rows take part in training."""
    meta_rows: ClassVar[int | None] = None
    """Over how many of the latest meta rows the validation loss is taken; ``None``: those of one batch."""
    train_share: float = 0.0
    """Of the training batch's loss, beside the validation loss, in the loss whose gradient the meta-step takes."""
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)
    """For which tasks it is made."""
    needs_teacher: ClassVar[bool] = True
    """Whether it learns nothing without a teacher."""
    wants_validation: ClassVar[bool] = False
    """Whether to call `validated`."""

    looks_ahead: ClassVar[bool] = True
    """Whether it needs the meta-gradient, and so meta batches."""

    @abstractmethod
    def start(self, table: SampleTable, teachers: int, trusted: Tensor, labels: Tensor, epochs: int | None) -> None:
        """Add the rule's columns.

        Args:
            table: The table; columns restored from a checkpoint keep their values.
            teachers: K.
            trusted: Which rows are trusted meta rows, bool ``(N,)``.
            labels: Given labels, ``(N,)``; `UNLABELED` where there is none.
            epochs: How many epochs the training has; ``None``: nobody knows.
        """

    @abstractmethod
    def active(self, epoch: int) -> bool:
        """Whether the meta-step is taken in this epoch, counted from 0."""

    @abstractmethod
    def observe(self, table: SampleTable, step: MetaStep) -> None:
        """Take the meta-step for a training batch."""

    def revise(self, table: SampleTable, batch: Batch) -> Batch:
        """A training batch with the labels that are to be learned."""
        return batch

    def weights(self, table: SampleTable, index: Tensor) -> Tensor:
        """How much the label, then each teacher counts, ``(B, K + 1)``."""
        return table["weights"][index]

    def renew(self, table: SampleTable, epoch: int) -> None:  # noqa: B027 - most rules are done in `observe`
        """Renew the weights after an epoch."""

    def validated(self, table: SampleTable, wrong: Tensor, rows: Tensor) -> None:  # noqa: B027 - most do not ask
        """Take in who is wrong on validation rows: called in every process with the same, if `wants_validation`.

        A validation comes after its epoch's `renew`, there may be several in an epoch, none, or some before the rule is
        active; sanity checks are none. What is to survive a resume belongs into ``table.shared``.

        Args:
            table: The table.
            wrong: See `count_errors`, ``(3, K + 1)``.
            rows: How many rows there were, a scalar above 0.
        """


class TellRule(Callback):
    """Counts errors of student and teachers on the split val, and tells ALM-KD's rule."""

    def on_validation_epoch_start(self, trainer: Trainer, module: Any) -> None:
        """Count anew."""
        self.counts = torch.zeros(3, 1 + len(module.teachers), dtype=torch.int64, device=module.device)
        self.rows = torch.zeros((), dtype=torch.int64, device=module.device)

    def on_validation_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the rows that no other process has; further validation loaders may be of other data."""
        if dataloader_idx != getattr(module.datamodule, "split_loader", 0):
            return
        self.counts += count_errors(*(outputs[name] for name in ("logits", "y", "teachers", "known")))
        self.rows += len(outputs["y"])

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """Tell the rule, before a checkpoint is written."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and module.table is not None:
            wrong, rows = all_sum(self.counts), all_sum(self.rows)
            if rows > 0:
                module.rule.validated(module.table, wrong, rows)


def count_errors(logits: Tensor, y: Tensor, teachers: list[Tensor], known: Sequence[Tensor | None]) -> Tensor:
    """How often the student, each teacher, and both together are wrong, ``(3, K + 1)``.

    Of all rows, then of those that each teacher speaks of. Together, a teacher is one voice beside ``belief.VOICES``
    of the student's: it has its way where it is sure and the student is not.
    """
    alone = torch.stack([logits, *teachers]).float().softmax(-1)
    student = alone[:1].expand_as(alone)
    wrong = torch.stack([student, alone, belief.VOICES * student + alone]).argmax(-1) != y
    counted = torch.stack([torch.ones_like(wrong[0, 0]) if rows is None else rows for rows in (None, *known)])
    return (wrong & counted).sum(-1)


def without_silent(weights: Tensor, known: Tensor | None) -> Tensor:
    """Weights ``(N, K + 1)`` in which the label takes over the teachers' that do not speak of a row, ``(N, K)``."""
    if known is None:
        return weights
    kept = weights[:, 1:] * known.to(weights.device)
    return torch.cat([weights[:, :1] + (weights[:, 1:] - kept).sum(1, keepdim=True), kept], dim=1)


def has_label(y: Tensor) -> Tensor:
    """Which of N samples have a label, or at least one of several, bool ``(N,)``."""
    return (~y.isnan() if y.is_floating_point() else y >= 0).view(len(y), -1).any(1)


def labelled_rows(data: DataModule) -> Tensor:
    """Indices of the rows that are trained on and have a label, ``(n,)``."""
    return has_label(data.labels).nonzero().squeeze(1)
