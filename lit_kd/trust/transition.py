"""Estimates of a transition matrix: entry [i][j] is P(given label = j | true label = i), ``(C, C)``."""

import torch
from torch import Tensor


def anchor_transition(probabilities: Tensor, drop: float = 0.03) -> Tensor:
    """Row i is what a network trained on the labels says of an anchor of class i (arXiv 1609.03683) [other code].

    The anchor is the row of the largest ``p_i`` once a part ``drop`` of the rows, those of the very largest, is left
    out. Takes probabilities of rows ``(N, C)``, which need no labels.

    Examples:
        >>> anchor_transition(torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.6, 0.4]]), drop=0.0)
        tensor([[0.9000, 0.1000],
                [0.3000, 0.7000]])
    """
    if not 0 <= drop < 1 or not len(probabilities):
        raise ValueError(f"expected rows, and a part to drop in [0, 1), found {len(probabilities)} and {drop}")
    anchors = probabilities.argsort(dim=0, descending=True, stable=True)[int(drop * len(probabilities))]
    return probabilities[anchors]


def gold_transition(probabilities: Tensor, y: Tensor) -> Tensor:
    """Row i is the mean of what it says of the trusted rows of class i (GLC, arXiv 1802.05300) [code].

    Takes probabilities ``(M, C)`` and trusted labels ``(M,)``. The row of a class without any is that of the identity
    [ours]: its labels are taken as they are.

    Examples:
        >>> gold_transition(torch.tensor([[0.9, 0.1], [0.7, 0.3]]), torch.tensor([0, 0]))
        tensor([[0.8000, 0.2000],
                [0.0000, 1.0000]])
    """
    classes = torch.arange(probabilities.shape[1], device=y.device)
    of_class = (y == classes.unsqueeze(1)).to(probabilities)  # (C, M)
    counts = of_class.sum(1, keepdim=True)
    return torch.where(counts > 0, of_class @ probabilities / counts.clamp(min=1), torch.eye(len(classes)).to(counts))
