"""Training with labels alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_kd.distiller.base import Distiller
from lit_kd.losses.labels import LabelLoss, label_loss_named
from lit_kd.models import Network
from lit_kd.types import UNLABELED, Batch, Outputs


class Supervised(Distiller):
    """The labels alone, by cross-entropy: trains teachers, and is the baseline of every distilled student.

    With data of `lit_kd.data`, rows without a label are not drawn; in their place, those with one come more often.

    Args:
        student: The network to train, a module or a name.
        label_loss: In the place of cross-entropy, for labels that may be wrong: see `lit_kd.losses.labels`.
        **base: See `lit_kd.Distiller`.
    """

    needs_teacher = False

    def __init__(self, student: Network, *, label_loss: LabelLoss = "cross_entropy", **base: Any) -> None:
        super().__init__(student=student, teacher=None, **base)
        self.label_loss = label_loss_named(label_loss)
        self.hparams.pop("teacher", None)  # which is no argument here: a checkpoint could not pass it

    def training_rows(self) -> Tensor:
        """Those with a label."""
        return (self.data.labels != UNLABELED).nonzero().squeeze(1)

    def distill(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> dict[str, Tensor]:
        """One term, ``label``."""
        return {"label": self.label_loss(student.logits, batch.y)}
