"""What the two published rules share: their schedule, constants and repeated gradient steps."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.types import UNLABELED
from lit_kd.weightings.base import MetaStep, Rule


class Published(Rule):
    """Gradient steps on the weights, with the constants of the ALM-KD authors' code.

    There, weights are updated in a separate pass in eval mode; here, in the training steps of the same epochs [ours].

    Args:
        start_weight: A teacher's weight before the first update.
        step_size: Step at a batch of 128 samples; it scales with the batch, since the meta-gradient of a sample
            carries 1 / B.
        repeats: Steps a batch; the look-ahead starts from the same student each time.
        warmup_epochs: Epochs before the first update.
        every: Updates in one epoch of so many.
    """

    def __init__(
        self,
        start_weight: float = 0.9,
        step_size: float = 1500.0,
        repeats: int = 5,
        warmup_epochs: int = 10,
        every: int = 10,
    ) -> None:
        self.start_weight = start_weight
        self.step_size = step_size
        self.repeats = repeats
        self.warmup_epochs = warmup_epochs
        self.every = every

    @abstractmethod
    def first(self, teachers: int) -> Tensor:
        """Weights of every sample before the first update, ``(K + 1,)``."""

    @abstractmethod
    def move(self, weights: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """One step against the gradient, back into the allowed set.

        Args:
            weights: ``(B, K + 1)``.
            gradient: ``dL_val / d weights`` as if all were free, ``(B, K + 1)``.
            rate: Step size for this batch.
        """

    def start(self, table: SampleTable, teachers: int, trusted: Tensor, labels: Tensor, epochs: int | None) -> None:
        """Add the weights."""
        table.add("weights", self.first(teachers))

    def active(self, epoch: int) -> bool:
        """First after the warm-up, then every so many epochs."""
        return epoch >= self.warmup_epochs and (epoch - self.warmup_epochs) % self.every == 0

    def observe(self, table: SampleTable, step: MetaStep) -> None:
        """Repeated steps on the weights of the batch."""
        weights = table["weights"][step.index]
        for _ in range(self.repeats):
            weights = self.move(weights, step.gradient(weights), self.step_size * step.batch_size / 128)
        weights[:, 0] *= step.y != UNLABELED  # a label that is missing has no gradient, nor weight
        table.write(step.index, weights=weights)
