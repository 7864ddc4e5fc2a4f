"""How much a prediction tells about a sample beyond its class."""

import torch
from torch import Tensor

from lit_kd.losses.logits import kl_divergence
from lit_kd.types import UNLABELED, distributions


def class_log_means(logits: Tensor, y: Tensor) -> Tensor:
    """``log Q``, ``(C, C)``: Q_y is the mean of ``softmax(logits)`` over rows of class y, uniform if there are none.

    Logits are ``(N, C)`` of all rows, labels ``(N,)``; rows without a label are left out.
    """
    classes = logits.shape[1]
    log_p, rows = logits.double().log_softmax(-1), distributions(y, classes).bool()
    means = [log_p[of_class].logsumexp(0) - of_class.sum().double().log() for of_class in rows.T]
    uniform = torch.full_like(log_p[0], 1 / classes).log()
    return torch.stack([mean if of_class.any() else uniform for mean, of_class in zip(means, rows.T, strict=True)])


def class_information(logits: Tensor, y: Tensor, log_means: Tensor) -> Tensor:
    """``KL(p || Q_y)`` of each sample; 0 where the label is missing.

    With the class means Q of `class_log_means` its mean over all rows is ``I(X; Y^ | Y)``: what the prediction tells of
    a sample whose class is known (arXiv 2401.08732).
    """
    log_p = logits.log_softmax(-1)
    return kl_divergence(log_p, log_means[y.clamp(min=0)].to(log_p)) * (y != UNLABELED)
