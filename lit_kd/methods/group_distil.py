"""Distillation for the group of rows that fares worst."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.data.table import SampleTable, all_sum, process
from lit_kd.methods.kd import KD
from lit_kd.models import Network
from lit_kd.terms import Weighed
from lit_kd.terms.base import row_losses
from lit_kd.terms.task import EvaluationMetrics
from lit_kd.types import UNLABELED, Batch, Outputs, class_labels, distributions, index_of
from lit_kd.weightings.base import labelled_rows
from lit_kd.weightings.groups import WorstGroupAccuracy, read_groups


class GroupDistil(KD):
    """`KD`, in which groups of rows count the more, the larger their loss is (GroupDistil, arXiv 2311.00476).

    The loss is ``sum_g w_g L_g``, with L_g the mean of `KD`'s loss over the batch's rows of group g. Each batch first
    renews the weights, ``w_g <- w_g exp(rate L_g)``, scaled to sum 1, as group DRO does (arXiv 1911.08731) [ours: the
    paper's formula was not at hand]; a group without rows in the batch loses nothing but the scale. Groups are those of
    a table, or the labels' classes [ours]; rows without a label are not drawn. Metrics have ``worst_group_accuracy``.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        rate: Of the weights, at least 0; at 0 groups count the same.
        groups: The path of a table with the group of each row, see `lit_kd.weightings.groups.read_groups`, by the ids
            of the data's rows. ``None``: the classes.
        **base: See `KD` and `lit_kd.Distiller`.
    """

    table: SampleTable  # there in training
    tasks = ("classification",)
    by_sample = True
    names: list[str] | None = None  # of the groups, if they are given
    of: Tensor | None = None  # the groups of the rows that are evaluated next
    group_of: Tensor | None

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        rate: float = 0.01,
        groups: str | None = None,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if rate < 0:
            raise ValueError(f"expected a rate of at least 0, found {rate}")
        self.rate, self.groups = rate, groups
        self.register_buffer("group_of", None, persistent=False)  # of each row by its index

    @property
    def num_groups(self) -> int:
        """G."""
        return self.num_classes if self.names is None else len(self.names)

    def make_metrics(self, stage: str) -> EvaluationMetrics:
        """The task's, the user's, and that of the worst group."""
        made = super().make_metrics(stage)
        made.metrics["worst_group_accuracy"] = WorstGroupAccuracy(self.num_groups, self.of)
        return made

    def setup(self, stage: str) -> None:
        """Read the groups."""
        super().setup(stage)
        if self.groups is not None and stage != "predict":
            self.group_of, self.names = read_groups(self.groups, self.data.parts.ids)
            self.metrics.update({f"at_{stage}": self.make_metrics(stage) for stage in ("val", "test")})

    def evaluate(self, batch: Batch, stage: str, batch_idx: int, loader: int) -> dict[str, Any]:
        """Tell the metrics whose rows these are."""
        batch = self.with_own_index(batch, stage, loader)
        unknown = torch.full_like(class_labels(batch.y), -1)
        known = unknown if self.group_of is None or batch.index is None else self.group_of[batch.index]
        self.of = None if self.group_of is None else known
        for metrics in self.metrics.values():
            cast(Any, metrics).metrics["worst_group_accuracy"].of = self.of
        return super().evaluate(batch, stage, batch_idx, loader)

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """The groups' weights; refuses a group without rows, which would have one."""
        super().start_table(table, fresh)
        y = class_labels(self.data.labels[: self.data.train_size])
        groups = y if self.group_of is None else self.group_of.cpu()[: len(y)]
        sizes = torch.bincount(groups[y != UNLABELED], minlength=self.num_groups)
        missing = [self.names[g] if self.names else g for g in sizes.eq(0).nonzero().flatten().tolist()]
        if missing:
            what = "group" if self.names else "class"
            raise ValueError(f"expected training rows with a label of every {what}, found none of {missing}")
        table.shared.setdefault("group_log_weights", torch.zeros(self.num_groups).log_softmax(0))

    def training_rows(self) -> Tensor:
        """Those with a label."""
        return labelled_rows(self.data)

    def weighed(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Weighed:
        """Those of `KD`, each row by its group's weight."""
        losses, weights, extra = super().weighed(student, teachers, batch)
        member = distributions(class_labels(batch.y), self.num_classes)
        if self.group_of is not None:
            member = F.one_hot(self.group_of[index_of(batch)], self.num_groups)
        member = member.to(losses[0])
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
