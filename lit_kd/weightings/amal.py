"""The final version of the ALM-KD authors' code: independent weights for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_kd.weightings.published import Published


class Amal(Published):
    """Independent weights in [0, 2] (AMAL, AAAI 2023, the authors' code).

    No sum is kept, so a sample whose label and teachers are all wrong can be switched off.
    """

    def first(self, teachers: int) -> Tensor:
        """``(1 - lam, lam, ..., lam)``."""
        return torch.tensor([1 - self.start_weight] + [self.start_weight] * teachers)

    def move(self, weights: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """A clamped gradient step."""
        return (weights - rate * gradient).clamp(0, 2)
