"""Losses that compare the student with a label as a distribution.

All take student logits ``(B, C)`` and labels, ``(B,)`` or soft ``(B, C)``, and give 0 where one is missing.
"""

import torch
from torch import Tensor

from lit_kd.losses.logits import cross_entropy, kl_divergence
from lit_kd.types import distributions, full


def smoothed_cross_entropy(logits: Tensor, y: Tensor, matrix: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with ``(1 - smoothing) e(y) + smoothing matrix[y]`` (arXiv 2004.07711) [text].

    Each row of the matrix, ``(C, C)``, is a distribution. A uniform one is label smoothing; the identity changes
    nothing [derived].
    """
    label = distributions(y, logits.shape[-1]).to(matrix)
    with torch.autocast(logits.device.type, enabled=False):  # a product would be rounded
        return cross_entropy(full(logits), (1 - smoothing) * label + smoothing * label @ matrix)


def brier_score(logits: Tensor, y: Tensor) -> Tensor:
    """``sum_c (p_c - e(y)_c)^2``, in [0, 2]; its mean is least at the true probabilities, as for cross-entropy.

    Examples:
        >>> import torch
        >>> brier_score(torch.zeros(2, 2), torch.tensor([1, -1]))
        tensor([0.5000, 0.0000])
    """
    label = distributions(y, logits.shape[-1])
    return (full(logits).softmax(-1) - label).square().sum(-1) * label.any(-1)


def teacher_free_loss(
    logits: Tensor, y: Tensor, alpha: float = 0.1, temperature: float = 20.0, multiplier: float | None = None
) -> Tensor:
    """Teacher-free regularisation (arXiv 1909.11723): ``(1 - alpha) CE + alpha (multiplier / C) KL(u || p)`` [code].

    u is a teacher made by hand: the softmax of ``v / temperature``, with v 0.99 for the label's class and
    ``0.01 / (C - 1)`` for each other. Published code takes KL's mean over classes, not its sum: hence ``1 / C``. A
    multiplier of C, the default, undoes that.
    """
    classes = logits.shape[-1]
    label = distributions(y, classes).to(full(logits))
    by_hand = 0.99 * label + 0.01 / (classes - 1) * (1 - label)
    kl = kl_divergence((by_hand / temperature).log_softmax(-1), full(logits).log_softmax(-1)) * label.any(-1)
    size = 1.0 if multiplier is None else multiplier / classes
    return (1 - alpha) * cross_entropy(full(logits), y) + alpha * size * kl
