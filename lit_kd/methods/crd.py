"""Contrastive representation distillation."""

from typing import Any

from lit_kd.distiller import Distiller
from lit_kd.models import Network
from lit_kd.terms import Contrastive, Term, Weights
from lit_kd.types import PENULTIMATE, Batch, Outputs


class CRD(Distiller):
    """Contrastive representation distillation (CRD, arXiv 1910.10699): cross-entropy, and `lit_kd.terms.Contrastive`.

    Needs a data module of `lit_kd.data`, whose sample indices address the memory. Several teachers have equal shares.
    The field's usual CE + 0.8 CRD + KL is ``CRD(..., extra=[KL()])``.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        student_tap: A layer of the student by its path, or ``"penultimate"``: what the last linear layer reads.
        teacher_tap: The same of the teacher.
        weight: What the contrast counts, beside 1 for the label; 0.8 in the authors' code.
        negatives: For each sample; 16384 in the authors' code.
        relax: Whether the positive is a random row of the sample's class, and not the sample itself.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        student_tap: str = PENULTIMATE,
        teacher_tap: str = PENULTIMATE,
        weight: float = 0.8,
        negatives: int = 1024,
        relax: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        self.student_tap, self.teacher_tap = student_tap, teacher_tap
        self.weight, self.negatives, self.relax = weight, negatives, relax

    def default_term(self) -> Term:
        """The contrast."""
        return Contrastive(self.student_tap, self.teacher_tap, negatives=self.negatives, relax=self.relax)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """1 for the label, and the weight."""
        return [1.0, *[self.weight / len(sources)] * len(sources)]
