"""Losses as pure functions of tensors, one value a sample: they know nothing of Lightning.

Shapes: B samples, C classes. Logits are unnormalised; temperatures are dimensionless.
"""

from lit_kd.losses.labels import (
    LABEL_LOSSES,
    LabelLoss,
    generalized_cross_entropy,
    label_loss_named,
    lambert_w,
    superloss,
    taylor_cross_entropy,
)
from lit_kd.losses.logits import (
    contradicts,
    cross_entropy,
    kd_loss,
    mean_teacher,
    revise_labels,
    revised_teacher,
    slam_loss,
    slam_mix,
    soft_cross_entropy,
    teacher_labels,
)

__all__ = [
    "LABEL_LOSSES",
    "LabelLoss",
    "contradicts",
    "cross_entropy",
    "generalized_cross_entropy",
    "kd_loss",
    "label_loss_named",
    "lambert_w",
    "mean_teacher",
    "revise_labels",
    "revised_teacher",
    "slam_loss",
    "slam_mix",
    "soft_cross_entropy",
    "superloss",
    "taylor_cross_entropy",
    "teacher_labels",
]
