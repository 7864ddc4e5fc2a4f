"""What depends on the task: default terms, checks, metrics, predictions."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
)

from lit_kd.losses import bernoulli_cross_entropy, cross_entropy
from lit_kd.terms.base import Term
from lit_kd.terms.labels import BernoulliCrossEntropy, CrossEntropy
from lit_kd.terms.logits import KL, BernoulliKL
from lit_kd.types import UNLABELED, Outputs


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

    def check_number(self, num_classes: Any) -> None:
        """Refuse a number of classes that is none; a ValueError."""
        if not isinstance(num_classes, Integral) or num_classes < self.least_classes:
            raise ValueError(f"expected as num_classes a whole number from {self.least_classes}, found {num_classes!r}")

    def compare_number(self, num_classes: int, data: Any) -> None:
        """Refuse fewer classes than the data say that they have, and warn of more."""
        found = getattr(data, "num_classes", None)
        if not isinstance(found, Integral) or found in (0, num_classes):
            return
        told = f"expected in num_classes the {found} classes of the data, found {num_classes}"
        if num_classes < int(found):
            raise ValueError(f"{told}: correct one of them")
        rank_zero_warn(f"{told}: no row is of the others. Is that meant?")


def _check_classes(y: Tensor, num_classes: int, missing: bool) -> None:
    """Class numbers ``(B,)``, or in training probabilities ``(B, C)``."""
    if y.is_floating_point() and y.shape[1:] == (num_classes,) and missing:
        if y.min() < 0 or (y.sum(1) > 1 + 1e-3).any():
            raise ValueError("expected soft labels that are probabilities, found negative ones or a sum above 1")
        return
    if y.dim() != 1 or y.is_floating_point():
        raise ValueError(
            f"expected labels of shape (batch,) and an integer type, found {tuple(y.shape)} and {y.dtype}: "
            "give class numbers, or set task='multilabel' for several labels a sample"
        )
    low, high = (int(label) for label in y.aminmax())
    if high >= num_classes or low < (UNLABELED if missing else 0):
        raise ValueError(
            f"expected labels in [0, {num_classes}), found {low} to {high}: correct the labels or num_classes"
        )


def _predict_class(probabilities: Tensor) -> dict[str, Tensor]:
    probability, index = probabilities.max(-1)
    return {"class": index, "probability": probability}


def _class_metrics(num_classes: int) -> dict[str, Metric]:
    """Fractions; top-5 accuracy with more than 5 classes; ECE with 15 bins, a mean absolute gap."""
    accuracy = partial(MulticlassAccuracy, num_classes, average="micro", validate_args=False)
    found: dict[str, Metric] = {"accuracy": accuracy(), "agreement": accuracy()}
    found["ece"] = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1", validate_args=False)
    return found | ({"accuracy_top5": accuracy(top_k=5)} if num_classes > 5 else {})


def _check_several(y: Tensor, num_classes: int, missing: bool) -> None:
    """Zeros and ones ``(B, C)``, or -1 where a label is missing."""
    if y.dim() != 2 or y.shape[1] != num_classes:
        raise ValueError(
            f"expected labels of shape (batch, {num_classes}), one 0 or 1 for each label, found {tuple(y.shape)}: "
            "set task='classification' for one class a sample"
        )
    wrong = (y != 0) & (y != 1) & ((y != UNLABELED) | (not missing))
    if wrong.any():
        raise ValueError(f"expected labels 0 or 1, found {y[wrong][0].item()}")


def _likely(probabilities: Tensor) -> Tensor:
    return (probabilities > 0.5).long()


def _predict_several(probabilities: Tensor) -> dict[str, Tensor]:
    return {"labels": _likely(probabilities), "probability": probabilities}


def _several_metrics(num_classes: int) -> dict[str, Metric]:
    """The share of labels that are right, mean average precision (``map``), and each label's F1 score."""
    return {
        "accuracy": MultilabelAccuracy(num_classes, average="micro", validate_args=False),
        "agreement": MultilabelAccuracy(num_classes, average="micro", validate_args=False),
        "map": MultilabelAveragePrecision(num_classes, average="macro", validate_args=False),
        **{f"f1_{label}": OfLabel(label) for label in range(num_classes)},
    }


class OfLabel(BinaryF1Score):
    """The F1 score of one of several labels, at a threshold of 0.5."""

    def __init__(self, label: int) -> None:
        super().__init__(validate_args=False)
        self.label = label

    def update(self, preds: Tensor, target: Tensor) -> None:
        """From probabilities and labels of all labels, ``(B, C)``."""
        super().update(preds[:, self.label], target[:, self.label])


TASKS = {
    "classification": Task(
        name="classification",
        least_classes=2,
        label_term=CrossEntropy,
        teacher_term=KL,
        label_loss=cross_entropy,
        check_labels=_check_classes,
        probabilities=partial(torch.softmax, dim=-1),
        decide=partial(torch.argmax, dim=-1),
        predict=_predict_class,
        metrics=_class_metrics,
    ),
    "multilabel": Task(
        name="multilabel",
        least_classes=1,
        label_term=BernoulliCrossEntropy,
        teacher_term=BernoulliKL,
        label_loss=bernoulli_cross_entropy,
        check_labels=_check_several,
        probabilities=torch.sigmoid,
        decide=_likely,
        predict=_predict_several,
        metrics=_several_metrics,
    ),
}


def check_outputs(
    task: Task, y: Tensor, outputs: Mapping[str, Outputs], num_classes: int, missing: bool, first: bool = False
) -> None:
    """Refuse labels and logits that do not fit; on an accelerator shapes only, as to read values would stall it.

    Outputs are by the model's name: teachers first, as their numbers can spoil the student's. On the ``first`` batch,
    warn of those that look like probabilities.

    Raises:
        ValueError: If logits are not ``(B, C)`` or not finite, labels are of another task, out of range, or missing
            where they may not be, or B is 0.
    """
    if not len(y):
        raise ValueError("expected batches of at least one row, found an empty one: let the loader leave it out")
    reads = y.device.type == "cpu"
    for name, given in outputs.items():
        if given.logits.shape != (len(y), num_classes):
            raise ValueError(
                f"expected {name}'s logits of shape {(len(y), num_classes)} (batch, num_classes), found "
                f"{tuple(given.logits.shape)}: student, teacher and num_classes must agree on the classes"
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
    if reads:
        task.check_labels(y, num_classes, missing)


def _warn_of_probabilities(task: Task, name: str, logits: Tensor) -> None:
    """Say so where a model gives probabilities in place of logits, as one does that ends in a softmax or sigmoid."""
    numbers = logits.detach().float()
    if task.name == "classification":
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
        """Take in a batch's student logits ``(B, C)``, labels, and each teacher's logits; return what to log, by name.

        Agreement is with the mean of the teachers' probabilities, of those that speak of a row, if which do is known.
        """
        logits = logits.float()
        probabilities = self.task.probabilities(logits)
        self.nll.update(self.task.label_loss(logits, y))
        logged: dict[str, Metric] = {f"{self.stage}/nll": self.nll}
        metrics = {name: cast(Metric, metric) for name, metric in self.metrics.items()}
        for name, metric in metrics.items():
            if name != "agreement":
                metric.update(probabilities, y)
                logged[f"{self.stage}/{name}"] = metric
        if teachers:
            said = torch.stack([self.task.probabilities(t.float()) for t in teachers])
            if any(rows is not None for rows in known):
                silent = [torch.zeros_like(y, dtype=torch.bool) if rows is None else ~rows for rows in known]
                said = said.masked_fill(torch.stack(silent).unsqueeze(-1), math.nan)
            mean = said.nanmean(0)
            spoken = ~mean.isnan().any(-1)
            metrics["agreement"].update(probabilities[spoken], self.task.decide(mean[spoken]))
            logged[f"{self.stage}/teacher_agreement"] = metrics["agreement"]
        return logged
