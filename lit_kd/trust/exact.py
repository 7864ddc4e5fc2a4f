"""The whole-network meta-gradient as pure functions: the look-ahead moves every layer, not the last alone.

The weights enter the inner loss linearly. So with v, the gradient of the validation loss at the look-ahead's
parameters, ``dL_val / dlam_ik = -lr / B * d/de ell_i^k(theta + e v)`` at ``e = 0`` [derived]: one directional
derivative of the batch's logits, and no graph of second order. It is taken in forward mode, or by central differences
where an operator of the network has no forward mode.

`torch.autograd.forward_ad` takes it and not `torch.func.jvp`, which draws other dropout masks inside attention than
the pass that it repeats, and refuses buffers that are updated in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from lit_kd.trust.meta import AllSum, only_process
from lit_kd.types import evaluating, logits_of

Inputs = Tensor | Mapping[str, Tensor]
Named = Mapping[str, Tensor]
"""Tensors by the names of the network's parameters or buffers."""

CENTRAL_STEP = 3e-6
"""Length of a step of central differences, relative to the norm of all parameters [ours].

Measured in float32 on six networks of up to 20 layers, at the start and in training: 1 - cosine to the exact derivative
is at most 2e-4, and ten times as much at 3e-5, where kinks of ReLUs are crossed, and at 2e-7, where rounding tells.
"""

ROWS_AT_A_TIME = 32
"""Of the meta rows whose validation gradient is taken."""


class Moment(NamedTuple):
    """What a forward pass depends on besides inputs and parameters, kept so that the pass can be repeated.

    Attributes:
        buffers: Copies of the network's buffers.
        random: States of the random generators: the CPU's and, where the network is on one, the GPU's.
    """

    buffers: Named
    random: list[Tensor]


class MetaInputs(NamedTuple):
    """Rows of the meta split of the validation data, as the whole network sees them.

    Attributes:
        x: Inputs of M rows.
        y: Trusted labels, ``(M,)``.
        keep: Which rows count, bool ``(M,)``: a row must not vouch for itself.
    """

    x: Inputs
    y: Tensor
    keep: Tensor


Derivative = Callable[[nn.Module, Inputs, Moment, Named], tuple[Tensor, Tensor]]
"""`exact_derivative` or `central_derivative`."""


def moment(model: nn.Module) -> Moment:
    """The present one."""
    random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, _gpus(model))]
    return Moment({name: buffer.clone() for name, buffer in model.named_buffers()}, random)


def repeat(model: nn.Module, x: Inputs, at: Moment, changed: Named | None = None, double: bool = False) -> Tensor:
    """A forward pass that leaves no trace: on buffers that are copies, with the random numbers of a moment.

    Args:
        model: The network; parts in training mode stay in it.
        x: The batch.
        at: Just before the pass that is to be repeated.
        changed: Parameters to use instead of the network's own.
        double: Whether to calculate in float64.

    Returns:
        Logits, ``(B, C)``, in the precision of the parameters but at least float32.
    """

    def cast(tensor: Tensor) -> Tensor:
        return tensor.double() if double and tensor.is_floating_point() else _full(tensor)

    values = {name: buffer.clone() for name, buffer in at.buffers.items()}
    values |= {name: parameter.detach() for name, parameter in model.named_parameters()}
    values = {name: cast(value) for name, value in (values | dict(changed or {})).items()}

    def call(*args: Any, **kwargs: Any) -> Any:
        return functional_call(model, values, args, kwargs)

    gpus = _gpus(model)
    with torch.random.fork_rng(gpus), torch.autocast(next(model.parameters()).device.type, enabled=False):
        torch.set_rng_state(at.random[0])
        for gpu, state in zip(gpus, at.random[1:], strict=True):
            torch.cuda.set_rng_state(state, gpu)
        return logits_of(call, {k: cast(v) for k, v in x.items()} if isinstance(x, Mapping) else cast(x))


def exact_derivative(model: nn.Module, x: Inputs, at: Moment, direction: Named) -> tuple[Tensor, Tensor]:
    """A pass's logits and their derivative along a direction of the parameters, by forward-mode differentiation.

    Args:
        model: The network.
        x: The batch.
        at: See `repeat`.
        direction: v, by parameter.

    Returns:
        z and ``d z(theta + e v) / de`` at ``e = 0``, ``(B, C)`` each.

    Raises:
        ValueError: If an operator of the network has no forward mode.
    """
    # the fused kernels of attention have no forward mode
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        make_dual: Any = forward_ad.make_dual
        theta = {name: _full(parameter.detach()) for name, parameter in _trainable(model).items()}
        dual = {name: make_dual(theta[name], v.to(theta[name])) for name, v in direction.items()}
        try:
            logits, tangent = forward_ad.unpack_dual(repeat(model, x, at, dual))  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(
                f"expected a network whose operators all support forward-mode differentiation, found in "
                f"{type(model).__name__}: {error}. Use meta_gradient: central, or last_layer"
            ) from error
        return logits, torch.zeros_like(logits) if tangent is None else tangent


def central_derivative(
    model: nn.Module, x: Inputs, at: Moment, direction: Named, double: bool | None = None
) -> tuple[Tensor, Tensor]:
    """The same as `exact_derivative` by central differences: two passes, for networks without forward mode.

    Args:
        model: The network.
        x: The batch.
        at: See `repeat`.
        direction: v, by parameter; a step is `CENTRAL_STEP` long.
        double: Whether to calculate in float64; ``None``: on a GPU, whose convolutions would take float32 for TF32,
            in which so small a step is lost.

    Returns:
        z and ``d z(theta + e v) / de`` at ``e = 0``, ``(B, C)`` each, nearly.
    """
    double = bool(_gpus(model)) if double is None else double
    theta = {name: _full(parameter.detach()) for name, parameter in _trainable(model).items()}
    size, length = get_total_norm(theta.values()), get_total_norm(direction.values())
    step = CENTRAL_STEP * size.where(size > 0, 1) / length.where(length > 0, 1)
    if double:
        theta = {name: value.double() for name, value in theta.items()}
    with torch.no_grad():
        up, down = (
            repeat(model, x, at, {name: theta[name] + s * v for name, v in direction.items()}, double)
            for s in (step, -step)
        )
    return ((up + down) / 2).to(step.dtype), ((up - down) / (2 * step)).to(step.dtype)


def look_ahead(
    model: nn.Module, logits: Tensor, pull: Tensor, lr: float, all_sum: AllSum = only_process
) -> dict[str, Tensor]:
    """All trainable parameters after one step of plain SGD on the mean loss of the batch.

    Args:
        model: The network.
        logits: z of the batch, ``(B, C)``, with their graph, which is kept.
        pull: Gradient of every sample's loss by its logits, ``(B, C)``.
        lr: Learning rate.
        all_sum: Sums a tensor over processes that share the batch.

    Returns:
        ``theta - lr / B * sum_i pull_i dz_i / dtheta`` by parameter.
    """
    parameters = _trainable(model)
    gradients = torch.autograd.grad(
        logits, list(parameters.values()), pull.to(logits.dtype), retain_graph=True, materialize_grads=True
    )
    mean = _mean(dict(zip(parameters, gradients, strict=True)), pull.new_full((1,), len(pull)), all_sum)
    return {name: _full(parameter.detach()) - lr * mean[name] for name, parameter in parameters.items()}


def validation_gradient(
    model: nn.Module, meta: MetaInputs, parameters: Named, all_sum: AllSum = only_process
) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy of the meta rows that count, with the network in evaluation mode.

    Args:
        model: The network; its mode, buffers and gradients stay as they are.
        meta: Meta rows.
        parameters: Where to take it, by name; those that are trainable.
        all_sum: Sums a tensor over processes that share the meta rows.

    Returns:
        v, by parameter; 0 where no row counts.
    """
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    sums: dict[str, Tensor] = {}
    with evaluating(model), torch.enable_grad():
        for part in _parts(model, meta):
            losses = F.cross_entropy(repeat(model, part.x, moment(model), leaves), part.y, reduction="none")
            total = losses.where(part.keep, 0).sum()
            gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
            sums = {n: g if n not in sums else sums[n] + g for n, g in zip(leaves, gradients, strict=True)}
    return _mean(sums, meta.keep.sum().view(1), all_sum)


def _parts(model: nn.Module, meta: MetaInputs) -> list[MetaInputs]:
    """Rows in parts of `ROWS_AT_A_TIME`, where each row's logits are its own: a part's graph takes the less memory."""
    mixes = any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules())
    if mixes or not isinstance(meta.x, Tensor):
        return [meta]
    parts = [slice(start, start + ROWS_AT_A_TIME) for start in range(0, len(meta.y), ROWS_AT_A_TIME)]
    return [MetaInputs(meta.x[part], meta.y[part], meta.keep[part]) for part in parts]


def whole_network_derivative(
    model: nn.Module,
    x: Inputs,
    at: Moment,
    logits: Tensor,
    meta: MetaInputs,
    pull: Tensor,
    lr: float,
    derivative: Derivative = exact_derivative,
    all_sum: AllSum = only_process,
) -> Tensor:
    """How the batch's logits move along the validation gradient after a look-ahead step of the whole network.

    Args:
        model: The network.
        x: The batch.
        at: Just before the pass that gave ``logits``.
        logits: z, ``(B, C)``, with their graph, which is kept; only needed if ``lr`` is not 0.
        meta: Meta rows.
        pull: ``sum_k lam_ik g_i^k`` with g of `lit_kd.trust.meta.term_gradients`, ``(B, C)``.
        lr: Learning rate of the look-ahead; 0 takes the validation gradient where the student is.
        derivative: `exact_derivative` or `central_derivative`.
        all_sum: Sums a tensor over processes that share the batch and the meta rows.

    Returns:
        ``(B, C)``; see `lit_kd.trust.meta.alignment`.
    """
    if lr:
        parameters = look_ahead(model, logits, pull, lr, all_sum)
    else:
        parameters = {name: _full(parameter.detach()) for name, parameter in _trainable(model).items()}
    v = validation_gradient(model, meta, parameters, all_sum)
    return derivative(model, x, at, v)[1].to(pull.dtype)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gpus(model: nn.Module) -> list[torch.device]:
    device = next(model.parameters()).device
    return [device] if device.type == "cuda" else []


def _full(tensor: Tensor) -> Tensor:
    """In at least float32: a look-ahead is a small change of the weights, which bfloat16 cannot hold."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _mean(sums: Named, rows: Tensor, all_sum: AllSum) -> dict[str, Tensor]:
    """From sums over this process's rows, ``(1,)`` many, to means over those of all processes: in one message."""
    flat = [_full(part).flatten() for part in sums.values()]
    total = all_sum(torch.cat([*flat, rows.to(flat[0])]))
    parts = torch.split(total[:-1] / total[-1:].clamp(min=1), [len(part) for part in flat])
    return {name: part.view_as(old) for (name, old), part in zip(sums.items(), parts, strict=True)}
