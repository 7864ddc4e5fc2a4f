"""Which training samples are worth distilling: their influence on trusted rows, at a teacher's last layer.

The source of data selection (arXiv 2404.03693) names "influence-based scoring" [text]; its formula could not be read.
The one here is the first-order score [ours].
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_kd.losses import cross_entropy
from lit_kd.trust.meta import Head, MetaRows, last_layer_derivative, logit_gradient
from lit_kd.types import UNLABELED


def selection_scores(head: Head, features: Tensor, y: Tensor, meta: MetaRows) -> Tensor:
    """How fast the loss on trusted rows falls if the teacher's last layer learns a sample [ours].

    ``s_i = <grad L_val, grad ell_i>``, both cross-entropies, gradients with respect to the last layer.

    Args:
        head: The teacher's last layer.
        features: Its inputs for the training samples, ``(N, D)``.
        y: Their labels, ``(N,)``.
        meta: Trusted rows.

    Returns:
        ``(N,)``; 0 where the label is missing.
    """
    gradients = logit_gradient(cross_entropy, head(features), y)
    return (gradients * last_layer_derivative(head, features, meta)).sum(1)


def select_rows(scores: Tensor, y: Tensor, fraction: float) -> Tensor:
    """Which samples to distil: a fraction of those with a label, by the highest scores, and all others [ours].

    Args:
        scores: ``(N,)``; of equal ones the first count more.
        y: Labels, ``(N,)``.
        fraction: In [0, 1].

    Returns:
        Bool, ``(N,)``.
    """
    labelled = y != UNLABELED
    order = scores.masked_fill(~labelled, torch.inf).argsort(descending=True, stable=True)
    selected = torch.zeros_like(labelled)
    selected[order[: int((~labelled).sum()) + round(fraction * int(labelled.sum()))]] = True
    return selected
