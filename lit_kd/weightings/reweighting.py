"""Rules that weigh the rows of each batch anew: learning to reweight, and Meta-Weight-Net."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.data.seeds import seeded
from lit_kd.data.table import SampleTable, all_sum
from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.weightings.base import MetaStep, Rule, has_label

HIDDEN = 100  # units of Meta-Weight-Net's network [code]


class L2RW(Rule):
    """Learning to reweight (L2RW, arXiv 1803.09050): a row counts as far as it agrees with the trusted rows, now.

    A row weighs ``max(0, <its gradient, the validation gradient>)``, divided by the mean over the batch, or 0 where all
    are 0 [code]. The published look-ahead starts from weights of 0, so it needs no step and no learning rate [derived].
    Meta rows pass in evaluation mode [ours]. Terms of teachers share in the same sum [ours].
    """

    def start(self, table: SampleTable, teachers: int, trusted: Tensor, labels: Tensor, epochs: int | None) -> None:
        """Add the weights."""
        table.add("weights", torch.ones(teachers + 1))

    def active(self, epoch: int) -> bool:
        """Always."""
        return True

    def observe(self, table: SampleTable, step: MetaStep) -> None:
        """Weigh the batch."""
        weights = step.alignment(table["weights"][step.index], 0.0).clamp(min=0)
        total = all_sum(weights.sum()).clamp(min=torch.finfo(weights.dtype).tiny)
        table.write(step.index, weights=step.batch_size * (weights / total))


class MetaWeightNet(Rule):
    """Meta-Weight-Net (arXiv 1902.07379): a small network V, trained on the trusted rows, turns a loss into a weight.

    V has 100 hidden units and a sigmoid. Before each step the student looks ahead with the weights V(loss), V takes a
    step of Adam on the validation loss, and then gives the weights of the step; they are not normalised [code]. V reads
    the label's cross-entropy, whatever the label's term, and sees nothing else: hard rows look like wrong ones. Each
    teacher has a network of its own, which reads its KL divergence at temperature 1 [ours].

    Args:
        lr: Of V.
        weight_decay: Of V, added to the gradient.
    """

    tasks = ("classification",)

    def __init__(self, lr: float = 1e-3, weight_decay: float = 1e-4) -> None:
        self.lr, self.weight_decay = lr, weight_decay

    def start(self, table: SampleTable, teachers: int, trusted: Tensor, labels: Tensor, epochs: int | None) -> None:
        """Add the weights, the networks as torch would start them, and their optimizer's state."""
        table.add("weights", torch.full((teachers + 1,), 0.5))
        if "weight_net" not in table.shared:
            with seeded("weight net"):
                net = 2 * torch.rand(teachers + 1, 3 * HIDDEN + 1) - 1
            net[:, 2 * HIDDEN :] /= HIDDEN**0.5
            moments = torch.zeros(2, *net.shape)
            table.shared |= {"weight_net": net, "weight_net_moments": moments, "weight_net_steps": torch.zeros(())}

    def active(self, epoch: int) -> bool:
        """Always."""
        return True

    def observe(self, table: SampleTable, step: MetaStep) -> None:
        """A step of V, then the batch's weights."""
        teachers = [kd_loss(step.logits, teacher, 1.0) for teacher in step.teachers]
        losses = torch.stack([cross_entropy(step.logits, step.y), *teachers], dim=1)
        net = table.shared["weight_net"].detach().requires_grad_()
        with torch.enable_grad():
            weights = net_weights(net, losses)
        [gradient] = torch.autograd.grad(weights, net, step.gradient(weights.detach()).to(weights))
        self.update(table.shared, all_sum(gradient))
        weights = net_weights(table.shared["weight_net"], losses)
        weights[:, 0] *= has_label(step.y)
        if step.known is not None:
            weights[:, 1:] *= step.known
        table.write(step.index, weights=weights)

    def update(self, state: dict[str, Tensor], gradient: Tensor) -> None:
        """Adam, with its usual constants."""
        net, steps = state["weight_net"], state["weight_net_steps"] + 1
        gradient = gradient + self.weight_decay * net
        first, second = state["weight_net_moments"]
        first, second = first.lerp(gradient, 0.1), second.lerp(gradient.square(), 0.001)
        move = first / (1 - 0.9**steps) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
        state |= {"weight_net": net - self.lr * move, "weight_net_steps": steps}
        state["weight_net_moments"] = torch.stack([first, second])


def net_weights(net: Tensor, losses: Tensor) -> Tensor:
    """What networks of one input, ``(S + 1, 301)``, make of losses ``(B, S + 1)``: weights in (0, 1)."""
    slope, shift, out = net[:, :-1].chunk(3, dim=1)
    return ((F.relu(losses.unsqueeze(-1) * slope + shift) * out).sum(-1) + net[:, -1]).sigmoid()
