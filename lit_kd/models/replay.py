"""A forward pass repeated with other parameters, without a trace on the network."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_kd.models.taps import Tapped
from lit_kd.types import Inputs, Outputs, full

Named = Mapping[str, Tensor]
"""Tensors by the names of the network's parameters or buffers."""


class Replay:
    """Keeps a network's buffers and the random numbers just before a pass, so that the pass can be repeated."""

    def __init__(self, model: nn.Module, taps: Sequence[str] = ()) -> None:
        self.model = model
        self.taps = tuple(taps)
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.gpus)]

    @property
    def gpus(self) -> list[torch.device]:
        """The network's GPU, if it is on one."""
        device = next(self.model.parameters()).device
        return [device] if device.type == "cuda" else []

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable ones, detached, in at least float32, as bfloat16 cannot hold a small change of them."""
        return {name: full(p.detach()) for name, p in self.model.named_parameters() if p.requires_grad}

    def __call__(self, x: Inputs, changed: Named | None = None) -> Outputs:
        """Repeat the pass on copies of the buffers, with the same random numbers, in at least float32.

        `changed` replaces some of the network's own parameters; if they are float64, so is the pass.
        """
        changed = dict(changed or {})
        double = any(value.dtype == torch.float64 for value in changed.values())

        def cast(tensor: Tensor) -> Tensor:
            return tensor.double() if double and tensor.is_floating_point() else full(tensor)

        own = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        copies = {name: buffer.clone() for name, buffer in self._buffers.items()}
        values = {name: cast(value) for name, value in (copies | own | changed).items()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, values, args, kwargs)

        gpus = self.gpus
        with torch.random.fork_rng(gpus), torch.autocast(next(iter(own.values())).device.type, enabled=False):
            torch.set_rng_state(self._random[0])
            for gpu, state in zip(gpus, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, gpu)
            inputs = {k: cast(v) for k, v in x.items()} if isinstance(x, Mapping) else cast(x)
            return Tapped(self.model, self.taps)(inputs, call)
