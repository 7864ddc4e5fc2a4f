"""What pixels, tokens, several labels a sample and numbers truly are, where labels and teacher both err. [ours]

Elements are of one of C classes and of one of J kinds, which err each in its own way: pixels and tokens are of one
kind, of several labels each is a kind. Equations: docs/methods/element_trust.md.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_kd.losses.regression import errors

TINY = 1e-12
PRIOR = 10.0  # pseudo-elements a class in the teacher's channel, eq. (1)
STEPS = 200  # of EM, whose likelihood has one maximum


def pair_counts(y: Tensor, said: Tensor, classes: int, kinds: int = 1) -> Tensor:
    """How many elements have label y and are said to be t, ``(J, C, C)``, from ``(B, ...)`` each.

    Elements of a label below 0 count for nothing. Where kinds are several, they are the second axis.

    Examples:
        >>> pair_counts(torch.tensor([[1, 0, -1]]), torch.tensor([[1, 1, 0]]), classes=2)
        tensor([[[0., 1.],
                 [0., 1.]]])
    """
    kind = torch.arange(kinds, device=y.device) if kinds > 1 else 0
    cell = ((kind * classes + y) * classes + said)[y >= 0]
    return torch.bincount(cell, minlength=kinds * classes**2).view(kinds, classes, classes).float()


def teacher_channel(counts: Tensor, prior: float = PRIOR) -> Tensor:
    """T[j, c, t], how often the teacher says t where c is true, eq. (1), from `pair_counts` of trusted elements.

    A prior of so many elements a class, `0.7 + 0.3 / C` of them right, stands for classes of which few are trusted.
    """
    classes = counts.shape[-1]
    start = 0.7 * torch.eye(classes).to(counts) + 0.3 / classes
    return normalised(counts + prior * start)


def label_joint(counts: Tensor, channel: Tensor) -> Tensor:
    """W[j, c, y], how often c is true and y is given, eq. (2), of sum 1 for each j, from `pair_counts`.

    It has the greatest likelihood, given the teacher's channel. A teacher that is always right gives the shares that
    are counted.
    """
    joint = torch.full_like(counts, 1 / counts.shape[-1] ** 2)
    seen = counts.sum((-1, -2), keepdim=True)
    share = counts / seen.clamp(min=TINY)
    for _ in range(STEPS):
        expected = joint.mT @ channel  # [j, y, t]
        joint = joint * (channel @ (share / expected.clamp(min=TINY)).mT)
    return joint.where(seen > 0, 1 / counts.shape[-1] ** 2)


def element_posterior(y: Tensor, said: Tensor, channel: Tensor, joint: Tensor) -> Tensor:
    """How probable each class of an element is, given its label and the teacher's class, eq. (3), ``(..., C)``.

    Args:
        y: Labels, ``(...)``, of which the last axis is that of kinds where these are several; below 0: not known.
        said: The teacher's classes, ``(...)``.
        channel: `teacher_channel`.
        joint: `label_joint`.
    """
    kind = torch.arange(len(joint), device=y.device) if len(joint) > 1 else 0
    given = joint.mT[kind, y.clamp(min=0)].where((y >= 0).unsqueeze(-1), joint.sum(-1)[kind])
    return normalised(given * channel.mT[kind, said])


def normalised(values: Tensor) -> Tensor:
    """Rows of sum 1."""
    return values / values.sum(-1, keepdim=True).clamp(min=TINY)


class NumberTrust(NamedTuple):
    """What `trust_numbers` finds, ``(D,)`` each."""

    offset: Tensor  # a, of what the teacher means by t, a + b t
    slope: Tensor  # b
    scale: Tensor  # s, the standard deviation of right targets around that, in units of the target
    log_odds: Tensor  # of a right target, in the middle of right ones

    def believed(self, y: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """How probable it is that a target is right, eq. (5), and what the teacher means, ``(B, D)`` each."""
        means = self.offset + self.slope * teacher
        odds = self.log_odds - 0.5 * (errors(means, y) / self.scale).square()
        return torch.sigmoid(odds) * ~y.isnan(), means


def trust_numbers(y: Tensor, teacher: Tensor, trusted: Tensor, heard: Tensor) -> NumberTrust:
    """How far targets and a teacher's outputs are right, eqs. (4) and (5).

    Args:
        y: Targets of N training rows, ``(N, D)``, nan where one is missing.
        teacher: The teacher's outputs for them.
        trusted: Targets of trusted rows, ``(M, D)``, none missing.
        heard: The teacher's outputs for these.
    """
    if len(trusted) < 3:
        raise ValueError(
            f"expected at least 3 trusted rows, to which a line is fitted, found {len(trusted)}: give more"
        )
    centred = heard - heard.mean(0)
    slope = (centred * trusted).sum(0) / centred.square().sum(0).clamp(min=TINY)
    offset = (trusted - slope * heard).mean(0)
    left = (trusted - offset - slope * heard).square().sum(0) / (len(trusted) - 2)
    scale = left.sqrt().clamp(min=TINY)
    error, known = errors(offset + slope * teacher, y), ~y.isnan()
    wide = (error.amax(0) - error.amin(0)).clamp(min=TINY)  # a wrong target may be anywhere among all
    height = (wide / scale).log() - 0.5 * math.log(2 * math.pi)
    share = torch.full_like(scale, 0.5)
    for _ in range(STEPS):
        right = torch.sigmoid(height + torch.logit(share) - 0.5 * (error / scale).square())
        share = ((right * known).sum(0) / known.sum(0).clamp(min=1)).clamp(1e-3, 1 - 1e-3)
    return NumberTrust(offset, slope, scale, height + torch.logit(share))
