"""Speculative distillation: the student proposes, the teacher replaces what it finds unlikely."""

from typing import Any

from torch import Tensor

from lit_kd.methods.sequence_kd import SequenceKD, check_sampling
from lit_kd.models import Network
from lit_kd.models.generate import NextToken, draw_tokens, ids_of
from lit_kd.types import IGNORED, Batch, Inputs


class SpeculativeKD(SequenceKD):
    """Speculative knowledge distillation (arXiv 2410.11325): responses that student and teacher write together.

    The student proposes each token. One that is not among the teacher's ``top_k`` likeliest is replaced by one sampled
    from the teacher, and the response goes on from there. The loss is the divergence of the next-token distributions;
    labels count nothing, as the tokens are the student's in part. ``train/kept`` logs the share of proposals that were
    kept. The source proposes five tokens at a time, which saves time and changes no distribution.

    Args:
        student: The network to train, a module or a name: from ids ``(B, T)`` to logits ``(B, T, C)``.
        teacher: One teacher, a module or a checkpoint path.
        top_k: At least 0: 0 takes the teacher's tokens alone, and the vocabulary's size the student's; 25 [code].
        weight: The teacher's share, in [0, 1].
        sampling_temperature: T > 0 of the student's proposals; 0.5 [code].
        top_p: Of the student's proposals, in (0, 1], see `SequenceKD`; 0.5 [code].
        teacher_temperature: T > 0 of the teacher's replacements; 0.2 [code].
        teacher_top_p: Of the teacher's replacements; 0.5 [code].
        **sequences: See `SequenceKD`.
    """

    samples = True

    def __init__(
        self,
        student: Network,
        teacher: Network | None = None,
        *,
        top_k: int = 25,
        weight: float = 1.0,
        sampling_temperature: float = 0.5,
        top_p: float = 0.5,
        teacher_temperature: float = 0.2,
        teacher_top_p: float = 0.5,
        **sequences: Any,
    ) -> None:
        super().__init__(
            student, teacher, weight=weight, sampling_temperature=sampling_temperature, top_p=top_p, **sequences
        )
        if self.responses != "data":
            raise ValueError("expected no responses: SpeculativeKD lets student and teacher write them; leave it out")
        check_sampling(teacher_temperature, teacher_top_p)
        if top_k < 0:
            raise ValueError(f"expected top_k of at least 0, found {top_k}")
        self.top_k, self.teacher_temperature, self.teacher_top_p = top_k, teacher_temperature, teacher_top_p
        self._kept: dict[int, Tensor] = {}  # of each token of the last batch, whether the proposal was kept, (B,)

    def takes_own(self, coin: float) -> bool:
        """Always."""
        return True

    def next_token(self, own: bool) -> NextToken | None:
        """The student's proposal, or the teacher's token."""
        propose = super().next_token(own=True)
        assert propose is not None

        def drawn(x: Inputs, uniform: Tensor) -> Tensor:
            proposed, logits = propose(x, uniform), self.teacher_logits(x)[:, -1]
            better = (logits > logits.gather(1, proposed.unsqueeze(1))).sum(1)  # tokens that the teacher prefers
            kept = better < self.top_k
            self._kept[ids_of(x).shape[1]] = kept
            own = draw_tokens(logits, uniform[:, 1], self.teacher_temperature, self.teacher_top_p)
            return proposed.where(kept, own)

        return drawn

    def prepare_batch(self, batch: Batch) -> Batch:
        """Sample the responses."""
        self._kept.clear()
        batch = super().prepare_batch(batch)
        counted = batch.y != IGNORED
        kept = sum(int((counted[:, t - 1] & rows).sum()) for t, rows in self._kept.items())
        self.log_means({"train/kept": kept / max(1, int(counted.sum()))}, len(batch.y))
        return batch
