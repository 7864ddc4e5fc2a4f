"""What a rule of ALM-KD is, and what it sees."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.trust.meta import meta_gradient
from lit_kd.types import UNLABELED, Batch


@dataclass
class MetaStep:
    """A training batch, and how its terms agree with the validation gradient; without gradients, in float32.

    Attributes:
        index: Sample indices, ``(B,)``.
        y: Given labels, ``(B,)``, or ``(B, C)`` for several a sample.
        logits: Student logits, ``(B, C)``.
        teachers: Teacher logits, K tensors ``(B, C)``.
        alignment: From weights ``(B, K + 1)`` and a learning rate to `lit_kd.trust.meta.alignment`, ``(B, K + 1)``,
            after a look-ahead step with them; a learning rate of 0 takes none.
        lr: Current learning rate of the student.
        batch_size: Rows of the batch over all processes.
    """

    index: Tensor
    y: Tensor
    logits: Tensor
    teachers: list[Tensor]
    alignment: Callable[[Tensor, float], Tensor]
    lr: float
    batch_size: int

    @property
    def labelled(self) -> Tensor:
        """Which samples have a label, bool ``(B,)``."""
        return has_label(self.y)

    def gradient(self, weights: Tensor) -> Tensor:
        """``dL_val / d weights`` through one look-ahead step at the current learning rate, ``(B, K + 1)``."""
        return meta_gradient(self.alignment(weights, self.lr), self.lr, self.batch_size)


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
    tasks: ClassVar[tuple[str, ...]] = ("classification", "multilabel")
    """For which tasks it is made."""
    wants_validation: ClassVar[bool] = False
    """Whether to call `validated`."""

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

    def renew(self, table: SampleTable, epoch: int) -> None:  # noqa: B027 - most rules are done in `observe`
        """Renew the weights after an epoch."""

    def validated(self, table: SampleTable, wrong: Tensor, rows: Tensor) -> None:  # noqa: B027 - most do not ask
        """Take in who is wrong on validation rows: called in every process with the same, if `wants_validation`.

        A validation comes after its epoch's `renew`, there may be several in an epoch, none, or some before the rule is
        active; sanity checks are none. What is to survive a resume belongs into ``table.shared``.

        Args:
            table: The table.
            wrong: How many rows the student's class is wrong for, then each teacher's, ``(K + 1,)``.
            rows: How many were counted, a scalar above 0.
        """


def has_label(y: Tensor) -> Tensor:
    """Which of N samples have a label, or at least one of several, bool ``(N,)``."""
    return (y != UNLABELED).view(len(y), -1).any(1)


def index_of(batch: Batch) -> Tensor:
    """The sample indices of a batch, ``(B,)``; a ValueError where it has none."""
    if batch.index is None:
        raise ValueError(
            "expected batches with sample indices, (x, y, index), found one without: use a data module of lit_kd.data, "
            "and keep the index in hooks that change batches"
        )
    return batch.index
