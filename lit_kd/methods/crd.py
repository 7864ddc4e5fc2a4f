"""Contrastive representation distillation."""

from typing import Any

from lit_kd.methods.fitnet import FitNet
from lit_kd.models import Network
from lit_kd.terms import Contrastive, Term


class CRD(FitNet):
    """Contrastive representation distillation (CRD, arXiv 1910.10699): as `FitNet`, with a contrast in place of hints.

    Needs a data module of `lit_kd.data`, whose sample indices address the memory of `lit_kd.terms.Contrastive`. The
    field's usual CE + 0.8 CRD + KL is ``CRD(..., extra=[KL()])``.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: What the contrast counts, beside 1 for the label; 0.8 in the authors' code.
        negatives: For each sample; 16384 in the authors' code.
        relax: Whether the positive is a random row of the sample's class, and not the sample itself.
        **base: See `FitNet` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 0.8,
        negatives: int = 1024,
        relax: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        self.negatives, self.relax = negatives, relax

    def default_term(self) -> Term:
        """The contrast."""
        return Contrastive(self.student_tap, self.teacher_tap, negatives=self.negatives, relax=self.relax)
