"""Losses on how the samples of a batch relate to each other, from vectors of features ``(B, d)``: one number, ``()``.

The widths d of both networks may differ. For a single sample that is not all zeros, every loss is 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.losses.maps import unit


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the similarities (SP, arXiv 1907.09682) [code].

    Those are scalar products, each sample's with all others as a vector of length 1.
    """
    s, t = (unit(f @ f.mT) for f in (student, teacher))
    return (s - t).square().mean()


def affinity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``p_ij log((p_ij + eps) / (q_ij + eps))`` with eps 1e-7, the mean over all pairs (PKT, arXiv 1803.10837) [code].

    p is the teacher's and q the student's ``(1 + cos) / 2``, divided by its sum over j. The cosine with a vector of
    zeros is 0, without a gradient [ours]; in published code that gradient is NaN.
    """
    q, p = (_affinities(unit(f)) for f in (student, teacher))
    return (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()


def _affinities(f: Tensor) -> Tensor:
    cosine = (f @ f.mT).clamp(min=-1)  # rounding may give less, and then a logarithm of nothing
    return (1 + cosine) / (1 + cosine).sum(-1, keepdim=True)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of all distances, divided by the mean of those above 0 (RKD, arXiv 1904.05068) [code].

    With two samples it is 0.
    """
    return F.smooth_l1_loss(_distances(student), _distances(teacher))


def _distances(f: Tensor) -> Tensor:
    # by differences: from scalar products, what features have in common would cost the distance its digits
    found = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
    mean = found.sum() / (found > 0).sum().clamp(min=1)
    return found / mean.where(mean > 0, 1)


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of the cosines of all angles that three samples form (RKD, arXiv 1904.05068) [code].

    Its memory grows with ``B^3 + B^2 d``. With two samples it is 0.
    """
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher))


def _cosines(f: Tensor) -> Tensor:
    towards = unit(f.unsqueeze(0) - f.unsqueeze(1))
    return towards @ towards.mT
