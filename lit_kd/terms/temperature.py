"""Distillation from logits at a learned temperature."""

import torch
from torch import Tensor, nn

from lit_kd.losses import kd_loss
from lit_kd.terms.logits import LogitTerm


class LearnedTemperature(LogitTerm):
    """``T^2 KL(teacher || student)`` at a temperature that makes it harder (CTKD, arXiv 2211.16231).

    ``T = 1 + 20 sigmoid(theta)``, and theta, from 1, climbs the loss that the student descends: its gradient is
    reversed [code]. Weight decay, which acts on it in the published code, does not here. `lit_kd.CTKD` lets the
    reversal grow from 0; under other methods it is 1 from the start.

    Args:
        weight: A constant factor.
        standardise: See `LogitTerm`.
    """

    decays = False

    def __init__(self, weight: float = 1.0, standardise: bool = False) -> None:
        super().__init__(1.0, weight, standardise)
        self.theta = nn.Parameter(torch.ones(1))
        self.reversal = 1.0
        """lambda, by which theta's gradient is multiplied, with the sign reversed; no checkpoint holds it."""

    @property
    def learned(self) -> Tensor:
        """T now, ``(1,)``, with its graph."""
        theta = (1 + self.reversal) * self.theta.detach() - self.reversal * self.theta
        return 1 + 20 * theta.sigmoid()

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """KL divergence."""
        return kd_loss(student, teacher, self.learned)
