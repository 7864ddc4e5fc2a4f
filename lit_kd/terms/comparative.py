"""What is learned from the teacher's differences between samples."""

from torch import Tensor, nn

from lit_kd.losses import comparative_loss
from lit_kd.terms.base import SAMPLES, Term
from lit_kd.terms.features import adapter
from lit_kd.types import Batch, Outputs


class Comparative(Term):
    """Differences of the student's responses between samples, against the teacher's (arXiv 2311.02253).

    See `lit_kd.losses.comparative_loss`. It needs no labels. On logits, it does not see that one network favours a
    class in all samples [derived]. Features of other widths go through an adapter, see `Hint` [ours].

    Args:
        student_tap: A layer of the student, see `lit_kd.models.taps.Tapped`; none: its logits.
        teacher_tap: A layer of the teacher, if one of the student is given.
        weight: A constant factor.
    """

    couples_batch = True
    tasks = SAMPLES

    def __init__(self, student_tap: str | None = None, teacher_tap: str | None = None, weight: float = 1.0) -> None:
        super().__init__(weight)
        if (student_tap is None) != (teacher_tap is None):
            found = f"{student_tap!r} and {teacher_tap!r}"
            raise ValueError(f"expected a layer of both networks, or of none for logits, found {found}")
        if student_tap is not None and teacher_tap is not None:
            self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.adapter: nn.Module | None = None

    def responses(self, student: Outputs, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        """Those of student and teacher, ``(B, ...)``."""
        assert teacher is not None
        if not self.student_taps:
            return student.logits, teacher.logits
        return student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the adapter, where shapes differ."""
        s, t = self.responses(student, teacher)
        if s.shape != t.shape:
            self.adapter = adapter(tuple(s.shape[1:]), tuple(t.shape[1:]))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The mean over all pairs of the batch, ``()``."""
        s, t = self.responses(student, teacher)
        return comparative_loss(s if self.adapter is None else self.adapter(s), t)
