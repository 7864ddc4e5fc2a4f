"""Distilling step by step: the way to an answer is learned beside the answer."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.methods.supervised import Supervised
from lit_kd.models import Network
from lit_kd.models.generate import ids_of
from lit_kd.terms import Weights
from lit_kd.types import IGNORED, Batch, Outputs


class StepByStep(Supervised):
    """Distilling step by step (arXiv 2305.02301): ``a L_label + (1 - a) L_rationale``, one student for both.

    A rationale is the way to the answer, which a teacher or a person wrote. For each row the data's method
    ``rationales(index)`` gives it as a sequence with a prompt of its own, from sample indices ``(B,)`` to inputs and
    labels ``(B, T)``, see `lit_kd.data.SumsDataModule`. It is learned in training only: at test the student answers at
    once. Inputs must be ids ``(B, T)``; shorter sequences are padded with 0, behind all that counts.

    Args:
        student: The network to train, a module or a name: from ids ``(B, T)`` to logits ``(B, T, C)``.
        label_share: a in [0, 1]; 0.5 [code]. 1 is plain training.
        **base: See `lit_kd.Distiller`.
    """

    tasks = ("tokens",)
    changes_batches = True
    by_sample = True

    def __init__(
        self, student: Network, *, label_share: float = 0.5, task: Literal["tokens"] = "tokens", **base: Any
    ) -> None:
        super().__init__(student=student, task=task, **base)
        if not 0 <= label_share <= 1:
            raise ValueError(f"expected label_share in [0, 1], found {label_share}")
        self.label_share = label_share

    def setup(self, stage: str) -> None:
        """Refuse data without rationales."""
        super().setup(stage)
        if stage == "fit" and not hasattr(self.data, "rationales"):
            raise ValueError(
                f"expected data with rationales, found {type(self.data).__name__} without: give its class a method "
                "rationales(index), such as lit_kd.data.SumsDataModule has"
            )

    def prepare_batch(self, batch: Batch) -> Batch:
        """The batch, and its rationales behind it."""
        batch = super().prepare_batch(batch)
        if not isinstance(batch.x, Tensor):
            raise ValueError(
                f"expected batches of ids (B, T), found {sorted(batch.x)}: StepByStep joins rows, unmasked"
            )
        x, y = (part.to(batch.y.device) for part in self.data.rationales(batch.index))  # type: ignore[attr-defined]
        width = max(y.shape[1], batch.y.shape[1])

        def joined(first: Tensor, second: Tensor, value: int) -> Tensor:
            return torch.cat([F.pad(part, (0, width - part.shape[1]), value=value) for part in (first, second)])

        return Batch(joined(ids_of(batch.x), x, 0), joined(batch.y, y, IGNORED))

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """Twice the shares, as the mean is over both kinds of rows."""
        rows = len(batch.y) // 2
        own, way = 2 * self.label_share, 2 - 2 * self.label_share
        return student.logits.new_tensor([own] * rows + [way] * rows).unsqueeze(1)
