"""Labels: stratified splits by them, noise on them, and which of them are known."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lit_kd.types import UNLABELED, check_choice

Positions = npt.NDArray[np.int64]
"""Row numbers."""
Matrix = npt.NDArray[np.float64]
Weights = npt.NDArray[np.float64]
"""How often each row is drawn, ``(n,)``, up to a factor."""
TaskName = Literal["classification", "multilabel", "dense", "tokens", "regression"]
"""What labels are, see `lit_kd.terms.tasks`."""
Labels = npt.NDArray[np.int64]
"""Class of each row, ``(n,)``; those of other tasks as `lit_kd.terms.tasks` says."""


def count_rows(size: int | float, total: int, name: str) -> int:
    """Turn the size of a split, a fraction of `total` or a count, into a count; 100.0 is a count, 1.0 is neither."""
    number = isinstance(size, Real)
    if number and size > 1 and float(size).is_integer():
        size = int(size)  # a config's 100 may arrive as 100.0
    if not number or not size >= 0 or (isinstance(size, float) and size >= 1):
        raise ValueError(f"expected for {name} a fraction in [0, 1) or a whole number of rows, found {size!r}")
    count = round(size * total) if isinstance(size, float) else size
    if count == 0 and size > 0:
        raise ValueError(f"expected rows in {name} or 0, found an empty split: {size} of {total} rows is less than one")
    return count


def stratified_split(
    labels: npt.ArrayLike, sizes: Mapping[str, int | float], seed: int, rest: str = "train"
) -> dict[str, Positions]:
    """Split rows so that each part has about the same class shares.

    Each part takes from every class its share of the remaining rows, rounded by largest remainders with random ties.
    Rows with several labels are split by combination of labels; if a part cannot hold every combination, by the number
    of labels set; else at random.

    Args:
        labels: Class of each row, ``(n,)``, or several labels of 0 or 1 per row, ``(n, C)``.
        sizes: Size of each part but the first: a fraction in ``[0, 1)`` of all rows, or a count.
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
    # a queue for each class, in random order: each part takes its share, by largest remainders, from the front
    grouped = order[np.argsort(strata[order], kind="stable")]
    queues = np.split(grouped, np.cumsum(per_stratum)[:-1])
    taken = np.zeros_like(per_stratum)
    parts: dict[str, Positions] = {}
    for name, count in counts.items():
        # whole numbers throughout: a floating-point quota of 2.9999 would cost a class a row
        available = per_stratum - taken
        share, remainder = np.divmod(count * available, available.sum())
        # a class gets one more only where its remainder is positive, so never more than it has
        share[np.lexsort((rng.random(len(available)), -remainder))[: count - share.sum()]] += 1
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


def transition_matrix(
    kind: Literal["symmetric", "asymmetric"], num_classes: int, rate: float, pairs: Mapping[int, int] | None = None
) -> Matrix:
    """The matrix ``T`` with ``T[i, j] = P(given label = j | true label = i)``.

    - ``symmetric``: with probability `rate` in ``[0, 1]`` a label is redrawn from ALL classes, its own included, so
      ``rate * (C - 1) / C`` of the labels are wrong [code of ALM-KD].
    - ``asymmetric``: with probability `rate` class ``c`` becomes ``pairs[c]``; classes without a pair stay clean. By
      default it becomes the next class, and the last one becomes 0.

    Examples:
        >>> transition_matrix("asymmetric", 3, 0.5, {2: 0}).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"expected a noise rate in [0, 1], found {rate}. It is a probability, e.g. 0.4.")
    eye = np.eye(num_classes)
    if kind == "symmetric":
        return (1 - rate) * eye + rate / num_classes
    if kind != "asymmetric":
        raise ValueError(f"expected noise 'symmetric' or 'asymmetric', found {kind!r}. Give a matrix for any other.")
    if not isinstance(pairs or {}, Mapping):
        raise ValueError(f"expected pairs as a mapping, such as {{1: 7}}, found {pairs!r}")
    wrong = np.roll(eye, 1, axis=1) if pairs is None else eye.copy()
    for true, mistaken in (pairs or {}).items():
        if not (0 <= true < num_classes and 0 <= mistaken < num_classes):
            raise ValueError(f"expected pairs of classes in [0, {num_classes}), found {true}: {mistaken}: count from 0")
        wrong[true] = eye[mistaken]
    return (1 - rate) * eye + rate * wrong


def draw_soft_labels(bank: npt.ArrayLike, of: npt.ArrayLike, labels: npt.ArrayLike, seed: int) -> Matrix:
    """For each label a soft label of its class, drawn from a bank (LW-KD, arXiv 2005.09163) [text], ``(n, C)``.

    The bank holds what a teacher says of samples of its own, such as synthetic ones: it never sees those that the
    student learns from. A bank of one-hot rows gives the labels back. The paper's adversarial part is left out.

    Args:
        bank: Probabilities, ``(m, C)``.
        of: The class of each row of the bank, ``(m,)``.
        labels: The class of each row to learn from, ``(n,)``.
        seed: Seed of the draw.
    """
    rows, classes, y = np.asarray(bank, dtype=np.float64), np.asarray(of), np.asarray(labels)
    if rows.ndim != 2 or len(rows) != len(classes) or not np.allclose(rows.sum(1), 1, atol=1e-4) or (rows < 0).any():
        raise ValueError(
            f"expected a bank of probabilities (m, C) and m classes, found {rows.shape} and {classes.shape}"
        )
    lacking = np.setdiff1d(y, classes)
    if len(lacking):
        raise ValueError(f"expected soft labels of every class in the bank, found none of class {lacking[0]}")
    rng, drawn = np.random.default_rng(seed), np.empty((len(y), rows.shape[1]))
    for c in np.unique(y):
        drawn[y == c] = rng.choice(rows[classes == c], (y == c).sum())
    return drawn


def check_matrix(
    matrix: Any,
    num_classes: int,
    kind: str = "transition",
    meaning: str = "Entry [i][j] is P(given label = j | true label = i).",
) -> Matrix:
    """Return `matrix` as a float64 array; raise a ValueError if its rows are no distributions over so many classes."""
    expected = f"expected a {num_classes} x {num_classes} {kind} matrix"
    array = np.asarray(matrix, dtype=np.float64)
    if array.shape != (num_classes, num_classes):
        raise ValueError(f"{expected}, found shape {array.shape}. {meaning}")
    good = (array >= 0).all(axis=1) & np.isclose(array.sum(axis=1), 1, rtol=0, atol=1e-6)
    if not good.all():
        row = int(good.argmin())
        raise ValueError(
            f"{expected} whose rows are at least 0 and sum to 1, found {array[row].tolist()} in row {row}. {meaning}"
        )
    return array


def corrupt(labels: Labels, matrix: Sequence[Sequence[float]] | Matrix, seed: int | np.random.Generator) -> Labels:
    """Draw each label, int64 of any shape, anew from its row of a transition matrix ``(C, C)``; missing ones stay."""
    array = check_matrix(matrix, len(matrix))
    given = np.array(labels)
    classes = np.unique(given[given != UNLABELED])
    if len(classes) and not 0 <= classes[0] <= classes[-1] < len(array):
        raise ValueError(f"expected labels in [0, {len(array)}) of the matrix, found {classes[0]} to {classes[-1]}")
    # one draw per label, missing or not: a missing label never changes the noise of another
    draws = np.random.default_rng(seed).random(given.shape)
    rows = [given == c for c in classes]
    for c, own in zip(classes, rows, strict=True):
        cumulative = array[c].cumsum()
        given[own] = np.searchsorted(cumulative / cumulative[-1], draws[own], side="right")
    return given


def has_label(labels: Labels) -> npt.NDArray[np.bool_]:
    """Which rows have a label, ``(n,)``."""
    known: npt.NDArray[np.bool_] = labels != UNLABELED
    return known if known.ndim == 1 else np.asarray(known.all(axis=1))


def strata(labels: Labels, task: str) -> Labels:
    """What rows are split by, the labels or, where a row has no class of its own, one stratum, ``(n,)``.

    Rows without any label are `UNLABELED`.
    """
    if task in ("classification", "multilabel"):
        return labels
    missing = np.isnan(labels) if labels.dtype.kind == "f" else labels < 0
    return np.where(missing.reshape(len(labels), -1).all(axis=1), UNLABELED, 0)


def balanced_weights(labels: Labels) -> Weights:
    """Weights by which all classes are drawn equally often, and rows without a label as often as without weights."""
    if labels.ndim != 1:
        raise ValueError("expected one class a sample with balanced row_weights, found several labels: give numbers")
    weights, known = np.ones(len(labels)), has_label(labels)
    _, classes, counts = np.unique(labels[known], return_inverse=True, return_counts=True)
    weights[known] = known.sum() / (len(counts) * counts[classes])
    return weights


def draw_weights(row_weights: str | Sequence[float] | None, given: Labels, train_size: int) -> Weights | None:
    """How often to draw each training row and, behind them, each meta row; None for each once an epoch.

    A ValueError unless `row_weights` is None, "uniform", "balanced" or a number for each of the training rows.
    """
    if row_weights is None or isinstance(row_weights, str):
        check_choice("row_weights", row_weights, (None, "uniform", "balanced"))
        return balanced_weights(given) if row_weights == "balanced" else None
    weights = np.asarray(row_weights, dtype=np.float64)
    if weights.shape != (train_size,) or not (weights >= 0).all() or not 0 < weights.sum() < np.inf:
        raise ValueError(
            f"expected in row_weights a number of at least 0 for each of {train_size} training rows, some above 0, "
            f"found shape {weights.shape} and sum {weights.sum()}"
        )
    return np.concatenate([weights, np.full(len(given) - train_size, weights.mean())])


def keep_labels(given: Labels, labeled: int | float, seed: int) -> Labels:
    """Keep a fraction or count of the labels, about the same share of each class; the others become `UNLABELED`."""
    known = np.flatnonzero(has_label(given))
    count = count_rows(labeled, len(known), "labeled")
    classes = len(np.unique(given[known])) if given.ndim == 1 else 1
    if not max(1, classes) <= count <= len(known):
        raise ValueError(
            f"expected labeled to keep at least one training label a class ({classes}) and at most all "
            f"({len(known)}), found {labeled}, {count} labels. Give a count or a fraction between, or None to keep all."
        )
    if count == len(known):
        return given
    kept = known[stratified_split(given[known], {"labeled": count}, seed)["labeled"]]
    left = np.full_like(given, UNLABELED)
    left[kept] = given[kept]
    return left
