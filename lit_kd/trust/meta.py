"""The last-layer meta-gradient: what would each term do to the validation loss? See docs/methods/almkd.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.losses import cross_entropy
from lit_kd.types import UNLABELED, full

AllSum = Callable[[Tensor], Tensor]
"""Sums a tensor over processes, maybe in place."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of each sample, ``(B,)``, from logits ``(B, C)`` and labels."""


class Head(NamedTuple):
    """The last layer: ``logits = features @ weight.T + bias``."""

    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)

    def __call__(self, features: Tensor) -> Tensor:
        """Logits ``(B, C)`` of features ``(B, D)``."""
        return F.linear(features, self.weight, self.bias)

    @classmethod
    def of(cls, layer: nn.Linear) -> Head:
        """The layer, in at least float32."""
        return cls(full(layer.weight), None if layer.bias is None else full(layer.bias))

    def gives(self, logits: Tensor, features: Tensor | None) -> bool:
        """Whether logits ``(B, C)`` are what it makes of features ``(B, D)``, but for rounding."""
        if features is None:
            return False
        found = self(full(features))
        return found.shape == logits.shape and bool((found - logits).abs().max() <= 0.01 * logits.abs().max())


class MetaRows(NamedTuple):
    """Rows of the meta split of the validation data, as the last layer sees them."""

    features: Tensor  # (M, D)
    y: Tensor  # trusted labels
    keep: Tensor  # which rows count, bool (M,): a row must not vouch for itself


def only_process(total: Tensor) -> Tensor:
    """The sum over processes where there is one: the same tensor."""
    return total


def logit_gradient(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """The gradient of each sample's loss by its own logits, ``(B, C)``."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, y).sum(), leaf)
    return gradient


def look_ahead(head: Head, features: Tensor, pull: Tensor, lr: float, all_sum: AllSum = only_process) -> Head:
    """The last layer after one step of plain SGD on the mean loss of the batch, which processes share, eq. (a).

    Takes the layer's inputs ``(B, D)``, and ``pull``, the gradient of every sample's loss by its logits, ``(B, C)``.
    """
    rows = pull.new_full((pull.shape[1], 1), float(len(pull)))  # one more column, to be summed with the rest
    total = all_sum(torch.cat([pull.T @ features, pull.sum(0).unsqueeze(1), rows], dim=1))
    move = lr * total[:, :-1] / total[:, -1:]
    return Head(head.weight - move[:, :-1], None if head.bias is None else head.bias - move[:, -1])


def last_layer_derivative(
    head: Head, features: Tensor, meta: MetaRows, loss: Loss = cross_entropy, all_sum: AllSum = only_process
) -> Tensor:
    """How the batch's logits move along the validation gradient of the last layer.

    Eq. (b), ``V h_i + v``, ``(B, C)``, for features h of the batch, ``(B, D)``, at the look-ahead's head; 0 where no
    meta row, which processes share, is kept.
    """
    error = logit_gradient(loss, head(meta.features), meta.y) * meta.keep.unsqueeze(-1)
    count = meta.keep.sum().to(error.dtype).expand(error.shape[-1], 1)
    total = all_sum(torch.cat([error.T @ meta.features, error.sum(0).unsqueeze(1), count], dim=1))
    direction = total[:, :-1] / total[:, -1:].clamp(min=1)
    return features @ direction[:, :-1].T + (0 if head.bias is None else direction[:, -1])


def alignment(gradients: Tensor, derivative: Tensor) -> Tensor:
    """How well each term's gradient agrees with the validation gradient, ``(B, S + 1)``: positive where it helps.

    Takes the terms' gradients by the logits, ``(B, S + 1, C)``, and `last_layer_derivative`, ``(B, C)``.
    """
    return torch.einsum("bkc,bc->bk", gradients, derivative)


def meta_gradient(alignment: Tensor, lr: float, batch_size: int) -> Tensor:
    """The derivative of the validation loss by the weights: ``dL_val / dlam_ik = -lr / B * alignment``, ``(B, S + 1)``.

    The alignment is that after a look-ahead with the same ``lr``; B counts the rows of all processes.
    """
    return -lr / batch_size * alignment


def selection_scores(head: Head, features: Tensor, y: Tensor, meta: MetaRows) -> Tensor:
    """How fast the loss on trusted rows falls if a teacher's last layer learns a sample, ``(N,)`` [ours].

    ``s_i = <grad L_val, grad ell_i>``, both cross-entropies, for the "influence-based scoring" of arXiv 2404.03693
    [text], whose formula could not be read. Takes the layer's inputs ``(N, D)`` and labels; without one the score is 0.
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
