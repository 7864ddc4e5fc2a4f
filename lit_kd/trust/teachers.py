"""What trusted rows tell of teachers before a student is trained. [ours, where nothing else is said]

M trusted rows, whose labels are right; N training rows, whose labels may be wrong; K teachers; C classes.
"""

from typing import NamedTuple

from scipy.stats import norm
from torch import Tensor

LEVEL = 0.95
"""Of intervals, where nothing else is said."""


class Interval(NamedTuple):
    """A number, and an interval that holds it with some probability."""

    estimate: float
    low: float
    high: float


def wilson(right: int, total: int, level: float = LEVEL) -> Interval:
    """A share and its score interval (Wilson, 1927) [text]; of no rows, nan in [0, 1].

    Examples:
        >>> [round(value, 3) for value in wilson(9, 10)]
        [0.9, 0.596, 0.982]
    """
    if not total:
        return Interval(float("nan"), 0.0, 1.0)
    z, p = float(norm.ppf((1 + level) / 2)), right / total
    middle, scale = (p + z**2 / (2 * total)), 1 + z**2 / total
    half = z * (p * (1 - p) / total + (z / (2 * total)) ** 2) ** 0.5
    return Interval(p, max(0.0, min(p, (middle - half) / scale)), min(1.0, max(p, (middle + half) / scale)))  # rounding


def shares_by_class(right: Tensor, y: Tensor, classes: int) -> list[Interval]:
    """By class y, ``(M,)``, the share of rows that are right, bool ``(M,)``, with its interval."""
    return [wilson(int(right[y == c].sum()), int((y == c).sum())) for c in range(classes)]


def agreement(named: Tensor) -> Tensor:
    """How often each two of K columns name the same class, ``(K, K)``: classes ``(N, K)``, -1 where one is silent."""
    first, second = named.unsqueeze(2), named.unsqueeze(1)
    both = (first >= 0) & (second >= 0)
    return ((first == second) & both).sum(0) / both.sum(0)


def shared_errors(wrong: Tensor, speaks: Tensor) -> Tensor:
    """Of the rows that teacher i gets wrong and j speaks of, the share that j gets wrong, too, ``(K, K)``.

    From who is wrong, and who speaks, about each row, bool ``(M, K)``. nan where i is never wrong. Teachers whose
    errors are independent share them as often as j errs at all.
    """
    errs, speaking = (wrong & speaks).double(), speaks.double()
    return errs.T @ errs / (errs.T @ speaking)


def wrong_share(right: Tensor, agrees: Tensor, classes: int) -> Interval:
    """The share of wrong labels, from a witness that never saw them.

    The witness is right on a share a of trusted rows, and agrees with a share g of the given labels. If it is right as
    often where labels are wrong, and names a wrong label in a share r of them, then ``g = (1 - e) a + e r``, so
    ``e = (a - g) / (a - r)`` [derived]. The estimate takes its mistakes as spread evenly, ``r = (1 - a) / (C - 1)``.
    The interval goes from r = 0 to r = (1 - a) / 2, and adds the sampling error of a and g (95%).

    Args:
        right: Whether the witness names the label of each trusted row, bool ``(M,)``.
        agrees: Whether it names the given label of each training row, bool ``(N,)``.
        classes: C.
    """
    a, g = float(right.float().mean()), float(agrees.float().mean())
    sampled = a * (1 - a) / len(right) + g * (1 - g) / len(agrees)
    half = float(norm.ppf((1 + LEVEL) / 2)) * sampled**0.5
    spread = a - (1 - a) / (classes - 1)
    if spread <= 2 * half:  # hardly better than chance: it tells nothing
        return Interval(float("nan"), 0.0, 1.0)
    found = [(a - g) / spread, (a - g - half) / a, (a - g + half) / max(a - (1 - a) / 2, half)]
    return Interval(*(min(max(value, 0.0), 1.0) for value in found))


def repeated_share(agreed: float, accuracy: float, wrong: float) -> Interval:
    """How many of the wrong labels a teacher repeats: it has learned them by heart, if they are more than its errors.

    It names a share of the given labels, `agreed`, and is right on a share of trusted rows, `accuracy`. Of the right
    labels it names at least as many as that, at most all, which bounds what is left for the wrong ones [derived]; the
    estimate is the middle. Where no label seems wrong, nan in [0, 1].
    """
    if not wrong > 0:
        return Interval(float("nan"), 0.0, 1.0)
    low, high = ((agreed - (1 - wrong) * named) / wrong for named in (1.0, accuracy))
    low, high = (min(max(value, 0.0), 1.0) for value in (low, high))
    return Interval((low + high) / 2, low, high)
