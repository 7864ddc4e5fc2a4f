"""The last-layer meta-gradient: what would each sample's terms do to the validation loss?

The weights ``lam`` of sample i mix its terms. The inner problem is one step of plain SGD on the last layer,
``z = W h + b`` with the features ``h`` held constant (ALM-KD, arXiv 2202.03250, authors' code). The derivative is taken
in closed form [derived]; it needs three small matrix products, and no gradient of a single sample is ever stored.
`lit_kd.trust.exact` has the derivative through all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.losses import cross_entropy
from lit_kd.types import full

AllSum = Callable[[Tensor], Tensor]
"""Sums a tensor over processes, maybe in place."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of each sample, ``(B,)``, from logits ``(B, C)`` and labels."""


class Head(NamedTuple):
    """The last layer: ``logits = features @ weight.T + bias``.

    Attributes:
        weight: ``(C, D)``.
        bias: ``(C,)``, or ``None``.
    """

    weight: Tensor
    bias: Tensor | None

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
    """Rows of the meta split of the validation data, as the last layer sees them.

    Attributes:
        features: ``(M, D)``.
        y: Trusted labels.
        keep: Which rows count, bool ``(M,)``: a row must not vouch for itself.
    """

    features: Tensor
    y: Tensor
    keep: Tensor


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
    """The last layer after one step of plain SGD on the mean loss of the batch.

    ``W' = W - lr / B sum_i pull_i h_i^T``, ``b' = b - lr / B sum_i pull_i``.

    Args:
        head: The student's last layer.
        features: Its inputs h for the batch, ``(B, D)``.
        pull: The gradient of every sample's loss by its logits, ``(B, C)``.
        lr: Learning rate.
        all_sum: Sums a tensor over processes that share the batch.
    """
    rows = pull.new_full((pull.shape[1], 1), float(len(pull)))  # one more column, to be summed with the rest
    total = all_sum(torch.cat([pull.T @ features, pull.sum(0).unsqueeze(1), rows], dim=1))
    move = lr * total[:, :-1] / total[:, -1:]
    return Head(head.weight - move[:, :-1], None if head.bias is None else head.bias - move[:, -1])


def last_layer_derivative(
    head: Head, features: Tensor, meta: MetaRows, loss: Loss = cross_entropy, all_sum: AllSum = only_process
) -> Tensor:
    """How the batch's logits move along the validation gradient of the last layer.

    The mean loss of the meta rows has the gradient ``V = E^T H``, ``v = sum_j e_j``, with ``e_j`` that of row j by its
    logits, divided by M; the result is ``V h_i + v``.

    Args:
        head: Where the gradient is taken; the look-ahead's.
        features: h of the batch, ``(B, D)``.
        meta: Meta rows.
        loss: Of the meta rows.
        all_sum: Sums a tensor over processes that share the meta rows.

    Returns:
        ``(B, C)``, 0 where no meta row is kept; see `alignment`.
    """
    error = logit_gradient(loss, head(meta.features), meta.y) * meta.keep.unsqueeze(-1)
    count = meta.keep.sum().to(error.dtype).expand(error.shape[-1], 1)
    total = all_sum(torch.cat([error.T @ meta.features, error.sum(0).unsqueeze(1), count], dim=1))
    direction = total[:, :-1] / total[:, -1:].clamp(min=1)
    return features @ direction[:, :-1].T + (0 if head.bias is None else direction[:, -1])


def alignment(gradients: Tensor, derivative: Tensor) -> Tensor:
    """How well each term's gradient agrees with the validation gradient: positive where listening to it helps.

    Args:
        gradients: Of the terms by the logits, ``(B, S + 1, C)``.
        derivative: Of the logits along the validation gradient, ``(B, C)``.

    Returns:
        Their scalar products, ``(B, S + 1)``.
    """
    return torch.einsum("bkc,bc->bk", gradients, derivative)


def meta_gradient(alignment: Tensor, lr: float, batch_size: int) -> Tensor:
    """The derivative of the validation loss by the weights: ``dL_val / dlam_ik = -lr / B * alignment``.

    Args:
        alignment: After a look-ahead with the same ``lr``, ``(B, S + 1)``.
        lr: Learning rate of the look-ahead.
        batch_size: B of the whole group, over all processes: the inner loss is a mean.
    """
    return -lr / batch_size * alignment
