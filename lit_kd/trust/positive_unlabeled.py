"""Positive-unlabeled estimation: which rows look like the trusted ones?"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from threadpoolctl import threadpool_limits

Array = NDArray[np.float64]

LAPSE = 0.1  # share of trusted rows that may look like noise
FITTED = 10**6  # rows that suffice for the fit: of more, every k-th is taken


class PUFit(NamedTuple):
    """The probability that a row is clean, ``(N,)``, 1 for trusted rows; the estimated share of noisy other rows."""

    clean: Array
    noise_rate: float


def fit_clean_probability(evidence: Array, trusted: NDArray[np.bool_], proof: float = 12.0) -> PUFit:
    """The probability that a row is clean, from evidence of which clean rows have more [ours].

    Trusted rows, bool ``(N,)``, show what clean rows look like; the others are a mixture of clean and noisy ones. The
    fit maximises ``mean_trusted log q - log mean_others q`` with ``q = 0.1 + 0.9 p`` and ``p = sigmoid(alpha +
    beta . x)``, over ``1 <= alpha <= 12`` and ``0 <= beta <= 8``. With p in place of q, a few trusted rows that look
    like noise would make p so flat that it doubts clean rows. For a constant p the optimum is 0: unless ``2 M N / (M +
    N)`` times it, for M trusted and N other rows, exceeds ``proof``, every row counts as clean.

    Evidence is ``(N, F)``, a column a feature, on any scale: columns are standardised by the trusted rows' median and
    interquartile range / 1.35, and clipped to [-12, 4].

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
