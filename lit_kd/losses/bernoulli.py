"""Losses for several labels a sample: each of C classes is there or not, independently."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.losses.logits import kl_divergence
from lit_kd.types import UNLABELED


def bernoulli_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy of each sample, the mean over its C labels, which are 0, 1 or `UNLABELED`, ``(B, C)``.

    A missing label adds 0.

    Examples:
        >>> bernoulli_cross_entropy(torch.zeros(1, 4), torch.tensor([[1, 0, UNLABELED, UNLABELED]]))
        tensor([0.3466])
    """
    loss = -F.logsigmoid(torch.where(y == 1, logits, -logits))
    return loss.masked_fill(y == UNLABELED, 0).mean(-1)


def bernoulli_kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Distillation loss: ``T^2`` times the mean over classes of ``KL(sigmoid(t / T) || sigmoid(z / T))``.

    Examples:
        >>> bernoulli_kd_loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0986]]))
        tensor([0.0654])
    """
    teacher, student = (
        F.logsigmoid(torch.stack([logits, -logits], dim=-1) / temperature)
        for logits in (teacher_logits, student_logits)
    )
    return temperature**2 * kl_divergence(teacher, student).mean(-1)
