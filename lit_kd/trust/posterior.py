"""The posterior of the true class, given two witnesses that may be wrong: a label and a teacher [ours].

Pure functions of tensors, in float64 on the CPU. Shapes: N training rows, M trusted meta rows, C classes, W sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize
from torch import Tensor

from lit_kd.types import UNLABELED

BETTER = 1e-3
"""In nats a row: a channel is used if it predicts held-out trusted rows better by so much."""
FOLDS = 5
SMALLEST = 1e-12
"""Probability that nothing falls below."""
COPY_START = 0.1
EM_STEPS = 30
NO_NOISE = 0.02
"""Noise rates below this are taken for none."""


class Opinion(NamedTuple):
    """Turns log-probabilities ``(W, N, C)`` into one calibrated distribution ``(N, C)``.

    Attributes:
        exponents: Of each source, ``(W,)``: ``r ~ prod_w p_w^exponent_w``.
        channel: Row k is the distribution of the true class where r says k, ``(C, C)``.
    """

    exponents: Tensor
    channel: Tensor

    def __call__(self, sources: Tensor) -> Tensor:
        """See the class."""
        return pool(sources, self.exponents) @ self.channel


def pool(sources: Tensor, exponents: Tensor) -> Tensor:
    """The normalised product of powers, ``(N, C)``, of log-probabilities ``(W, N, C)`` with exponents ``(W,)``."""
    return torch.einsum("w,wnc->nc", exponents.double(), sources.double()).softmax(-1)


def mean_nll(probabilities: Tensor, y: Tensor) -> float:
    """Mean negative log-likelihood in nats of labels ``(M,)`` under probabilities ``(M, C)``."""
    return float(-probabilities.gather(1, y.unsqueeze(1)).clamp(min=SMALLEST).log().mean())


def fit_channel(probabilities: Tensor, y: Tensor, steps: int = 20) -> Tensor:
    """The channel A, ``(C, C)``, that makes labels most likely: ``P(y) = sum_k p(k) A[k, y]``, by EM [ours].

    Takes p ``(M, C)`` and labels ``(M,)``; 5 pseudo-counts on the diagonal.
    """
    classes = probabilities.shape[1]
    channel = _start(classes)
    for _ in range(steps):
        said = probabilities.double() * channel[:, y].T
        said = said / said.sum(1, keepdim=True).clamp(min=SMALLEST)
        counts = _count_by(y, said, classes).T + 5 * torch.eye(classes, dtype=torch.float64)
        channel = counts / counts.sum(1, keepdim=True)
    return channel


def held_out_nll(probabilities: Tensor, y: Tensor) -> float:
    """Mean negative log-likelihood of labels under channels that were fitted to other rows, 5-fold."""
    p, found = probabilities.double(), torch.empty(len(y), probabilities.shape[1], dtype=torch.float64)
    fold = torch.arange(len(y)) % FOLDS  # not in blocks, as data may be sorted by class
    for held in range(min(FOLDS, len(y))):
        out = fold == held
        found[out] = p[out] @ fit_channel(p[~out], y[~out])
    return mean_nll(found, y)


def channel_if_better(probabilities: Tensor, y: Tensor) -> Tensor:
    """`fit_channel` if it predicts held-out rows better by `BETTER`, else the identity; ``(C, C)``."""
    if held_out_nll(probabilities, y) < mean_nll(probabilities, y) - BETTER:
        return fit_channel(probabilities, y)
    return torch.eye(probabilities.shape[1], dtype=torch.float64)


def calibrate(log_probabilities: Tensor, y: Tensor) -> Opinion:
    """A teacher's inverse temperature, from a grid by the likelihood of trusted labels, and its channel [ours].

    Takes the teacher's log-probabilities ``(M, C)`` and trusted labels ``(M,)``. With a channel the inverse temperature
    is chosen anew: without one, that of a teacher that mistakes whole classes would blur all that it says.
    """
    sources = log_probabilities.unsqueeze(0)
    grid = [torch.tensor([beta]) for beta in np.geomspace(0.05, 5.0, 21)]
    alone = min(grid, key=lambda beta: mean_nll(pool(sources, beta), y))
    passed = min(grid, key=lambda beta: held_out_nll(pool(sources, beta), y))
    if held_out_nll(pool(sources, passed), y) < mean_nll(pool(sources, alone), y) - BETTER:
        return Opinion(passed, fit_channel(pool(sources, passed), y))
    return Opinion(alone, torch.eye(log_probabilities.shape[1], dtype=torch.float64))


def stack(sources: Tensor, y: Tensor) -> Opinion:
    """The exponents in [0, 3] that make trusted labels most likely, with a small ridge, and a channel [ours].

    Takes log-probabilities ``(W, M, C)`` and trusted labels ``(M,)``.
    """
    s = sources.double()
    of_label = s.gather(2, y.expand(len(s), -1).unsqueeze(2)).squeeze(2).mean(1)

    def loss(w: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        exponents = torch.from_numpy(w)
        logits = torch.einsum("w,wnc->nc", exponents, s)
        value = logits.logsumexp(1).mean() - of_label @ exponents + 1e-3 * exponents.square().sum()
        slope = (s * logits.softmax(1)).sum(2).mean(1) - of_label + 2e-3 * exponents
        return float(value), slope.numpy()

    start = np.full(len(s), 1 / len(s))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0.0, 3.0)] * len(s))
    exponents = torch.from_numpy(found.x)
    return Opinion(exponents, channel_if_better(pool(s, exponents), y))


class Habits(NamedTuple):
    """How a teacher speaks of each true class, from trusted rows.

    Attributes:
        said: P[c, k], how often it takes class c for class k, ``(C, C)``.
        mean: Its mean calibrated probabilities for rows of class c, ``(C, C)``.
    """

    said: Tensor
    mean: Tensor


def habits(said: Tensor, probabilities: Tensor, y: Tensor) -> Habits:
    """A teacher's `Habits`, with a tenth of a row added everywhere [ours].

    Takes the classes that it predicts for the trusted rows ``(M,)``, its calibrated probabilities ``(M, C)``, and the
    trusted labels ``(M,)``.
    """
    classes = probabilities.shape[1]
    counts = [_count_by(y, rows.double(), classes) + 0.1 for rows in (F.one_hot(said, classes), probabilities)]
    return Habits(*(count / count.sum(1, keepdim=True) for count in counts))


class Posterior(NamedTuple):
    """What the EM of `label_posterior` finds.

    Attributes:
        classes: Probability of each class to be the true one, ``(N, C)``.
        channel: ``Tm[c, y]``, how the label of a true class c is given, ``(C, C)``.
        copied: Probability mu that a teacher's prediction is a copy of the given label.
        echo: By how much the given label has raised the log-odds of its class with the teacher elsewhere, at least 0.
        noise_rate: Share of the labels that are wrong.
    """

    classes: Tensor
    channel: Tensor
    copied: float
    echo: float
    noise_rate: float


def label_posterior(
    student: Tensor,
    teacher: Tensor,
    both: Callable[[Tensor], Tensor],
    ways: Habits,
    said: Tensor,
    y: Tensor,
    steps: int = EM_STEPS,
) -> Posterior:
    """The posterior of the true class, with the label's channel and what the teacher has memorised, by EM [ours].

    A label y of class c is given with probability ``Tm[c, y]``. A teacher that was trained on it is no independent
    witness. With probability mu its prediction is a copy of the label, and the posterior is that of student and label
    alone. A teacher that agrees with a label against the student, where it would not make this mistake by itself, has
    probably copied. On the other rows the label still echoes in the teacher's log-odds: as much is taken away as makes
    its mean probability of given labels what its habits on trusted rows predict. Then the posterior is that of student,
    teacher and label.

    Args:
        student: r_S, probabilities of the true class from the student alone, ``(N, C)``.
        teacher: q, calibrated probabilities of the teacher, ``(N, C)``.
        both: Gives r_ST, the true class from student and teacher, ``(N, C)``, for q without the label's echo.
        ways: The teacher's habits.
        said: Classes that the teacher predicts, ``(N,)``.
        y: Given labels, ``(N,)``. Where one is missing, the posterior is r_ST.
        steps: Of EM; 5 pseudo-counts a class are spread as the channel that it starts from.
    """
    classes = student.shape[1]
    labelled = y != UNLABELED
    given, r, q = y[labelled], student[labelled].double(), teacher.double().clamp(min=SMALLEST)
    agrees = said[labelled] == given
    by_itself = (r * ways.said[:, said[labelled]].T).sum(1)
    odds = q[labelled].gather(1, given.unsqueeze(1)).squeeze(1).logit(SMALLEST)
    label = F.one_hot(y.where(labelled, 0), classes) * labelled.unsqueeze(1)
    channel, copied, echo, noise_rate = _start(classes), COPY_START, 0.0, 0.0
    posterior = both(q).double()
    for _ in range(steps if len(given) else 0):
        posterior = both((q.log() - echo * label).softmax(1)).double()
        likelihood = channel[:, given].T
        alone, joint = r * likelihood, posterior[labelled] * likelihood
        z_alone, z_joint = alone.sum(1).clamp(min=SMALLEST), joint.sum(1).clamp(min=SMALLEST)
        alone, joint = alone / z_alone.unsqueeze(1), joint / z_joint.unsqueeze(1)
        copy = copied * agrees * z_alone
        nu = copy / (copy + (1 - copied) * by_itself * z_joint).clamp(min=SMALLEST)
        pi = nu.unsqueeze(1) * alone + (1 - nu.unsqueeze(1)) * joint
        posterior[labelled] = pi
        copied = float(nu.mean())
        echo = find_echo(odds, (joint * ways.mean[:, given].T).sum(1), 1 - nu)
        counts = _count_by(given, pi, classes).T + 5 * _start(classes)
        channel = counts / counts.sum(1, keepdim=True)
        noise_rate = float(1 - pi.gather(1, given.unsqueeze(1)).mean())
    return Posterior(posterior, channel, copied, echo, noise_rate)


def find_echo(odds: Tensor, expected: Tensor, weights: Tensor) -> float:
    """What to take from log-odds so that the mean probability, by weights, is the expected one, in [0, 10] [ours]."""

    def excess(echo: float) -> float:
        return float((weights * ((odds - echo).sigmoid() - expected)).sum())

    if excess(0) <= 0:
        return 0.0
    return 10.0 if excess(10) >= 0 else float(brentq(excess, 0, 10, xtol=1e-11))


def posterior_targets(posterior: Tensor, y: Tensor, noise_rate: float, soft: bool) -> tuple[Tensor, Tensor]:
    """What a row is trained on, and how much it weighs [ours].

    Args:
        posterior: ``(N, C)``.
        y: Given labels, ``(N,)``.
        noise_rate: Below `NO_NOISE` labels are taken as they are.
        soft: Whether the target is the posterior and its weight the largest probability; otherwise the target is the
            label, and its probability the weight. A row without a label always has the former.

    Returns:
        Targets ``(N, C)`` and weights ``(N,)`` of mean 1.
    """
    labelled = y != UNLABELED
    of_label = y.where(labelled, 0).unsqueeze(1)
    label = torch.zeros_like(posterior).scatter(1, of_label, 1.0)
    trust = posterior.gather(1, of_label).squeeze(1)
    if noise_rate < NO_NOISE:
        soft, trust = False, torch.ones_like(trust)
    hard = labelled & (not soft)
    weights = torch.where(hard, trust, posterior.amax(1))
    return torch.where(hard.unsqueeze(1), label, posterior), weights / weights.mean().clamp(min=SMALLEST)


def _start(classes: int) -> Tensor:
    """A channel that EM starts from."""
    return 0.7 * torch.eye(classes, dtype=torch.float64) + 0.3 / classes


def _count_by(y: Tensor, values: Tensor, classes: int) -> Tensor:
    """The sum of the rows of ``values``, ``(M, C)``, with each label, ``(C, C)``."""
    return torch.zeros(classes, values.shape[1], dtype=torch.float64).index_add_(0, y, values)
