"""What is learned from a teacher's logits."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lit_kd.losses import (
    bernoulli_kd_loss,
    contradicts,
    cross_entropy,
    decoupled_kd_loss,
    kd_loss,
    revise_labels,
    revised_teacher,
    slam_loss,
    slam_mix,
    teacher_labels,
)
from lit_kd.terms.base import Term
from lit_kd.trust.reliability import MixingRates, class_ranks, margin
from lit_kd.types import Batch, Outputs, check_choice, class_labels


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

    See `lit_kd.losses.decoupled_kd_loss`. Of a soft label, the most probable class counts.

    Args:
        alpha: Weight of the labelled class against all others.
        beta: Weight of the distribution over the others. In the authors' code 8, and 2 to 6 for some pairs.
        temperature: T > 0, dimensionless.
        weight: A constant factor.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__(temperature, weight)
        self.alpha, self.beta = alpha, beta

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Both parts."""
        return decoupled_kd_loss(student, teacher, class_labels(y), self.alpha, self.beta, self.temperature)


class BernoulliKL(LogitTerm):
    """For several labels a sample, the mean of their KL divergences; see `lit_kd.losses.bernoulli_kd_loss`."""

    tasks = ("multilabel",)

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Mean KL divergence of the labels."""
        return bernoulli_kd_loss(student, teacher, self.temperature)


class Mixed(LogitTerm):
    """Student-label mixing (SLaM, arXiv 2302.03806), see `lit_kd.losses.slam_mix`.

    Args:
        hard: Whether the teacher's label is its most probable class, or its probabilities.
        normalise: Share the teacher's mistakes out among its other k - 1 classes.
        weight: A constant factor.
    """

    def __init__(self, hard: bool = True, normalise: bool = False, weight: float = 1.0) -> None:
        super().__init__(1.0, weight)
        self.hard, self.normalise = hard, normalise
        self.rates: MixingRates | None = None
        """How often the teacher is right, set by the method; no checkpoint holds it."""

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of the teacher's label with the mixed output."""
        assert self.rates is not None
        teacher = teacher.float()
        at = margin(teacher)
        top = class_ranks(teacher) < self.rates.k(at).unsqueeze(-1)
        mix = slam_mix(student.float().softmax(-1), top, self.rates.alpha(at), self.normalise)
        return slam_loss(mix, teacher_labels(teacher, self.hard))


class Revised(LogitTerm):
    """Label revision (arXiv 2404.03693): where the teacher contradicts the label, its probabilities are revised.

    ``"mse"`` has the losses of a reimplementation by others: ``4 mean_c (z - t)^2`` where both agree, else
    ``mean_c (softmax(z) - p)^2`` with the revised probabilities p; ``"kl"`` has KL to either, which is ours.

    Args:
        eta: In [0, 1): how much of a wrong teacher stays, see `lit_kd.losses.revise_labels`.
        form: The loss.
        weight: A constant factor.
    """

    def __init__(self, eta: float = 0.8, form: Literal["mse", "kl"] = "mse", weight: float = 1.0) -> None:
        super().__init__(1.0, weight)
        if not 0 <= eta < 1:
            raise ValueError(f"expected an eta of label revision in [0, 1), found {eta}")
        check_choice("form", form, ("mse", "kl"))
        self.eta, self.form = eta, form

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """See above."""
        y = class_labels(y)
        if self.form == "kl":
            return kd_loss(student, revised_teacher(teacher, y, self.eta))
        revised = (student.softmax(-1) - revise_labels(teacher.softmax(-1), y, self.eta)).square().mean(-1)
        return revised.where(contradicts(teacher, y), 4 * (student - teacher).square().mean(-1))
