"""Many one-hidden-layer perceptrons trained side by side: the same arithmetic as torch's, many times faster."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, LR = 64, 0.1
"""Rows of an update, and the first learning rate."""


class Mlps:
    """Nets of one shape; each starts from its own seed, as torch's linear layers do."""

    def __init__(self, seeds: Sequence[int], features: int, hidden: int, classes: int) -> None:
        parts: list[list[Tensor]] = [[], [], [], []]
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for i, (inputs, outputs) in enumerate([(features, hidden), (hidden, classes)]):
                for part, rows in (parts[2 * i], inputs), (parts[2 * i + 1], 1):
                    part.append((2 * torch.rand(rows, outputs, generator=generator) - 1) / math.sqrt(inputs))
        self.parameters = [torch.stack(part) for part in parts]
        self.momentum = [torch.zeros_like(p) for p in self.parameters]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden features and logits of ``x (E, B, F)``."""
        w1, b1, w2, b2 = self.parameters
        hidden = torch.baddbmm(b1, x, w1).relu_()
        return hidden, torch.baddbmm(b2, hidden, w2)

    def step(self, x: Tensor, hidden: Tensor, dz: Tensor, lr: float, taken: Tensor | None = None) -> None:
        """SGD with Nesterov momentum 0.9 and weight decay 5e-4; with `taken`, ``(E,)``, of some nets alone."""
        dh = torch.bmm(dz, self.parameters[2].mT).mul_(hidden > 0)
        gradients = [torch.bmm(x.mT, dh), dh.sum(1, True), torch.bmm(hidden.mT, dz), dz.sum(1, True)]
        for p, b, g in zip(self.parameters, self.momentum, gradients, strict=True):
            g.add_(p, alpha=5e-4)
            if taken is None or taken.all():
                b.mul_(0.9).add_(g)
                p.sub_(g.add_(b, alpha=0.9), alpha=lr)
            else:
                b[taken] = 0.9 * b[taken] + g[taken]
                p[taken] -= lr * (g[taken] + 0.9 * b[taken])

    def module(self, i: int) -> nn.Sequential:
        """Net i."""
        w1, b1, w2, b2 = (p[i] for p in self.parameters)
        net = nn.Sequential(nn.Linear(*w1.shape), nn.ReLU(), nn.Linear(*w2.shape))
        with torch.no_grad():
            for parameter, value in zip(net.parameters(), (w1.T, b1[0], w2.T, b2[0]), strict=True):
                parameter.copy_(value)
        return net


def cosine(epoch: int, epochs: int) -> float:
    """The learning rate of an epoch."""
    return LR * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def fit(x: Tensor, y: Tensor, hidden: int, epochs: int, classes: int, seed: int) -> Mlps:
    """One net, trained on labels ``(N,)``."""
    nets, generator = Mlps([seed], x.shape[1], hidden, classes), torch.Generator().manual_seed(seed)
    onehot = F.one_hot(y, classes).float()
    for epoch in range(epochs):
        for rows in torch.randperm(len(y), generator=generator).split(BATCH):
            features, z = nets.forward(x[rows].unsqueeze(0))
            nets.step(x[rows].unsqueeze(0), features, (z.softmax(-1) - onehot[rows]) / len(rows), cosine(epoch, epochs))
    return nets
