"""What is learned from a teacher's logits at several levels: of instances, of the batch, of classes."""

import torch
from torch import Tensor

from lit_kd.losses import kd_loss, relation_loss, standardised
from lit_kd.terms.base import Term
from lit_kd.types import Batch, Outputs, full

TEMPERATURES = (2.0, 3.0, 4.0, 5.0, 6.0)


class MultiLevel(Term):
    """Multi-level logit distillation (MLKD, CVPR 2023) of one view, the sum over the temperatures 2, 3, 4, 5 and 6.

    At each it adds ``T^2 KL``, the error of ``P P^T``, which tells how rows resemble each other, and that of
    ``P^T P``, of classes; see `lit_kd.losses.relation_loss`. Only the half of rows, and of classes, counts of which the
    teacher is less sure in the batch [from memory]. In the published code each mask meets a loss that is a mean
    already, so that all rows count, by about one half [code].

    Args:
        published: Whether masks do what they do in the published code.
        weight: A constant factor.
        standardise: Of the KL alone [code], see `lit_kd.terms.LogitTerm`.
    """

    couples_batch = True
    tasks = ("classification",)

    def __init__(self, published: bool = False, weight: float = 1.0, standardise: bool = False) -> None:
        super().__init__(weight)
        self.published, self.standardise = published, standardise

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """All levels, ``()``."""
        assert teacher is not None
        z, t = full(student.logits), full(teacher.logits)
        said, pair = t.softmax(-1), (standardised(z), standardised(t)) if self.standardise else (z, t)
        rows, classes = less_sure(said.amax(-1)), less_sure(said.sum(0))
        if self.published:
            rows, classes = rows.mean(), classes.mean()
        total = z.new_zeros(())
        with torch.autocast(z.device.type, enabled=False):  # products of probabilities are small
            for temperature in TEMPERATURES:
                p, q = (logits.div(temperature).softmax(-1) for logits in (z, t))
                levels = relation_loss(p, q, rows) + relation_loss(p.mT, q.mT, classes)
                total = total + (kd_loss(*pair, temperature) * rows).mean() + levels
        return total


def less_sure(confidence: Tensor) -> Tensor:
    """1 for what is not above the median, else 0."""
    return (confidence <= confidence.median()).to(confidence)
