"""What the student is unsure of, or what covers the pool: the rules that the game is compared with."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from lit_kd.trust.arrays import Floats, Indices, check_budget, matrix

# what the rules ask of the student


def margin_gain(probabilities: ArrayLike) -> Floats:
    """How unsure the student is of each row: 1 less its margin, the largest probability less the second largest.

    RAD's gain [the paper's, from memory].

    Args:
        probabilities: ``(n, C)``.

    Returns:
        In [0, 1], ``(n,)``.

    Examples:
        >>> margin_gain([[0.5, 0.5], [0.75, 0.25]])
        array([1. , 0.5])
    """
    top = np.partition(matrix(probabilities, "probabilities"), -2, axis=1)
    return 1 - (top[:, -1] - top[:, -2])


# the rules to compare with


def uniform(n: int, budget: int, generator: np.random.Generator) -> Indices:
    """Draw b of n rows, all equally likely, ``(b,)``."""
    check_budget(budget, n)
    return generator.choice(n, budget, replace=False)


def margin(probabilities: ArrayLike, budget: int) -> Indices:
    """The b rows of the smallest margin, ``(b,)``; of equal ones, the first (Scheffer et al., 2001).

    Examples:
        >>> margin([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]], budget=2)
        array([1, 2])
    """
    return _largest(margin_gain(probabilities), budget)


def entropy(probabilities: ArrayLike, budget: int) -> Indices:
    """The b rows of the largest entropy, ``(b,)``; of equal ones, the first (Shannon's, in nats).

    Examples:
        >>> entropy([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]], budget=2)
        array([1, 2])
    """
    p = matrix(probabilities, "probabilities")
    return _largest(-(p * np.log(p.clip(np.finfo(p.dtype).tiny))).sum(1), budget)


def coreset(features: ArrayLike, centers: ArrayLike, budget: int) -> Indices:
    """Cover the pool: again and again the row farthest from all centers becomes one (CoreSet, arXiv 1708.00489).

    The greedy k-center of the paper, within twice the best radius. Costs b passes over the features.

    Args:
        features: Of the pool, ``(n, D)``.
        centers: Of the rows that are labeled or queried already, ``(k, D)``, k at least 1.
        budget: b.

    Returns:
        In the order of choice, ``(b,)``.

    Examples:
        >>> coreset([[0.0], [1.0], [9.0], [5.0]], centers=[[0.0]], budget=2)
        array([2, 3])
    """
    x, known = matrix(features, "features"), matrix(centers, "centers")
    check_budget(budget, len(x))
    if not len(known) or known.shape[1] != x.shape[1]:
        raise ValueError(f"expected at least one center with {x.shape[1]} features, found shape {known.shape}")
    if budget == 0:
        return np.zeros(0, np.int64)
    from sklearn.metrics import pairwise_distances_argmin_min  # late: most runs need none of scikit-learn

    distance = pairwise_distances_argmin_min(x, known)[1] ** 2
    chosen: list[int] = []
    for _ in range(budget):
        distance[chosen[-1:]] = -1  # never again, though all others lie on a center
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((x - x[chosen[-1]]) ** 2).sum(1))
    return np.array(chosen)


def badge(probabilities: ArrayLike, features: ArrayLike, budget: int, generator: np.random.Generator) -> Indices:
    """Diverse rows of large gradients (BADGE, arXiv 1906.03671): k-means++ on gradient embeddings.

    The embedding of a row is the gradient of the last layer's weights if the student's own prediction were the label,
    ``(p - e(argmax p)) h^T`` [the paper's]. k-means++ (Arthur and Vassilvitskii, 2007): the first row is drawn
    uniformly, each further one in proportion to its squared distance to the nearest chosen one. The C x D embeddings
    are never built, as inner products of outer products factor: ``<a h^T, a' h'^T> = <a, a'> <h, h'>`` [derived]; this
    is why scikit-learn's kmeans_plusplus, which needs them, is not called.

    Args:
        probabilities: ``(n, C)``.
        features: h, the input of the last layer, ``(n, D)``.
        budget: b.
        generator: Draws b times.

    Returns:
        In the order of choice, ``(b,)``.
    """
    a, h = matrix(probabilities, "probabilities").copy(), matrix(features, "features")
    check_budget(budget, len(a))
    if len(h) != len(a):
        raise ValueError(f"expected features of {len(a)} rows, as many as probabilities, found {len(h)}")
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


def cluster_margin(probabilities: ArrayLike, features: ArrayLike, budget: int) -> Indices:
    """Rows of small margin from many clusters (Cluster-Margin, arXiv 2107.14263).

    Hierarchical clusters, candidates of small margin, and a round robin over the clusters from the smallest one on are
    the paper's. [ours]: the 10 b candidates alone are clustered, not the pool, for memory grows with the square of
    their number; average linkage, 10 candidates a cluster on average; within a cluster the smallest margin goes first.

    Args:
        probabilities: ``(n, C)``.
        features: ``(n, D)``.
        budget: b.

    Returns:
        In the order of choice, ``(b,)``.
    """
    gain, x = margin_gain(probabilities), matrix(features, "features")
    check_budget(budget, len(gain))
    if len(x) != len(gain):
        raise ValueError(f"expected features of {len(gain)} rows, as many as probabilities, found {len(x)}")
    candidates = _largest(gain, min(10 * budget, len(gain)))
    if len(candidates) < 2:
        return candidates
    from sklearn.cluster import AgglomerativeClustering

    clusters = AgglomerativeClustering(math.ceil(len(candidates) / 10), linkage="average")
    label = clusters.fit_predict(x[candidates])
    size = np.bincount(label)
    # how many of its cluster come before it: the round in which it is picked; candidates are sorted by margin
    turn = np.array([np.count_nonzero(label[:i] == own) for i, own in enumerate(label)])
    return candidates[np.lexsort((label, size[label], turn))[:budget]]


def _largest(values: Floats, budget: int) -> Indices:
    check_budget(budget, len(values))
    return np.argsort(-values, kind="stable")[:budget]
