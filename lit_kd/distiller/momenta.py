"""SGD with two momenta."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT


class TwoMomenta(Optimizer):
    """SGD that accumulates the label's gradient apart from that of what is distilled (DOT, ICCV 2023) [code].

    ``v = (momentum - delta) v + g + weight_decay w`` of the label's g, ``u = (momentum + delta) u + h`` of the rest h,
    then ``w = w - lr (v + u)``. A parameter that the label's loss does not reach uses plain ``momentum``. At delta = 0
    it is `torch.optim.SGD` with momentum.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        momentum: In [delta, 1 - delta).
        delta: How far apart both are; 0.075 in the authors' code for KD.
        weight_decay: Decay.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.05,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 5e-4,
    ) -> None:
        if min(lr, weight_decay, delta, momentum - delta) < 0 or momentum + delta >= 1:
            expected = "expected lr and weight_decay of at least 0, and momentum - delta to momentum + delta in [0, 1)"
            raise ValueError(f"{expected}, found {lr}, {weight_decay}, {momentum} and {delta}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        self.of_label: dict[Tensor, Tensor] = {}
        """What of ``grad`` of each parameter is the label's, where the label reaches it; `zero_grad` clears it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy: gradients are left behind, as torch does."""
        super().__setstate__(state)
        self.of_label = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch."""
        super().zero_grad(set_to_none)
        self.of_label.clear()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                label, decay, m, d = self.of_label.get(p), group["weight_decay"] * p, group["momentum"], group["delta"]
                parts = {"taught": (p.grad + decay, m)}
                if label is not None:
                    parts = {"label": (label + decay, m - d), "taught": (p.grad - label, m + d)}
                for name, (gradient, momentum) in parts.items():
                    if name not in self.state[p]:
                        self.state[p][name] = torch.zeros_like(p)
                    p.add_(self.state[p][name].mul_(momentum).add_(gradient), alpha=-group["lr"])
        return loss


def two_momenta(params: ParamsT) -> TwoMomenta:
    """The default optimizer of `lit_kd.DOT`: a function, as the command line takes no class for a default."""
    return TwoMomenta(params)
