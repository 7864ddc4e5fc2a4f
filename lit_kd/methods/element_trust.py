"""Trust in the labels of pixels, tokens, or several labels a sample, learned from a few trusted rows."""

from typing import Any

import torch
from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.distiller import Distiller
from lit_kd.losses import classes_last, cross_entropy
from lit_kd.models import Network
from lit_kd.terms import Term
from lit_kd.trust.elements import element_posterior, pair_counts, trust_elements
from lit_kd.types import IGNORED, Batch, Outputs, full, index_of
from lit_kd.weightings.mean_teacher import as_one

TASKS = ("dense", "tokens", "multilabel")


class Believed(Term):
    """Cross-entropy with `lit_kd.trust.elements.element_posterior`, the mean over the elements that count."""

    tasks = TASKS
    keeps_rows = True

    def start(self, table: SampleTable, labels: Tensor) -> None:
        """Know where the channels of teacher and labels are."""
        self.shared = table.shared

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The cross-entropy."""
        assert teacher is not None
        y, kept = batch.y, batch.y != IGNORED
        z, t = (by_class(full(one.logits), y) for one in (student, teacher))
        believed = element_posterior(y, t.softmax(-1), self.shared["teacher"], self.shared["labels"])
        z = z.masked_fill(~kept.unsqueeze(-1), 0)
        values = cross_entropy(z.flatten(0, -2), believed.flatten(0, -2)).view(y.shape) * kept
        return values.flatten(1).sum(1) / kept.flatten(1).sum(1).clamp(min=1)


def by_class(logits: Tensor, y: Tensor) -> Tensor:
    """The logits of each element's classes in the last axis, ``(*y.shape, C)``; of several labels, of no and yes."""
    return torch.stack([torch.zeros_like(logits), logits], -1) if logits.shape == y.shape else classes_last(logits)


class ElementTrust(Distiller):
    """Learns whether the labels of a row are right and, where they are not, what each of its elements is. [ours]

    An element is a pixel, a token, or one of several labels. Before the training, the teacher's mistakes are counted on
    the trusted meta rows, class by class. With that, the pairs of label and teacher's class of the training rows tell
    which rows have wrong labels, and how those are mistaken: see `lit_kd.trust.elements.trust_elements`. The student
    learns from the labels as far as a row's are right, and else from what is believed of each element, given its label
    and the teacher's probabilities. Several teachers count as their mean.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths. None may have been trained on the meta rows.
        **base: See `lit_kd.Distiller`.
    """

    table: SampleTable  # there in training
    tasks = TASKS
    settled = ("term",)
    num_sources = 1
    by_sample = True

    def __init__(self, student: Network, teacher: Network | list[Network] | None = None, **base: Any) -> None:
        super().__init__(student=student, teacher=teacher, **base)

    def default_term(self) -> Term:
        """Cross-entropy with what is believed of each element."""
        return Believed()

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """Column ``weights``, ``(N, 2)``: how probable it is that a row's labels are right, and that they are not."""
        self.data.require_meta("ElementTrust, by which the teacher is judged")
        table.add("weights", torch.tensor([1.0, 0.0]))

    def prepare_epoch(self) -> None:
        """Estimate all, once: neither the teacher nor the labels change."""
        table, n, rows = self.table, self.data.train_size, torch.arange(len(self.data.labels))
        if "teacher" in table.shared:
            return
        counts = torch.cat([self.counts(some) for some in rows.split(self.data.batch_size)])
        right, table.shared["teacher"], table.shared["labels"] = trust_elements(counts[:n], counts[n:])
        right = torch.cat([right, right.new_ones(len(counts) - n)])
        table["weights"] = torch.stack([right, 1 - right], dim=1)

    def counts(self, index: Tensor) -> Tensor:
        """`lit_kd.trust.elements.pair_counts` of some rows; 0 for those that the teacher does not speak of."""
        found = self.predict_rows(self.data.parts.rows(index))
        teacher, several = as_one(found.teachers), self.task.name == "multilabel"
        said = by_class(teacher.logits, found.y)
        each = pair_counts(found.y, said.argmax(-1), said.shape[-1], found.y.shape[1] if several else 1)
        return each * teacher.speaks.view(-1, 1, 1, 1)

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """The mean of the teachers' probabilities."""
        return [as_one(teachers)]

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Tensor:
        """That the labels are right, and that they are not; the label alone where no teacher speaks."""
        weights = self.table["weights"][index_of(batch)]
        return torch.where(sources[0].speaks.unsqueeze(1), weights, weights.new_tensor([1.0, 0.0]))
