"""What is learned of a sample beyond its class."""

import torch
from torch import Tensor

from lit_kd.losses import class_information
from lit_kd.terms.base import Term
from lit_kd.types import Batch, Outputs, class_labels, full


class ClassInformation(Term):
    """`lit_kd.losses.class_information`; a negative weight lets it grow. The method sets ``log_means``.

    Args:
        weight: A constant factor.
    """

    reads_teacher = False
    tasks = ("classification",)
    log_means: Tensor

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make room for what is said of each class, ``(C, C)``."""
        classes = student.logits.shape[1]
        self.register_buffer("log_means", torch.full((classes, classes), torch.nan))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The information, in nats."""
        return class_information(full(student.logits), class_labels(batch.y), self.log_means)
