"""Variational information distillation."""

from collections.abc import Sequence
from typing import Any

from lit_kd.methods.attention_transfer import AttentionTransfer
from lit_kd.models import Network
from lit_kd.models.taps import STAGES
from lit_kd.terms import Term, Variational


class VID(AttentionTransfer):
    """Variational information distillation (VID, arXiv 1904.05835): as `AttentionTransfer`, by `Variational`.

    A normal distribution of the teacher's maps, whose mean comes from the student's, is trained along. Where the
    teacher cannot be predicted its variance grows, and the channel counts less.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        student_taps: Layers of the student by their paths, which give maps or vectors.
        teacher_taps: As many of the teacher, in the same order.
        weight: What is distilled, beside 1 for the label; 1 in the benchmarks [code].
        **base: See `lit_kd.weightings.mean_teacher.Beside` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        student_taps: Sequence[str] = STAGES,
        teacher_taps: Sequence[str] = STAGES,
        weight: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(student, teacher, student_taps=student_taps, teacher_taps=teacher_taps, weight=weight, **base)

    def default_term(self) -> Term:
        """The distribution."""
        return Variational(*self.pairs)
