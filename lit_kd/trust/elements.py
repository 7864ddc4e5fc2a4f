"""How much the labels of pixels, tokens or several labels a sample are worth, and the teacher's word on them. [ours]

N rows of many elements, each of one of C classes; J kinds of elements that err each in its own way: one kind for pixels
and tokens, and of several labels each. Equations: docs/methods/element_trust.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TINY = 1e-12
PRIOR = 10.0  # pseudo-elements a class in the teacher's channel, eq. (1)
STEPS = 200  # of EM for the labels' channel, whose likelihood has one maximum
ROUNDS = 20  # of EM for the rows


class ElementTrust(NamedTuple):
    """What `trust_elements` finds."""

    right: Tensor  # the probability that all labels of a row are right, (N,)
    teacher: Tensor  # T[j, c, t], how often the teacher says t where c is true, (J, C, C)
    labels: Tensor  # W[j, c, y], how often c is true and y is given, in rows that are wrong, (J, C, C)


def pair_counts(y: Tensor, said: Tensor, classes: int, kinds: int) -> Tensor:
    """How many elements of each row have label y and are said to be t, ``(N, J, C, C)``, from ``(N, ...)`` each.

    Elements of a label below 0 count for nothing.
    """
    rows = torch.arange(len(y), device=y.device).view(-1, 1) * kinds
    kind = torch.arange(y[0].numel(), device=y.device) if kinds > 1 else 0
    y, said = y.flatten(1), said.flatten(1)
    cell = (((rows + kind) * classes + y) * classes + said)[y >= 0]
    size = len(y) * kinds * classes**2
    return torch.bincount(cell, minlength=size).view(len(y), kinds, classes, classes).float()


def teacher_channel(counts: Tensor, prior: float = PRIOR) -> Tensor:
    """What a teacher says by true class, eq. (1), ``(J, C, C)``, from counts of trusted elements of the same shape.

    A prior of so many elements a class, 70% of them right, stands for classes of which few or none are trusted.
    """
    classes = counts.shape[-1]
    start = 0.7 * torch.eye(classes).to(counts) + 0.3 / classes
    return normalised(counts + prior * start)


def label_joint(counts: Tensor, channel: Tensor) -> Tensor:
    """How often class c is true and label y given, eq. (2), ``(J, C, C)`` of sum 1, from counts ``[j, y, t]``.

    This is the maximum of the likelihood by EM. A teacher that is always right gives the shares that are counted.
    """
    joint = torch.full_like(counts, 1 / counts.shape[-1] ** 2)  # [j, c, y]
    share = counts / counts.sum((-1, -2), keepdim=True).clamp(min=TINY)
    for _ in range(STEPS):
        expected = joint.mT @ channel  # [j, y, t]
        joint = joint * (channel @ (share / expected.clamp(min=TINY)).mT)
    return joint


def trust_elements(counts: Tensor, trusted: Tensor) -> ElementTrust:
    """Which rows have right labels, how the others' are wrong, and how the teacher is.

    Args:
        counts: `pair_counts` of the training rows.
        trusted: The same of the trusted rows.
    """
    teacher = teacher_channel(trusted.sum(0))
    joint = label_joint(counts.sum(0), teacher)
    classes = joint.sum(-1)
    good = (classes.unsqueeze(-1) * teacher).clamp(min=TINY).log()  # [j, y, t]: y is true
    right, prior = torch.ones(len(counts)).to(counts), 0.5
    for _ in range(ROUNDS):
        score = good - (joint.mT @ teacher).clamp(min=TINY).log()
        sums = (counts * score).sum((1, 2, 3)) / redundancy(trusted, score)
        right = torch.sigmoid(sums + torch.logit(torch.tensor(prior)).to(sums))
        prior = float(right.mean().clamp(0.01, 0.99))
        joint = label_joint((counts * (1 - right).view(-1, 1, 1, 1)).sum(0) + TINY, teacher)
    return ElementTrust(right, teacher, joint)


def redundancy(counts: Tensor, score: Tensor) -> Tensor:
    """Of how many elements one counts as much as a single independent one: the design effect, at least 1.

    The variance of the rows' sums of a score, ``(J, C, C)``, over what it would be if elements were independent.
    """
    n = counts.sum((1, 2, 3))
    centred = score - (counts.sum(0) * score).sum() / n.sum().clamp(min=1)
    sums = (counts * centred).sum((1, 2, 3))
    return (sums.square().sum() / (counts * centred.square()).sum().clamp(min=TINY)).clamp(min=1)


def element_posterior(y: Tensor, said: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """How probable each class of an element is, eq. (4), ``(..., C)``, in a row whose labels are wrong.

    Args:
        y: Labels, ``(...)``, of which the last axis is that of kinds where these are several; below 0: not known.
        said: The teacher's probabilities, ``(..., C)``.
        teacher: The teacher's channel, ``(J, C, C)``.
        labels: `label_joint`.
    """
    classes = labels.sum(-1, keepdim=True)
    heard = normalised((classes * teacher).mT)  # [j, t, c]
    given = (labels / classes.clamp(min=TINY)).mT  # [j, y, c]
    kind = torch.arange(len(labels), device=y.device) if len(labels) > 1 else 0
    likelihood = given[kind, y.clamp(min=0)].where((y >= 0).unsqueeze(-1), 1.0)
    prior = torch.einsum("...jt,jtc->...jc", said, heard) if len(labels) > 1 else said @ heard[0]
    return normalised(likelihood * prior)


def normalised(values: Tensor) -> Tensor:
    """Rows of sum 1."""
    return values / values.sum(-1, keepdim=True).clamp(min=TINY)
