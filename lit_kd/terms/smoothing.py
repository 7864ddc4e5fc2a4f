"""What is learned from the label as a distribution."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_kd.data.labels import check_matrix
from lit_kd.losses import brier_score, smoothed_cross_entropy, teacher_free_loss
from lit_kd.terms.labels import LabelTerm
from lit_kd.trust.similarity import as_rows
from lit_kd.types import Outputs


class SmoothedCrossEntropy(LabelTerm):
    """Semantic label smoothing (arXiv 2004.07711): classes that resemble the label's get a part of it.

    See `lit_kd.losses.smoothed_cross_entropy`. `lit_kd.trust.similarity` makes matrices of attributes and of vectors,
    `lit_kd.trust.transition.gold_transition` of what a teacher says of each class.

    Args:
        matrix: Rows of C probabilities, in the order of the classes: entry ``[i][j]`` is j's share of what i gives.
        smoothing: In [0, 1]: the part of each label that is given away.
        weight: A constant factor.
    """

    matrix: Tensor

    def __init__(self, matrix: Sequence[Sequence[float]] | Tensor, smoothing: float = 0.1, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not 0 <= smoothing <= 1:
            raise ValueError(f"expected smoothing in [0, 1], found {smoothing}")
        meaning = "Entry [i][j] is the share of class j in what class i gives away."
        checked = check_matrix(as_rows(matrix), len(matrix), "similarity", meaning)
        self.register_buffer("matrix", torch.from_numpy(checked).float(), persistent=False)
        self.smoothing = smoothing

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Refuse a matrix of another size."""
        if student.logits.shape[-1] != len(self.matrix):
            classes = student.logits.shape[-1]
            raise ValueError(f"expected a matrix of the {classes} classes, found one of {len(self.matrix)}")

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        return smoothed_cross_entropy(logits, y, self.matrix, self.smoothing)


class Brier(LabelTerm):
    """The squared error of the probabilities, `lit_kd.losses.brier_score`, to train a teacher (arXiv 2407.18041).

    The student's error is bounded by the teacher's squared distance from the true probabilities [text]. The published
    code means to take its mean over classes, but never takes it [code]; here it is the sum [ours].
    """

    loss = staticmethod(brier_score)


class TeacherFree(LabelTerm):
    """`lit_kd.losses.teacher_free_loss`: a teacher made by hand, which is label smoothing but for its size.

    Args:
        alpha: The teacher's share, in [0, 1]; on CIFAR-100 0.1 for a ResNet-18, 0.95 for a MobileNetV2 [code].
        temperature: T > 0 of the teacher alone, dimensionless; 20 and 40.
        multiplier: m of KL as a mean over classes, 100 and 1; C, the default, gives KL its true size.
        weight: A constant factor.
    """

    def __init__(
        self, alpha: float = 0.1, temperature: float = 20.0, multiplier: float | None = None, weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        if not 0 <= alpha <= 1 or not temperature > 0 or (multiplier or 0) < 0:
            expected = "expected alpha in [0, 1], a temperature above 0 and a multiplier of at least 0"
            raise ValueError(f"{expected}, found {alpha}, {temperature} and {multiplier}")
        self.alpha, self.temperature, self.multiplier = alpha, temperature, multiplier

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Both parts."""
        return teacher_free_loss(logits, y, self.alpha, self.temperature, self.multiplier)
