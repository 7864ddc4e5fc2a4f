"""How far a teacher can be trusted, estimated on rows with trusted labels.

B samples, C classes, M rows of the meta split, which neither teacher nor student was trained on. A margin is the
difference of the two largest probabilities, in [0, 1]. No gradient flows into an estimate.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def margin(logits: Tensor) -> Tensor:
    """The margin of each row: logits ``(B, C)`` to ``(B,)``."""
    first, second = logits.detach().float().softmax(-1).topk(2, dim=-1).values.unbind(-1)
    return first - second


def distortions(student_logits: Tensor, teacher: Tensor, y: Tensor, floor: float = 1e-2) -> Tensor:
    """How many times more the teacher's label costs the student than the true one, for each meta row, ``(M,)``.

    The mean over rows alike is 1 over the weight of arXiv 2210.06711 [derived], see docs/methods/weighted.md. No loss
    counts less than ``floor`` nats [ours]: no single row may silence its neighbourhood. Takes the student's logits and
    the teacher's labels, distributions, ``(M, C)``, and trusted labels ``(M,)``.

    Examples:
        >>> p = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
        >>> distortions(p.log(), torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), torch.tensor([0, 0]))
        tensor([1., 2.])
    """
    z = student_logits.detach().float()
    said = F.cross_entropy(z, teacher.detach().float(), reduction="none").clamp(min=floor)
    return said / F.cross_entropy(z, y, reduction="none").clamp(min=floor)


class Neighbours:
    """The nearest meta rows in the plane (teacher's margin, student's margin), both standardised by the meta rows.

    ``k = max(5, round(0.5 sqrt(M)))`` rows are neighbours, or all M if these are fewer [ours].
    """

    def __init__(self, margins: Tensor) -> None:
        from sklearn.neighbors import KDTree  # late, as most runs do without scikit-learn
        from sklearn.preprocessing import StandardScaler

        self.k = min(max(5, round(0.5 * len(margins) ** 0.5)), len(margins))
        self.scaler = StandardScaler()
        self.tree = KDTree(self.scaler.fit_transform(margins.double().numpy(force=True)))

    def __call__(self, margins: Tensor) -> Tensor:
        """Positions among the meta rows, ``(B, k)``, of the neighbours of margins ``(B, 2)``."""
        near = self.tree.query(self.scaler.transform(margins.double().numpy(force=True)), self.k, return_distance=False)
        return torch.from_numpy(near).to(margins.device)


def distillation_weights(margins: Tensor, neighbours: Neighbours, distortions: Tensor) -> Tensor:
    """How much the teacher's label of each row counts, ``(B,)``: 1 over the mean distortion among its neighbours.

    At most 1 [ours], also where the student likes the teacher's mistakes better than the truth.
    """
    mean = distortions.to(margins.device)[neighbours(margins)].mean(1)
    return 1 / mean.clamp(min=1)


class Curve(NamedTuple):
    """A function that never falls: linear between rising knots x, ``(K,)``, with values y; constant beyond them."""

    x: Tensor
    y: Tensor

    def __call__(self, at: Tensor) -> Tensor:
        """Its values at margins ``(B,)``."""
        if len(self.x) == 1:
            return self.y.expand(at.shape)
        i = torch.searchsorted(self.x, at.contiguous()).clamp(1, len(self.x) - 1)
        share = ((at - self.x[i - 1]) / (self.x[i] - self.x[i - 1])).clamp(0, 1)
        return torch.lerp(self.y[i - 1], self.y[i], share)

    def reaches(self, level: float) -> float:
        """The margin from which on it is at least ``level``: -inf if it always is, inf if it never is."""
        i = int((self.y < level).sum())
        if i in (0, len(self.y)):
            return float("inf" if i else "-inf")
        share = (level - self.y[i - 1]) / (self.y[i] - self.y[i - 1])
        return float(self.x[i - 1] + share * (self.x[i] - self.x[i - 1]))


def accuracy_curve(margins: Tensor, right: Tensor) -> Curve:
    """The isotonic regression of whether the teacher is right, bool ``(M,)``, on its margins, ``(M,)``."""
    from sklearn.isotonic import IsotonicRegression

    fit = IsotonicRegression(y_min=0, y_max=1).fit(margins.double().numpy(force=True), right.double().numpy(force=True))
    x, y = (torch.from_numpy(np.array(part)).to(margins) for part in (fit.X_thresholds_, fit.y_thresholds_))
    return Curve(x, y)


class MixingRates(NamedTuple):
    """What student-label mixing knows of a teacher."""

    accuracy: Curve  # by margin
    enough: Tensor  # for k = 2 ... C - 1, the margin from which on the teacher's first k classes are enough, (C - 2,)
    lower_bound: float  # least alpha

    def alpha(self, margins: Tensor) -> Tensor:
        """The probability that the teacher is right, in [lower_bound, 1], at margins ``(B,)``."""
        return self.accuracy(margins).clamp(self.lower_bound, 1)

    def k(self, margins: Tensor) -> Tensor:
        """How many of the teacher's first classes hold the true one, in [2, C], at margins ``(B,)``."""
        return 2 + (margins.unsqueeze(-1) < self.enough).sum(-1)


def mixing_rates(teacher_logits: Tensor, y: Tensor, lower_bound: float = 0.5, top_accuracy: float = 0.9) -> MixingRates:
    """Estimate alpha(x) and k(x) of student-label mixing (arXiv 2302.03806) by the teacher's margin [ours in detail].

    Both by isotonic regression: alpha of "the teacher is right", at least ``lower_bound``; k is the smallest number of
    classes, at least 2, that hold the true one with a probability of ``top_accuracy``. Takes the teacher's logits
    ``(M, C)`` and trusted labels ``(M,)``.
    """
    margins, classes = margin(teacher_logits), teacher_logits.shape[-1]
    place = class_ranks(teacher_logits).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    enough = [accuracy_curve(margins, place < k).reaches(top_accuracy) for k in range(2, classes)]
    return MixingRates(accuracy_curve(margins, place < 1), margins.new_tensor(enough), lower_bound)


def class_ranks(logits: Tensor) -> Tensor:
    """The place of each class in the order of logits, 0 for the largest, int64 ``(B, C)``."""
    return logits.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
