"""Which labels are wrong, and what they should be: ranked rows of a training set."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]


class LabelIssues(NamedTuple):
    """All labelled training rows, the most suspect first: n rows, K teachers."""

    ids: list[str]  # the rows' names
    index: Whole  # type: ignore[assignment]  # their positions in the training set, (n,)
    given: Whole  # the class that the label says, (n,)
    suggested: Whole  # the class to put in its place; the same class where the label seems right, (n,)
    score: Floats  # the probability that the label is right, (n,), ascending
    is_issue: npt.NDArray[np.bool_]  # whether the label is taken for wrong, (n,)
    weights: Floats | None  # what was learned: how much the label, then each teacher counts, (n, K + 1)
    true: Whole | None  # the right class, where the truth is known, (n,)
