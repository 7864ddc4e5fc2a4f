"""What depends on the task: default terms, checks, metrics, predictions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection

from lit_kd.data.labels import TaskName
from lit_kd.losses import classes_last
from lit_kd.terms.base import Term
from lit_kd.types import IGNORED, Outputs


@dataclass(frozen=True)
class Task:
    """One kind of labels."""

    name: str  # in configs
    least_classes: int  # the smallest C
    label_term: Callable[[], Term]  # what is learned from labels by default
    teacher_term: Callable[[float], Term]  # the same from a teacher, at a temperature T > 0
    label_loss: Callable[[Tensor, Tensor], Tensor]  # with trusted labels, (B,), from logits and labels
    check_labels: Callable[[Tensor, int, bool], None]  # whether they fit C classes; may some be missing?
    probabilities: Callable[[Tensor], Tensor]  # (B, C), of logits
    decide: Callable[[Tensor], Tensor]  # the most probable labels, of probabilities
    predict: Callable[[Tensor], dict[str, Tensor]]  # what is said of each sample, from probabilities
    metrics: Callable[[int], dict[str, Metric]]  # ``agreement`` is with the teachers' decisions
    elements: bool = False  # whether a sample has many labels of one class each, as pixels and tokens
    score: str = "accuracy"  # the metric that tells the best epoch
    best: str = "max"  # or "min": which value of it is the best

    def check_number(self, num_classes: Any) -> None:
        """Refuse a number of classes that is none; a ValueError."""
        if not isinstance(num_classes, Integral) or num_classes < self.least_classes:
            raise ValueError(f"expected as num_classes a whole number from {self.least_classes}, found {num_classes!r}")

    def compare(self, num_classes: int, data: Any) -> None:
        """Refuse data that say that they are of another task or have more classes, and warn of fewer."""
        task = getattr(data, "task", self.name)
        if task != self.name and task in get_args(TaskName):  # others call theirs as they like
            raise ValueError(f"expected a method for the data's task, found task={self.name!r}: set task={task!r}")
        found = getattr(data, "num_classes", None)
        if not isinstance(found, Integral) or found in (0, num_classes):
            return
        told = f"expected in num_classes the {found} classes of the data, found {num_classes}"
        if num_classes < int(found):
            raise ValueError(f"{told}: correct one of them")
        rank_zero_warn(f"{told}: no row is of the others. Is that meant?")


def check_outputs(
    task: Task, y: Tensor, outputs: Mapping[str, Outputs], num_classes: int, missing: bool, first: bool = False
) -> None:
    """Refuse labels and logits that do not fit.

    On an accelerator, which would stall where values are read, these are shapes, and the labels of the ``first`` batch.
    Our data modules, and wrapped ones, have checked all labels that are classes before. Outputs are by the model's
    name: teachers first, as their numbers can spoil the student's. On the first batch, warn of those that look like
    probabilities.

    Raises:
        ValueError: If logits are not ``(B, C)`` or not finite, labels are of another task, out of range, or missing
            where they may not be, or B is 0.
    """
    if not len(y):
        raise ValueError("expected batches of at least one row, found an empty one: let the loader leave it out")
    reads = y.device.type == "cpu"
    for name, given in outputs.items():
        wanted = *(y.shape if task.elements else y.shape[:1]), num_classes
        if classes_last(given.logits).shape != wanted:
            axes = ("batch", *["..."] * (len(wanted) - 2), "num_classes")
            raise ValueError(
                f"expected {name}'s logits of shape {wanted} ({', '.join(axes)}), found "
                f"{tuple(classes_last(given.logits).shape)}: student, teacher, labels and num_classes must agree"
            )
        # a class may be ruled out, with a logit of minus infinity
        if reads and not given.logits.detach().sum(dtype=torch.float32) < math.inf:
            cure = "check its weights" if name.startswith("teacher") else "lower the learning rate"
            raise ValueError(
                f"expected finite numbers in {name}'s logits, found nan or infinity: check that the inputs are finite, "
                f"or {cure}"
            )
        if first:
            _warn_of_probabilities(task, name, given.logits)
    if reads or first:
        task.check_labels(y, num_classes, missing)


def _warn_of_probabilities(task: Task, name: str, logits: Tensor) -> None:
    """Say so where a model gives probabilities in place of logits, as one does that ends in a softmax or sigmoid."""
    numbers = logits.detach().float()
    if task.name == "regression":
        return
    if task.name != "multilabel":
        numbers = classes_last(numbers)
        found = bool((numbers.sum(-1) - 1).abs().max() < 0.01)
    else:
        found = name != "student" and bool(numbers.max() <= 1)  # untrained logits may be so, too
    if found and numbers.min() >= 0:
        rank_zero_warn(
            f"expected logits of {name}, found what looks like probabilities. Let the model end before its softmax or "
            "sigmoid: the loss takes another one, after which next to nothing can be learned"
        )


class EvaluationMetrics(nn.Module):
    """Metrics of one stage, ``"val"`` or ``"test"``, which begins their names; copies of others join them."""

    def __init__(self, stage: str, task: Task, num_classes: int, others: MetricCollection | None = None) -> None:
        super().__init__()
        self.stage = stage
        self.task = task
        metrics = task.metrics(num_classes)
        for name, metric in MetricCollection(others).items() if others is not None else ():
            if name in (*metrics, "nll", "teacher_agreement"):
                raise ValueError(f"expected metrics with names of their own, found {name!r}, which is ours")
            metrics[name] = metric.clone()
        self.metrics = nn.ModuleDict(metrics)
        self.nll = MeanMetric()

    def reset(self) -> None:
        """Begin anew: `Trainer.validate` leaves tensors of inference mode, on which a fit cannot go on."""
        for metric in (self.nll, *self.metrics.values()):
            cast(Metric, metric).reset()

    def update(
        self, logits: Tensor, y: Tensor, teachers: Sequence[Tensor], known: Sequence[Tensor | None] = ()
    ) -> dict[str, Metric]:
        """Take in a batch's student logits, labels, and each teacher's logits; return what to log, by name.

        Agreement is with the mean of the teachers' probabilities, of those that speak of a row, if which do is known.
        """
        logits = logits.float()
        self.nll.update(self.task.label_loss(logits, y))
        row = torch.arange(len(y), device=y.device)  # of each element
        counted: Tensor | slice = slice(None)
        if self.task.elements:  # each is a row, from here on
            counted = y != IGNORED
            row = row.view(-1, *[1] * (y.dim() - 1)).expand_as(y)[counted]
        probabilities, y = self.task.probabilities(logits)[counted], y[counted]
        logged: dict[str, Metric] = {f"{self.stage}/nll": self.nll}
        metrics = {name: cast(Metric, metric) for name, metric in self.metrics.items()}
        for name, metric in metrics.items():
            if name != "agreement":
                metric.update(probabilities, y)
                logged[f"{self.stage}/{name}"] = metric
        if teachers:
            said = torch.stack([self.task.probabilities(t.float())[counted] for t in teachers])
            if any(rows is not None for rows in known):
                silent = [torch.zeros_like(row, dtype=torch.bool) if rows is None else ~rows[row] for rows in known]
                said = said.masked_fill(torch.stack(silent).unsqueeze(-1), math.nan)
            mean = said.nanmean(0)
            spoken = ~mean.isnan().any(-1)
            metrics["agreement"].update(probabilities[spoken], self.task.decide(mean[spoken]))
            logged[f"{self.stage}/teacher_agreement"] = metrics["agreement"]
        return logged
