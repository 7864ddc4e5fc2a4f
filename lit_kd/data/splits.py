"""Stratified splits of a data set, from its labels alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]


def count_rows(size: int | float, total: int, name: str) -> int:
    """Read the size of a split, a fraction of `total` or a count, as a count; 100.0 is one, 1.0 is neither.

    Raises:
        ValueError: If it is negative, a fraction of 1 or more, or a fraction so small that it holds no row.
    """
    if size > 1 and float(size).is_integer():
        size = int(size)  # jsonargparse reads the 100 of a config as 100.0 or 100, by what was imported before
    if not size >= 0 or (isinstance(size, float) and size >= 1):
        raise ValueError(
            f"expected for {name} a fraction in [0, 1) or a whole number of rows, found {size}. "
            "Write a count without a decimal point."
        )
    count = round(size * total) if isinstance(size, float) else size
    if count == 0 and size > 0:
        raise ValueError(
            f"expected rows in {name}, found an empty split: {size} of {total} rows is less than one. "
            "Give a larger fraction or a count, or 0 for no such split."
        )
    return count


def stratified_split(
    labels: npt.ArrayLike, sizes: Mapping[str, int | float], seed: int, rest: str = "train"
) -> dict[str, Positions]:
    """Split the rows of a data set so that each part has about the same class shares.

    Each part takes of every class its share of the rows that remain, rounded by largest remainders; ties are
    drawn. A class too small to be in every part is thus left to the larger ones.

    Args:
        labels: Class of each row, integers, shape ``(n,)``.
        sizes: Size of each part but the first: a float is a fraction in ``[0, 1)`` of all rows, an int a
            count. 0 gives an empty part.
        seed: Seed of the draw.
        rest: Name of the first part, which takes what the others leave.

    Returns:
        Positions of each part, ascending: disjoint, and covering all rows. `rest` comes first.

    Raises:
        ValueError: If a size is no fraction or count, is below the number of classes, or nothing is left.

    Examples:
        >>> parts = stratified_split([0, 1] * 10, {"val": 0.2}, seed=0)
        >>> [(name, len(part)) for name, part in parts.items()]
        [('train', 16), ('val', 4)]
    """
    y = np.asarray(labels)
    counts = {name: count_rows(size, len(y), name) for name, size in sizes.items()}
    if rest in counts:
        raise ValueError(f"expected no size for {rest}, found {sizes[rest]}. It takes what the other parts leave.")
    if not any(counts.values()):
        return {rest: np.arange(len(y)), **{name: np.arange(0) for name in counts}}
    if sum(counts.values()) >= len(y):
        asked = ", ".join(f"{name}={count}" for name, count in counts.items())
        raise ValueError(
            f"expected rows left for {rest}, found {len(y)} rows in all and {asked} asked for. "
            "Lower these sizes, or give more data."
        )
    classes, inverse, per_class = np.unique(y, return_inverse=True, return_counts=True)
    for name, count in counts.items():
        if 0 < count < len(classes):
            raise ValueError(
                f"expected in {name} at least one row a class ({len(classes)}), found {count}. "
                "Give a larger size, or 0 for no such split."
            )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    # queues[c]: the rows of class c in random order; each part takes its share from the front.
    grouped = order[np.argsort(inverse[order], kind="stable")]
    queues = np.split(grouped, np.cumsum(per_class)[:-1])
    taken = np.zeros(len(classes), dtype=np.int64)
    parts: dict[str, Positions] = {}
    for name, count in counts.items():
        share = _apportion(count, per_class - taken, rng)
        chosen = [q[t : t + s] for q, t, s in zip(queues, taken, share, strict=True)]
        parts[name] = np.sort(np.concatenate(chosen))
        taken += share
    left = np.concatenate([q[t:] for q, t in zip(queues, taken, strict=True)])
    return {rest: np.sort(left), **parts}


def _apportion(count: int, available: Positions, rng: np.random.Generator) -> Positions:
    """Divide `count` rows among classes in proportion to `available`, by largest remainders."""
    # Whole numbers throughout: a floating-point quota of 2.9999 would cost a class a row.
    floor, remainder = np.divmod(count * available, available.sum())
    # A class gets one more only where its remainder is positive, so never more than it has.
    largest = np.lexsort((rng.random(len(available)), -remainder))[: count - floor.sum()]
    floor[largest] += 1
    return np.asarray(floor, dtype=np.int64)
