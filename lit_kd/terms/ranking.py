"""Recommendation: rows are users, labels are 0 or 1 for each item, logits are scores of items."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_kd.losses.ranking import draw_pairs, pairwise_loss
from lit_kd.terms.base import Term
from lit_kd.terms.task import Task
from lit_kd.terms.tasks import TASKS
from lit_kd.types import Batch, Outputs, full


class BPR(Term):
    """Bayesian personalised ranking: each item that a user has against another, drawn uniformly: their mean."""

    reads_teacher = False
    tasks = ("multilabel",)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """See `lit_kd.losses.ranking.pairwise_loss`."""
        has = batch.y > 0
        others = (~has).float() + has.all(1, keepdim=True)  # who has everything has no pairs
        drawn = others.multinomial(has.shape[1], replacement=True)
        items = torch.arange(has.shape[1], device=has.device).expand_as(drawn)
        return pairwise_loss(full(student.logits), items, drawn, has & ~has.all(1, keepdim=True))


class GroupRanking(Term):
    """The teacher's ranking of items that a user does not have, by pairs within each group of items.

    Args:
        group_of: The group of each item, ``(I,)``.
        pairs: Of each user in all, shared out equally among the groups.
    """

    tasks = ("multilabel",)

    def __init__(self, group_of: Tensor, pairs: int) -> None:
        super().__init__()
        self.group_of, self.groups, self.pairs = group_of, int(group_of.max()) + 1, pairs

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """See `lit_kd.losses.ranking`."""
        assert teacher is not None
        group_of, own = self.group_of.to(batch.y.device), batch.y <= 0
        shares = [self.pairs * (g + 1) // self.groups - self.pairs * g // self.groups for g in range(self.groups)]
        drawn = [draw_pairs(teacher.logits, own & (group_of == g), pairs) for g, pairs in enumerate(shares)]
        return pairwise_loss(full(student.logits), *(torch.cat(part, dim=1) for part in zip(*drawn, strict=True)))


class Ranking(Metric):
    """Recall or NDCG of the items that score best, the mean over users that have one to be found.

    Args:
        top: How many are recommended.
        discounted: NDCG, which counts ``1 / log2(place + 1)`` for an item at a place from 1; else recall.
        items: Which count as to be found, bool ``(I,)``; ``None``: all.
    """

    total: Tensor
    users: Tensor

    def __init__(self, top: int, discounted: bool, items: Tensor | None = None) -> None:
        super().__init__()
        self.top, self.discounted, self.items = top, discounted, items
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("users", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """From scores ``(B, I)`` and zeros and ones ``(B, I)``."""
        wanted = target.float() if self.items is None else target * self.items.to(preds)
        wanted, preds = wanted[wanted.any(1)], preds[wanted.any(1)]
        found, many = wanted.gather(1, preds.topk(self.top, dim=1).indices), wanted.sum(1)
        if self.discounted:
            worth = 1 / torch.arange(2.0, self.top + 2, device=preds.device).log2()
            share = (found * worth).sum(1) / worth.cumsum(0)[many.clamp(max=self.top).long() - 1]
        else:
            share = found.sum(1) / many
        self.total += share.sum()
        self.users += len(share)

    def compute(self) -> Tensor:
        """A fraction, nan without users."""
        return self.total / self.users


def held_out_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the log-probability of the items to be found among all not seen, their mean, ``(B,)``; 0 without any."""
    own = logits.masked_fill(y <= 0, 0).sum(1)
    many = (y > 0).sum(1)
    return logits.logsumexp(1) * (many > 0) - own / many.clamp(min=1)


def _best(scores: Tensor, top: int) -> Tensor:
    return torch.zeros_like(scores).scatter(1, scores.topk(top, dim=1).indices, 1)


def _recommend(scores: Tensor, top: int) -> dict[str, Tensor]:
    return {"items": scores.topk(top, dim=1).indices}


def _scores(logits: Tensor) -> Tensor:
    return logits


def _metrics(items: int, top: int, group_of: Tensor | None) -> dict[str, Metric]:
    """Of all items, then of each group; the agreement is the recall of what the teachers recommend."""
    found: dict[str, Metric] = {"agreement": Ranking(top, False)}
    members = [] if group_of is None else [group_of == group for group in range(int(group_of.max()) + 1)]
    for name, discounted in (("recall", False), ("ndcg", True)):
        found[name] = Ranking(top, discounted)
        found |= {f"{name}_group_{group}": Ranking(top, discounted, items) for group, items in enumerate(members)}
    return found


def recommendation(top: int, group_of: Tensor | None = None) -> Task:
    """Several labels a sample that are ranked, measured by `Ranking` of all items and, if given, of each group."""
    return replace(
        TASKS["multilabel"],
        label_term=BPR,
        label_loss=held_out_loss,
        probabilities=_scores,
        decide=partial(_best, top=top),
        predict=partial(_recommend, top=top),
        metrics=partial(_metrics, top=top, group_of=group_of),
        score="ndcg",
    )
