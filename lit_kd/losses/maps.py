"""Losses on maps of features, ``(B, c, h, w)``.

The two networks may have different numbers of channels unless a loss says otherwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.losses.features import check_alike


def pooled_alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps, the larger one averaged down to the size of the smaller, in each direction."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    s, t = (f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in (student, teacher))
    return s, t


def unit(vectors: Tensor) -> Tensor:
    """Vectors over the last axis, of length 1; those not above 1e-12 become zeros and have no gradient."""
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norm.where(norm > 1e-12, torch.inf)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of each sample's attention, in [0, 2 / (h w)] (AT, arXiv 1612.03928) [code].

    Attention is the mean over the channels of the squared features, as a vector of length 1 over the pixels.
    """
    s, t = (unit(f.square().mean(1).flatten(1)) for f in pooled_alike(student, teacher))
    return (s - t).square().mean(-1)


def selectivity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How far apart the channels of each sample are as sets of maps (NST, arXiv 1707.01219) [code].

    The maximum mean discrepancy with the kernel ``<a, b>^2`` of channels of length 1 over the pixels.
    """
    s, t = (unit(f.flatten(2)) for f in pooled_alike(student, teacher))
    of_teacher, of_student, across = ((a @ b.mT).square().mean((1, 2)) for a, b in ((t, t), (s, s), (s, t)))
    return of_teacher + of_student - 2 * across


def information_loss(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Mean of ``((teacher - mean)^2 / variance + log variance) / 2`` of each sample (VID, arXiv 1904.05835) [code].

    The mean has the teacher's shape, and a variance above 0 is for each channel, ``(c,)``. It can be below 0.
    """
    check_alike(mean, teacher)
    spread = variance.view(-1, 1, 1)
    return 0.5 * ((teacher - mean).square() / spread + spread.log()).mean((1, 2, 3))
