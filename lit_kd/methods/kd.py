"""Knowledge distillation with one fixed weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_kd.data.batch import Batch
from lit_kd.distiller import Distiller
from lit_kd.features import Outputs
from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.models import Network


class KD(Distiller):
    """Knowledge distillation (Hinton et al., 2015): ``(1 - weight) CE + weight T^2 KL``, the same for every sample.

    With several teachers the distillation losses are averaged.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: The teacher's share, in [0, 1].
        temperature: T > 0, dimensionless.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 0.9,
        temperature: float = 4.0,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if not 0 <= weight <= 1:
            raise ValueError(f"expected a weight in [0, 1], the teacher's share of the loss; found {weight}")
        if not temperature > 0:
            raise ValueError(f"expected a temperature above 0, found {temperature}")
        self.weight = weight
        self.temperature = temperature

    def distill(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> dict[str, Tensor]:
        """Two terms, ``label`` and ``teacher``."""
        distilled = torch.stack([kd_loss(student.logits, t.logits, self.temperature) for t in teachers])
        return {
            "label": (1 - self.weight) * cross_entropy(student.logits, batch.y),
            "teacher": self.weight * distilled.mean(0),
        }
