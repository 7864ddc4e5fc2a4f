"""How likely is each label, and each teacher, to be right about a row? [ours]

N rows, the trusted ones among them, C classes, K teachers. Equations: docs/mathematics.md, "The rule robust".
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.types import UNLABELED

SHARPER = 2.0  # power of what the student says, for the channel alone, eq. (3): it has learned some of the noise
LABEL_ROWS = 5.0  # pseudo-rows a class in the label's channel, eq. (3)
TEACHER_ROWS = 10.0  # in a teacher's confusion matrix, eq. (4): trusted rows are few
VOICES = 3.0  # of the student beside one of a teacher, eq. (5): both together differ where the student is unsure
REPEATED = 0.25  # of the wrong labels; a teacher that says so many of them is not heard, eq. (5)
FEW = 0.05  # of the labels; where fewer are wrong, it matters less who repeats them, eq. (5)
SURE = 3.0  # power of a class's probability, for how much to learn from it, eq. (8): what is unsure teaches little
STEPS = 10  # of EM
TINY = 1e-12


class Belief(NamedTuple):
    """What `believe` finds."""

    classes: Tensor  # the most probable class of each row, (N,)
    weights: Tensor  # how much to learn from that class, then from each teacher, (N, K + 1), of sum 0 to 1
    clean: Tensor  # the probability that the label is right, (N,); 0 where there is none
    channel: Tensor  # T[c, y], how often class c is labelled y, (C, C)
    quality: Tensor  # how far each teacher is heard, (K,) in [0, 1]
    false_doubt: Tensor  # the share of each row's doubt that is taken for false, (N,)


def believe(
    student: Tensor, labels: Tensor, trusted: Tensor, said: Tensor, errors: Tensor | None = None, rest: float = 0.0
) -> Belief:
    """The posterior of the true class of each row, and what to learn from it.

    Where no row is trusted, nothing can tell which doubt is false, and none is taken for false.

    Args:
        student: The running mean of what the student said of each row, probabilities ``(N, C)``.
        labels: Given labels, ``(N,)``; `UNLABELED` where there is none.
        trusted: Which labels are known to be right, bool ``(N,)``.
        said: The class that each teacher names, ``(N, K)``; `UNLABELED` where it does not speak.
        errors: Of all validation rows, then of those that each teacher speaks of: how many the student is wrong about,
            the teacher, and both together, ``(3, K + 1)``; ``None``: nobody knows, and no teacher is heard.
        rest: The part of the training that is left, in [0, 1]: how much a teacher teaches beside the class.
    """
    labelled = labels != UNLABELED
    trusted, untrusted, y = labelled & trusted, labelled & ~trusted, labels.where(labelled, 0)
    channel, posterior = label_channel(student, y, labelled, untrusted)
    doubt = 1 - of(posterior, y)
    told = trusted.any()
    doubt = doubt * (1 - told * false_doubt(doubt, trusted, untrusted)) * untrusted
    quality = torch.zeros(said.shape[1]).to(student) if errors is None else better(errors.to(student))
    quality = quality * (1 - echoes(said, y, doubt, untrusted) / REPEATED).clamp(min=0)
    speaks = said != UNLABELED
    shares = quality * speaks
    # teachers may have learned the same: all of them together say no more than the best
    if len(quality):
        shares = shares * shares.amax(1, keepdim=True) / shares.sum(1, keepdim=True).clamp(min=TINY)
    for k, named in enumerate(said.clamp(min=0).unbind(1)):
        rows = trusted & speaks[:, k]
        confusion = channel_of(y[rows], F.one_hot(named[rows], student.shape[1]).to(student), TEACHER_ROWS)
        posterior = normalised(posterior * confusion.T[named] ** shares[:, k : k + 1])
    false = told * false_doubt(1 - of(posterior, y), trusted, untrusted)
    found = mostly_right(posterior, y, untrusted) | known(student, y, trusted)
    credible = (frequency(y, labelled, student.shape[1]) * found)[y]
    kept = torch.where(labelled, (1 - false) * credible, 1.0).unsqueeze(1)
    own = F.one_hot(y, student.shape[1]) * labelled.unsqueeze(1)
    posterior = torch.where(trusted.unsqueeze(1), own, own + kept * (posterior - own))
    probability, classes = posterior.max(1)
    weights = probability**SURE * torch.where(labelled, 1.0, shares.sum(1))
    beside = rest * shares * (said == classes.unsqueeze(1))
    weights = weights.unsqueeze(1) * torch.cat([1 - beside.sum(1, keepdim=True), beside], dim=1)
    return Belief(classes, weights, of(posterior, y) * labelled, channel, quality, false)


def of(values: Tensor, y: Tensor) -> Tensor:
    """Each row's value of its own class, ``(N,)``."""
    return values.gather(1, y.unsqueeze(1)).squeeze(1)


def normalised(values: Tensor) -> Tensor:
    """Rows of sum 1."""
    return values / values.sum(-1, keepdim=True).clamp(min=TINY)


def channel_of(rows: Tensor, values: Tensor, prior: float) -> Tensor:
    """The mean of values ``(N, C)`` by class ``(N,)``, pseudo-rows included: 70% on the diagonal, the rest even."""
    classes = values.shape[1]
    start = 0.7 * torch.eye(classes).to(values) + 0.3 / classes
    return normalised(prior * start + values.new_zeros(classes, classes).index_add(0, rows, values))


def label_channel(student: Tensor, y: Tensor, labelled: Tensor, untrusted: Tensor) -> tuple[Tensor, Tensor]:
    """The labels' channel by EM, eq. (3), ``(C, C)``, and the posterior given the labels, eq. (2), ``(N, C)``."""
    said, given = normalised(student[untrusted] ** SHARPER), y[untrusted]
    channel = start = channel_of(given[:0], said[:0], 1.0)
    for _ in range(STEPS):
        found = normalised(said * channel.T[given])
        counts = torch.zeros_like(start).index_add(0, given, found).T
        channel = normalised(LABEL_ROWS * start + counts)
    return channel, normalised(student * channel.T[y].where(labelled.unsqueeze(1), 1))


def better(errors: Tensor) -> Tensor:
    """How sure it is that the student errs more than each teacher, or both together, eq. (5), ``(K,)`` in [0, 1]."""
    student, teachers = errors[0, 1:], errors[1:, 1:].amin(0)
    z = (student - teachers) / (student + teachers + 1).sqrt()
    return torch.erf(z / 2**0.5).clamp(min=0)


def echoes(said: Tensor, y: Tensor, doubt: Tensor, untrusted: Tensor) -> Tensor:
    """Of the labels that are doubted the share that each teacher repeats, ``(K,)``: what it learned by heart.

    Of labels of which it speaks.
    """
    repeated = ((said == y.unsqueeze(1)) * doubt.unsqueeze(1)).sum(0)
    asked = (said != UNLABELED) * (doubt + FEW * untrusted).unsqueeze(1)
    return repeated / asked.sum(0).clamp(min=TINY)


def false_doubt(doubt: Tensor, trusted: Tensor, untrusted: Tensor) -> Tensor:
    """For each row the share of the doubt as great as its own, or greater, that is false, eq. (6), ``(N,)``.

    It is a false discovery rate, from how often labels that are known to be right are doubted as much. To these a row
    in full doubt is added: the fewer they are, the greater is the burden of proof.
    """
    of_right = (1 + at_least(doubt, doubt[trusted])) / (1 + trusted.sum())
    of_others = at_least(doubt, doubt[untrusted]).clamp(min=1) / untrusted.sum().clamp(min=1)
    order = doubt.argsort()
    falling = (of_right / of_others)[order].cummin(0).values  # a greater doubt is false no more often
    return falling[order.argsort()].clamp(max=1)


def at_least(values: Tensor, others: Tensor) -> Tensor:
    """How many of some numbers are as great as each value, or greater, ``(N,)``."""
    return len(others) - torch.searchsorted(others.sort().values, values)


def frequency(y: Tensor, labelled: Tensor, classes: int) -> Tensor:
    """How frequent each label is beside the mean, at most 1, ``(C,)``: rare classes are learned late."""
    counts = torch.bincount(y[labelled], minlength=classes).to(torch.float32)
    return (counts / counts.mean().clamp(min=TINY)).clamp(max=1)


def mostly_right(posterior: Tensor, y: Tensor, untrusted: Tensor) -> Tensor:
    """Whether labels of a class seem right more often than a mistake for any other: else it may be lost, ``(C,)``."""
    classes = posterior.shape[1]
    found = posterior.new_zeros(classes, classes).index_add(0, y[untrusted], posterior[untrusted])
    return found.diagonal() >= found.amax(1)


def known(student: Tensor, y: Tensor, trusted: Tensor) -> Tensor:
    """Whether the student is right about most trusted rows of a class, bool ``(C,)``."""
    rows, classes = y[trusted], student.shape[1]
    right = rows[student[trusted].argmax(1) == rows]
    return 2 * torch.bincount(right, minlength=classes) > torch.bincount(rows, minlength=classes)
