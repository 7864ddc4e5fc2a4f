"""What is measured on validation and test data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lit_kd.losses import cross_entropy


class EvaluationMetrics(nn.Module):
    """Metrics of one stage: accuracy, top-5 where there are more than 5 classes, NLL, ECE, teacher agreement.

    Accuracies and agreement are fractions; the calibration error has 15 bins and is a mean absolute gap; NLL is in
    nats. With several teachers, agreement is with the mean of their probabilities.

    Args:
        stage: Prefix of the names, ``"val"`` or ``"test"``.
        num_classes: C.
    """

    def __init__(self, stage: str, num_classes: int) -> None:
        super().__init__()
        self.stage = stage
        self.accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.accuracy_top5 = (
            MulticlassAccuracy(num_classes, average="micro", top_k=5, validate_args=False) if num_classes > 5 else None
        )
        self.ece = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1", validate_args=False)
        self.nll = MeanMetric()
        self.teacher_agreement = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def update(self, logits: Tensor, y: Tensor, teachers: Sequence[Tensor]) -> dict[str, Metric]:
        """Take in a batch.

        Args:
            logits: Student logits, ``(B, C)``.
            y: Labels, ``(B,)``.
            teachers: Teacher logits, K tensors ``(B, C)``; without any, there is no agreement.

        Returns:
            The metrics to log, by name.
        """
        logits = logits.float()
        probabilities = logits.softmax(-1)
        self.accuracy.update(probabilities, y)
        self.ece.update(probabilities, y)
        self.nll.update(cross_entropy(logits, y))
        logged: dict[str, Metric] = {"accuracy": self.accuracy, "ece": self.ece, "nll": self.nll}
        if self.accuracy_top5 is not None:
            self.accuracy_top5.update(probabilities, y)
            logged["accuracy_top5"] = self.accuracy_top5
        if teachers:
            mean = torch.stack([t.float().softmax(-1) for t in teachers]).mean(0)
            self.teacher_agreement.update(probabilities, mean.argmax(-1))
            logged["teacher_agreement"] = self.teacher_agreement
        return {f"{self.stage}/{name}": metric for name, metric in logged.items()}
