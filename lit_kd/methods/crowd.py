"""Learning from the vote of several annotators."""

from typing import Any

import torch
from torch import Tensor

from lit_kd.distiller import Distiller
from lit_kd.models import Network
from lit_kd.terms import Weighed, Weights
from lit_kd.trust.votes import VOTES, How
from lit_kd.types import UNLABELED, Batch, Outputs, check_choice, index_of


class CrowdLabels(Distiller):
    """Learns from the classes that several annotators, its teachers, vote for, in the place of labels.

    Votes are counted once, before the training. A row without votes keeps its label. Trusted meta rows keep theirs,
    which the estimate knows. Needs a data module of `lit_kd.data`.

    Args:
        student: The network to train, a module or a name.
        teacher: Annotators: files, modules or checkpoint paths; a vote is the most probable class.
        vote: ``"dawid_skene"``, see `lit_kd.trust.votes.dawid_skene`, or ``"majority"``.
        **base: See `lit_kd.Distiller`.
    """

    num_sources, tasks, settled = 0, ("classification",), ("term",)
    votes: Tensor  # the class to learn of training and meta rows, (N + M,)

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        vote: How = "dawid_skene",
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        check_choice("vote", vote, VOTES)
        self.vote = vote

    def on_fit_start(self) -> None:
        """Count the votes."""
        super().on_fit_start()
        labels, trusted = self.data.labels.to(self.device), self.data.trusted.to(self.device)
        said = self.predict_rows(self.data.parts.rows(torch.arange(len(labels)))).teachers
        votes = torch.stack([one.logits.argmax(-1).where(one.speaks, UNLABELED) for one in said], dim=1)
        found = VOTES[self.vote](votes, self.num_classes, labels.where(trusted, UNLABELED))
        self.votes = found.where(found != UNLABELED, labels)

    def training_rows(self) -> Tensor:
        """Those with a vote or a label."""
        return (self.votes != UNLABELED).nonzero().squeeze(1)

    def ask(self, batch: Batch) -> list[Outputs]:
        """In training nobody."""
        return [] if self.trainer.training else super().ask(batch)

    def weighed(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Weighed:
        """The label's term, of the vote."""
        return super().weighed(student, teachers, batch.with_labels(self.votes[index_of(batch)]))

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The vote alone."""
        return [1.0]
