"""Attention transfer: where in the image a teacher's features are large."""

from collections.abc import Sequence
from typing import Any

from lit_kd.models import Network
from lit_kd.models.taps import STAGES
from lit_kd.terms import Attention, Term
from lit_kd.weightings.mean_teacher import Beside


class AttentionTransfer(Beside):
    """Attention transfer (AT, arXiv 1612.03928): cross-entropy, and `lit_kd.terms.Attention` of several layers.

    Several teachers have equal shares. To distil logits beside it: ``extra=[KL()]``.

    Args:
        student: The network to train, a module or a name, with maps ``(B, c, h, w)``.
        teacher: One teacher or a list: modules or checkpoint paths.
        student_taps: Layers of the student by their paths.
        teacher_taps: As many of the teacher, in the same order.
        weight: What is distilled, beside 1 for the label; 1000 in the benchmarks [code], for maps of 32 x 32 to 8 x 8;
            smaller maps need less, in proportion to their pixels.
        **base: See `lit_kd.weightings.mean_teacher.Beside` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        student_taps: Sequence[str] = STAGES,
        teacher_taps: Sequence[str] = STAGES,
        weight: float = 1000.0,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        self.pairs = student_taps, teacher_taps

    def default_term(self) -> Term:
        """Attention."""
        return Attention(*self.pairs)
