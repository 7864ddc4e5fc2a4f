"""What is learned from a teacher that errs: the student's output is mixed as the teacher would get it wrong."""

from torch import Tensor

from lit_kd.losses import slam_loss, slam_mix, teacher_labels
from lit_kd.terms.logits import LogitTerm
from lit_kd.trust.reliability import MixingRates, class_ranks, margin


class Mixed(LogitTerm):
    """Student-label mixing (SLaM, arXiv 2302.03806), see `lit_kd.losses.slam_mix`.

    Args:
        hard: Whether the teacher's label is its most probable class, or its probabilities.
        normalise: Share the teacher's mistakes out among its other k - 1 classes.
        weight: A constant factor.
    """

    def __init__(self, hard: bool = True, normalise: bool = False, weight: float = 1.0) -> None:
        super().__init__(1.0, weight)
        self.hard = hard
        self.normalise = normalise
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
