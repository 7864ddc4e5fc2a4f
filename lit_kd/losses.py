"""Losses as pure functions of tensors, one value a sample: they know nothing of Lightning.

Shapes: B samples, C classes. Whatever is called logits is unnormalised; temperatures are dimensionless.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lit_kd.data.batch import UNLABELED


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each sample; 0 where the label is missing.

    Args:
        logits: Student logits, ``(B, C)``.
        y: Labels, ``(B,)``, in ``[0, C)`` or `UNLABELED`.

    Returns:
        Losses in nats, ``(B,)``.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, UNLABELED]))
        tensor([1.3863, 0.0000])
    """
    return F.cross_entropy(logits, y, reduction="none", ignore_index=UNLABELED)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Distillation loss of each sample (Hinton et al., 2015, the paper's own).

    ``T^2 * sum_c softmax(t / T)_c * (log_softmax(t / T)_c - log_softmax(z / T)_c)``: the KL divergence summed, not
    averaged, over classes; the factor ``T^2`` keeps the size of the gradient independent of the temperature.

    Args:
        student_logits: z, ``(B, C)``.
        teacher_logits: t, ``(B, C)``.
        temperature: T > 0, dimensionless.

    Returns:
        Losses in nats, ``(B,)``; 0 where both agree, never negative.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 0.0]])
        >>> kd_loss(z, torch.tensor([[0.0, 0.0]]), temperature=4.0)
        tensor([0.])
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
