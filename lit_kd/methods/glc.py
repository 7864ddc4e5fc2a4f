"""Gold loss correction: trusted rows tell how labels are mistaken for each other, and the loss is corrected by it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.losses import corrected_cross_entropy
from lit_kd.models import Network
from lit_kd.terms import SoftTarget, Weights
from lit_kd.trust.transition import gold_transition
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.base import has_label
from lit_kd.weightings.checks import warn_of_absent_classes
from lit_kd.weightings.stretches import Stretched


class Likelihood(SoftTarget):
    """`lit_kd.losses.corrected_cross_entropy` with a column of the table."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The corrected cross-entropy."""
        return corrected_cross_entropy(student.logits, self.table[self.column][batch.index])


class GLC(Stretched):
    """Gold loss correction (GLC, arXiv 1802.05300) [code].

    In the first half of the training the student learns from the labels of untrusted rows. What it then says of the
    trusted meta rows is how labels are mistaken for each other, see `lit_kd.trust.transition.gold_transition`. In the
    second half it learns anew from its initial weights, by forward correction of the untrusted labels, and by
    cross-entropy with the trusted ones. The published halves are each as long as a usual
    training.

    Args:
        student: The network to train, a module or a name.
        **base: See `lit_kd.Distiller`.
    """

    needs_teacher = False
    trains_on_meta = True
    tasks = ("classification",)
    settled = ("term", "label_term")
    num_stretches = 2

    def __init__(self, student: Network, **base: Any) -> None:
        super().__init__(student=student, teacher=None, **base)
        self.hparams.pop("teacher", None)  # which is no argument here
        self._templates = (None, Likelihood("likelihood"), self._templates[2])

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """Column ``likelihood``, ``(N, C)``: how probable the row's label is, by true class."""
        super().start_table(table, fresh)
        self.data.require_meta("GLC, by which the noise is estimated")
        warn_of_absent_classes(self.data)
        table.add("likelihood", self._likelihood(torch.eye(self.num_classes)), rows=True)

    def _likelihood(self, transition: Tensor) -> Tensor:
        """Of all labels given by a transition matrix; those of trusted rows are right."""
        y, labelled = self.data.labels.to(transition.device), has_label(self.data.labels).to(transition.device)
        right = F.one_hot(y.where(labelled, 0), self.num_classes).to(transition)
        found = torch.where(self.data.trusted.to(labelled).unsqueeze(1), right, right @ transition.T)
        return found.where(labelled.unsqueeze(1), 1)

    def training_rows(self) -> Tensor:
        """Those with a label; first the untrusted ones alone."""
        return (has_label(self.data.labels) & ~(self.data.trusted & (self.stretch == 0))).nonzero().squeeze(1)

    def begin_stretch(self, stretch: int) -> None:
        """First read the noise off the student."""
        assert self.table is not None
        said = self.predict_rows(self.data.parts.meta_rows(), teachers=False)
        self.table.shared["transition"] = gold_transition(said.student.logits.float().softmax(-1), said.y)
        self.table.shared["noise_rate"] = 1 - self.table.shared["transition"].diagonal()[said.y].mean()
        self.table["likelihood"] = self._likelihood(self.table.shared["transition"])
        super().begin_stretch(stretch)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The label alone."""
        return [1.0]
