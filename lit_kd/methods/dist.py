"""Distillation from a stronger teacher, by correlations."""

from typing import Any

from lit_kd.models import Network
from lit_kd.terms import BatchCorrelation, Correlation, Term
from lit_kd.weightings.mean_teacher import Beside, MeanTeacher


class DIST(Beside, MeanTeacher):
    """Correlations in the place of KL (DIST, arXiv 2205.10536): ``CE + weight T^2 (inter + intra)``.

    *Inter* correlates the classes of each sample, and can be weighed by sample: `lit_kd.terms.Correlation` is a term
    for `ALMKD`, too. *Intra* correlates the samples of a batch, so batches should be large.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: What is distilled, beside 1 for the label.
        intra: What the intra-class part counts beside the inter-class part.
        temperature: T > 0, dimensionless: 4 on CIFAR, 1 on ImageNet [code].
        **base: See `lit_kd.weightings.mean_teacher.MeanTeacher` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 2.0,
        intra: float = 1.0,
        temperature: float = 4.0,
        extra: list[Term] | None = None,
        **base: Any,
    ) -> None:
        if intra < 0:
            raise ValueError(f"expected an intra of at least 0, found {intra}")
        within = BatchCorrelation(temperature, weight * intra)
        super().__init__(student=student, teacher=teacher, weight=weight, extra=[within, *(extra or [])], **base)
        self.intra, self.temperature = intra, temperature

    def default_term(self) -> Term:
        """The inter-class part."""
        return Correlation(self.temperature)
