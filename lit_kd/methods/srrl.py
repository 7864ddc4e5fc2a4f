"""SRRL: the teacher's last layer reads the student's features."""

from typing import Any, cast

from lit_kd.models import Network
from lit_kd.models.subclasses import class_head
from lit_kd.terms import SoftmaxRegression, Term
from lit_kd.types import PENULTIMATE
from lit_kd.weightings.mean_teacher import Beside


class SRRL(Beside):
    """Softmax regression representation learning (SRRL, ICLR 2021): cross-entropy, and `SoftmaxRegression`.

    The student keeps its own last layer. Several teachers have equal shares.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        student_tap: A layer of the student by its path, or ``"penultimate"``: what the last linear layer reads. In the
            authors' code the last map: for networks such as ``resnet20``, ``"layer3"``.
        weight: What is distilled, beside 1 for the label; 1 on ImageNet [code].
        **base: See `lit_kd.weightings.mean_teacher.Beside` and `lit_kd.Distiller`.
    """

    settled = ("term",)

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        student_tap: str = PENULTIMATE,
        weight: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        self.student_tap = student_tap

    def default_term(self) -> Term:
        """Errors of features and of the logits that they give."""
        return SoftmaxRegression(self.student_tap)

    def complete_student(self) -> None:
        """Show each teacher's last layer to its term."""
        assert self.terms is not None
        for term, teacher in zip(self.terms.each, self.teachers.models, strict=True):
            cast(SoftmaxRegression, term).head = (class_head(teacher),)
