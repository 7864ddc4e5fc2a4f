"""Comparative distillation."""

from typing import Any

from lit_kd.models import Network
from lit_kd.terms import Comparative, Term
from lit_kd.weightings.mean_teacher import Beside


class ComparativeKD(Beside):
    """Differences between the samples of a batch become the teacher's (arXiv 2311.02253), beside 1 for the label.

    See `lit_kd.terms.Comparative`. Each pair teaches, so that few samples suffice. The label has cross-entropy here
    [ours]; the authors compare differences of labels, too.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        student_tap: A layer of the student by its path, or ``"penultimate"``: what the last linear layer reads; none:
            logits are compared.
        teacher_tap: The same of the teacher.
        weight: What is distilled; 1 in the authors' code, which can diverge [ours].
        **base: See `lit_kd.weightings.mean_teacher.Beside` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        student_tap: str | None = None,
        teacher_tap: str | None = None,
        weight: float = 0.1,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        self.student_tap, self.teacher_tap = student_tap, teacher_tap

    def default_term(self) -> Term:
        """The differences."""
        return Comparative(self.student_tap, self.teacher_tap)
