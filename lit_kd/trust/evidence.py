"""Which labels look clean, and how often teachers and labels take one class for another."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from threadpoolctl import threadpool_limits
from torch import Tensor

Array = NDArray[np.float64]

LAPSE = 0.1  # share of trusted rows that may look like noise
FITTED = 10**6  # rows that suffice for the fit: of more, every k-th is taken


class PUFit(NamedTuple):
    """The probability that a row is clean, ``(N,)``, 1 for trusted rows; the estimated share of noisy other rows."""

    clean: Array
    noise_rate: float


def fit_clean_probability(evidence: Array, trusted: NDArray[np.bool_], proof: float = 12.0) -> PUFit:
    """The probability that a row is clean, from evidence of which clean rows have more [ours].

    Evidence is ``(N, F)``, a column a feature, on any scale. Trusted rows, bool ``(N,)``, show what clean rows look
    like; the others are a mixture of clean and noisy ones: a positive-unlabeled fit, see docs/methods/almkd.md. Unless
    its statistic exceeds ``proof``, every row counts as clean.

    Examples:
        >>> x = np.concatenate([np.full(60, -5.0), np.tile([-1.0, 0.0, 1.0], 60)])
        >>> fit = fit_clean_probability(x[:, None], np.arange(240) >= 180)
        >>> round(fit.noise_rate, 2), fit.clean[:60].max() < 0.1
        (0.33, np.True_)
    """
    if trusted.all() or not trusted.any():
        return PUFit(np.ones(len(evidence)), 0.0)
    low, median, high = np.quantile(evidence[trusted], [0.25, 0.5, 0.75], axis=0)
    away = evidence - median
    least = 1e-6 * np.abs(away).max(axis=0) + np.finfo(np.float64).tiny
    # wider below, where the distance from the trusted rows tells noise from a hard clean row
    x = np.clip(away / np.maximum((high - low) / 1.35, least), -12, 4)
    positive, unlabeled = (part[:: len(part) // FITTED + 1] for part in (x[trusted], x[~trusted]))

    def negative_bound(theta: Array) -> tuple[float, Array]:
        p, others = expit(theta[0] + positive @ theta[1:]), expit(theta[0] + unlabeled @ theta[1:])
        q, mean = LAPSE + (1 - LAPSE) * p, LAPSE + (1 - LAPSE) * others.mean()
        slope, ratio = (1 - LAPSE) * p * (1 - p) / q, (1 - LAPSE) * others * (1 - others) / mean
        by_alpha = slope.mean() - ratio.mean()
        by_beta = (slope[:, None] * positive).mean(0) - (ratio[:, None] * unlabeled).mean(0)
        return -float(np.log(q).mean() - np.log(mean)), -np.concatenate([[by_alpha], by_beta])

    begin = np.ones(1 + x.shape[1])
    begin[0] = 2.0
    bounds = [(1.0, 12.0)] + [(0.0, 8.0)] * x.shape[1]
    # to the end, so that rounding, which differs between processes, does not decide where it stops
    with threadpool_limits(1):  # threads only slow down products this small
        best = minimize(
            negative_bound, begin, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-9}
        )
    rows = len(positive) * len(unlabeled) / (len(positive) + len(unlabeled))
    if 2 * rows * -best.fun <= proof:
        return PUFit(np.ones(len(x)), 0.0)
    clean = expit(best.x[0] + x @ best.x[1:])
    clean[trusted] = 1.0
    return PUFit(clean, float(1 - clean[~trusted].mean()))


def teacher_channel(classes: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """The distribution of the true class for each class that a teacher predicts, from trusted rows [ours].

    Takes predicted classes ``(M, K)`` and true ones ``(M,)``; returns ``(K, C, C)``, each row a distribution: counts of
    (predicted, true), plus 5 rows on the diagonal and a tenth of a row everywhere.
    """
    joint = F.one_hot(classes, num_classes).transpose(0, 1).transpose(1, 2).float() @ F.one_hot(y, num_classes).float()
    counts = joint + 5 * torch.eye(num_classes, device=joint.device, dtype=joint.dtype) + 0.1
    return counts / counts.sum(-1, keepdim=True)


def label_channel(classes: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """The noise's transition matrix, with the student's classes taken for the true ones [ours].

    Takes the student's classes and the given labels, ``(N,)``; returns ``(C, C)``, each row a distribution: counts of
    (predicted, given), plus 5 rows a class, 70% of them right and the rest spread evenly over all classes.
    """
    joint = torch.bincount(classes * num_classes + y, minlength=num_classes**2).view(num_classes, num_classes).float()
    counts = joint + 5 * (0.7 * torch.eye(num_classes, device=joint.device, dtype=joint.dtype) + 0.3 / num_classes)
    return counts / counts.sum(1, keepdim=True)


def label_log_odds(student: Tensor, y: Tensor, channel: Tensor) -> Tensor:
    """The log-odds that a row of the label's own class got it, not one of another class [ours].

    Takes the student's probabilities ``(B, C)``, given labels ``(B,)`` and a `label_channel`; returns ``(B,)``, between
    -14 and 14.
    """
    given, own = student * channel.T[y], y.unsqueeze(1)
    right, wrong = given.gather(1, own).squeeze(1), given.scatter(1, own, 0).sum(1)  # 1 - right would cancel
    return (right + 1e-6).log() - (wrong + 1e-6).log()
