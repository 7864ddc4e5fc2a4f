"""What an audit says of each label."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class LabelIssues(NamedTuple):
    """Rows and what is believed of their labels, the least believed first."""

    ids: list[str]
    index: npt.NDArray[np.int64]  # type: ignore[assignment]  # positions in the training set, (n,)
    given: npt.NDArray[np.int64]  # (n,), the labels
    suggested: npt.NDArray[np.int64]  # (n,), the most probable classes
    score: npt.NDArray[np.float64]  # (n,), probability that the given label is right
    is_issue: npt.NDArray[np.bool_]  # (n,)
    weights: npt.NDArray[np.float64] | None  # (n, K + 1), learned, of the label and of each teacher
    true: npt.NDArray[np.int64] | None  # (n,), if they are known
