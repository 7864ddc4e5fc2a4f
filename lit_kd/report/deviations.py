"""How a student deviates from its teacher (arXiv 2301.12923)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

PARTS = {"unsure": (0.0, 0.25), "sure": (0.75, 1.0)}
"""The rows where the teacher is least sure of its class, and surest: quartiles of its log-odds."""


def log_odds(evidence: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """The teacher's and the student's log-odds of its class, ``(2, n)``, of the rows where both are finite."""
    both = np.stack([evidence[f"{who}_log_odds"].astype(np.float64) for who in ("teacher", "student")])
    return both[:, np.isfinite(both).all(0)]


def deviations(evidence: Mapping[str, npt.NDArray[Any]]) -> dict[str, float | None]:
    """The student's log-odds of the teacher's class by least squares from the teacher's own, in both `PARTS`.

    ``slope_unsure``, ``offset_unsure``, ``slope_sure``, ``offset_sure`` [ours]; of `lit_kd.report.evidence`, nothing
    if there is no teacher. A student that says the same has slope 1 and offset 0. Students tend to be even less sure
    where the teacher is unsure [text]: their line then lies lower there. Rows with an infinite number are left out.
    ``None`` where there are fewer than two different numbers of the teacher.
    """
    found: dict[str, float | None] = {}
    for part, ends in PARTS.items() if "teacher_log_odds" in evidence else ():
        x, y = log_odds(evidence)
        low, high = np.quantile(x, ends) if x.size else ends
        rows = (low <= x) & (x <= high)
        line = [None, None] if len(np.unique(x[rows])) < 2 else np.polyfit(x[rows], y[rows], 1).round(6).tolist()
        found |= {f"slope_{part}": line[0], f"offset_{part}": line[1]}
    return found
