"""A network with several outputs for each class."""

import math

import torch
from torch import Tensor, nn

from lit_kd.models.build import last_linear
from lit_kd.types import logits_of


class Subclassed(nn.Module):
    """A network whose last linear layer gives S outputs for each of C classes; its logits are their logsumexp.

    That layer takes the place of the network's own, and at first says the same: S copies of each class.

    Args:
        body: The network, of C logits; it is changed.
        subclasses: S.
    """

    def __init__(self, body: nn.Module, subclasses: int) -> None:
        super().__init__()
        path, head = last_linear(body)
        wide = nn.Linear(head.in_features, subclasses * head.out_features).to(head.weight)
        with torch.no_grad():
            wide.weight.copy_(head.weight.repeat_interleave(subclasses, 0))
            bias = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
            wide.bias.copy_((bias - math.log(subclasses)).repeat_interleave(subclasses))
        if path:
            body.set_submodule(path, wide)
        self.body = body if path else wide
        self.subclasses, self.width = subclasses, wide.out_features
        self.spec = {"subclasses": subclasses}
        self.lit_kd_head = f"body.{path}" if path else "body"  # read by `last_linear`

    def forward(self, *x: Tensor, **named: Tensor) -> Tensor:
        """The logits ``(B, C)`` for one tensor, or for a mapping that is passed as keywords."""
        logits = logits_of(self.body, x[0] if x else named)
        if logits.shape[1:] != (self.width,):
            raise ValueError(
                f"expected that {self.lit_kd_head.removeprefix('body.')!r}, the network's last linear layer, gives its "
                f"logits, found some of shape {tuple(logits.shape)}: name the layer, lit_kd.models.adapt(net, head=...)"
            )
        return logits.reshape(-1, self.width // self.subclasses, self.subclasses).logsumexp(-1)


def class_head(model: nn.Module) -> nn.Linear:
    """The last linear layer, of one output for each class; a ValueError for a student of LELP, which has several."""
    if isinstance(model, Subclassed):
        raise ValueError(
            "expected a network whose last linear layer gives its logits, found a student of LELP, whose layer gives "
            f"{model.subclasses} outputs for each class: take a method that does not read it, such as KD or FitNet"
        )
    return last_linear(model)[1]
