"""Many one-hidden-layer perceptrons trained side by side: the same arithmetic as `lit_kd.KD`, many times faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
"""The gradient of a sample's loss by its logits ``(B, C)``, for the rows ``(B,)``."""


class Task(NamedTuple):
    """What one net is trained on: inputs ``(N, F)``, its loss, and (inputs, labels) of validation and test."""

    x: Tensor
    gradient: Loss
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def label_loss(onehot: Tensor) -> Loss:
    """Cross-entropy with labels ``(N, C)``."""
    return lambda z, rows: z.softmax(-1) - onehot[rows]


def kd_loss(onehot: Tensor, teacher: Tensor, weight: float, temperature: float) -> Loss:
    """``(1 - weight) CE + weight T^2 KL``; teacher logits ``(N, C)``."""
    soft = (teacher / temperature).softmax(-1)

    def gradient(z: Tensor, rows: Tensor) -> Tensor:
        distil = temperature * ((z / temperature).softmax(-1) - soft[rows])
        return (1 - weight) * (z.softmax(-1) - onehot[rows]) + weight * distil

    return gradient


class Mlps:
    """Nets of one shape; each starts from its own seed, as torch's linear layers do."""

    def __init__(self, seeds: Sequence[int], features: int, hidden: int, classes: int) -> None:
        parts: list[list[Tensor]] = [[], [], [], []]
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for i, (inputs, outputs) in enumerate([(features, hidden), (hidden, classes)]):
                for part, rows in (parts[2 * i], inputs), (parts[2 * i + 1], 1):
                    part.append((2 * torch.rand(rows, outputs, generator=generator) - 1) / math.sqrt(inputs))
        self.seeds = list(seeds)
        self.parameters = [torch.stack(part) for part in parts]
        self.momentum = [torch.zeros_like(p) for p in self.parameters]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden features and logits of ``x (E, B, F)``."""
        w1, b1, w2, b2 = self.parameters
        hidden = torch.baddbmm(b1, x, w1).relu_()
        return hidden, torch.baddbmm(b2, hidden, w2)

    def step(self, x: Tensor, hidden: Tensor, dz: Tensor, lr: float) -> None:
        """SGD with Nesterov momentum 0.9 and weight decay 5e-4."""
        dh = torch.bmm(dz, self.parameters[2].mT).mul_(hidden > 0)
        gradients = [torch.bmm(x.mT, dh), dh.sum(1, True), torch.bmm(hidden.mT, dz), dz.sum(1, True)]
        for p, b, g in zip(self.parameters, self.momentum, gradients, strict=True):
            g.add_(p, alpha=5e-4)
            b.mul_(0.9).add_(g)
            p.sub_(g.add_(b, alpha=0.9), alpha=lr)

    def begin_as(self, i: int, net: nn.Module) -> None:
        """Let net i start from the parameters of another."""
        with torch.no_grad():
            for part, value in zip(self.parameters, net.parameters(), strict=True):
                part[i] = value.t()

    def module(self, i: int) -> nn.Sequential:
        """Net i."""
        w1, b1, w2, b2 = (p[i] for p in self.parameters)
        net = nn.Sequential(nn.Linear(*w1.shape), nn.ReLU(), nn.Linear(*w2.shape))
        with torch.no_grad():
            for parameter, value in zip(net.parameters(), (w1.T, b1[0], w2.T, b2[0]), strict=True):
                parameter.copy_(value)
        return net


def train(
    nets: Mlps,
    tasks: Sequence[Task],
    epochs: int,
    batch_size: int = 64,
    lr: float = 0.1,
    order: Callable[[int, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Train with a cosine schedule by epoch; the nets are left at their best validation epoch.

    Nets with the same seed see their rows in the same order.

    Args:
        nets: Where they begin.
        tasks: Of each.
        epochs: How many.
        batch_size: Rows of an update.
        lr: The first learning rate.
        order: The rows of an epoch, by seed and epoch; ``None``: drawn.

    Returns:
        Test accuracies ``(E,)`` at the best validation epoch and at the last.
    """
    size = len(tasks[0].x)
    shared = {seed: torch.Generator().manual_seed(seed) for seed in nets.seeds}
    best, at_best, last = torch.full((len(tasks),), -1.0), torch.zeros(len(tasks)), torch.zeros(len(tasks))
    kept = [p.clone() for p in nets.parameters]
    val, test = (_stacked([getattr(t, part) for t in tasks]) for part in ("val", "test"))
    for epoch in range(epochs):
        rate = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        orders = {
            seed: (torch.randperm(size, generator=generator) if order is None else order(seed, epoch)).split(batch_size)
            for seed, generator in shared.items()
        }
        for batch in range(math.ceil(size / batch_size)):
            rows = [orders[seed][batch] for seed in nets.seeds]
            x = torch.stack([task.x[r] for task, r in zip(tasks, rows, strict=True)])
            hidden, z = nets.forward(x)
            dz = torch.stack([task.gradient(z[i], rows[i]) for i, task in enumerate(tasks)])
            nets.step(x, hidden, dz / x.shape[1], rate)
        found = _accuracy(nets, *val)
        better = found > best
        best = torch.where(better, found, best)
        last = _accuracy(nets, *test)
        at_best = torch.where(better, last, at_best)
        for keep, p in zip(kept, nets.parameters, strict=True):
            keep[better] = p[better]
    nets.parameters = kept
    return at_best, last


def _stacked(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first = pairs[0]
    if all(pair[0] is first[0] for pair in pairs):  # one copy serves all
        return first[0].unsqueeze(0).expand(len(pairs), -1, -1), first[1]
    return torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])


def _accuracy(nets: Mlps, x: Tensor, y: Tensor) -> Tensor:
    logits = torch.cat([nets.forward(part)[1] for part in x.split(1024, dim=1)], dim=1)
    return (logits.argmax(-1) == y).float().mean(-1)
