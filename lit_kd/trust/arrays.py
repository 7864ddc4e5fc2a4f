"""Arrays that the rules take, checked."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def vector(values: ArrayLike, name: str, rows: int | None = None) -> Floats:
    """One number a row, at least 0 and finite, ``(n,)``; else a ValueError that calls it by its name."""
    v = np.asarray(values, dtype=np.float64)
    if v.ndim != 1 or (rows is not None and len(v) != rows):
        raise ValueError(f"expected {name} of shape ({'n' if rows is None else rows},), found {v.shape}")
    if not (v >= 0).all() or not np.isfinite(v).all():
        raise ValueError(f"expected {name} of at least 0 and finite, found values from {v.min()} to {v.max()}")
    return v


def matrix(values: ArrayLike, name: str) -> Floats:
    """Rows of numbers, finite, ``(n, D)``; of probabilities at least two columns; else a ValueError."""
    m = np.asarray(values, dtype=np.float64)
    if m.ndim != 2 or (name == "probabilities" and m.shape[1] < 2):
        least = " with at least two columns" if name == "probabilities" else ""
        raise ValueError(f"expected {name} of two axes, rows first{least}, found shape {m.shape}")
    if not np.isfinite(m).all():
        raise ValueError(f"expected finite {name}, found nan or infinity")
    return m


def check_budget(budget: int, rows: int) -> None:
    """Refuse to pick more rows than there are."""
    if not 0 <= budget <= rows:
        raise ValueError(f"expected a budget from 0 to the {rows} rows of the pool, found {budget}")
