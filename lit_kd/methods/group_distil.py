"""Distillation for the group of rows that fares worst."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassStatScores

from lit_kd.data.table import SampleTable, all_sum, process
from lit_kd.methods.kd import KD
from lit_kd.models import Network
from lit_kd.terms import Weighed
from lit_kd.terms.base import row_losses
from lit_kd.terms.task import EvaluationMetrics
from lit_kd.types import UNLABELED, Batch, Outputs, class_labels, distributions
from lit_kd.weightings.base import labelled_rows


class WorstGroupAccuracy(MulticlassStatScores):
    """The accuracy of the class that is recognised worst, of those that there are."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average=None, validate_args=False)

    def compute(self) -> Tensor:
        """In [0, 1]."""
        scores = super().compute()
        right, rows = scores[:, 0], scores[:, 4]
        return torch.where(rows > 0, right / rows, 1).min()


class GroupDistil(KD):
    """`KD`, in which groups of rows count the more, the larger their loss is (GroupDistil, arXiv 2311.00476).

    The loss is ``sum_g w_g L_g``, with L_g the mean of `KD`'s loss over the batch's rows of group g. Each batch first
    renews the weights, ``w_g <- w_g exp(rate L_g)``, scaled to sum 1, as group DRO does (arXiv 1911.08731) [ours: the
    paper's formula was not at hand]; a group without rows in the batch loses nothing but the scale. Groups are the
    labels' classes [ours]; rows without a label are not drawn. Metrics have ``worst_group_accuracy``, too.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        rate: Of the weights, at least 0; at 0 groups count the same.
        **base: See `KD` and `lit_kd.Distiller`.
    """

    table: SampleTable  # there in training
    tasks = ("classification",)
    by_sample = True

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        rate: float = 0.01,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if rate < 0:
            raise ValueError(f"expected a rate of at least 0, found {rate}")
        self.rate = rate

    def make_metrics(self, stage: str) -> EvaluationMetrics:
        """The task's, the user's, and that of the worst group."""
        made = super().make_metrics(stage)
        made.metrics["worst_group_accuracy"] = WorstGroupAccuracy(self.num_classes)
        return made

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """The groups' weights; refuses a class without rows, which would have one."""
        super().start_table(table, fresh)
        y = class_labels(self.data.labels[: self.data.train_size])
        missing = torch.bincount(y[y != UNLABELED], minlength=self.num_classes).eq(0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"expected training rows with a label of every class, found none of {missing}")
        table.shared.setdefault("group_log_weights", torch.zeros(self.num_classes).log_softmax(0))

    def training_rows(self) -> Tensor:
        """Those with a label."""
        return labelled_rows(self.data)

    def weighed(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Weighed:
        """Those of `KD`, each row by its group's weight."""
        losses, weights, extra = super().weighed(student, teachers, batch)
        member = distributions(class_labels(batch.y), self.num_classes).to(losses[0])
        each = torch.stack([row_losses(losses, weights, {}).detach(), batch.by_share(torch.ones_like(losses[0]))])
        total, rows = all_sum((each.unsqueeze(2) * member).sum(1))  # a matrix product would round under autocast
        log_weights = self.table.shared["group_log_weights"] + self.rate * torch.where(rows > 0, total / rows, 0)
        self.table.shared["group_log_weights"] = log_weights = log_weights.log_softmax(0)
        # the optimiser sees a mean over the rows of this process, and then one over processes
        factor = (member * torch.where(rows > 0, log_weights.exp() / rows, 0)).sum(1) * len(member) * process()[1]
        shares = weights if isinstance(weights, Tensor) else factor.new_tensor(weights)
        return losses, factor.unsqueeze(1) * shares, extra

    def on_train_epoch_end(self) -> None:
        """Log also the largest weight of a group, ``groups/largest_weight``."""
        super().on_train_epoch_end()
        self.log("groups/largest_weight", self.table.shared["group_log_weights"].max().exp())
