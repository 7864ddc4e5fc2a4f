"""Meta-gradients as pure functions of tensors: what would each sample's loss terms do to the validation loss?

The weights ``lam`` of sample i mix its terms: term 0 is the cross-entropy with its label, term k the distillation
loss from teacher k. The inner problem is one step of plain SGD on the last layer, ``z = W h + b`` with the features
``h`` held constant (ALM-KD, arXiv 2202.03250, authors' code). The derivative is taken in closed form [derived]; it
needs three small matrix products, and no gradient of a single sample is ever stored. `lit_kd.trust.exact` has the derivative
through all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.types import UNLABELED

AllSum = Callable[[Tensor], Tensor]
"""Sums a tensor over processes, maybe in place."""


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
        """The layer in float32."""
        return cls(layer.weight.float(), None if layer.bias is None else layer.bias.float())

    def gives(self, logits: Tensor, features: Tensor | None) -> bool:
        """Whether logits are what it makes of these features, but for the rounding of mixed precision.

        Args:
            logits: ``(B, C)``.
            features: ``(B, D)``; ``None`` where the layer was not called.
        """
        if features is None:
            return False
        found = self(features.float())
        return found.shape == logits.shape and bool((found - logits).abs().max() <= 0.01 * logits.abs().max())


class MetaRows(NamedTuple):
    """Rows of the meta split of the validation data, as the last layer sees them.

    Attributes:
        features: ``(M, D)``.
        y: Trusted labels, ``(M,)``.
        keep: Which rows count, bool ``(M,)``: a row must not vouch for itself.
    """

    features: Tensor
    y: Tensor
    keep: Tensor


def term_gradients(logits: Tensor, y: Tensor, teachers: Sequence[Tensor], temperature: float) -> Tensor:
    """Gradient of every loss term of every sample with respect to the sample's logits.

    ``softmax(z) - e(y)`` for the label (0 where it is missing), ``T (softmax(z/T) - softmax(t_k/T))`` for teacher k.

    Args:
        logits: Student logits z, ``(B, C)``.
        y: Labels, ``(B,)``.
        teachers: Teacher logits, K tensors ``(B, C)``.
        temperature: T, dimensionless.

    Returns:
        ``(B, K + 1, C)``.
    """
    labelled = y != UNLABELED
    label = F.softmax(logits, -1) - F.one_hot(y.where(labelled, 0), logits.shape[-1]).to(logits.dtype)
    student = F.softmax(logits / temperature, -1)
    distil = [temperature * (student - F.softmax(t / temperature, -1)) for t in teachers]
    return torch.stack([label * labelled.unsqueeze(-1), *distil], dim=1)


def only_process(total: Tensor) -> Tensor:
    """The sum over processes where there is one: the same tensor."""
    return total


def last_layer_derivative(
    head: Head,
    features: Tensor,
    meta: MetaRows,
    pull: Tensor,
    lr: float,
    all_sum: AllSum = only_process,
) -> Tensor:
    """How the batch's logits move along the validation gradient after a look-ahead step of the last layer.

    With ``u_i = pull_i / B`` the look-ahead is ``W' = W - lr sum_i u_i h_i^T``, ``b' = b - lr sum_i u_i``. There the
    mean cross-entropy of the meta rows has the gradient ``V = E^T H``, ``v = sum_j e_j``, where
    ``e_j = (softmax(W' h_j + b') - e(y_j)) / M``; the result is ``V h_i + v``.

    Args:
        head: The student's last layer.
        features: Its inputs h for the batch, ``(B, D)``.
        meta: Meta rows.
        pull: ``sum_k lam_ik g_i^k`` with g of `term_gradients`, ``(B, C)``.
        lr: Learning rate of the look-ahead; 0 takes the validation gradient where the student is.
        all_sum: Sums a tensor over processes that share the batch and the meta rows.

    Returns:
        ``(B, C)``, 0 where no meta row is kept; see `alignment`.
    """
    bias = head.bias is not None
    if lr:
        total = all_sum(torch.cat([pull.T @ features, pull.sum(0).unsqueeze(1), _count(pull)], dim=1))
        move = lr * total[:, :-1] / total[:, -1:]
        head = Head(head.weight - move[:, :-1], head.bias - move[:, -1] if head.bias is not None else None)
    error = F.softmax(head(meta.features), -1) - F.one_hot(meta.y, pull.shape[-1]).to(pull.dtype)
    error = error * meta.keep.unsqueeze(-1)
    count = meta.keep.sum().to(error.dtype).expand(error.shape[-1], 1)
    total = all_sum(torch.cat([error.T @ meta.features, error.sum(0).unsqueeze(1), count], dim=1))
    direction = total[:, :-1] / total[:, -1:].clamp(min=1)
    return features @ direction[:, :-1].T + (direction[:, -1] if bias else 0)


def _count(rows: Tensor) -> Tensor:
    """The number of rows, as one more column to be summed over processes with the rest: ``(C, 1)``."""
    return rows.new_full((rows.shape[1], 1), float(rows.shape[0]))


def alignment(gradients: Tensor, derivative: Tensor) -> Tensor:
    """How well each loss term's gradient agrees with the validation gradient after a look-ahead step.

    It is positive where listening to the term helps, and the meta-gradient is a multiple of it: see `meta_gradient`.

    Args:
        gradients: g of `term_gradients`, ``(B, K + 1, C)``.
        derivative: Of the logits along the validation gradient, ``(B, C)``: `last_layer_derivative`, or
            `lit_kd.trust.exact.whole_network_derivative`.

    Returns:
        Their scalar products, ``(B, K + 1)``.
    """
    return torch.einsum("bkc,bc->bk", gradients, derivative)


def meta_gradient(alignment: Tensor, lr: float, batch_size: int) -> Tensor:
    """The derivative of the validation loss with respect to the weights: ``dL_val / dlam_ik``.

    Args:
        alignment: See `alignment`, of a derivative with the same ``lr``, ``(B, K + 1)``.
        lr: Learning rate of the look-ahead.
        batch_size: B of the whole group, over all processes: the inner loss is a mean.

    Returns:
        ``-lr / B * alignment``, ``(B, K + 1)``.
    """
    return -lr / batch_size * alignment
