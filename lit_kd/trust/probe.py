"""A probe: how well rows can be told apart from their inputs, in seconds and without training a network. [ours]"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURES = 512
RIDGE = 0.03  # of the mean square of a feature
SIDE = 16  # pixels; larger pictures are averaged to so many
FOLDS = 5


class Probe:
    """Ridge regression on random ReLU features, cross-fitted: what it says of a row, it says without the row's target.

    N rows in some folds; each fold is predicted by a fit to the others. Pictures are averaged to at most 16 x 16.

    Args:
        x: Inputs, ``(N, ...)``.
        seed: Of features and folds.
    """

    def __init__(self, x: Tensor, seed: int) -> None:
        x = shrunk(x).flatten(1)
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
        draw = torch.Generator().manual_seed(seed)
        w = torch.randn(x.shape[1], FEATURES, generator=draw) / math.sqrt(x.shape[1])
        hidden = (x @ w + torch.randn(FEATURES, generator=draw)).relu()
        self.features = torch.cat([hidden, torch.ones(len(x), 1)], dim=1)
        self.folds = torch.randperm(len(x), generator=draw) % FOLDS

    def __call__(self, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """What is predicted of targets ``(N, C)`` of which rows count by weights ``(N,)``: ``(N, C)``."""
        h = self.features
        own = h if weights is None else h * weights.unsqueeze(1)
        grams = torch.stack([h[self.folds == k].T @ own[self.folds == k] for k in range(FOLDS)])
        sums = torch.stack([own[self.folds == k].T @ targets[self.folds == k] for k in range(FOLDS)])
        found = torch.empty_like(targets)
        for k in range(FOLDS):
            gram = grams.sum(0) - grams[k]
            ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
            solved = torch.linalg.solve(gram + ridge, sums.sum(0) - sums[k], left=True)
            found[self.folds == k] = h[self.folds == k] @ solved
        return found


def shrunk(x: Tensor) -> Tensor:
    """Inputs as floats, pictures averaged to at most 16 x 16."""
    return F.adaptive_avg_pool2d(x.float(), SIDE) if x.dim() == 4 and max(x.shape[2:]) > SIDE else x.float()
