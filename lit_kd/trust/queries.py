"""Which rows of a pool to ask the teacher about: the game of `lit_kd.trust.game`, and the rules it is compared with.

NumPy arrays; n rows in the pool, b queries, C classes, D features. Probabilities are the student's.
"""

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from lit_kd.trust.game import Floats, Indices, check_budget, dep_round, rad_marginals
from lit_kd.types import check_choice

QueryRule = Literal["rad", "uniform", "margin", "entropy", "coreset", "badge", "cluster_margin", "spaced"]
OF_FEATURES = ("coreset", "badge", "cluster_margin")
"""Rules that need features, the inputs of the student's last linear layer."""
SPACING = 4
"""How many candidates the rule spaced has for a query."""


def choose_rows(
    rule: QueryRule,
    probabilities: ArrayLike,
    budget: int,
    generator: np.random.Generator,
    *,
    mistakes: float = 0.0,
    features: ArrayLike | None = None,
    known_features: ArrayLike | None = None,
) -> Indices:
    """Pick b different rows of the pool by a rule; returns their positions, ``(b,)``.

    Args:
        rule: ``"rad"``, the game against a teacher that is wrong where it hurts most; ``"uniform"``; ``"margin"`` and
            ``"entropy"``, where the student is least sure; ``"spaced"``, see `spaced`; or one of `OF_FEATURES`.
        probabilities: ``(n, C)``, C at least 2.
        budget: b, from 0 to n.
        generator: For the rules that draw: rad, uniform and badge.
        mistakes: On how many of the n rows the teacher may be wrong, for ``"rad"``.
        features: ``(n, D)``, for `OF_FEATURES`.
        known_features: Of the k rows that are labelled or queried already, ``(k, D)``, for ``"coreset"``.

    Examples:
        >>> choose_rows("margin", [[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]], 2, np.random.default_rng(0))
        array([1, 2])
    """
    check_choice("rule", rule, get_args(QueryRule))
    p = np.asarray(probabilities, dtype=np.float64)
    check_budget(budget, len(p))
    if not np.isfinite(p).all():
        raise ValueError("expected finite probabilities, found nan or infinity")
    if rule == "rad":
        return dep_round(rad_marginals(margin_gain(p), mistakes, budget), generator)
    if rule == "uniform":
        return generator.choice(len(p), budget, replace=False)
    if rule == "margin":
        return _largest(margin_gain(p), budget)
    if rule == "entropy":
        return _largest(_entropy(p), budget)
    if rule == "spaced":
        return spaced(p, budget)
    if features is None or (rule == "coreset" and known_features is None):
        raise ValueError(f"expected features, and for coreset known_features, for the rule {rule!r}, found none")
    x = np.asarray(features, dtype=np.float64)
    if rule == "badge":
        return badge(p, x, budget, generator)
    if rule == "cluster_margin":
        return cluster_margin(p, x, budget)
    return coreset(x, np.asarray(known_features, dtype=np.float64), budget)


def margin_gain(probabilities: ArrayLike) -> Floats:
    """How unsure the student is of each row, ``(n,)`` in [0, 1]: 1 less its margin [the paper's gain, from memory]."""
    top = np.partition(np.asarray(probabilities, dtype=np.float64), -2, axis=1)
    return 1 - (top[:, -1] - top[:, -2])


def spaced(probabilities: Floats, budget: int) -> Indices:
    """Every m-th of the m b rows of which the student is least sure, so that they differ (MyriadAL, arXiv 2310.16161).

    The rank is by margin and entropy together [text]: ``(1 - margin) + entropy / log C`` [ours]; m is `SPACING`, or as
    many as the pool has rows for a query [ours].
    """
    unsure = margin_gain(probabilities) + _entropy(probabilities) / math.log(probabilities.shape[1])
    step = max(1, min(SPACING, len(probabilities) // max(1, budget)))
    return _largest(unsure, step * budget)[::step]


def coreset(features: Floats, centers: Floats, budget: int) -> Indices:
    """Cover the pool: again and again, the row farthest from all centers ``(k, D)`` becomes one (arXiv 1708.00489).

    The greedy k-center of CoreSet's paper; b passes over the features.
    """
    from sklearn.metrics import pairwise_distances_argmin_min  # late, as most runs do without scikit-learn

    distance = pairwise_distances_argmin_min(features, centers)[1] ** 2
    chosen: list[int] = []
    for _ in range(budget):
        distance[chosen[-1:]] = -1  # never again, even if all others lie on a center
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((features - features[chosen[-1]]) ** 2).sum(1))
    return np.array(chosen, dtype=np.int64)


def badge(probabilities: Floats, features: Floats, budget: int, generator: np.random.Generator) -> Indices:
    """Diverse rows of large gradients (BADGE, arXiv 1906.03671): k-means++ on ``a h^T`` with ``a = p - e(argmax p)``.

    These embeddings, which scikit-learn would need, are never built: ``<a h^T, a' h'^T> = <a, a'> <h, h'>`` [derived].
    """
    a, h = probabilities.copy(), features
    a[np.arange(len(a)), a.argmax(1)] -= 1
    norm = (a**2).sum(1) * (h**2).sum(1)
    weight, distance = np.ones(len(a)), np.full(len(a), np.inf)
    chosen: list[int] = []
    for _ in range(budget):
        if weight.sum() <= 0:  # every other row is the same as a chosen one
            weight[:] = 1
            weight[chosen] = 0
        row = int(generator.choice(len(a), p=weight / weight.sum()))
        chosen.append(row)
        distance = np.minimum(distance, (norm + norm[row] - 2 * (a @ a[row]) * (h @ h[row])).clip(min=0))
        weight = distance.copy()
        weight[chosen] = 0
    return np.array(chosen, dtype=np.int64)


def cluster_margin(probabilities: Floats, features: Floats, budget: int) -> Indices:
    """Rows of small margin from many clusters (Cluster-Margin, arXiv 2107.14263).

    A round robin over the clusters of candidates, the smallest first. Ours: only the 10 b candidates are clustered, as
    memory grows with the square of their number; 10 a cluster on average; the smallest margin of a cluster goes first.
    """
    candidates = _largest(margin_gain(probabilities), min(10 * budget, len(probabilities)))
    if len(candidates) < 2:
        return candidates
    from sklearn.cluster import AgglomerativeClustering

    clusters = AgglomerativeClustering(math.ceil(len(candidates) / 10), linkage="average")
    label = clusters.fit_predict(features[candidates])
    size = np.bincount(label)
    # a row is picked in the round whose number is how many of its cluster come before it: candidates rise by margin
    turn = np.array([np.count_nonzero(label[:i] == own) for i, own in enumerate(label)])
    return candidates[np.lexsort((label, size[label], turn))[:budget]]


def _entropy(probabilities: Floats) -> Floats:
    found: Floats = -(probabilities * np.log(probabilities.clip(np.finfo(probabilities.dtype).tiny))).sum(1)
    return found


def _largest(values: Floats, budget: int) -> Indices:
    return np.argsort(-values, kind="stable")[:budget]
