"""What depends on the task: default terms, checks, metrics, predictions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
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


class Task(ABC):
    """One kind of labels."""

    least_classes: ClassVar[int]

    @abstractmethod
    def label_term(self) -> Term:
        """What is learned from labels by default."""

    @abstractmethod
    def teacher_term(self, temperature: float) -> Term:
        """What is learned from a teacher by default, at a temperature T > 0."""

    @abstractmethod
    def label_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """The loss with trusted labels, ``(B,)``."""

    @abstractmethod
    def check_labels(self, y: Tensor, num_classes: int, missing: bool) -> None:
        """Refuse labels of another task, or out of range; reads values.

        Raises:
            ValueError: If they do not fit, or are missing where they may not be.
        """

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:
        """``(B, C)``."""

    @abstractmethod
    def decide(self, probabilities: Tensor) -> Tensor:
        """The most probable labels, in the form of labels."""

    @abstractmethod
    def predict(self, logits: Tensor) -> dict[str, Tensor]:
        """What predictions tell of each sample."""

    @abstractmethod
    def metrics(self, num_classes: int) -> dict[str, Metric]:
        """What is measured, from probabilities and labels; ``agreement`` is updated with the teachers' decisions."""


class Classification(Task):
    """One class a sample: accuracy, top-5 accuracy with more than 5 classes, and ECE with 15 bins (a mean gap)."""

    least_classes = 2

    def label_term(self) -> Term:
        """Cross-entropy."""
        return CrossEntropy()

    def teacher_term(self, temperature: float) -> Term:
        """KL divergence."""
        return KL(temperature)

    def label_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        return cross_entropy(logits, y)

    def check_labels(self, y: Tensor, num_classes: int, missing: bool) -> None:
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

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax."""
        return logits.softmax(-1)

    def decide(self, probabilities: Tensor) -> Tensor:
        """The most probable class, ``(B,)``."""
        return probabilities.argmax(-1)

    def predict(self, logits: Tensor) -> dict[str, Tensor]:
        """``class`` and its ``probability``, ``(B,)`` each."""
        probability, index = self.probabilities(logits).max(-1)
        return {"class": index, "probability": probability}

    def metrics(self, num_classes: int) -> dict[str, Metric]:
        """Fractions; ECE is a mean absolute gap."""

        def accuracy(top_k: int = 1) -> Metric:
            return MulticlassAccuracy(num_classes, average="micro", top_k=top_k, validate_args=False)

        found = {"accuracy": accuracy(), "agreement": accuracy()}
        found["ece"] = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1", validate_args=False)
        return found | ({"accuracy_top5": accuracy(5)} if num_classes > 5 else {})


class MultiLabel(Task):
    """Any of C labels a sample, each a Bernoulli variable: 0, 1, or -1 where it is missing."""

    least_classes = 1

    def label_term(self) -> Term:
        """The mean cross-entropy of the labels."""
        return BernoulliCrossEntropy()

    def teacher_term(self, temperature: float) -> Term:
        """The mean KL divergence of the labels."""
        return BernoulliKL(temperature)

    def label_loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy in nats."""
        return bernoulli_cross_entropy(logits, y)

    def check_labels(self, y: Tensor, num_classes: int, missing: bool) -> None:
        """Zeros and ones ``(B, C)``."""
        if y.dim() != 2 or y.shape[1] != num_classes:
            raise ValueError(
                f"expected labels of shape (batch, {num_classes}), one 0 or 1 for each label, found {tuple(y.shape)}: "
                "set task='classification' for one class a sample"
            )
        wrong = (y != 0) & (y != 1) & ((y != UNLABELED) | (not missing))
        if wrong.any():
            raise ValueError(f"expected labels 0 or 1, found {y[wrong][0].item()}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid."""
        return logits.sigmoid()

    def decide(self, probabilities: Tensor) -> Tensor:
        """0 or 1 for each label, ``(B, C)``."""
        return (probabilities > 0.5).long()

    def predict(self, logits: Tensor) -> dict[str, Tensor]:
        """``labels``, 0 or 1, and the ``probability`` of each, ``(B, C)``."""
        probability = self.probabilities(logits)
        return {"labels": self.decide(probability), "probability": probability}

    def metrics(self, num_classes: int) -> dict[str, Metric]:
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


TASKS: dict[str, Task] = {"classification": Classification(), "multilabel": MultiLabel()}


def check_outputs(task: Task, y: Tensor, outputs: Mapping[str, Outputs], num_classes: int, missing: bool) -> None:
    """Refuse labels and logits that do not fit; on an accelerator shapes only, as to read values would stall it.

    Args:
        task: The task.
        y: Labels of B samples.
        outputs: What each model gives for them, by its name; teachers first, as their numbers can spoil the student's.
        num_classes: C.
        missing: Whether labels may be missing.

    Raises:
        ValueError: If logits are not ``(B, C)`` or not finite, labels are of another task or out of range, or B is 0.
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
    if reads:
        task.check_labels(y, num_classes, missing)


class EvaluationMetrics(nn.Module):
    """Metrics of one stage.

    Args:
        stage: Prefix of the names, ``"val"`` or ``"test"``.
        task: What is measured.
        num_classes: C.
    """

    def __init__(self, stage: str, task: Task, num_classes: int) -> None:
        super().__init__()
        self.stage = stage
        self.task = task
        self.metrics = nn.ModuleDict(task.metrics(num_classes))  # type: ignore[arg-type]
        self.nll = MeanMetric()

    def update(self, logits: Tensor, y: Tensor, teachers: Sequence[Tensor]) -> dict[str, Metric]:
        """Take in a batch.

        Args:
            logits: The student's, ``(B, C)``.
            y: Labels.
            teachers: Each teacher's logits; agreement is with the mean of their probabilities.

        Returns:
            The metrics to log that are one number each, by name.
        """
        logits = logits.float()
        probabilities = self.task.probabilities(logits)
        self.nll.update(self.task.label_loss(logits, y))
        logged: dict[str, Metric] = {f"{self.stage}/nll": self.nll}
        for name, metric in self.metrics.items():
            if name != "agreement":
                metric.update(probabilities, y)
                logged[f"{self.stage}/{name}"] = metric  # type: ignore[assignment]
        if teachers:
            mean = torch.stack([self.task.probabilities(t.float()) for t in teachers]).mean(0)
            self.metrics["agreement"].update(probabilities, self.task.decide(mean))
            logged[f"{self.stage}/teacher_agreement"] = self.metrics["agreement"]  # type: ignore[assignment]
        return logged
