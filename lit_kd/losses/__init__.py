"""Losses as pure functions of tensors, one unweighted value a sample.

Shapes: B samples, C classes. Logits are unnormalised, temperatures T > 0 dimensionless, losses ``(B,)``, in nats.
"""

from lit_kd.losses.classes import class_information, class_log_means
from lit_kd.losses.divergences import correlation_loss, divergence, normalised_kd_loss, standardised
from lit_kd.losses.elements import by_sample, classes_last
from lit_kd.losses.ensemble import median_shares, median_teacher
from lit_kd.losses.features import contrastive_loss, hint_loss
from lit_kd.losses.labels import (
    corrected_cross_entropy,
    early_learning,
    generalized_cross_entropy,
    overparameterized_loss,
    superloss,
    taylor_cross_entropy,
)
from lit_kd.losses.levels import relation_loss
from lit_kd.losses.logits import (
    bernoulli_cross_entropy,
    bernoulli_kd_loss,
    contradicts,
    cross_entropy,
    decoupled_kd_loss,
    kd_loss,
    mean_teacher,
    revise_labels,
    revised_teacher,
    slam_loss,
    slam_mix,
    teacher_labels,
)
from lit_kd.losses.maps import attention_loss, information_loss, selectivity_loss
from lit_kd.losses.regression import bounded_error, gaussian_error, squared_error
from lit_kd.losses.relations import affinity_loss, angle_loss, distance_loss, similarity_loss
from lit_kd.losses.smoothing import brier_score, smoothed_cross_entropy, teacher_free_loss
from lit_kd.losses.stages import class_map_loss, comparative_loss, pyramid_loss, regional_logits

__all__ = [
    "affinity_loss",
    "angle_loss",
    "attention_loss",
    "bernoulli_cross_entropy",
    "bernoulli_kd_loss",
    "bounded_error",
    "brier_score",
    "by_sample",
    "class_information",
    "class_log_means",
    "class_map_loss",
    "classes_last",
    "comparative_loss",
    "contradicts",
    "contrastive_loss",
    "corrected_cross_entropy",
    "correlation_loss",
    "cross_entropy",
    "decoupled_kd_loss",
    "distance_loss",
    "divergence",
    "early_learning",
    "gaussian_error",
    "generalized_cross_entropy",
    "hint_loss",
    "information_loss",
    "kd_loss",
    "mean_teacher",
    "median_shares",
    "median_teacher",
    "normalised_kd_loss",
    "overparameterized_loss",
    "pyramid_loss",
    "regional_logits",
    "relation_loss",
    "revise_labels",
    "revised_teacher",
    "selectivity_loss",
    "similarity_loss",
    "slam_loss",
    "slam_mix",
    "smoothed_cross_entropy",
    "squared_error",
    "standardised",
    "superloss",
    "taylor_cross_entropy",
    "teacher_free_loss",
    "teacher_labels",
]
