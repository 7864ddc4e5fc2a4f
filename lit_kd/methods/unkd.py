"""Recommendation: what a teacher ranks, item against item of like popularity."""

from typing import Any

from torch import Tensor

from lit_kd.distiller import Distiller
from lit_kd.losses.ranking import popularity_groups
from lit_kd.models import Network
from lit_kd.terms import TaskName, Term, Weights
from lit_kd.terms.ranking import GroupRanking, recommendation
from lit_kd.terms.task import EvaluationMetrics
from lit_kd.types import Batch, Outputs

QUARTERS = 4  # groups of items that are measured, and by default distilled


class UnKD(Distiller):
    """Recommendation without the teacher's bias for what is popular (UnKD, arXiv 2211.14729).

    Items are divided into groups of about equal numbers of interactions. In each group, pairs of items that a user does
    not have are drawn by the teacher's ranking, and the student learns which of the two the teacher prefers. No pair
    crosses groups. The loss is ``BPR + weight pairs`` [code]; pairs are drawn anew each epoch. With ``groups=1`` this
    is plain ranking distillation; without a teacher, BPR alone, which trains teachers. A row is a user, whose labels
    are 0 or 1 for each item: BPR is a mean over users of a mean over their items [ours]. The authors' code computes a
    weight of each user's groups and does not use it [code]: there is none here.

    Args:
        student: The network to train, a module or a name: scores ``(B, I)`` of all items.
        teacher: One teacher or a list, modules or checkpoint paths; or none.
        weight: Of the pairs, at least 0.
        groups: G, of items by popularity.
        pairs: Of each user in an epoch, at least one for each group.
        top: How many items are recommended: metrics are ``recall`` and ``ndcg`` of so many, over all items, and of
            each quarter of the interactions alone, as ``recall_group_0`` for the most popular.
        task: ``"multilabel"``.
        **base: See `lit_kd.Distiller`.
    """

    needs_teacher = False
    tasks = ("multilabel",)

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 1.0,
        groups: int = QUARTERS,
        pairs: int = 30,
        top: int = 10,
        task: TaskName = "multilabel",
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, task=task, **base)
        if weight < 0 or not 1 <= groups <= pairs or not 1 <= top <= self.num_classes:
            found = f"{weight}, {groups}, {pairs} and {top}"
            raise ValueError(
                "expected a weight of at least 0, from 1 to so many groups as there are pairs, and a top from 1 to "
                f"{self.num_classes} items, found {found}"
            )
        self.weight, self.groups, self.pairs, self.top = weight, groups, pairs, top
        self.task = recommendation(top)

    def make_metrics(self, stage: str) -> EvaluationMetrics:
        """Those of recommendation."""
        return EvaluationMetrics(stage, self.task, self.num_classes, self._own_metrics[0])

    def group_of(self, groups: int) -> Tensor:
        """The group of each item, ``(I,)``, by the interactions of the training."""
        return popularity_groups((self.data.labels[: self.data.train_size] > 0).sum(0), groups)

    def setup(self, stage: str) -> None:
        """Divide the items into groups to measure, unless nothing is measured."""
        if stage != "predict":
            self.task = recommendation(self.top, self.group_of(QUARTERS))
            self.metrics.update({f"at_{stage}": self.make_metrics(stage) for stage in ("val", "test")})
        super().setup(stage)

    def default_term(self) -> Term:
        """The teacher's ranking within groups."""
        return GroupRanking(self.group_of(self.groups), self.pairs)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """1 for the label; the teachers share the weight."""
        return [1.0, *[self.weight / max(1, len(sources))] * len(sources)]
