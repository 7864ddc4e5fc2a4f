"""The class that students decide for in each place, for comparisons whose inputs are points of the plane."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from lit_kd.models import load_student
from lit_kd.report.charts import Arrays
from lit_kd.report.runs import POINTS, SAMPLES, TEACHER, Job, Result

SHOWN = 800
"""Training points drawn; more would hide the regions."""
GRID = 300
"""Cells of the background in each direction."""
Box = tuple[float, float, float, float]
"""Left, right, lower and upper bound."""


def regions_chart(done: Sequence[tuple[Job, Result]]) -> Figure | None:
    """Decision regions of the first seed, side by side; ``None`` if the inputs are not points of the plane.

    Panels: the teacher, the KD student with the best mean test accuracy, and each student with learned weights, whose
    training points show the weight of their label.

    Args:
        done: Trainings and their results, in the recipe's order.
    """
    best, seed = _best_kd(done), done[0][0].seed
    shown = [
        (job, result)
        for job, result in done
        if job.seed == seed
        and (job.folder / POINTS).is_file()
        and (job.method in (TEACHER, best) or (job.folder / SAMPLES).is_file())
    ]
    if not shown:
        return None
    points: list[Arrays] = [np.load(job.folder / POINTS) for job, _ in shown]
    files = [job.folder / SAMPLES for job, _ in shown]
    weights = [np.load(file)["weights"][:, 0] if file.is_file() else None for file in files]
    top = max([1.0, *(float(weight.max()) for weight in weights if weight is not None)])
    every = np.concatenate([each["x"] for each in points])
    room = 0.04 * np.ptp(every, axis=0)
    (left, bottom), (right, upper) = (every.min(0) - room).tolist(), (every.max(0) + room).tolist()
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.6 * columns + 0.8, 3.6 * rows + 0.6), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    dots = [
        _draw(axes, job.folder, each, weight, (left, right, bottom, upper), top)
        for axes, (job, _), each, weight in zip(places, shown, points, weights, strict=False)
    ]
    for axes, (job, result) in zip(places, shown, strict=False):
        axes.set_title(f"{job.method}: {100 * result['test_accuracy']:.1f}%")
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    weighted = [dot for dot, weight in zip(dots, weights, strict=True) if weight is not None]
    if weighted:
        label = "learned weight of the label (0: it is ignored)"
        figure.colorbar(weighted[0], ax=list(places), label=label, fraction=0.04, aspect=40)
    caption = _caption(points[0], any(each["noisy"].any() for each in points), bool(weighted), best, seed)
    figure.supxlabel(textwrap.fill(caption, 55 * columns), fontsize=8, ma="left")
    return figure


def decide(folder: Path, box: Box, grid: int = GRID) -> tuple[npt.NDArray[np.int64], int]:
    """The class that a training's student decides for at the centre of each cell of a grid.

    Args:
        folder: The training's.
        box: Bounds of the grid.
        grid: Cells in each direction.

    Returns:
        Classes, ``(grid, grid)``, the lowest row first, and how many classes there are.
    """
    best = folder / "best.ckpt"  # none without validation data: then the test accuracy is the last epoch's, too
    student = load_student(best if best.is_file() else folder / "last.ckpt")
    left, right, bottom, top = box
    centres = (torch.arange(grid) + 0.5) / grid
    x, y = left + (right - left) * centres, bottom + (top - bottom) * centres
    with torch.no_grad():
        logits = student(torch.cartesian_prod(y, x).flip(1))
    return logits.argmax(1).view(grid, grid).numpy(), logits.shape[1]


def _best_kd(done: Sequence[tuple[Job, Result]]) -> str | None:
    accuracies: dict[str, list[float]] = {}
    for job, result in done:
        if job.config["model"]["class_path"].split(".")[-1] == "KD":
            accuracies.setdefault(job.method, []).append(result["test_accuracy"])
    return max(accuracies, key=lambda method: mean(accuracies[method]), default=None)


def _draw(
    axes: Axes, folder: Path, points: Arrays, weight: npt.NDArray[np.float32] | None, box: Box, top: float
) -> PathCollection:
    """Draw one panel; return its dots."""
    regions, classes = decide(folder, box)
    few = mpl.colormaps["tab10"](np.arange(classes))
    strong = (few if classes <= 10 else mpl.colormaps["turbo"](np.linspace(0, 1, classes)))[:, :3]
    pale = 1 - (0.35 if weight is None else 0.15) * (1 - strong)
    axes.imshow(pale[regions], origin="lower", extent=box, interpolation="nearest", aspect="auto")
    shown = np.random.default_rng(0).permutation(np.flatnonzero(points["label"] >= 0))[:SHOWN]
    x, y = points["x"][shown].T
    noisy = points["noisy"][shown]
    axes.scatter(x[noisy], y[noisy], s=20, facecolors="none", edgecolors="black", linewidths=0.5)
    axes.set(xlim=box[:2], ylim=box[2:], xticks=[], yticks=[])
    if weight is None:
        return axes.scatter(x, y, s=4, c=strong[points["label"][shown]], linewidths=0)
    return axes.scatter(x, y, s=8, c=weight[shown], vmin=0, vmax=top, cmap="viridis", linewidths=0)


def _caption(points: Arrays, noisy: bool, weighted: bool, best: str | None, seed: int) -> str:
    size = int((points["label"] >= 0).sum())
    dots = f"Dots: {min(SHOWN, size)} of {size} labeled training points, in the colour of their label"
    sentences = [
        "Background: the predicted class",
        dots + " or, if weights are learned, of its final weight" * weighted,
    ]
    if noisy:
        sentences.append("Rings: the label is wrong")
    sentences.append(f"Titles: test accuracy of seed {seed} at the best validation epoch")
    if best is not None:
        sentences.append(f"{best} is the KD student with the best mean test accuracy")
    return ". ".join(sentences) + "."
