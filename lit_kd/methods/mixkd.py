"""MixKD: the teacher is also asked about mixtures of samples."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.distiller.base import Weights
from lit_kd.methods.kd import KD
from lit_kd.models import Network
from lit_kd.types import UNLABELED, Batch, Outputs


class MixKD(KD):
    """MixKD (arXiv 2011.00593): `KD` on each batch and on a mixture of it, ``x' = l x_i + (1 - l) x_j`` [text].

    l is drawn for each row from ``Beta(alpha, alpha)``, j from the batch of the same process. On x' the student learns
    from the teacher's answer about x', and, if wanted, from the mixed label; each half of the loss has the size of KD's
    [ours]. Inputs must be floating-point tensors.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        alpha: Above 0: the larger, the more even the mixtures [ours].
        mixed_labels: Whether mixed labels are learned from, too.
        **base: See `KD` and `lit_kd.Distiller`.
    """

    changes_batches = True

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        alpha: float = 0.4,
        mixed_labels: bool = True,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if not alpha > 0:
            raise ValueError(f"expected an alpha above 0, found {alpha}")
        self.alpha = alpha
        self.mixed_labels = mixed_labels

    def prepare_batch(self, batch: Batch) -> Batch:
        """The batch, and its mixture behind it."""
        x, y = batch.x, batch.y
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"expected inputs to mix, a floating-point tensor, found {type(x).__name__}")
        rows = len(y)
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((rows,)).to(x)
        partner = torch.randperm(rows).to(x.device)
        labels = y if y.is_floating_point() or y.dim() == 2 else F.one_hot(y.clamp(min=0), self.num_classes)
        labels = labels.to(x) * (y != UNLABELED).view(rows, -1)
        mixed = [_mix(part, part[partner], share) for part in (x, labels)]
        if not self.mixed_labels:
            mixed[1] = torch.zeros_like(labels)
        index = None if batch.index is None else torch.cat([batch.index, batch.index])
        return Batch(torch.cat([x, mixed[0]]), torch.cat([labels, mixed[1]]), index)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """Twice those of KD, for a batch that is twice as large."""
        weights = super().weigh(student, sources, batch)
        return 2 * weights if isinstance(weights, Tensor) else [2 * weight for weight in weights]


def _mix(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    share = share.view(-1, *[1] * (one.dim() - 1))
    return share * one + (1 - share) * other
