"""What is learned from a teacher's logits."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.losses import (
    bernoulli_kd_loss,
    by_sample,
    contradicts,
    correlation_loss,
    cross_entropy,
    decoupled_kd_loss,
    divergence,
    kd_loss,
    normalised_kd_loss,
    revise_labels,
    revised_teacher,
    slam_loss,
    slam_mix,
    standardised,
    teacher_labels,
)
from lit_kd.losses.divergences import Kind
from lit_kd.terms.base import CLASSES, Term
from lit_kd.trust.reliability import MixingRates, class_ranks, margin
from lit_kd.types import Batch, Outputs, check_choice, class_labels, full


class LogitTerm(Term):
    """A function of the logits of student and teacher; of tokens and pixels, the mean over a sample.

    Args:
        temperature: T > 0, dimensionless.
        weight: A constant factor.
        standardise: Compare logits of mean 0 and standard deviation 1, so that neither network's scale counts (arXiv
            2403.01427, whose code has T = 2 and weights of 9 for what is distilled and 0.1 for the label).
    """

    tasks = CLASSES

    def __init__(self, temperature: float = 4.0, weight: float = 1.0, standardise: bool = False) -> None:
        super().__init__(weight)
        if not temperature > 0:
            raise ValueError(f"expected a temperature above 0, found {temperature}")
        self.temperature, self.standardise = temperature, standardise

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """The loss of each row, ``(B,)``, from logits ``(B, C)`` and labels."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """See `loss`."""
        assert teacher is not None
        z, t = full(student.logits), full(teacher.logits)
        return by_sample(self.own_loss, batch.y, z, t)

    def own_loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """See `loss`, of logits that are standardised, if wanted."""
        if self.standardise:
            student, teacher = standardised(student), standardised(teacher)
        return self.loss(student, teacher, y)


class KL(LogitTerm):
    """``T^2 KL(teacher || student)`` (Hinton et al., 2015), or another divergence in its place.

    Args:
        temperature: T > 0, dimensionless.
        weight: A constant factor.
        divergence: See `lit_kd.losses.divergence`.
        beta: Of those that mix both distributions, in (0, 1).
        standardise: See `LogitTerm`.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        weight: float = 1.0,
        divergence: Kind = "forward",
        beta: float = 0.5,
        standardise: bool = False,
    ) -> None:
        super().__init__(temperature, weight, standardise)
        self.divergence, self.beta = divergence, beta
        self.loss(torch.zeros(1, 3), torch.zeros(1, 3), torch.zeros(1))  # refuses what is not known

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """The divergence."""
        q, p = ((logits / self.temperature).log_softmax(-1) for logits in (student, teacher))
        return self.temperature**2 * divergence(p, q, self.divergence, self.beta)


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
        standardise: See `LogitTerm`.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        weight: float = 1.0,
        standardise: bool = False,
    ) -> None:
        super().__init__(temperature, weight, standardise)
        self.alpha, self.beta = alpha, beta

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Both parts."""
        return decoupled_kd_loss(student, teacher, class_labels(y), self.alpha, self.beta, self.temperature)


class NormalisedKL(LogitTerm):
    """The label's class, and the others apart from it (NKD, arXiv 2303.13005); see `lit_kd.losses.normalised_kd_loss`.

    Of a soft label, the most probable class counts [code].

    Args:
        gamma: Weight of the distribution over the others: 1.5 on ImageNet, 3.5 at T = 3 on CIFAR-100 [code].
        temperature: T > 0, dimensionless.
        weight: A constant factor.
        standardise: See `LogitTerm`.
    """

    def __init__(
        self, gamma: float = 1.5, temperature: float = 1.0, weight: float = 1.0, standardise: bool = False
    ) -> None:
        super().__init__(temperature, weight, standardise)
        if gamma < 0:
            raise ValueError(f"expected a gamma of at least 0, found {gamma}")
        self.gamma = gamma

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Both parts."""
        return normalised_kd_loss(student, teacher, class_labels(y), self.gamma, self.temperature)


class Correlation(LogitTerm):
    """How well probabilities agree but for scale and shift, ``T^2 (1 - Pearson's correlation)`` of each sample.

    It is the inter-class part of DIST (arXiv 2205.10536), see `lit_kd.losses.correlation_loss`.
    """

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Over the classes."""
        return self.temperature**2 * self.correlations(
            *((z / self.temperature).softmax(-1) for z in (student, teacher))
        )

    def correlations(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of probabilities ``(B, C)``."""
        return correlation_loss(student, teacher)


class BatchCorrelation(Correlation):
    """The same over the samples of the batch, the mean of all classes: the intra-class part of DIST."""

    couples_batch = True
    tasks = ("classification",)

    def correlations(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of the transposes, one number."""
        return correlation_loss(student.mT, teacher.mT).mean()


class BernoulliKL(LogitTerm):
    """For several labels a sample, the mean of their KL divergences; see `lit_kd.losses.bernoulli_kd_loss`."""

    tasks = ("multilabel",)

    def __init__(self, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__(temperature, weight)

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

    tasks = ("classification",)

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
