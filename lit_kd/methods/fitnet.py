"""FitNet: hints from an inner layer of the teacher."""

from typing import Any

from lit_kd.models import Network
from lit_kd.terms import Hint, Term
from lit_kd.types import PENULTIMATE
from lit_kd.weightings.mean_teacher import Beside


class FitNet(Beside):
    """Hints (FitNet, arXiv 1412.6550): cross-entropy, and the error of inner features through a trained adapter.

    Both are learned at once, as in the field's benchmarks [code]; in the paper, hints come first. Several teachers have
    equal shares. To distil logits beside them: ``extra=[KL()]``.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        student_tap: A layer of the student by its path, such as ``"layer2"``, or ``"penultimate"``: what the last
            linear layer reads.
        teacher_tap: The same of the teacher.
        weight: What the hints count, beside 1 for the label; 100 in the benchmarks.
        **base: See `lit_kd.weightings.mean_teacher.Beside` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        student_tap: str = PENULTIMATE,
        teacher_tap: str = PENULTIMATE,
        weight: float = 100.0,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        self.student_tap, self.teacher_tap = student_tap, teacher_tap

    def default_term(self) -> Term:
        """Hints."""
        return Hint(self.student_tap, self.teacher_tap)
