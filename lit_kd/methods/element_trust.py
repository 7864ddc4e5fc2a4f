"""Trust in pixels, tokens, several labels a sample and numbers, learned from a few trusted rows."""

from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from lit_kd.distiller import Distiller
from lit_kd.losses import classes_last, cross_entropy
from lit_kd.losses.regression import errors
from lit_kd.models import Network
from lit_kd.terms import Term
from lit_kd.trust.elements import (
    NumberTrust,
    element_posterior,
    label_joint,
    pair_counts,
    teacher_channel,
    trust_numbers,
)
from lit_kd.types import IGNORED, Batch, Outputs, full, index_of


class Believed(Term):
    """Cross-entropy with `lit_kd.trust.elements.element_posterior`, the mean over the elements that count."""

    tasks = ("dense", "tokens", "multilabel")
    channel: Tensor
    joint: Tensor
    """How the teacher and the labels err, set by the method; no checkpoint holds it."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The cross-entropy."""
        assert teacher is not None
        y, kept = batch.y, batch.y != IGNORED
        z, t = (by_class(full(one.logits), y) for one in (student, teacher))
        believed = element_posterior(y, t.argmax(-1), self.channel, self.joint)
        z = z.masked_fill(~kept.unsqueeze(-1), 0)
        values = cross_entropy(z.flatten(0, -2), believed.flatten(0, -2)).view(y.shape) * kept
        return values.flatten(1).sum(1) / kept.flatten(1).sum(1).clamp(min=1)


class BelievedNumbers(Term):
    """The squared error of the target, as far as that is right, and else of what the teacher means by its output."""

    tasks = ("regression",)
    found: NumberTrust
    """Set by the method; no checkpoint holds it."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The mean over the numbers of a sample."""
        assert teacher is not None
        z = full(student.logits)
        right, means = self.found.believed(batch.y, full(teacher.logits))
        return (right * errors(z, batch.y).square() + (1 - right) * (z - means).square()).mean(-1)


def by_class(logits: Tensor, y: Tensor) -> Tensor:
    """The logits of each element's classes in the last axis, ``(*y.shape, C)``; of several labels, of no and yes."""
    return torch.stack([torch.zeros_like(logits), logits], -1) if logits.shape == y.shape else classes_last(logits)


class ElementTrust(Distiller):
    """Learns what each pixel, token, label or number is, where labels and teacher both err. [ours]

    Before the training, the teacher's mistakes are counted on the trusted meta rows, class by class. From that and the
    pairs of label and teacher's class of the training rows follows how the labels are mistaken, see
    `lit_kd.trust.elements`. The student learns the posterior of each element given its label and the teacher's class;
    meta rows, where they are trained on, as they are. What is kept are two C x C matrices, however large samples are.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher, a module or a checkpoint path. It must not have been trained on the meta rows.
        **base: See `lit_kd.Distiller`.
    """

    tasks = (*Believed.tasks, *BelievedNumbers.tasks)
    settled = ("term",)
    by_sample = True

    def __init__(self, student: Network, teacher: Network | list[Network] | None = None, **base: Any) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if self.num_sources > 1:
            raise ValueError(f"expected one teacher for ElementTrust, found {self.num_sources}: choose the best")

    def default_term(self) -> Term:
        """What is believed of each element."""
        return BelievedNumbers() if self.task.name == "regression" else Believed()

    def on_fit_start(self) -> None:
        """Estimate how teacher and labels err: neither changes in a training."""
        super().on_fit_start()
        self.data.require_meta("ElementTrust, by which the teacher is judged")
        assert self.terms is not None
        own, trusted = torch.arange(len(self.data.labels)).tensor_split([self.data.train_size])
        several = self.task.name == "multilabel"
        sizes = (2, self.num_classes) if several else (self.num_classes, 1)
        for term in self.terms:
            if isinstance(term, BelievedNumbers):
                pairs = [torch.cat(part) for rows in (own, trusted) for part in zip(*self.said(rows), strict=True)]
                term.found = trust_numbers(*pairs)
            elif isinstance(term, Believed):
                counts, right = (reduce(add, (pair_counts(*p, *sizes) for p in self.said(r))) for r in (own, trusted))
                if not right.any():
                    raise ValueError(
                        "expected a teacher that speaks of meta rows, which judge it, found none: give more"
                    )
                term.channel = teacher_channel(right)
                term.joint = label_joint(counts, term.channel)

    def said(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See `heard`, batch by batch."""
        return map(self.heard, torch.split(rows, self.data.batch_size))

    def heard(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The labels of some rows, and what the teacher says, of those that it speaks of."""
        found = self.predict_rows(self.data.parts.rows(index))
        teacher, y = found.teachers[0], found.y
        said = teacher.logits if self.task.name == "regression" else by_class(teacher.logits, y).argmax(-1)
        return y[teacher.speaks], full(said[teacher.speaks])

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Tensor:
        """The label counts where it is trusted, or no teacher speaks; else what is believed."""
        label = (index_of(batch) >= self.data.train_size) | ~sources[0].speaks
        return torch.stack([label, ~label], dim=1).float()
