"""Which rows of a pool to ask the teacher about: the game of Robust Active Distillation, and the rules it is against.

Pure functions of NumPy arrays: they run once a round, on the host, in float64. They know nothing of Lightning.
Shapes: n rows in the pool, b queries, C classes, D features. Probabilities are the student's.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import pairwise_distances_argmin_min

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

# the game


def rad_distribution(gain: ArrayLike, mistakes: float, penalty: ArrayLike | None = None) -> Floats:
    r"""The best mix of rows to query if the teacher is wrong on some of them (RAD, arXiv 2210.01213).

    The game ``max_p min_|S| <= m  sum_{i not in S} p_i g_i - sum_{i in S} p_i l_i`` over probabilities p [the paper's,
    as our notes have it], in closed form [derived]: with rows sorted by falling g,
    ``G_k = sum_{i <= k} g_i / (g_i + l_i)`` and ``H_k = sum_{i <= k} 1 / (g_i + l_i)``, the value is
    ``max_k (G_k - m) / H_k``, and ``p_i = 1 / (H_k (g_i + l_i))`` for the first k rows and 0 for the others. Of several
    best k the largest is taken, so rows of equal gain are treated alike. Where even this value is below ``-min l``,
    the teacher may be wrong on too many rows to gain anything, p is uniform over the rows of the smallest penalty.

    Args:
        gain: g, what a right answer about each row is worth, at least 0, ``(n,)``: see `margin_gain`.
        mistakes: m, on how many of the n rows the teacher is wrong at most; at least 0, need not be whole.
        penalty: l, what a wrong answer about each row costs, at least 0, ``(n,)``; ``None``: nothing.

    Returns:
        p, ``(n,)``, of sum 1. `guaranteed_gain` tells the game's value.

    Raises:
        ValueError: If a value is negative or not finite, the shapes differ, or there are no rows.

    Example:
        >>> rad_distribution([1.0, 1.0, 0.5, 0.1], mistakes=1.0)
        array([0.25, 0.25, 0.5 , 0.  ])
    """
    g, w = _game(gain, mistakes, penalty)
    if not len(g):
        raise ValueError("expected at least one row to choose from, found 0")
    # a row of neither gain nor penalty changes nothing
    order = np.argsort(-g, kind="stable")
    order = order[w[order] > 0]
    inverse = 1 / w[order]
    values = (np.cumsum(g[order] * inverse) - mistakes) / np.cumsum(inverse)
    cheapest = float(np.min(w - g))
    best = float(values.max(initial=-cheapest))
    p = np.zeros(len(g))
    if best <= -cheapest:
        p[w - g <= cheapest] = 1
    else:
        k = int(np.flatnonzero(values >= best - 1e-12 * abs(best))[-1]) + 1
        p[order[:k]] = inverse[:k]
    p /= p.sum()
    return p


def rad_marginals(gain: ArrayLike, mistakes: float, budget: int, penalty: ArrayLike | None = None) -> Floats:
    """With which probability to query each row, if b different rows are to be queried.

    ``b p`` with the p of `rad_distribution`, wherever none of these exceeds 1. Otherwise [derived] the game over
    ``0 <= q <= 1, sum q = b``: at a price s for each query, rows of gain above s are worth it. Mistakes are bought off
    where ``w = g + l`` is largest, ``(g - s) / w`` of a mistake (at most a whole one) for each row, until m are spent,
    at the row with w = t; then ``q = min(1, t / w)``, or 1 where even a mistake costs less than the price,
    ``-l >= s``. The price is bisected until the sum is b; as it jumps there, both sides are mixed.

    Args:
        gain: As in `rad_distribution`.
        mistakes: Likewise, among the n rows.
        budget: b, from 0 to n.
        penalty: As in `rad_distribution`.

    Returns:
        q, ``(n,)``, in [0, 1], of sum b.

    Raises:
        ValueError: As `rad_distribution`, and if the budget is not in [0, n].

    Example:
        >>> rad_marginals([1.0, 0.5, 0.4], mistakes=0.0, budget=2)
        array([1., 1., 0.])
    """
    g, w = _game(gain, mistakes, penalty)
    _check_budget(budget, len(g))
    if budget in (0, len(g)):
        return np.full(len(g), float(budget > 0))
    q = budget * rad_distribution(g, mistakes, w - g)
    if q.max() <= 1:
        return q
    order = np.argsort(-w, kind="stable")
    g, w = g[order], w[order]
    free = w <= 0

    def at(price: float) -> Floats:
        cost = np.divide(g - price, w, out=np.ones_like(g), where=~free).clip(0, 1)
        spent = np.cumsum(np.where(g >= price, cost, 0))
        critical = int(np.searchsorted(spent, mistakes))
        threshold = w[critical] if critical < len(w) else 0.0
        chosen = np.minimum(1, np.divide(threshold, w, out=np.ones_like(w), where=~free))
        chosen[g < price] = 0
        chosen[g - w >= price] = 1
        return chosen

    low, high = float(np.min(g - w)) - 1, float(g.max()) + 1  # all rows at the one price, none at the other
    while high - low > 1e-13 * (1 + abs(low)):
        middle = (low + high) / 2
        if at(middle).sum() >= budget:
            low = middle
        else:
            high = middle
    many, few = at(low), at(high)
    share = (budget - few.sum()) / (many.sum() - few.sum())
    q[order] = share * many + (1 - share) * few
    return q


def guaranteed_gain(marginals: ArrayLike, gain: ArrayLike, mistakes: float, penalty: ArrayLike | None = None) -> float:
    """What a mix of queries gains if the teacher's mistakes fall where they hurt most.

    Args:
        marginals: p or q, ``(n,)``, at least 0.
        gain: As in `rad_distribution`, and the same for the others.
        mistakes: A fraction of one hits a row by that fraction.
        penalty: See above.

    Returns:
        For the p of `rad_distribution` the game's value.

    Example:
        >>> guaranteed_gain([0.25, 0.25, 0.5, 0.0], [1.0, 1.0, 0.5, 0.1], mistakes=1.0)
        0.5
    """
    g, w = _game(gain, mistakes, penalty)
    q = _vector(marginals, "marginals", len(g))
    hurt = np.sort(q * w)[::-1]
    whole = min(math.floor(mistakes), len(g))
    part = (mistakes - whole) * hurt[whole] if whole < len(g) else 0.0
    return float(q @ g - hurt[:whole].sum() - part)


def dep_round(marginals: ArrayLike, generator: np.random.Generator) -> Indices:
    """Draw exactly b different rows, each with its own probability: dependent rounding (DepRound).

    One pass: the rows whose fate is open meet one that is carried along; one of the two is decided, at odds that keep
    the expectation of both, the other is carried on.

    Args:
        marginals: q, ``(n,)``, in [0, 1], of a whole sum b.
        generator: Draws once for each open row.

    Returns:
        The chosen rows, rising, ``(b,)``.

    Raises:
        ValueError: If a marginal is outside of [0, 1], or their sum is not whole.

    Example:
        >>> dep_round([1.0, 0.0, 1.0, 0.5, 0.5], np.random.default_rng(0)).shape
        (3,)
    """
    q = _vector(marginals, "marginals")
    budget = round(q.sum())
    if (len(q) and q.max() > 1 + 1e-9) or abs(q.sum() - budget) > 1e-6:
        raise ValueError(
            f"expected marginals in [0, 1] of a whole sum, found a largest one of {q.max(initial=0)} and the sum "
            f"{q.sum()}: see rad_marginals"
        )
    chosen = q >= 1 - 1e-12
    open_rows = np.flatnonzero(~chosen & (q > 1e-12))
    carried, left, taken = -1, 0.0, []
    for row, own, draw in zip(
        open_rows.tolist(), q[open_rows].tolist(), generator.random(len(open_rows)).tolist(), strict=True
    ):
        total = left + own
        if total < 1:  # one of the two gets all, the other nothing
            if draw * total >= left:
                carried = row
            left = total
        else:  # one of the two is taken, the other keeps the rest
            if draw * (2 - total) >= 1 - own:
                taken.append(row)
            else:
                taken.append(carried)
                carried = row
            left = total - 1
    chosen[taken] = True
    if carried >= 0 and left > 0.5:  # 1 but for rounding, else 0
        chosen[carried] = True
    return np.flatnonzero(chosen)


# what the rules ask of the student


def margin_gain(probabilities: ArrayLike) -> Floats:
    """How unsure the student is of each row: 1 less its margin, the largest probability less the second largest.

    RAD's gain [the paper's, from memory].

    Args:
        probabilities: ``(n, C)``.

    Returns:
        In [0, 1], ``(n,)``.

    Example:
        >>> margin_gain([[0.5, 0.5], [0.75, 0.25]])
        array([1. , 0.5])
    """
    top = np.partition(_matrix(probabilities, "probabilities"), -2, axis=1)
    return 1 - (top[:, -1] - top[:, -2])


# the rules to compare with


def uniform(n: int, budget: int, generator: np.random.Generator) -> Indices:
    """Draw b of n rows, all equally likely, ``(b,)``."""
    _check_budget(budget, n)
    return generator.choice(n, budget, replace=False)


def margin(probabilities: ArrayLike, budget: int) -> Indices:
    """The b rows of the smallest margin, ``(b,)``; of equal ones, the first (Scheffer et al., 2001).

    Example:
        >>> margin([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]], budget=2)
        array([1, 2])
    """
    return _largest(margin_gain(probabilities), budget)


def entropy(probabilities: ArrayLike, budget: int) -> Indices:
    """The b rows of the largest entropy, ``(b,)``; of equal ones, the first (Shannon's, in nats).

    Example:
        >>> entropy([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]], budget=2)
        array([1, 2])
    """
    p = _matrix(probabilities, "probabilities")
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

    Example:
        >>> coreset([[0.0], [1.0], [9.0], [5.0]], centers=[[0.0]], budget=2)
        array([2, 3])
    """
    x, known = _matrix(features, "features"), _matrix(centers, "centers")
    _check_budget(budget, len(x))
    if not len(known) or known.shape[1] != x.shape[1]:
        raise ValueError(f"expected at least one center with {x.shape[1]} features, found shape {known.shape}")
    if budget == 0:
        return np.zeros(0, np.int64)
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
    a, h = _matrix(probabilities, "probabilities").copy(), _matrix(features, "features")
    _check_budget(budget, len(a))
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
    gain, x = margin_gain(probabilities), _matrix(features, "features")
    _check_budget(budget, len(gain))
    if len(x) != len(gain):
        raise ValueError(f"expected features of {len(gain)} rows, as many as probabilities, found {len(x)}")
    candidates = _largest(gain, min(10 * budget, len(gain)))
    if len(candidates) < 2:
        return candidates
    clusters = AgglomerativeClustering(math.ceil(len(candidates) / 10), linkage="average")
    label = clusters.fit_predict(x[candidates])
    size = np.bincount(label)
    # how many of its cluster come before it: the round in which it is picked; candidates are sorted by margin
    turn = np.array([np.count_nonzero(label[:i] == own) for i, own in enumerate(label)])
    return candidates[np.lexsort((label, size[label], turn))[:budget]]


def _largest(values: Floats, budget: int) -> Indices:
    _check_budget(budget, len(values))
    return np.argsort(-values, kind="stable")[:budget]


# what is refused


def _game(gain: ArrayLike, mistakes: float, penalty: ArrayLike | None) -> tuple[Floats, Floats]:
    """Gain and stake, g and g + l, of each row."""
    g = _vector(gain, "gain")
    if not 0 <= mistakes < math.inf:
        raise ValueError(f"expected a number of mistakes of at least 0, found {mistakes}")
    return g, g if penalty is None else g + _vector(penalty, "penalty", len(g))


def _vector(values: ArrayLike, name: str, rows: int | None = None) -> Floats:
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or (rows is not None and len(v) != rows):
        raise ValueError(f"expected {name} of shape ({'n' if rows is None else rows},), found {v.shape}")
    if not (v >= 0).all() or not np.isfinite(v).all():
        raise ValueError(f"expected {name} of at least 0 and finite, found values from {v.min()} to {v.max()}")
    return v


def _matrix(values: ArrayLike, name: str) -> Floats:
    m = np.asarray(values, dtype=np.float64)
    if m.ndim != 2 or (name == "probabilities" and m.shape[1] < 2):
        least = " with at least two columns" if name == "probabilities" else ""
        raise ValueError(f"expected {name} of two axes, rows first{least}, found shape {m.shape}")
    if not np.isfinite(m).all():
        raise ValueError(f"expected finite {name}, found nan or infinity")
    return m


def _check_budget(budget: int, rows: int) -> None:
    if not 0 <= budget <= rows:
        raise ValueError(f"expected a budget from 0 to the {rows} rows of the pool, found {budget}")
