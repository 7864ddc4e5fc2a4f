"""On-policy distillation of language models: the student is corrected where it goes itself."""

from typing import Any

from lit_kd.losses.divergences import Kind
from lit_kd.methods.sequence_kd import SequenceKD
from lit_kd.models import Network


class GKD(SequenceKD):
    """Generalised knowledge distillation (arXiv 2306.13649): part of the responses are sampled from the student.

    With probability ``student_share`` a batch's responses are the student's, drawn without dropout and without a
    gradient; else the data's or the teacher's. On both, the loss is the generalised Jensen-Shannon divergence of the
    next-token distributions. The label counts ``1 - weight``, on the student's own responses nothing. Each sequence
    counts the same, where the source sums over a batch's tokens [ours].

    Args:
        student: The network to train, a module or a name: from ids ``(B, T)`` to logits ``(B, T, C)``.
        teacher: One teacher, a module or a checkpoint path.
        student_share: In [0, 1]; 0.5 [code].
        weight: The teacher's share, in [0, 1].
        divergence: See `lit_kd.losses.divergence`.
        **sequences: See `SequenceKD`. Its ``beta`` is 0.5 [code], its ``sampling_temperature`` 1 [text], 0.9 [code].
    """

    samples = True

    def __init__(
        self,
        student: Network,
        teacher: Network | None = None,
        *,
        student_share: float = 0.5,
        weight: float = 1.0,
        divergence: Kind = "jensen_shannon",
        **sequences: Any,
    ) -> None:
        super().__init__(student, teacher, weight=weight, divergence=divergence, **sequences)
        if not 0 <= student_share <= 1:
            raise ValueError(f"expected student_share in [0, 1], found {student_share}")
        self.student_share = student_share

    def takes_own(self, coin: float) -> bool:
        """With the probability ``student_share``."""
        return coin < self.student_share
