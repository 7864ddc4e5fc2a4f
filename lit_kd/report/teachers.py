"""The picture that shows whether learned weights pick the teacher that is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_kd.cli.training import picks_right
from lit_kd.report.pictures import STYLE, save

MOST_NUMBERS = 20
"""With more classes, cells are too narrow for numbers."""


def draw_teachers(method: str, teachers: Sequence[str], samples: Sequence[Path], path: Path) -> None:
    """By true class, how often label and teachers are right, and below it how much a method listens to each of them.

    Args:
        method: For the title.
        teachers: Their names, K of them.
        samples: Per seed an npz file with ``weights``, ``(N, K + 1)``, label first; given ``label`` and ``true``
            one, ``(N,)``; ``teachers``, their predictions, ``(N, K)``. All seeds are drawn together.
        path: Where the PNG is written.
    """
    seeds = [np.load(file) for file in samples]
    true, weights = (np.concatenate([seed[name] for seed in seeds]) for name in ("true", "weights"))
    said = np.concatenate([np.column_stack([seed["label"], seed["teachers"]]) for seed in seeds])
    classes = np.unique(true[true >= 0])  # those there are, without the missing label
    right, listens = (
        np.stack([values[true == c].mean(0) for c in classes], axis=1) for values in (said == true[:, None], weights)
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 1.8 + 0.6 * len(right)), layout="constrained")
        top, bottom = figure.subplots(2, sharex=True)
        _draw(top, 100 * right, 100.0, "{:.0f}", "who is right: share of the training samples of a class, %")
        _draw(bottom, listens, float(listens.max()), "{:.2f}", "who is listened to: mean learned weight")
        for axes in (top, bottom):
            axes.set_yticks(range(len(right)), ["label", *teachers])
        if len(classes) <= MOST_NUMBERS:
            bottom.set_xticks(range(len(classes)), [str(c) for c in classes])
        bottom.set_xlabel("true class")
        figure.suptitle(f"{method}\n{_picks(seeds)}", fontsize=9)
        save(figure, path)


def _picks(seeds: Sequence[Mapping[str, npt.NDArray[Any]]]) -> str:
    """How often the right teacher has the largest weight, and how often one drawn at random would be right."""
    found, random = [], []
    for seed in seeds:
        right, weights = seed["teachers"] == seed["true"][:, None], seed["weights"][:, 1:]
        if (share := picks_right(weights, right)) is not None:
            found.append(100 * share)
            random.append(100 * (picks_right(np.zeros_like(weights), right) or 0))
    if not found:
        return "teachers are right and wrong together"
    picked = f"the one with the largest weight is right in {mean(found):.0f}%"
    return f"where teachers differ, {picked} (one drawn at random: {mean(random):.0f}%)"


def _draw(axes: Axes, values: npt.NDArray[np.float64], top: float, form: str, title: str) -> None:
    """A row for the label and each teacher, a column for each class; the darker, the more."""
    axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if values.shape[1] <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > 0.6 * top else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", color=color, fontsize=8)
