"""The first version of ALM-KD: a convex combination for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_kd.weightings.published import Published


class Paper(Published):
    """Convex weights (arXiv 2202.03250 v1, the paper's own): the label has what the teachers leave.

    The teachers' shares are free, ``lam_k >= 0`` and ``sum_k lam_k <= 1``. For one teacher the projection is a clamp to
    [0, 1]; for several it is the Euclidean one [ours].
    """

    def first(self, teachers: int) -> Tensor:
        """``(1 - lam, lam)``; several teachers share lam equally."""
        return _with_label(torch.full((1, teachers), self.start_weight / teachers)).squeeze(0)

    def move(self, weights: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """A projected gradient step on the shares."""
        return _with_label(project(weights[:, 1:] - rate * by_share(gradient)))


def by_share(gradient: Tensor) -> Tensor:
    """The derivative by the teachers' shares, ``(B, K)``: what a teacher gains, the label loses.

    Args:
        gradient: By all weights as if they were free, ``(B, K + 1)``.
    """
    return gradient[:, 1:] - gradient[:, :1]


def project(shares: Tensor) -> Tensor:
    """The nearest point with ``shares >= 0`` and ``sum <= 1``, row by row, ``(B, K)``.

    Examples:
        >>> project(torch.tensor([[1.7], [-0.2], [0.4]])).flatten()
        tensor([1.0000, 0.0000, 0.4000])
    """
    inside = shares.clamp(min=0)
    # the nearest point of the simplex ignores a common shift; this one keeps huge steps exact
    shifted = shares - shares.amax(1, keepdim=True)
    ordered = shifted.sort(dim=1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, shares.shape[1] + 1, device=shares.device)
    last = (ordered > excess).sum(1, keepdim=True).clamp(min=1) - 1  # 0 only for what is no number, and stays so
    on_simplex = (shifted - excess.gather(1, last)).clamp(min=0)
    return torch.where(inside.sum(1, keepdim=True) <= 1, inside, on_simplex)


def _with_label(shares: Tensor) -> Tensor:
    return torch.cat([1 - shares.sum(1, keepdim=True), shares], dim=1)
