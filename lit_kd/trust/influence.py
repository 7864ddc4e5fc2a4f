"""Which training samples are worth distilling: their influence on trusted rows, at a teacher's last layer.

The source of data selection (arXiv 2404.03693) says "influence-based scoring to only distill a subset of the data while
supervising the rest with ground-truth" [text]; its formula could not be read. The one here is ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.trust.meta import Head, MetaRows, alignment, term_gradients
from lit_kd.types import UNLABELED

RESIDUAL = 1e-10
"""Of the conjugate gradients, relative: where they stop."""


def selection_scores(head: Head, features: Tensor, y: Tensor, meta: MetaRows, damping: float | None = None) -> Tensor:
    r"""How much a training sample's label speaks, through the teacher's last layer, for the trusted labels [ours].

    ``s_i = <grad L_val, grad ell_i>``, both cross-entropies, gradients with respect to the last layer. Positive: a step
    on the sample lowers the loss on the trusted rows. In closed form ``(p_i - e(y_i)) . (V h_i + v)``: no gradient of a
    single sample is built.

    With ``damping``, ``s_i = <(H + damping m I)^-1 grad L_val, grad ell_i>``, where H is the Hessian of the mean
    cross-entropy over the training samples with respect to the last layer (equal to its Gauss-Newton and Fisher matrix,
    ``mean_i (diag(p_i) - p_i p_i^T) (x) h_i h_i^T``), and m its mean diagonal entry, so that ``damping`` has no unit.
    Solved by conjugate gradients, without H.

    Args:
        head: The teacher's last layer.
        features: What it reads for the training samples, ``(N, D)``.
        y: Their labels, ``(N,)``.
        meta: Trusted rows.
        damping: Above 0; ``None``: first order, without H.

    Returns:
        ``(N,)``; 0 where the label is missing.
    """
    biased = head.bias is not None
    inputs, meta_inputs = (F.pad(h, (0, 1), value=1.0) if biased else h for h in (features, meta.features))
    errors = term_gradients(head(meta.features), meta.y, [], 1.0)[:, 0] * meta.keep.unsqueeze(1)
    direction = errors.T @ meta_inputs / meta.keep.sum().clamp(min=1)
    logits = head(features)
    if damping is not None:
        direction = solve_damped(F.softmax(logits, -1), inputs, direction, damping)
    return alignment(term_gradients(logits, y, [], 1.0), inputs @ direction.T)[:, 0]


def solve_damped(probabilities: Tensor, inputs: Tensor, right: Tensor, damping: float) -> Tensor:
    """``(H + damping m I)^-1 right`` with H and m of `selection_scores`, by conjugate gradients in float64.

    Args:
        probabilities: p, ``(N, C)``.
        inputs: h, with a column of ones if there is a bias, ``(N, D)``.
        right: ``(C, D)``.
        damping: Above 0.

    Returns:
        ``(C, D)``.
    """
    p, h, b = probabilities.double(), inputs.double(), right.double()
    diagonal = ((p - p.square()).T @ h.square()).mean() / len(h)
    shift = damping * diagonal.clamp(min=1e-30)  # of a teacher that is certain of all

    def product(x: Tensor) -> Tensor:
        moved = p * (h @ x.T)
        return (moved - p * moved.sum(1, keepdim=True)).T @ h / len(h) + shift * x

    solution = torch.zeros_like(b)
    residual, step = b.clone(), b.clone()
    square = residual.square().sum()
    enough = RESIDUAL**2 * square
    for _ in range(10 * b.numel()):  # without rounding, a tenth of this would do
        if square <= enough:
            break
        image = product(step)
        length = square / (step * image).sum()
        solution += length * step
        residual -= length * image
        last, square = square, residual.square().sum()
        step = residual + square / last * step
    return solution.to(right.dtype)


def select_rows(scores: Tensor, y: Tensor, fraction: float) -> Tensor:
    """Which samples to distil [ours]: of those with a label the fraction with the highest scores, of the others all.

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
