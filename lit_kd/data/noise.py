"""Label noise: every kind is a transition matrix, and one function draws labels from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_kd.types import UNLABELED

Labels = TypeVar("Labels", npt.NDArray[np.int64], Tensor)


def transition_matrix(
    kind: Literal["symmetric", "asymmetric"],
    num_classes: int,
    rate: float,
    pairs: Mapping[int, int] | None = None,
) -> npt.NDArray[np.float64]:
    """Build the matrix ``T`` with ``T[i, j] = P(given label = j | true label = i)``.

    - ``symmetric``: with probability `rate` the label is redrawn uniformly from ALL classes, so that it may
      fall on the true one again (the convention of the ALM-KD code): ``rate * (C - 1) / C`` of them end up
      wrong.
    - ``asymmetric``: with probability `rate` class ``c`` becomes ``pairs[c]``; others stay clean.

    Args:
        kind: Which noise.
        num_classes: Number of classes ``C``.
        rate: Probability in ``[0, 1]``.
        pairs: For asymmetric noise, the class that each class is mistaken for. Default: the next class, the
            last one's being 0.

    Returns:
        float64 array ``(C, C)``, each row a distribution.

    Raises:
        ValueError: If `kind` is unknown, `rate` is not in ``[0, 1]``, or a class in `pairs` does not exist.

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
        raise ValueError(
            f"expected noise 'symmetric' or 'asymmetric', found {kind!r}. Give any other kind as a transition matrix."
        )
    if pairs is None:
        pairs = {c: (c + 1) % num_classes for c in range(num_classes)}
    wrong = eye.copy()
    for true, mistaken in pairs.items():
        if not (0 <= true < num_classes and 0 <= mistaken < num_classes):
            raise ValueError(
                f"expected pairs of classes in [0, {num_classes}), found {true}: {mistaken}. "
                "Name each class by its number, from 0."
            )
        wrong[true] = eye[mistaken]
    return (1 - rate) * eye + rate * wrong


def check_matrix(matrix: Any, num_classes: int) -> npt.NDArray[np.float64]:
    """Return `matrix` as a float64 array, if it is a transition matrix of `num_classes` classes.

    Raises:
        ValueError: If it is not square of that size, or a row is not a distribution.
    """
    expected = f"expected a {num_classes} x {num_classes} transition matrix"
    try:
        array = np.asarray(matrix, dtype=np.float64)
    except ValueError:  # rows of unequal length
        raise ValueError(
            f"{expected}, found rows of unequal length. Give one row a true class, one column a given class."
        ) from None
    if array.shape != (num_classes, num_classes):
        raise ValueError(f"{expected}, found shape {array.shape}. Give one row a true class, one column a given class.")
    if not (array >= 0).all():
        raise ValueError(f"{expected} of probabilities, found {array.min()}. Entries are at least 0.")
    sums = array.sum(axis=1)
    if not np.allclose(sums, 1, rtol=0, atol=1e-6):
        worst = int(np.abs(sums - 1).argmax())
        raise ValueError(
            f"{expected} whose rows sum to 1, found {sums[worst]:.6g} in row {worst}. "
            "Entry [i][j] is P(given label = j | true label = i): divide each row by its sum."
        )
    return array


def corrupt(
    labels: Labels, matrix: Sequence[Sequence[float]] | npt.NDArray[np.float64], seed: int | np.random.Generator
) -> Labels:
    """Draw each label anew from its row of a transition matrix.

    Args:
        labels: True labels, int64, shape ``(N,)``, array or tensor. `UNLABELED` ones stay missing.
        matrix: Transition matrix ``(C, C)``, see `transition_matrix`.
        seed: A seed, or a generator to draw from.

    Returns:
        The given labels, of the same kind and shape; the input is left alone.

    Raises:
        ValueError: If the matrix is none, or a label has no row in it.

    Examples:
        >>> corrupt(np.array([0, 1, -1]), [[0, 1], [1, 0]], seed=0).tolist()
        [1, 0, -1]
    """
    true = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    array = check_matrix(matrix, len(matrix))
    known = true != UNLABELED
    if known.any() and (true[known].min() < 0 or true[known].max() >= len(array)):
        raise ValueError(
            f"expected labels in [0, {len(array)}), found {true[known].min()} to {true[known].max()}. "
            "Give a transition matrix with a row for each class."
        )
    # One draw a row, missing ones too: whether a label is missing never changes the noise of another.
    draws = np.random.default_rng(seed).random(len(true))
    given = true.copy()
    for c in np.unique(true[known]):
        rows = true == c
        cumulative = array[c].cumsum()
        given[rows] = np.searchsorted(cumulative / cumulative[-1], draws[rows], side="right")
    return torch.from_numpy(given).to(labels.device) if isinstance(labels, Tensor) else given
