"""Label noise: each kind is a transition matrix, and one function draws labels from it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lit_kd.data.splits import Labels
from lit_kd.types import UNLABELED


def transition_matrix(
    kind: Literal["symmetric", "asymmetric"],
    num_classes: int,
    rate: float,
    pairs: Mapping[int, int] | None = None,
) -> npt.NDArray[np.float64]:
    """The matrix ``T`` with ``T[i, j] = P(given label = j | true label = i)``.

    - ``symmetric``: with probability `rate` in ``[0, 1]`` a label is redrawn from ALL classes, its own included. So
      ``rate * (C - 1) / C`` of the labels are wrong: 40% noise is 36% wrong labels with 10 classes [code of ALM-KD].
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
    wrong = np.roll(eye, 1, axis=1) if pairs is None else eye.copy()
    for true, mistaken in (pairs or {}).items():
        if not (0 <= true < num_classes and 0 <= mistaken < num_classes):
            raise ValueError(f"expected pairs of classes in [0, {num_classes}), found {true}: {mistaken}: count from 0")
        wrong[true] = eye[mistaken]
    return (1 - rate) * eye + rate * wrong


def check_matrix(matrix: Any, num_classes: int) -> npt.NDArray[np.float64]:
    """Return `matrix` as a float64 array; raise a ValueError if it is no transition matrix of so many classes."""
    expected = f"expected a {num_classes} x {num_classes} transition matrix"
    meaning = "Entry [i][j] is P(given label = j | true label = i)."
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


def corrupt(
    labels: Labels, matrix: Sequence[Sequence[float]] | npt.NDArray[np.float64], seed: int | np.random.Generator
) -> Labels:
    """Draw each label, int64 of any shape, anew from its row of a transition matrix ``(C, C)``; missing ones stay.

    Examples:
        >>> corrupt(np.array([0, 1, -1]), [[0, 1], [1, 0]], seed=0).tolist()
        [1, 0, -1]
    """
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
