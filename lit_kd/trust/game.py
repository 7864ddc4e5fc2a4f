"""The game of Robust Active Distillation, against a teacher that errs where it hurts, and dependent rounding.

NumPy arrays in float64; n rows in the pool, b queries. The equations are those of docs/methods/rad.md.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def rad_distribution(gain: ArrayLike, mistakes: float, penalty: ArrayLike | None = None) -> Floats:
    """The best mix of rows to query if the teacher is wrong on some (RAD, arXiv 2210.01213): p of eq. (2), ``(n,)``.

    Takes what a right answer about each row is worth, g, and what a wrong one costs, l, ``(n,)`` or nothing; and m, on
    how many of the n rows the teacher is wrong at most, which need not be whole. A ValueError for values below 0.

    Examples:
        >>> rad_distribution([1.0, 1.0, 0.5, 0.1], mistakes=1.0)
        array([0.25, 0.25, 0.5 , 0.  ])
    """
    g, w = _game(gain, mistakes, penalty)
    if not len(g):
        raise ValueError("expected at least one row to choose from, found 0")
    order = np.argsort(-g, kind="stable")
    order = order[w[order] > 0]  # a row of neither gain nor penalty changes nothing
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
    """With which probability to query each row, ``(n,)``, if b different rows are to be queried: eq. (3), (4)."""
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

    def at(price: float) -> Floats:  # eq. (4)
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
        low, high = (middle, high) if at(middle).sum() >= budget else (low, middle)
    many, few = at(low), at(high)
    share = (budget - few.sum()) / (many.sum() - few.sum())
    q[order] = share * many + (1 - share) * few
    return q


def dep_round(marginals: ArrayLike, generator: np.random.Generator) -> Indices:
    """Draw exactly b different rows, rising, ``(b,)``, each with its own probability: dependent rounding (DepRound).

    One pass over the undecided rows: each meets the one that is carried along, one of the two is decided at odds that
    keep the expectation of both, and the other is carried on. Each undecided row takes one random number.
    """
    q = _vector(marginals, "marginals")
    largest, total = q.max(initial=0), q.sum()
    if largest > 1 + 1e-9 or abs(total - round(total)) > 1e-6:
        raise ValueError(f"expected marginals in [0, 1] of a whole sum, found one of {largest} and the sum {total}")
    chosen = q >= 1 - 1e-12
    undecided = np.flatnonzero(~chosen & (q > 1e-12))
    draws = generator.random(len(undecided))
    carried, left, taken = -1, 0.0, []
    for row, own, draw in zip(undecided.tolist(), q[undecided].tolist(), draws.tolist(), strict=True):
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


def check_budget(budget: int, rows: int) -> None:
    """Refuse to pick more rows than there are."""
    if not 0 <= budget <= rows:
        raise ValueError(f"expected a budget from 0 to the {rows} rows of the pool, found {budget}")


def _vector(values: ArrayLike, name: str) -> Floats:
    """One number a row, at least 0 and finite, ``(n,)``."""
    v = np.asarray(values, dtype=np.float64)
    if not (v >= 0).all() or not np.isfinite(v).all():
        raise ValueError(f"expected {name} of at least 0 and finite, found values from {v.min()} to {v.max()}")
    return v


def _game(gain: ArrayLike, mistakes: float, penalty: ArrayLike | None) -> tuple[Floats, Floats]:
    """Gain and stake, g and g + l, of each row."""
    g = _vector(gain, "gain")
    if not 0 <= mistakes < math.inf:
        raise ValueError(f"expected a number of mistakes of at least 0, found {mistakes}")
    return g, g if penalty is None else g + _vector(penalty, "penalty")
