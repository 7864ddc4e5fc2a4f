"""Losses as pure functions of tensors, one value a sample: they know nothing of Lightning.

Shapes: B samples, C classes. Whatever is called logits is unnormalised; temperatures are dimensionless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
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


def mean_teacher(
    teachers: Sequence[Tensor], temperature: float = 1.0, of: Literal["probabilities", "logits"] = "probabilities"
) -> Tensor:
    r"""One teacher in the place of several, for `kd_loss`.

    With ``of="probabilities"`` its softened distribution is the mean of theirs, ``mean_k softmax(t_k / T)``: the loss
    differs from the mean of the K losses by what does not depend on the student, so the gradient is the same [derived].
    With ``of="logits"`` its logits are the mean of theirs, so a teacher that is very sure outvotes the others.

    Args:
        teachers: K tensors of logits, ``(B, C)``.
        temperature: T > 0 that the loss is taken at, dimensionless.
        of: What is averaged.

    Returns:
        Logits, ``(B, C)``; those of a single teacher as they are.

    Example:
        >>> import torch
        >>> t = [torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.4, 0.6]]).log()]
        >>> mean_teacher(t).softmax(-1)
        tensor([[0.6000, 0.4000]])
    """
    if len(teachers) == 1:
        return teachers[0]
    logits = torch.stack(list(teachers))
    if of == "logits":
        return logits.mean(0)
    # a constant less than the logarithm of the mean, which no softmax sees
    return temperature * F.log_softmax(logits / temperature, dim=-1).logsumexp(0)
