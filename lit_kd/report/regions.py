"""The class that students decide for in each place, for comparisons whose inputs are points of the plane."""

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
    """
    seed = done[0][0].seed
    kd: dict[str, list[float]] = {}
    for job, result in done:
        if job.config["model"]["class_path"].split(".")[-1] == "KD":
            kd.setdefault(job.method, []).append(result["test_accuracy"])
    best = max(kd, key=lambda method: mean(kd[method]), default=None)
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
    dots = None
    for axes, (job, result), each, weight in zip(places, shown, points, weights, strict=False):
        axes.set_title(f"{job.method}: {100 * result['test_accuracy']:.1f}%")
        drawn = _draw(axes, job.folder, each, weight, (left, right, bottom, upper), top)
        dots = dots if weight is None else drawn
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    if dots is not None:
        label = "learned weight of the label (0: it is ignored)"
        figure.colorbar(dots, ax=list(places), label=label, fraction=0.04, aspect=40)
    size = int((points[0]["label"] >= 0).sum())
    caption = (
        f"Background: the predicted class. Dots: {min(SHOWN, size)} of {size} labeled training points, in the colour "
        "of their label or, if weights are learned, of its final weight. Rings: the label is wrong. Titles: test "
        f"accuracy of seed {seed} at the best validation epoch."
    )
    if best is not None:
        caption += f" {best} is the KD student with the best mean test accuracy."
    figure.supxlabel(textwrap.fill(caption, 55 * columns), fontsize=8, ma="left")
    return figure


def _decide(folder: Path, box: Box) -> tuple[npt.NDArray[np.int64], int]:
    """What a student decides for at the centre of each cell, ``(GRID, GRID)``, the lowest row first; and C."""
    best = folder / "best.ckpt"  # none without validation data: then the test accuracy is the last epoch's, too
    student = load_student(best if best.is_file() else folder / "last.ckpt")
    left, right, bottom, top = box
    centres = (torch.arange(GRID) + 0.5) / GRID
    x, y = left + (right - left) * centres, bottom + (top - bottom) * centres
    with torch.no_grad():
        logits = student(torch.cartesian_prod(y, x).flip(1))
    return logits.argmax(1).view(GRID, GRID).numpy(), logits.shape[1]


def _draw(
    axes: Axes, folder: Path, points: Arrays, weight: npt.NDArray[np.float32] | None, box: Box, top: float
) -> PathCollection:
    """Draw one panel; return its dots."""
    regions, classes = _decide(folder, box)
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
