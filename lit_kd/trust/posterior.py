"""The posterior of the true class, given two witnesses that may be wrong: a label and a teacher [ours].

Tensors in float64 on the CPU; N training rows, M trusted meta rows, C classes, W sources. Equations:
docs/methods/posterior.md.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize
from torch import Tensor

from lit_kd.types import UNLABELED

BETTER = 1e-3  # nats a row: a channel is used if it predicts held-out trusted rows better by so much
FOLDS = 5
SMALLEST = 1e-12  # probability that nothing falls below
COPY_START = 0.1
NO_NOISE = 0.02  # a smaller noise rate is taken for none


class Opinion(NamedTuple):
    """Makes one calibrated distribution of several sources, eq. (1)."""

    exponents: Tensor  # of each source, (W,)
    channel: Tensor  # row k is the distribution of the true class where the sources together say k, (C, C)

    def __call__(self, sources: Tensor) -> Tensor:
        """From log-probabilities ``(W, N, C)`` to a distribution ``(N, C)``."""
        return pool(sources, self.exponents) @ self.channel


def pool(sources: Tensor, exponents: Tensor) -> Tensor:
    """The normalised product of powers, ``(N, C)``, of log-probabilities ``(W, N, C)`` with exponents ``(W,)``."""
    return torch.einsum("w,wnc->nc", exponents.double(), sources.double()).softmax(-1)


def mean_nll(probabilities: Tensor, y: Tensor) -> float:
    """Mean negative log-likelihood in nats of labels ``(M,)`` under probabilities ``(M, C)``."""
    return float(-probabilities.gather(1, y.unsqueeze(1)).clamp(min=SMALLEST).log().mean())


def fit_channel(probabilities: Tensor, y: Tensor, steps: int = 20) -> Tensor:
    """The channel A, ``(C, C)``, that makes labels ``(M,)`` most likely: ``P(y) = sum_k p(k) A[k, y]``, by EM [ours].

    With p ``(M, C)``, and 5 pseudo-counts on the diagonal.
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
    """`mean_nll` of labels under channels that were fitted to other rows, 5-fold."""
    p, found = probabilities.double(), torch.empty(len(y), probabilities.shape[1], dtype=torch.float64)
    fold = torch.arange(len(y)) % FOLDS  # not in blocks, as data may be sorted by class
    for held in range(min(FOLDS, len(y))):
        out = fold == held
        found[out] = p[out] @ fit_channel(p[~out], y[~out])
    return mean_nll(found, y)


def calibrate(log_probabilities: Tensor, y: Tensor) -> Opinion:
    """A teacher's inverse temperature, from a grid by the likelihood of trusted labels, and its channel [ours].

    Takes log-probabilities ``(M, C)`` and trusted labels ``(M,)``. With a channel the inverse temperature is chosen
    anew, as without one a teacher that mistakes whole classes needs one that blurs all that it says.
    """
    sources = log_probabilities.unsqueeze(0)
    grid = [torch.tensor([beta]) for beta in np.geomspace(0.05, 5.0, 21)]
    alone = min(grid, key=lambda beta: mean_nll(pool(sources, beta), y))
    passed = min(grid, key=lambda beta: held_out_nll(pool(sources, beta), y))
    return _better(sources, alone, passed, y)


def stack(sources: Tensor, y: Tensor) -> Opinion:
    """The exponents in [0, 3] that make trusted labels ``(M,)`` most likely, with a small ridge, and a channel [ours].

    Takes log-probabilities ``(W, M, C)``.
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
    return _better(s, exponents, exponents, y)


def _better(sources: Tensor, alone: Tensor, passed: Tensor, y: Tensor) -> Opinion:
    """Exponents with a channel if it is better by `BETTER` on held-out rows, else those that stand alone."""
    pooled = pool(sources, passed)
    if held_out_nll(pooled, y) < mean_nll(pool(sources, alone), y) - BETTER:
        return Opinion(passed, fit_channel(pooled, y))
    return Opinion(alone, torch.eye(sources.shape[2], dtype=torch.float64))


class Habits(NamedTuple):
    """How a teacher speaks of each true class, from trusted rows."""

    said: Tensor  # H[c, k], how often it takes class c for class k, (C, C)
    mean: Tensor  # Q[c, k], its mean calibrated probability of class k for rows of class c, (C, C)


def habits(said: Tensor, probabilities: Tensor, y: Tensor) -> Habits:
    """A teacher's `Habits` from predicted classes ``(M,)``, calibrated probabilities ``(M, C)`` and trusted labels.

    A tenth of a row is added everywhere [ours].
    """
    classes = probabilities.shape[1]
    counts = [_count_by(y, rows.double(), classes) + 0.1 for rows in (F.one_hot(said, classes), probabilities)]
    return Habits(*(count / count.sum(1, keepdim=True) for count in counts))


class Posterior(NamedTuple):
    """What the EM of `label_posterior` finds."""

    classes: Tensor  # pi, the probability of each class to be the true one, (N, C)
    channel: Tensor  # T[c, y], how often class c is labelled y, (C, C)
    copied: float  # mu, the probability that a teacher's prediction is a copy of the given label
    echo: float  # e, by how much the given label raises its log-odds with the teacher elsewhere, at least 0
    noise_rate: float  # share of the labels that are wrong


def label_posterior(
    student: Tensor,
    teacher: Tensor,
    both: Callable[[Tensor], Tensor],
    ways: Habits,
    said: Tensor,
    y: Tensor,
    steps: int = 30,
) -> Posterior:
    """The posterior of the true class, with the label's channel and what the teacher has memorised, by EM [ours].

    Takes r_S, probabilities from the student alone, and q, calibrated ones of the teacher, ``(N, C)``; what gives r_ST
    for q without the label's echo; the teacher's habits and classes ``(N,)``; and given labels ``(N,)``. Where one is
    missing, the posterior is r_ST. Steps are those of eq. (2) to (5).
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
    """What to take from log-odds so that their weighted mean probability is as expected, eq. (5), in [0, 10] [ours]."""

    def excess(echo: float) -> float:
        return float((weights * ((odds - echo).sigmoid() - expected)).sum())

    if excess(0) <= 0:
        return 0.0
    return 10.0 if excess(10) >= 0 else float(brentq(excess, 0, 10, xtol=1e-11))


def posterior_targets(posterior: Tensor, y: Tensor, noise_rate: float, soft: bool) -> tuple[Tensor, Tensor]:
    """What each row is trained on, ``(N, C)``, and how much it weighs, ``(N,)`` of mean 1 [ours].

    If ``soft``, and where a label is missing, the target is the posterior and its largest probability the weight; else
    the target is the label, and its probability the weight. Below a noise rate of `NO_NOISE` labels are taken as right.
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
