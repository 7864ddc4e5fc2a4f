"""Soft labels that a student makes for itself."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.losses.logits import cross_entropy
from lit_kd.types import UNLABELED, class_labels


def uskd_loss(
    logits: Tensor, auxiliary: Tensor, y: Tensor, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005
) -> Tensor:
    """USKD (arXiv 2303.13005) of each sample: ``CE - alpha s log p_y - beta sum_c z_c log q_c + mu CE_aux`` [code].

    ``s = p_y^2 + 1 - mean p_y^2``, the mean over the labelled rows of the batch. q is the distribution over the other
    classes, and so is z: ``1 / rank``, scaled to sum 1. All classes are ranked, by the sum of ``p_c / (1 - p_y)`` of
    logits and of auxiliary logits, ``(B, C)`` each; published code adds a probability and a logarithm. s and z have no
    gradient. CE_aux has labels smoothed by 0.1. Of soft labels the most probable class counts, except in CE. A missing
    label adds 0.
    """
    hard = class_labels(y)
    labelled = hard != UNLABELED
    is_label = F.one_hot(hard.where(labelled, 0), logits.shape[-1]).bool()
    said = logits.log_softmax(-1).masked_fill(~is_label, 0).sum(-1)
    with torch.no_grad():
        square = said.exp().square()
        s = square + 1 - (square * labelled).sum() / labelled.sum().clamp(min=1)
        rest = [one.masked_fill(is_label, -torch.inf).logsumexp(-1, keepdim=True) for one in (logits, auxiliary)]
        score = (logits - rest[0]).exp() + (auxiliary - rest[1]).exp()
        rank = 1 + score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        z = rank.to(logits).reciprocal().masked_fill(is_label, 0)
        z = z / z.sum(-1, keepdim=True)
    log_q = logits.masked_fill(is_label, -torch.inf).log_softmax(-1).masked_fill(is_label, 0)
    own = -alpha * s * said - beta * (z * log_q).sum(-1)
    found: Tensor = cross_entropy(logits, y) + own * labelled + mu * cross_entropy(auxiliary, hard, 0.1)
    return found
