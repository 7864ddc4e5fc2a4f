"""Charts of learned sample weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_kd.data import UNLABELED
from lit_kd.report.charts import RIGHT, WIDE, WRONG, Arrays, mean_and_deviation
from lit_kd.report.evidence import picks_right
from lit_kd.report.samples import noise_auc

KINDS = {"right": (RIGHT, "label is right"), "wrong": (WRONG, "label is wrong"), "all": (RIGHT, "all labels")}
"""Colour and name of training samples by what is known of their label."""
MOST_NUMBERS = 20
"""With more classes, the cells of `teachers_chart` are too narrow for numbers."""
Means = Mapping[str, Sequence[Sequence[float]]]


def draw_histogram(axes: Axes, weights: npt.NDArray[np.float32], wrong: npt.NDArray[np.bool_]) -> None:
    """How the weights of right and of wrong labels are distributed.

    Args:
        axes: Where to draw.
        weights: Of the label, ``(N,)``, of labeled samples.
        wrong: Which labels are known to be wrong, ``(N,)``.
    """
    bins = np.linspace(0.0, weights.max(initial=1.0), 41).tolist()
    for kind, mask in {"right" if wrong.any() else "all": ~wrong, "wrong": wrong}.items():
        if mask.any():
            color, name = KINDS[kind]
            share = np.full(int(mask.sum()), 100 / int(mask.sum()))
            axes.hist(weights[mask], bins=bins, weights=share, color=color, alpha=0.65, label=f"{name} ({share.size})")
    axes.set(xlabel="learned weight of the label", ylabel="samples of the kind, %")
    ticks = [tick for tick in axes.get_yticks() if tick <= 100]
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend, above all bars
    axes.set_yticks(ticks)
    if len(weights):
        axes.legend(frameon=False, loc="upper center")


def draw_course(axes: Axes, epochs: Sequence[int], means: Means) -> None:
    """The mean weights of right and of wrong labels, epoch by epoch.

    Args:
        axes: Where to draw.
        epochs: The epochs, E of them.
        means: By kind of label (see `KINDS`), for each seed, E values; drawn are their mean and range.
    """
    for kind, seeds in means.items():
        values = np.array(seeds)
        color, name = KINDS[kind]
        axes.plot(epochs, values.mean(0), ".-", color=color, label=name, ms=4)
        axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="epoch", ylabel="mean weight of the label")
    axes.legend(frameon=False)


def chart_of(draw: Callable[..., None], *args: Any, title: str = "") -> Figure:
    """A figure of `draw_histogram` or `draw_course` alone; one with a title is wider."""
    figure = Figure(figsize=(7.5, 3.0) if title else (WIDE, 2.8), layout="constrained")
    axes = figure.subplots()
    draw(axes, *args)
    axes.set_title(title, fontsize=10)
    return figure


def pooled_weights(seeds: Sequence[Arrays]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """The label weights of the labeled samples of all seeds, and which of these labels are wrong.

    Args:
        seeds: For each seed ``weights``, ``(N, K + 1)``, label first; ``label``, ``(N,)``; ``noisy``, bool ``(N,)``.
    """
    weights, given, wrong = (
        np.concatenate(column)
        for column in zip(*((seed["weights"][:, 0], seed["label"], seed["noisy"]) for seed in seeds), strict=True)
    )
    return weights[given != UNLABELED], wrong[given != UNLABELED]


def wrong_labels(seeds: Sequence[Arrays], digits: int) -> str:
    """How well the wrong labels were found, in words.

    Args:
        seeds: As for `pooled_weights`.
        digits: Of the AUC.
    """
    areas = [noise_auc(seed["weights"][:, 0], seed["label"], seed["noisy"]) for seed in seeds]
    known = [area for area in areas if area is not None]
    if known:
        return f"finds wrong labels with AUC {mean_and_deviation(known, digits)}"
    if any(seed["noisy"].any() for seed in seeds):
        return "every label is wrong"
    return "no label is wrong" if knows_wrong(seeds) else "which labels are wrong is not known"


def knows_wrong(seeds: Sequence[Arrays]) -> bool:
    """Whether it is known which labels are wrong; shown samples keep their true class if it is known."""
    return any(seed["noisy"].any() or ("shown_true" in seed and seed["shown_true"].max() >= 0) for seed in seeds)


def teachers_chart(method: str, teachers: Sequence[str], seeds: Sequence[Arrays]) -> Figure:
    """By true class, how often label and teachers are right, and below it how much a method listens to each of them.

    Args:
        method: For the title.
        teachers: Their names, K of them.
        seeds: As for `pooled_weights`, with the ``true`` label, ``(N,)``, and the predictions of ``teachers``,
            ``(N, K)``. All seeds are drawn together.
    """
    true, weights = (np.concatenate([seed[name] for seed in seeds]) for name in ("true", "weights"))
    said = np.concatenate([np.column_stack([seed["label"], seed["teachers"]]) for seed in seeds])
    classes = np.unique(true[true >= 0])
    right, listens = (
        np.stack([values[true == c].mean(0) for c in classes], axis=1) for values in (said == true[:, None], weights)
    )
    figure = Figure(figsize=(7.5, 1.8 + 0.6 * len(right)), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    _draw_cells(top, 100 * right, 100.0, "{:.0f}", "who is right: share of the training samples of a class, %")
    _draw_cells(bottom, listens, float(listens.max()), "{:.2f}", "who is listened to: mean learned weight")
    for axes in (top, bottom):
        axes.set_yticks(range(len(right)), ["label", *teachers])
    if len(classes) <= MOST_NUMBERS:
        bottom.set_xticks(range(len(classes)), [str(c) for c in classes])
    bottom.set_xlabel("true class")
    figure.suptitle(f"{method}\n{_picks(seeds)}", fontsize=9)
    return figure


def _picks(seeds: Sequence[Arrays]) -> str:
    """How often the right teacher has the largest weight, and how often a teacher drawn at random would be right."""
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


def _draw_cells(axes: Axes, values: npt.NDArray[Any], top: float, form: str, title: str) -> None:
    """A row for the label and each teacher, a column for each class; the darker, the more."""
    axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if values.shape[1] <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > 0.6 * top else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", color=color, fontsize=8)
