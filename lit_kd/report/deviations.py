"""How a student deviates from its teacher (arXiv 2301.12923)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

PARTS = {"unsure": (0.0, 0.25), "sure": (0.75, 1.0)}
"""The rows where the teacher is least sure of its class, and surest: quartiles of its log-odds."""


def deviations(evidence: Mapping[str, npt.NDArray[Any]]) -> dict[str, float | None]:
    """The student's log-odds of the teacher's class by least squares from the teacher's own, in both `PARTS`.

    ``slope_unsure``, ``offset_unsure``, ``slope_sure``, ``offset_sure`` [ours]; of `lit_kd.report.evidence`, nothing
    if there is no teacher. A student that says the same has slope 1 and offset 0; one that is less sure than the
    teacher where that is unsure, as students are [text], lies below. ``None`` where the teacher is equally sure of all.
    """
    found: dict[str, float | None] = {}
    for part, ends in PARTS.items() if "teacher_log_odds" in evidence else ():
        x, y = (evidence[f"{who}_log_odds"].astype(np.float64) for who in ("teacher", "student"))
        low, high = np.quantile(x, ends)
        rows = (low <= x) & (x <= high)
        line = [None, None] if np.ptp(x[rows]) == 0 else np.polyfit(x[rows], y[rows], 1).round(6).tolist()
        found |= {f"slope_{part}": line[0], f"offset_{part}": line[1]}
    return found
