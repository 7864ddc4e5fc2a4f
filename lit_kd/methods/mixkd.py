"""MixKD: the teacher is also asked about mixtures of samples."""

from typing import Any

import torch
from torch import Tensor

from lit_kd.methods.kd import KD
from lit_kd.models import Network
from lit_kd.types import Batch, distributions


class MixKD(KD):
    """MixKD (arXiv 2011.00593): `KD` on each batch and on a mixture of it, ``x' = l x_i + (1 - l) x_j`` [text].

    l is drawn for each row from ``Beta(alpha, alpha)``, j from the batch of the same process. On x' the student learns
    from the teacher's answer about x', and, if wanted, from the mixed label, of which a missing label adds nothing. The
    loss is the mean over both halves [ours]. Inputs must be floating-point tensors; a mixture is no row of the data.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        alpha: Above 0: the larger, the more even the mixtures [ours].
        mixed_labels: Whether mixed labels are learned from, too.
        **base: See `KD` and `lit_kd.Distiller`; without ``revise`` and ``select``.
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
        if self.task.name != "classification" or (self.revise, self.select, self.mix) != (None, None, None):
            raise ValueError("expected MixKD with one class a sample, without revise, select and mix: labels are mixed")
        self.alpha, self.mixed_labels = alpha, mixed_labels

    def prepare_batch(self, batch: Batch) -> Batch:
        """The batch, and its mixture behind it."""
        x, y = batch.x, batch.y
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"expected inputs to mix, a floating-point tensor, found {type(x).__name__}")
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((len(y),)).to(x)
        partner = torch.randperm(len(y)).to(x.device)
        parts = x, distributions(y, self.num_classes).to(x)
        mixed, soft = (part[partner].lerp(part, share.view(-1, *[1] * (part.dim() - 1))) for part in parts)
        return Batch(torch.cat([x, mixed]), torch.cat([parts[1], soft * self.mixed_labels]))
