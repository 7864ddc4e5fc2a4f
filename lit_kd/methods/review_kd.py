"""Distillation by knowledge review."""

from typing import Any

from lit_kd.models import Network
from lit_kd.terms import Review, Term, Weights
from lit_kd.terms.stages import STAGES
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.mean_teacher import Beside


class ReviewKD(Beside):
    """Stages of the student, fused from the last to the first, become the teacher's (ReviewKD, arXiv 2104.09044).

    The label counts 1, `lit_kd.terms.Review` ``w weight``; w rises from 1 / warm-up to 1 [code].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        student_stages: Layers of the student from the first to the last. The default fits networks such as
            ``resnet20``, ``wrn-16-2`` and ``cnn-16``.
        teacher_stages: The counterpart of each in the teacher.
        weight: What is distilled; 0.6 for ``resnet56`` and ``resnet20``, 5 for ``resnet32x4`` and ``resnet8x4`` [code].
        warmup_epochs: Epochs until w is 1; 20 of 240 in the authors' code.
        **base: See `lit_kd.weightings.mean_teacher.Beside` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        student_stages: list[str] | tuple[str, ...] = STAGES,
        teacher_stages: list[str] | tuple[str, ...] = STAGES,
        weight: float = 1.0,
        warmup_epochs: int = 20,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        if warmup_epochs < 0:
            raise ValueError(f"expected warmup_epochs of at least 0, found {warmup_epochs}")
        self.student_stages, self.teacher_stages, self.warmup_epochs = student_stages, teacher_stages, warmup_epochs

    def default_term(self) -> Term:
        """The fused stages."""
        return Review(self.student_stages, self.teacher_stages)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """1, and ``w weight``, which several teachers share."""
        label, *others = super().weigh(student, sources, batch)
        w = min((self.current_epoch + 1) / max(1, self.warmup_epochs), 1.0)
        return [label, *(w * other for other in others)]
