"""Losses for labels that may be wrong, in place of cross-entropy.

All take student logits ``(B, C)`` and labels ``(B,)``, in ``[0, C)`` or `UNLABELED`, and give 0 where one is missing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.losses.logits import cross_entropy
from lit_kd.types import UNLABELED, full


def generalized_cross_entropy(logits: Tensor, y: Tensor, q: float = 0.7) -> Tensor:
    """``(1 - p_y^q) / q`` with q in (0, 1] (Zhang and Sabuncu, 2018).

    It goes from cross-entropy, q to 0, to mean absolute error, q = 1. The default is the paper's.
    """
    return -torch.expm1(-q * cross_entropy(logits, y)) / q


def taylor_cross_entropy(logits: Tensor, y: Tensor, order: int = 2) -> Tensor:
    """The first terms of the Taylor series of ``-log p_y``: ``sum_i (1 - p_y)^i / i`` (Feng et al., 2020)."""
    miss = -torch.expm1(-cross_entropy(logits, y))  # 0 where the label is missing, as the cross-entropy is
    return torch.stack([miss**i / i for i in range(1, order + 1)]).sum(0)


def superloss(logits: Tensor, y: Tensor, strength: float = 1.0) -> Tensor:
    """SuperLoss (Castells et al., 2020) of the cross-entropy l: hard samples, whose labels may be wrong, count less.

    ``min over s of (l - tau) s + strength (log s)^2``, reached at ``s = exp(-W(b / 2))`` with Lambert's W and
    ``b = max(-2 / e, (l - tau) / strength)``. ``tau = log C``, the loss of a guess, is one of the paper's choices; its
    strength is 1 for CIFAR-10 and 0.25 for CIFAR-100. Losses are below 0 where l is below tau.
    """
    if y.is_floating_point():
        raise ValueError("expected class numbers as labels for the SuperLoss, found probabilities")
    excess = cross_entropy(logits, y) - math.log(logits.shape[-1])
    # at the minimum the derivative by l is s, so no gradient needs to flow through s
    log_s = -lambert_w((excess.detach() / strength).clamp(min=-2 / math.e) / 2)
    return (excess * log_s.exp() + strength * log_s**2) * (y != UNLABELED)


def corrected_cross_entropy(logits: Tensor, likelihood: Tensor) -> Tensor:
    """``-log sum_c l_c p_c`` with l_c the probability of the given label if c is the true class, ``(B, C)``.

    This is forward correction (Patrini et al., 2017) [text]. A one-hot likelihood gives the cross-entropy, ones, where
    a label is missing, give 0 [derived]. A label that all classes exclude teaches nothing [ours].

    Examples:
        >>> corrected_cross_entropy(torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[0.8, 0.4]]))
        tensor([0.3567])
    """
    log_p = full(logits).log_softmax(-1)
    return -(log_p + likelihood.to(log_p).clamp(min=torch.finfo(log_p.dtype).tiny).log()).logsumexp(-1)


def overparameterized_loss(logits: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The loss of SOP (arXiv 2202.14026) of each sample, with its u, ``(B,)``, and v, ``(B, C)`` [code].

    With ``s = u^2 e(y) - v^2 (1 - e(y))``, squares at most 1, it is the cross-entropy of the normalised ``p + s``,
    whose entries are at least 1e-4, and the squared distance from e(y) to the predicted class's one-hot plus s. The
    cross-entropy has no gradient in v.
    """
    if y.is_floating_point():
        raise ValueError("expected class numbers as labels for SOP, found probabilities")
    labelled, p = y != UNLABELED, full(logits).softmax(-1)
    label, said = (F.one_hot(c, p.shape[-1]).to(p) for c in (y.where(labelled, 0), p.argmax(-1)))
    more, less = (u.unsqueeze(-1).square() * label).clamp(max=1), (v.square() * (1 - label)).clamp(max=1)
    shifted = (p + more - less.detach()).clamp(min=1e-4)
    shifted = (shifted / shifted.sum(-1, keepdim=True)).clamp(min=1e-4)
    distance = (said + more - less - label).square().sum(-1)
    return (distance - (label * shifted.log()).sum(-1)) * labelled


def early_learning(logits: Tensor, target: Tensor) -> Tensor:
    """``log(1 - <q, p>)``, which keeps p at a target ``(B, C)``, a running mean of p (arXiv 2007.00151) [code]."""
    p = full(logits).softmax(-1).clamp(1e-4, 1 - 1e-4)
    return (1 - (target * p).sum(-1)).log()


def lambert_w(x: Tensor, steps: int = 8) -> Tensor:
    """The principal branch of Lambert's W, ``W exp(W) = x``, for ``x >= -1 / e``, by Halley's method on any device."""
    near = (2 * (1 + math.e * x)).clamp(min=0).sqrt()  # distance from the branch point, where W = -1
    w = torch.where(x < 0, near - 1 - near**2 / 3, torch.log1p(x.clamp(min=0)))
    for _ in range(steps):
        error, slope = w - x * torch.exp(-w), w + 1
        # at the branch point itself the slope is 0, and so is the error
        step = error / (slope - (w + 2) * error / (2 * slope)).where(slope > 1e-3, torch.inf)
        w = w - step
    return w
