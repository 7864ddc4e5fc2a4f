"""How good a cascade of student and teacher is."""

import numpy as np
from numpy.typing import ArrayLike

from lit_kd.trust.game import Floats


def deferral_curve(correct_student: ArrayLike, correct_teacher: ArrayLike, score: ArrayLike) -> tuple[Floats, Floats]:
    """The accuracy when the k rows of the lowest score are left to the teacher, for k = 0 to n.

    Takes who is right, bool, and a score, ``(n,)`` each; returns the share that is deferred, k / n, and the accuracy,
    ``(n + 1,)`` each. Rows of equal score are deferred in random order: the accuracy is its mean.

    Examples:
        >>> deferral_curve([True, False], [True, True], [0.9, 0.2])
        (array([0. , 0.5, 1. ]), array([0.5, 1. , 1. ]))
    """
    ours, theirs = (np.asarray(correct, dtype=np.float64) for correct in (correct_student, correct_teacher))
    scores = np.asarray(score, dtype=np.float64)
    if not (ours.shape == theirs.shape == scores.shape == (len(scores),)) or not len(scores):
        raise ValueError(f"expected three arrays (n,), n above 0, found {ours.shape}, {theirs.shape}, {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError("expected scores that are numbers, found nan")
    place, count = np.unique(scores, return_inverse=True, return_counts=True)[1:]
    gain = np.bincount(place, theirs - ours) / count
    gains = np.concatenate([[0.0], np.repeat(gain, count).cumsum()])
    return np.linspace(0, 1, len(gains)), ours.mean() + gains / len(scores)
