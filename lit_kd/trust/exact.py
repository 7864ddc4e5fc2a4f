"""The whole-network meta-gradient by one directional derivative, eq. (c) of docs/methods/almkd.md."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from lit_kd.trust.meta import AllSum, only_process

Named = Mapping[str, Tensor]
"""Tensors by the names of a network's parameters."""
Function = Callable[[Named], Tensor]
"""Of parameters."""

CENTRAL_STEP = 3e-6
"""Length of a step of central differences, relative to the norm of all parameters [ours], see docs/methods/almkd.md."""


def exact_derivative(function: Function, theta: Named, direction: Named) -> Tensor:
    """``d f(theta + e v) / de`` at ``e = 0`` along a direction v, by forward-mode differentiation.

    A ValueError if an operator has no forward mode.
    """
    # torch.func.jvp would draw other dropout masks in attention than the first pass, and refuse to update buffers in
    # place; the fused kernels of attention have no forward mode
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        make_dual: Any = forward_ad.make_dual
        dual = {name: make_dual(value, direction[name].to(value)) for name, value in theta.items()}
        try:
            value, tangent = forward_ad.unpack_dual(function(dual))  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            if "forward" not in str(error):
                raise
            raise ValueError(
                "expected a network and terms whose operators all support forward-mode differentiation, found: "
                f"{error}. Use meta_gradient: central, or last_layer"
            ) from error
        return torch.zeros_like(value) if tangent is None else tangent


def central_derivative(function: Function, theta: Named, direction: Named, double: bool = False) -> Tensor:
    """The same as `exact_derivative` by central differences: two passes, for operators without forward mode.

    With ``double`` the parameters are given in float64, for devices that round float32 in convolutions.
    """
    size, length = get_total_norm(theta.values()), get_total_norm(direction.values())
    step = CENTRAL_STEP * size.where(size > 0, 1) / length.where(length > 0, 1)
    start = {name: value.double() if double else value for name, value in theta.items()}
    with torch.no_grad():
        up, down = (function({name: start[name] + s * v for name, v in direction.items()}) for s in (step, -step))
    return ((up - down) / (2 * step)).to(step.dtype)


def gradient(total: Tensor, leaves: Named) -> dict[str, Tensor]:
    """The gradient of the sum of ``total`` by tensors of its graph, which is kept; 0 where one has no part in it."""
    ones = torch.ones_like(total)
    found = torch.autograd.grad(total, list(leaves.values()), ones, retain_graph=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def mean(sums: Named, rows: Tensor, all_sum: AllSum = only_process) -> dict[str, Tensor]:
    """From sums over this process's rows, ``(1,)`` many, to means over those of all processes, in one message."""
    flat = [part.flatten() for part in sums.values()]
    total = all_sum(torch.cat([*flat, rows.to(flat[0])]))
    parts = torch.split(total[:-1] / total[-1:].clamp(min=1), [len(part) for part in flat])
    return {name: part.view_as(old) for (name, old), part in zip(sums.items(), parts, strict=True)}
