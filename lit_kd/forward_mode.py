"""Forward-mode derivatives by closed forms that take fewer passes over the activations than torch's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


class FewPasses(TorchFunctionMode):
    """While it lasts, networks normalise their batches by `batch_norm`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """In the place of torch's."""
        return (batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def batch_norm(
    input: Tensor,  # as torch calls it
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Batch normalisation like `torch.nn.functional.batch_norm`, with its derivative along dual tensors [derived].

    With x' = x - mean, r = 1 / std and dots for derivatives, the normalised ``r x'`` moves by
    ``r (dx - mean dx) - r^3 x' mean(x' dx)``: two means over the batch, and one sum of multiples of dx and x'. Torch's
    own formula took a third of the time of a resnet20's derivative.
    """
    (x, dx), (w, dw), (b, db) = (_unpack(tensor) for tensor in (input, weight, bias))
    if x is None or not training or (dx is None and dw is None and db is None):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    out, mean, r = torch.native_batch_norm(x, w, b, running_mean, running_var, True, momentum, eps)
    over = [d for d in range(x.dim()) if d != 1]

    def wide(of_channel: Tensor) -> Tensor:
        return of_channel.view(-1, *[1] * (x.dim() - 2))

    centred = x - wide(mean)
    shift = torch.zeros_like(mean) if db is None else db
    slope = torch.zeros_like(mean) if dw is None else dw * r
    if dx is None:
        return _dual(out, torch.addcmul(wide(shift), centred, wide(slope)))
    scale = r if w is None else r * w
    slope = slope - scale * r.square() * (centred * dx).mean(over)
    shift = shift - scale * dx.mean(over)
    return _dual(out, torch.addcmul(wide(shift), dx, wide(scale)).addcmul_(centred, wide(slope)))


def _unpack(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if tensor is None:
        return None, None
    return tuple(forward_ad.unpack_dual(tensor))  # type: ignore[no-untyped-call]


def _dual(primal: Tensor, tangent: Tensor) -> Tensor:
    return forward_ad.make_dual(primal, tangent)  # type: ignore[no-untyped-call, no-any-return]
