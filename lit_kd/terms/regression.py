"""What a regression learns from targets and from a teacher's outputs, ``(B, D)`` each."""

import torch
from torch import Tensor, nn

from lit_kd.losses import bounded_error, gaussian_error, squared_error
from lit_kd.terms.base import Term
from lit_kd.types import Batch, Outputs, full


class SquaredError(Term):
    """`lit_kd.losses.squared_error` of the target."""

    reads_teacher = False
    tasks = ("regression",)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The mean squared error of each sample."""
        return squared_error(full(student.logits), batch.y)


class GaussianError(SquaredError):
    """`lit_kd.losses.gaussian_error` of the target, whose standard deviations, one an output, are learned along."""

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Begin at a standard deviation of 1, in units of the target."""
        self.log_scale = nn.Parameter(torch.zeros(student.logits.shape[1], device=student.logits.device))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The negative log-density."""
        return gaussian_error(full(student.logits), batch.y, self.log_scale)


class TeacherError(Term):
    """The squared error to the teacher's output: what KL is for normal distributions of one variance, but for a factor.

    There is no temperature.
    """

    tasks = ("regression",)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The mean squared error of each sample."""
        assert teacher is not None
        return squared_error(full(student.logits), full(teacher.logits))


class TeacherBound(TeacherError):
    """The student's error, where it is not below the teacher's: see `lit_kd.losses.bounded_error`.

    Args:
        margin: m >= 0, in squared units of the target: how far below the teacher's the student's error shall come.
        weight: A constant factor.
    """

    def __init__(self, margin: float = 0.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if margin < 0:
            raise ValueError(f"expected a margin of at least 0, found {margin}")
        self.margin = margin

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The bounded squared error."""
        assert teacher is not None
        return bounded_error(full(student.logits), full(teacher.logits), batch.y, self.margin)
