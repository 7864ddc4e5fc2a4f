"""Normalised knowledge distillation."""

from typing import Any

from lit_kd.models import Network
from lit_kd.terms import NormalisedKL, Term
from lit_kd.weightings.mean_teacher import Beside, MeanTeacher


class NKD(Beside, MeanTeacher):
    """Normalised distillation (NKD, arXiv 2303.13005): cross-entropy, and `lit_kd.terms.NormalisedKL`.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        gamma: Weight of the classes that are not the label's: 1.5 on ImageNet, 3.5 at T = 3 on CIFAR-100 [code].
        temperature: Of these classes, T > 0, dimensionless.
        weight: What is distilled, beside 1 for the label.
        **base: See `lit_kd.weightings.mean_teacher.MeanTeacher` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        gamma: float = 1.5,
        temperature: float = 1.0,
        weight: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        self.gamma, self.temperature = gamma, temperature
        self.default_term()  # refuses what it cannot do

    def default_term(self) -> Term:
        """Normalised KL."""
        return NormalisedKL(self.gamma, self.temperature)
