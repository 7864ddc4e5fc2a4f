"""What is learned from parts that a teacher's features have within each class."""

import math

import torch
from torch import Tensor

from lit_kd.losses.logits import kl_divergence
from lit_kd.terms.base import Term
from lit_kd.types import PENULTIMATE, Batch, Outputs, full


class Subclasses(Term):
    """KL divergence from the teacher's subclasses, which linear projections of its features give (LELP, 2409.20449).

    A subclass has the probability that the teacher gives the class, times its part of the class: the softmax of S
    projections of the teacher's features. `fit` finds these. At S = 1 this is `KL` at temperature 1.

    Args:
        student_tap: The student's last linear layer, of S outputs for each class.
        subclasses: S.
        weight: A constant factor.
    """

    tasks = ("classification",)
    teacher_taps = (PENULTIMATE,)
    centres: Tensor
    directions: Tensor

    def __init__(self, student_tap: str, subclasses: int, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.student_taps, self.subclasses = (student_tap,), subclasses

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make room for the projections: centres ``(C, d)`` and directions ``(C, d, S)``."""
        assert teacher is not None
        features = teacher.features[PENULTIMATE]
        if features.dim() != 2:
            raise ValueError(f"expected a teacher whose last linear layer reads vectors, found {tuple(features.shape)}")
        classes = teacher.logits.shape[1]
        self.register_buffer("centres", features.new_zeros(classes, features.shape[1]))
        self.register_buffer("directions", features.new_zeros(classes, features.shape[1], self.subclasses))

    @property
    def fitted(self) -> bool:
        """Whether there are projections."""
        return bool(self.directions.any())

    def fit(self, features: Tensor, logits: Tensor, head: Tensor) -> None:
        """Find the projections from a teacher's features ``(N, d)``, logits and head ``(C, d)``; see `projections`."""
        centres, directions = projections(full(features), logits.argmax(-1), full(head), self.subclasses)
        self.centres.copy_(centres)
        self.directions.copy_(directions)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The divergence over all subclasses, ``(B,)``."""
        assert teacher is not None
        projected = project(full(teacher.features[PENULTIMATE]), full(self.centres), full(self.directions))
        log_p = subclass_log_probabilities(full(teacher.logits), projected)
        return kl_divergence(log_p, full(student.features[self.student_taps[0]]).log_softmax(-1))


def subclass_log_probabilities(logits: Tensor, projected: Tensor) -> Tensor:
    """Log-probabilities of all subclasses, ``(B, C S)``, those of a class side by side.

    Takes logits of classes ``(B, C)``, and of subclasses within each class ``(B, C, S)``.
    """
    return (logits.log_softmax(-1).unsqueeze(-1) + projected.log_softmax(-1)).flatten(1)


def project(features: Tensor, centres: Tensor, directions: Tensor) -> Tensor:
    """Features ``(B, d)`` from the centre of each class along its directions, ``(B, C, S)``."""
    return torch.einsum("bcd,cds->bcs", features.unsqueeze(1) - centres, directions)


def projections(features: Tensor, classes: Tensor, head: Tensor, subclasses: int) -> tuple[Tensor, Tensor]:
    """The centre of each class's features, and S directions in which they vary: ``(C, d)`` and ``(C, d, S)``.

    Of each class these are the first principal components of what the head, ``(C, d)``, maps to the same logit for all
    classes, turned at random so that they vary alike [text]. Their length is such that the entropy of the subclasses of
    a row's own class is half of log S in the mean [ours]. Takes N features ``(N, d)`` and their classes ``(N,)``, here
    those that the teacher finds most probable [ours]. A ValueError where there are too few rows or dimensions.
    """
    features, head = features.double(), head.double()
    # a shift of all logits alike tells nothing, so the mean row may be left out
    _, sizes, rows = torch.linalg.svd(head - head.mean(0))
    rank = int((sizes > 1e-6 * sizes.max()).sum())
    unseen = rows[rank:]
    if len(unseen) < subclasses:
        raise ValueError(
            f"expected at most as many subclasses as dimensions of the teacher's features that its logits do not tell, "
            f"{head.shape[1]} - {rank} = {len(unseen)}, found {subclasses}: choose fewer, or a wider teacher"
        )
    counts = classes.bincount(minlength=len(head))
    if counts.min() <= subclasses:
        raise ValueError(
            f"expected more than {subclasses} training rows that the teacher puts into each class, found "
            f"{int(counts.min())} in class {int(counts.argmin())}: choose fewer subclasses, or give more rows"
        )
    centres, directions, own = [], [], []
    for c in range(len(head)):
        centres.append(features[classes == c].mean(0))
        apart = (features[classes == c] - centres[-1]) @ unseen.T
        leading = torch.linalg.eigh(apart.T @ apart).eigenvectors[:, -subclasses:]
        turn = torch.nn.init.orthogonal_(torch.empty(subclasses, subclasses, dtype=torch.float64)).to(leading.device)
        turned = leading @ turn
        directions.append(unseen.T @ turned)
        own.append(apart @ turned)
    return torch.stack(centres), torch.stack(directions) * sharpness(torch.cat(own))


def sharpness(projected: Tensor) -> float:
    """By how much to multiply ``(N, S)`` that the mean entropy of their softmax is half of log S."""
    subclasses, spread = projected.shape[1], float(projected.std())
    if subclasses == 1:
        return 1.0
    if not spread > 1e-9:
        raise ValueError(
            "expected features of the teacher that vary within a class beside what its logits tell, found none: choose "
            "another teacher, or KD"
        )
    low, high = -10.0, 10.0  # logarithms, between which the entropy falls from log S to 0
    for _ in range(60):
        middle = (low + high) / 2
        log_p = (projected * (math.exp(middle) / spread)).log_softmax(-1)
        unsure = -(log_p.exp() * log_p).sum(-1).mean() > 0.5 * math.log(subclasses)
        low, high = (middle, high) if unsure else (low, middle)
    return math.exp(low) / spread
