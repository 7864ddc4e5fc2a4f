"""Training with labels alone."""

from typing import Any

from torch import Tensor

from lit_kd.distiller import Distiller
from lit_kd.models import Network
from lit_kd.terms import Weights
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.base import labelled_rows


class Supervised(Distiller):
    """The labels alone, by cross-entropy: trains teachers, and is the baseline of every distilled student.

    For labels that may be wrong, ``label_term`` takes another loss's place. With data of `lit_kd.data`, rows without a
    label are not drawn; in their place, those with one come more often.

    Args:
        student: The network to train, a module or a name.
        **base: See `lit_kd.Distiller`.
    """

    needs_teacher = False
    settled = ("term",)

    def __init__(self, student: Network, **base: Any) -> None:
        super().__init__(student=student, teacher=None, **base)
        self.hparams.pop("teacher", None)  # which is no argument here: a checkpoint could not pass it

    def training_rows(self) -> Tensor:
        """Those with a label."""
        return labelled_rows(self.data)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The label alone."""
        return [1.0]
