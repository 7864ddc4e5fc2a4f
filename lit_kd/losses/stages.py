"""Losses on maps ``(B, c, h, w)`` at several scales, and on differences between samples."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.losses.features import check_alike, hint_loss
from lit_kd.losses.maps import unit
from lit_kd.types import full


def pyramid_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of each sample's maps, and of them pooled (ReviewKD, arXiv 2104.09044) [code]; ``(B,)``.

    Maps count 1; pooled to 4 by 4, 2 by 2 and 1 by 1, where that is smaller than they are, each half as much as the
    size before. The sum is divided by the sum of these weights.
    """
    student, teacher = full(student), full(teacher)
    total, weights = hint_loss(student, teacher), [1.0]
    for size in (4, 2, 1):
        if size < min(student.shape[2:]):
            weights.append(weights[-1] / 2)
            total = total + weights[-1] * hint_loss(*(F.adaptive_avg_pool2d(x, size) for x in (student, teacher)))
    return total / sum(weights)


def class_map_loss(student: Tensor, teacher: Tensor, normalise: bool = True) -> Tensor:
    """Mean squared error of each sample's class maps ``(B, C, h, w)``, pooled to 2 by 2 (CAT-KD) [code]; ``(B,)``.

    To ``normalise`` is to compare the pooled maps of each class at norm 1: then the size of logits does not count.
    """
    student, teacher = (F.adaptive_avg_pool2d(full(maps), 2).flatten(2) for maps in (student, teacher))
    if normalise:
        student, teacher = (unit(maps) for maps in (student, teacher))
    return hint_loss(student, teacher)


def regional_logits(logits: Tensor, maps: Tensor, scales: Sequence[int]) -> Tensor:
    """What a linear head says of each of R regions of a map, ``(B, R, C)`` (SDD, arXiv 2403.13512).

    Takes the head's logits ``(B, C)`` and class maps ``(B, C, h, w)``. A scale k has k by k regions. As the head is
    linear, pooled class maps are logits of pooled features but for the bias, which is what the mean of the map lacks
    to the logits [derived].
    """
    logits, maps = full(logits), full(maps)
    pooled = [F.adaptive_avg_pool2d(maps, scale).flatten(2).mT for scale in scales]
    return torch.cat(pooled, dim=1) + (logits - maps.mean((2, 3))).unsqueeze(1)


def comparative_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """How far differences between samples differ, over all pairs of a batch (arXiv 2311.02253) [code]; ``()``.

    The mean over all i, j and elements of ``((s_i - s_j) - (t_i - t_j))^2``, from responses ``(B, ...)``. It is twice
    the variance of ``s - t`` over the batch [derived], so no pair is formed; what all samples share does not count.
    """
    check_alike(student, teacher)
    apart = full(student) - full(teacher)
    return 2 * (apart - apart.mean(0)).square().mean()
