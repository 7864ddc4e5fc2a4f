"""Training with labels alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_kd.data.batch import UNLABELED, Batch
from lit_kd.distiller import Distiller
from lit_kd.features import Outputs
from lit_kd.losses import cross_entropy
from lit_kd.models import Network


class Supervised(Distiller):
    """Cross-entropy with the labels: trains teachers, and is the baseline of every distilled student.

    With data of `lit_kd.data`, rows without a label are not drawn; in their place, those with one come more often.

    Args:
        student: The network to train, a module or a name.
        **base: See `lit_kd.Distiller`.
    """

    needs_teacher = False

    def __init__(self, student: Network, **base: Any) -> None:
        super().__init__(student=student, teacher=None, **base)
        self.hparams.pop("teacher", None)  # which is no argument here: a checkpoint could not pass it

    def training_rows(self) -> Tensor:
        """Those with a label."""
        return (self.data.labels != UNLABELED).nonzero().squeeze(1)

    def distill(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> dict[str, Tensor]:
        """One term, ``label``."""
        return {"label": cross_entropy(student.logits, batch.y)}
