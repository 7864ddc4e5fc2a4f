"""What is learned from how a teacher relates the samples of a batch to each other."""

import torch
from torch import Tensor

from lit_kd.losses import affinity_loss, angle_loss, distance_loss, similarity_loss
from lit_kd.terms.features import FeatureTerm
from lit_kd.types import PENULTIMATE, Batch, Outputs, full

ANGLE_ROWS = 128
"""Of how many rows angles are compared, so that their cube takes 8 MB a network, and not 4 GB at a batch of 1024."""


class RelationTerm(FeatureTerm):
    """A function of a batch's features of the student and of the teacher, flattened, in at least float32.

    Args:
        student_tap: A layer of the student, see `lit_kd.models.taps.Tapped`; it may have another width.
        teacher_tap: A layer of the teacher.
        weight: A constant factor.
    """

    couples_batch = True

    def __init__(self, student_tap: str = PENULTIMATE, teacher_tap: str = PENULTIMATE, weight: float = 1.0) -> None:
        super().__init__(student_tap, teacher_tap, weight)

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """One number, ``()``, from features ``(B, d)``."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """See `loss`; rows without a label take part."""
        s, t = (full(f).flatten(1) for f in self.features(student, teacher))
        with torch.autocast(s.device.type, enabled=False):  # float16 cannot hold scalar products of whole maps
            return self.loss(s, t)


class Similarity(RelationTerm):
    """Which samples of a batch resemble each other (SP), see `lit_kd.losses.similarity_loss`."""

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared error of the similarities."""
        return similarity_loss(student, teacher)


class Affinity(RelationTerm):
    """The same as a distribution over the other samples (PKT), see `lit_kd.losses.affinity_loss`."""

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL divergence of the affinities, the mean over all pairs."""
        return affinity_loss(student, teacher)


class Relational(RelationTerm):
    """Distances and angles between samples (RKD), see `lit_kd.losses.distance_loss` and `lit_kd.losses.angle_loss`.

    Angles are compared between the first 128 rows of the batch [ours]: they take ``B^3 + B^2 d`` numbers, 0.27 GB a
    copy at d = 4096. There, tap ``penultimate``.

    Args:
        student_tap: A layer of the student, see `lit_kd.models.taps.Tapped`.
        teacher_tap: A layer of the teacher.
        distance: Weight of the distances.
        angle: Weight of the angles.
        weight: A constant factor.
    """

    def __init__(
        self,
        student_tap: str = PENULTIMATE,
        teacher_tap: str = PENULTIMATE,
        distance: float = 25.0,
        angle: float = 50.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_tap, teacher_tap, weight)
        if min(distance, angle) < 0:
            raise ValueError(f"expected weights of distance and angle of at least 0, found {distance} and {angle}")
        self.distance, self.angle = distance, angle

    def loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The weighted sum of both parts."""
        angles = angle_loss(student[:ANGLE_ROWS], teacher[:ANGLE_ROWS])
        return self.distance * distance_loss(student, teacher) + self.angle * angles
