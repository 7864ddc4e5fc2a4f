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
from lit_kd.weightings.mean_teacher import as_one
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
    cross-entropy with the trusted ones. The published halves are each as long as a usual training. A teacher that was
    trained on the untrusted labels takes the place of the first half [ours]; it teaches nothing else.

    Args:
        student: The network to train, a module or a name.
        teacher: None, or teachers, whose mean probabilities count: modules or checkpoint paths.
        **base: See `lit_kd.Distiller`.
    """

    table: SampleTable  # there in training
    needs_teacher = False
    trains_on_meta = True
    num_sources = 0
    tasks = ("classification",)
    settled = ("term", "label_term")

    def __init__(self, student: Network, teacher: Network | list[Network] | None = None, **base: Any) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        self.num_stretches = 1 if self._teacher_specs else 2
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
        """Those with a label; in a first half the untrusted ones alone."""
        early = self.stretch + 1 < self.num_stretches
        return (has_label(self.data.labels) & ~(self.data.trusted & early)).nonzero().squeeze(1)

    def prepare_epoch(self) -> None:
        """Read the noise off the teacher, if there is one."""
        if self.num_stretches == 1 and "transition" not in self.table.shared:
            self.read_off()
        super().prepare_epoch()

    def begin_stretch(self, stretch: int) -> None:
        """First read the noise off the student."""
        self.read_off()
        super().begin_stretch(stretch)

    def read_off(self) -> None:
        """How labels are mistaken for each other, from what is said of the trusted rows."""
        meta, table = self.predict_rows(self.data.parts.meta_rows()), self.table
        heard = as_one([one._replace(logits=one.logits.float()) for one in meta.teachers or [meta.student]])
        said, y = heard.logits[heard.speaks].softmax(-1), meta.y[heard.speaks]
        if not len(y):
            raise ValueError("expected a teacher that speaks of meta rows, from which GLC reads the noise, found none")
        table.shared["transition"] = transition = gold_transition(said, y)
        table.shared["noise_rate"] = 1 - transition.diagonal()[y].mean()
        table["likelihood"] = self._likelihood(transition)

    def ask(self, batch: Batch) -> list[Outputs]:
        """In training nobody."""
        return [] if self.trainer.training else super().ask(batch)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The label alone."""
        return [1.0]
