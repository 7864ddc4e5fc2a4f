"""What is learned from a teacher's logits."""

import torch.nn.functional as F
from torch import Tensor

from lit_kd.losses import bernoulli_kd_loss, cross_entropy, decoupled_kd_loss, kd_loss
from lit_kd.terms.base import Term
from lit_kd.types import UNLABELED, Batch, Outputs


class LogitTerm(Term):
    """A function of the logits of student and teacher.

    Args:
        temperature: T > 0, dimensionless.
        weight: A constant factor.
    """

    tasks = ("classification",)

    def __init__(self, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not temperature > 0:
            raise ValueError(f"expected a temperature above 0, found {temperature}")
        self.temperature = temperature

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """The loss of each sample, ``(B,)``, from logits ``(B, C)`` and labels."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """See `loss`."""
        assert teacher is not None
        return self.loss(student.logits, teacher.logits, batch.y)


class KL(LogitTerm):
    """``T^2 KL(teacher || student)`` (Hinton et al., 2015), see `lit_kd.losses.kd_loss`."""

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """KL divergence."""
        return kd_loss(student, teacher, self.temperature)


class HardLabel(LogitTerm):
    """Cross-entropy with the class that the teacher finds most probable, at no temperature."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(1.0, weight)

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(student, teacher.argmax(-1))


class TeacherLabel(LogitTerm):
    """Cross-entropy with the teacher's probabilities, at temperature 1."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(1.0, weight)

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(student, teacher.softmax(-1), reduction="none")


class DecoupledKL(LogitTerm):
    """Decoupled KL (arXiv 2203.08679): what the teacher says of the labelled class, apart from all others.

    ``T^2 (alpha TCKD + beta NCKD)``, see `lit_kd.losses.decoupled_kd_loss`. Of a soft label, the most probable class
    counts.

    Args:
        alpha: Weight of the labelled class against all others.
        beta: Weight of the distribution over the others. In the authors' code 8, and 2 to 6 for some pairs.
        temperature: T > 0, dimensionless.
        weight: A constant factor.
    """

    tasks = ("classification",)

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__(temperature, weight)
        self.alpha = alpha
        self.beta = beta

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Both parts."""
        if y.is_floating_point():
            y = y.argmax(-1).where(y.any(-1), UNLABELED)
        return decoupled_kd_loss(student, teacher, y, self.alpha, self.beta, self.temperature)


class BernoulliKL(LogitTerm):
    """For several labels a sample, the mean of their KL divergences; see `lit_kd.losses.bernoulli_kd_loss`."""

    tasks = ("multilabel",)

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Mean KL divergence of the labels."""
        return bernoulli_kd_loss(student, teacher, self.temperature)
