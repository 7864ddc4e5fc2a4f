"""Distillation by knowledge review."""

from collections.abc import Sequence
from typing import Any

from lit_kd.methods.attention_transfer import AttentionTransfer
from lit_kd.models import Network
from lit_kd.models.taps import STAGES
from lit_kd.terms import Review, Term, Weights
from lit_kd.types import PENULTIMATE, Batch, Outputs
from lit_kd.weightings.mean_teacher import warm_up


class ReviewKD(AttentionTransfer):
    """Stages of the student, fused from the last to the first, become the teacher's (ReviewKD, arXiv 2104.09044).

    The label counts 1, `lit_kd.terms.Review` ``w weight``; w begins at 1 / warm-up [other code], not at 0 [code].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        student_taps: Layers of the student from the first to the last. The default fits networks such as ``resnet20``,
            ``wrn-16-2`` and ``cnn-16``.
        teacher_taps: The counterpart of each in the teacher.
        weight: What is distilled; 0.6 for ``resnet56`` and ``resnet20``, 5 for ``resnet32x4`` and ``resnet8x4`` [code].
        warmup_epochs: Epochs until w is 1; 20 of 240 in the authors' code.
        **base: See `lit_kd.weightings.mean_teacher.Beside` and `lit_kd.Distiller`.
    """

    rises = "warmup_epochs"

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        student_taps: Sequence[str] = (*STAGES, PENULTIMATE),
        teacher_taps: Sequence[str] = (*STAGES, PENULTIMATE),
        weight: float = 1.0,
        warmup_epochs: int = 20,
        **base: Any,
    ) -> None:
        super().__init__(student, teacher, student_taps=student_taps, teacher_taps=teacher_taps, weight=weight, **base)
        if warmup_epochs < 0:
            raise ValueError(f"expected warmup_epochs of at least 0, found {warmup_epochs}")
        self.warmup_epochs = warmup_epochs

    def default_term(self) -> Term:
        """The fused stages."""
        return Review(*self.pairs)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """1, and ``w weight``, which several teachers share."""
        w = warm_up(self.current_epoch, self.warmup_epochs) * self.weight / len(sources)
        return [1.0, *[w] * len(sources)]
