"""Curriculum temperature."""

import math
from typing import Any

from lit_kd.models import Network
from lit_kd.terms import LearnedTemperature, Term
from lit_kd.weightings.mean_teacher import Shares


class CTKD(Shares):
    """Curriculum temperature (CTKD, arXiv 2211.16231): ``(1 - weight) CE + weight T^2 KL``, where T makes it harder.

    T follows the loss upwards, see `lit_kd.terms.LearnedTemperature`, by lambda times its gradient:
    ``lambda = (1 - cos(pi min(epoch / ramp_epochs, 1))) / 2``, epochs from 1 [code]. Several teachers have equal
    shares, and each a T of its own [ours].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: The teacher's share, in [0, 1].
        ramp_epochs: Epochs until lambda is 1: 10 on CIFAR-100, 5 on ImageNet [code].
        **base: See `lit_kd.Distiller`.
    """

    rises = "ramp_epochs"

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 0.9,
        ramp_epochs: int = 10,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        if ramp_epochs < 0:
            raise ValueError(f"expected ramp_epochs of at least 0, found {ramp_epochs}")
        self.ramp_epochs = ramp_epochs

    def default_term(self) -> Term:
        """KL divergence at a learned temperature."""
        return LearnedTemperature()

    def prepare_epoch(self) -> None:
        """Set lambda."""
        done = min((self.current_epoch + 1) / max(1, self.ramp_epochs), 1.0)
        for term in self.terms or ():
            if isinstance(term, LearnedTemperature):
                term.reversal = (1 - math.cos(math.pi * done)) / 2
