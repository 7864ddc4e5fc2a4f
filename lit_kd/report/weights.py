"""Charts of learned sample weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lit_kd.data import UNLABELED
from lit_kd.report.charts import RIGHT, WIDE, WRONG, Arrays, mean_and_deviation, new_chart
from lit_kd.report.samples import noise_auc

KINDS = {"right": (RIGHT, "label is right"), "wrong": (WRONG, "label is wrong"), "all": (RIGHT, "all labels")}
"""Colour and name of training samples by what is known of their label."""
MOST_NUMBERS = 20
"""With more classes, the cells of `teachers_chart` are too narrow for numbers."""


def draw_histogram(axes: Axes, weights: npt.NDArray[np.float32], wrong: npt.NDArray[np.bool_]) -> None:
    """How the label weights of right and of wrong labels are distributed, ``(N,)`` each."""
    bins = np.linspace(0.0, weights.max(initial=1.0), 41).tolist()
    for kind, mask in {"right" if wrong.any() else "all": ~wrong, "wrong": wrong}.items():
        if mask.any():
            color, name = KINDS[kind]
            share = np.full(int(mask.sum()), 100 / int(mask.sum()))
            axes.hist(weights[mask], bins=bins, weights=share, color=color, alpha=0.65, label=f"{name} ({share.size})")
    axes.set(xlabel="learned weight of the label", ylabel="samples of the kind, %")
    axes.margins(y=0.35)  # room for the legend, above all bars
    if len(weights):
        axes.legend(frameon=False, loc="upper center")


def draw_course(axes: Axes, epochs: Sequence[int], means: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The mean label weight by epoch: by kind of label (see `KINDS`), the mean and the range of the seeds' values."""
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
    figure, axes = new_chart((7.5, 3.0) if title else (WIDE, 2.8), title=title)
    draw(axes, *args)
    return figure


def pooled_weights(seeds: Sequence[Arrays]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """The label weights of the labeled samples of all seeds, and which of these labels are wrong."""
    weights = np.concatenate([seed["weights"][seed["label"] != UNLABELED, 0] for seed in seeds])
    return weights, np.concatenate([seed["noisy"][seed["label"] != UNLABELED] for seed in seeds])


def wrong_labels(seeds: Sequence[Arrays], digits: int) -> str:
    """How well the wrong labels were found, in words; the AUC with so many digits."""
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
    """By true class, how often label and teachers are right, and below it how much a method listens to each of them."""
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
    figure.suptitle(method, fontsize=9)
    return figure


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
