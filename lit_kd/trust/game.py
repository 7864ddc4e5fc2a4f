"""The game of Robust Active Distillation against a teacher that errs where it hurts, and dependent rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from lit_kd.trust.arrays import Floats, Indices, check_budget, vector


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

    Examples:
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

    Examples:
        >>> rad_marginals([1.0, 0.5, 0.4], mistakes=0.0, budget=2)
        array([1., 1., 0.])
    """
    g, w = _game(gain, mistakes, penalty)
    check_budget(budget, len(g))
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

    Examples:
        >>> guaranteed_gain([0.25, 0.25, 0.5, 0.0], [1.0, 1.0, 0.5, 0.1], mistakes=1.0)
        0.5
    """
    g, w = _game(gain, mistakes, penalty)
    q = vector(marginals, "marginals", len(g))
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

    Examples:
        >>> dep_round([1.0, 0.0, 1.0, 0.5, 0.5], np.random.default_rng(0)).shape
        (3,)
    """
    q = vector(marginals, "marginals")
    budget = round(q.sum())
    if (len(q) and q.max() > 1 + 1e-9) or abs(q.sum() - budget) > 1e-6:
        raise ValueError(
            f"expected marginals in [0, 1] of a whole sum, found a largest one of {q.max(initial=0)} and the sum "
            f"{q.sum()}: see rad_marginals"
        )
    chosen = q >= 1 - 1e-12
    open_rows = np.flatnonzero(~chosen & (q > 1e-12))
    carried, left, taken = -1, 0.0, []
    for row, own, draw in _triples(open_rows, q, generator):
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


def _triples(rows: Indices, q: Floats, generator: np.random.Generator) -> Iterator[tuple[int, float, float]]:
    """Rows with their marginals and a draw each, as Python's numbers: some at a time, for these are large."""
    for first in range(0, len(rows), 10**5):
        some = rows[first : first + 10**5]
        yield from zip(some.tolist(), q[some].tolist(), generator.random(len(some)).tolist(), strict=True)


def _game(gain: ArrayLike, mistakes: float, penalty: ArrayLike | None) -> tuple[Floats, Floats]:
    """Gain and stake, g and g + l, of each row."""
    g = vector(gain, "gain")
    if not 0 <= mistakes < math.inf:
        raise ValueError(f"expected a number of mistakes of at least 0, found {mistakes}")
    return g, g if penalty is None else g + vector(penalty, "penalty", len(g))
