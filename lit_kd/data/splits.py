"""Stratified splits of a data set, from its labels alone."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
"""Row numbers."""
Labels = npt.NDArray[np.int64]
"""Class of each row, ``(n,)``; with several labels a sample, 0 or 1 for each, ``(n, C)``."""


def count_rows(size: int | float, total: int, name: str) -> int:
    """Turn the size of a split, a fraction of `total` or a count, into a count; 100.0 is a count, 1.0 is neither."""
    if size > 1 and float(size).is_integer():
        size = int(size)  # a config's 100 may arrive as 100.0
    if not size >= 0 or (isinstance(size, float) and size >= 1):
        raise ValueError(f"expected for {name} a fraction in [0, 1) or a whole number of rows, found {size}")
    count = round(size * total) if isinstance(size, float) else size
    if count == 0 and size > 0:
        raise ValueError(f"expected rows in {name} or 0, found an empty split: {size} of {total} rows is less than one")
    return count


def stratified_split(
    labels: npt.ArrayLike, sizes: Mapping[str, int | float], seed: int, rest: str = "train"
) -> dict[str, Positions]:
    """Split rows so that each part has about the same class shares.

    Each part takes from every class its share of the remaining rows, rounded by largest remainders with random ties.
    So a class too small for every part goes to the larger ones. Rows with several labels are split by combination of
    labels; if a part cannot hold every combination, by the number of labels set; else at random.

    Args:
        labels: Class of each row, ``(n,)``, or several labels of 0 or 1 per row, ``(n, C)``.
        sizes: Size of each part but the first: a fraction in ``[0, 1)`` of all rows, a count, or 0 for an empty part.
        seed: Seed of the draw.
        rest: Name of the first part, which takes what the others leave.

    Returns:
        Ascending positions of each part, `rest` first: disjoint, and together all rows.

    Examples:
        >>> parts = stratified_split([0, 1] * 10, {"val": 0.2}, seed=0)
        >>> [(name, len(part)) for name, part in parts.items()]
        [('train', 16), ('val', 4)]
    """
    y = np.asarray(labels)
    counts = {name: count_rows(size, len(y), name) for name, size in sizes.items()}
    if not any(counts.values()):
        return {rest: np.arange(len(y)), **{name: np.arange(0) for name in counts}}
    if sum(counts.values()) >= len(y):
        asked = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise ValueError(f"expected rows left for {rest}, found {len(y)} rows in all and {asked}: lower these sizes")
    smallest = min(count for count in counts.values() if count)
    strata, per_stratum = _strata(y, smallest)
    if smallest < len(per_stratum):
        name = min((name for name in counts if counts[name]), key=counts.__getitem__)
        raise ValueError(
            f"expected in {name} at least one row a class ({len(per_stratum)}), found {smallest}. "
            "Give a larger size, or 0 for no such split."
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    # a queue for each class, in random order: each part takes its share from the front
    grouped = order[np.argsort(strata[order], kind="stable")]
    queues = np.split(grouped, np.cumsum(per_stratum)[:-1])
    taken = np.zeros_like(per_stratum)
    parts: dict[str, Positions] = {}
    for name, count in counts.items():
        share = _apportion(count, per_stratum - taken, rng)
        parts[name] = np.sort(np.concatenate([q[t : t + s] for q, t, s in zip(queues, taken, share, strict=True)]))
        taken += share
    left = np.concatenate([q[t:] for q, t in zip(queues, taken, strict=True)])
    return {rest: np.sort(left), **parts}


def _strata(y: Labels, smallest: int) -> tuple[Positions, Positions]:
    """The stratum of each row, ``(n,)``, and how many rows each stratum has."""
    keys = [y] if y.ndim == 1 else [y, y.sum(axis=1), np.zeros(len(y))]
    for key in keys:
        _, strata, counts = np.unique(key, axis=0, return_inverse=True, return_counts=True)
        if len(counts) <= smallest:
            break
    return strata, counts


def _apportion(count: int, available: Positions, rng: np.random.Generator) -> Positions:
    """Divide `count` rows among classes in proportion to `available`, by largest remainders."""
    # whole numbers throughout: a floating-point quota of 2.9999 would cost a class a row
    floor, remainder = np.divmod(count * available, available.sum())
    # a class gets one more only where its remainder is positive, so never more than it has
    largest = np.lexsort((rng.random(len(available)), -remainder))[: count - floor.sum()]
    floor[largest] += 1
    return np.asarray(floor, dtype=np.int64)
