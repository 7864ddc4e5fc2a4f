"""What is learned from the label, which may be wrong, or from a distribution in its place."""

import torch
from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.losses import (
    bernoulli_cross_entropy,
    by_sample,
    cross_entropy,
    generalized_cross_entropy,
    superloss,
    taylor_cross_entropy,
)
from lit_kd.terms.base import CLASSES, Term
from lit_kd.types import Batch, Outputs, full


class LabelTerm(Term):
    """A function of logits and label; of tokens and pixels, the mean over a sample."""

    reads_teacher = False
    tasks = CLASSES

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss of each row, ``(B,)``."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """See `loss`."""
        return by_sample(self.loss, batch.y, full(student.logits))


class CrossEntropy(LabelTerm):
    """`lit_kd.losses.cross_entropy`, for class numbers and soft labels.

    Args:
        label_smoothing: In [0, 1): the part of each label that is shared out among all classes.
        class_weights: A factor for each class; the loss stays the mean over samples, not over weights.
        weight: A constant factor.
    """

    class_weights: Tensor | None

    def __init__(
        self, label_smoothing: float = 0.0, class_weights: list[float] | None = None, weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        if not 0 <= label_smoothing < 1 or min(class_weights or [0.0]) < 0:
            found = f"{label_smoothing} and {class_weights}"
            raise ValueError(f"expected label_smoothing in [0, 1) and class_weights of at least 0, found {found}")
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", None if class_weights is None else torch.tensor(class_weights))

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        weights = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        return cross_entropy(logits, y, self.label_smoothing, weights)


class GeneralizedCrossEntropy(LabelTerm):
    """`lit_kd.losses.generalized_cross_entropy`, for labels that may be wrong.

    Args:
        q: In (0, 1]; 0.7 in the paper.
        weight: A constant factor.
    """

    def __init__(self, q: float = 0.7, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not 0 < q <= 1:
            raise ValueError(f"expected q in (0, 1], found {q}")
        self.q = q

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """``(1 - p_y^q) / q``."""
        return generalized_cross_entropy(logits, y, self.q)


class TaylorCrossEntropy(LabelTerm):
    """`lit_kd.losses.taylor_cross_entropy`, for labels that may be wrong.

    Args:
        order: Terms of the series, at least 1.
        weight: A constant factor.
    """

    def __init__(self, order: int = 2, weight: float = 1.0) -> None:
        super().__init__(weight)
        if order < 1:
            raise ValueError(f"expected an order of at least 1, found {order}")
        self.order = order

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The series."""
        return taylor_cross_entropy(logits, y, self.order)


class SuperLoss(LabelTerm):
    """`lit_kd.losses.superloss`, which lets hard samples count less.

    Args:
        strength: lambda > 0; 1 for CIFAR-10 and 0.25 for CIFAR-100 in the paper.
        weight: A constant factor.
    """

    def __init__(self, strength: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not strength > 0:
            raise ValueError(f"expected a strength above 0, found {strength}")
        self.strength = strength

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """SuperLoss of the cross-entropy."""
        return superloss(logits, y, self.strength)


class BernoulliCrossEntropy(LabelTerm):
    """`lit_kd.losses.bernoulli_cross_entropy`, for several labels a sample."""

    tasks = ("multilabel",)
    loss = staticmethod(bernoulli_cross_entropy)


class SoftTarget(Term):
    """Cross-entropy with a column of the table, ``(N, C)``, in the place of the label."""

    reads_teacher = False
    keeps_rows = True
    tasks = ("classification",)

    def __init__(self, column: str = "target", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.column = column

    def start(self, table: SampleTable, labels: Tensor) -> None:
        """Know the table."""
        self.table = table

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(full(student.logits), self.table[self.column][batch.index])
