"""Data selection (arXiv 2404.03693): which training samples are worth distilling?

The source names "influence-based scoring" [text]; its formula could not be read. This is the first-order score [ours].
"""

import torch
from torch import Tensor

from lit_kd.losses import cross_entropy
from lit_kd.trust.meta import Head, MetaRows, last_layer_derivative, logit_gradient
from lit_kd.types import UNLABELED


def selection_scores(head: Head, features: Tensor, y: Tensor, meta: MetaRows) -> Tensor:
    """How fast the loss on trusted rows falls if a teacher's last layer learns a sample, ``(N,)`` [ours].

    ``s_i = <grad L_val, grad ell_i>``, both cross-entropies, gradients with respect to the last layer. Takes the
    layer's inputs ``(N, D)`` and labels ``(N,)``; a sample without a label scores 0.
    """
    gradients = logit_gradient(cross_entropy, head(features), y)
    return (gradients * last_layer_derivative(head, features, meta)).sum(1)


def select_rows(scores: Tensor, y: Tensor, fraction: float) -> Tensor:
    """Which samples to distil, bool ``(N,)``: a fraction of the labelled ones, and all without a label [ours].

    Takes those of the highest scores ``(N,)``; of equal ones the first.
    """
    labelled = y != UNLABELED
    order = scores.masked_fill(~labelled, torch.inf).argsort(descending=True, stable=True)
    selected = torch.zeros_like(labelled)
    selected[order[: int((~labelled).sum()) + round(fraction * int(labelled.sum()))]] = True
    return selected
