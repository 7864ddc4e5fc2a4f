"""Which class a student decides for where: a picture of comparisons whose inputs are points of the plane."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from lit_kd.cli.recipe import TEACHER, Job
from lit_kd.cli.training import POINTS, SAMPLES, Result
from lit_kd.models import load_student
from lit_kd.report.pictures import STYLE, save

SHOWN = 800
"""Training points drawn; more would hide the regions."""
GRID = 300
"""Cells of the background in each direction."""
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Panel:
    """One training, to be drawn.

    Attributes:
        title: Method and accuracy.
        folder: The training's.
        points: Training points, ``(N, 2)``.
        label: Their labels, ``(N,)``.
        noisy: Which of them are wrong, ``(N,)``.
        weight: Learned weights of the labels, ``(N,)``; ``None`` where none are learned.
    """

    title: str
    folder: Path
    points: npt.NDArray[np.float32]
    label: npt.NDArray[np.int64]
    noisy: npt.NDArray[np.bool_]
    weight: npt.NDArray[np.float32] | None


def draw_regions(done: Sequence[tuple[Job, Result]], path: Path) -> None:
    """Draw decision regions of the first seed side by side; nothing where inputs are no points of the plane.

    Panels: the teacher, the KD student with the best mean test accuracy, and each student with learned weights, whose
    training points are coloured by the weight of their label.

    Args:
        done: Trainings and their results, in the recipe's order.
        path: Where the PNG is written.
    """
    best, seed = _best_kd(done), done[0][0].seed
    panels = [
        _read(job, result)
        for job, result in done
        if job.seed == seed
        and (job.folder / POINTS).is_file()
        and (job.method in (TEACHER, best) or (job.folder / SAMPLES).is_file())
    ]
    if not panels:
        return
    top = max([1.0, *(float(panel.weight.max()) for panel in panels if panel.weight is not None)])
    box = _around(np.concatenate([panel.points for panel in panels]))
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns + 0.8, 3.6 * rows + 0.6), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).ravel()
        drawn = [_draw(panel, axes, box, top) for panel, axes in zip(panels, places, strict=False)]
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        weighted = [dots for dots, panel in zip(drawn, panels, strict=True) if panel.weight is not None]
        if weighted:
            label = "learned weight of the label (0: it is ignored)"
            figure.colorbar(weighted[0], ax=list(places), label=label, fraction=0.04, aspect=40)
        figure.supxlabel(textwrap.fill(_caption(panels, best, seed), 55 * columns), fontsize=8, ma="left")
        save(figure, path)


def decide(folder: Path, box: Box, grid: int = GRID) -> tuple[npt.NDArray[np.int64], int]:
    """The class that a training's student decides for in each cell of a grid, at the cell's centre.

    Args:
        folder: The training's.
        box: Left, right, lower and upper bound of the grid.
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


def _read(job: Job, result: Result) -> Panel:
    kept, samples = np.load(job.folder / POINTS), job.folder / SAMPLES
    return Panel(
        title=f"{job.method}: {100 * result['test_accuracy']:.1f}%",
        folder=job.folder,
        points=kept["x"],
        label=kept["label"],
        noisy=kept["noisy"],
        weight=np.load(samples)["weights"][:, 0] if samples.is_file() else None,
    )


def _around(points: npt.NDArray[np.float32]) -> Box:
    """A box with some room around all points."""
    low, high = points.min(0), points.max(0)
    room = 0.04 * (high - low)
    (left, bottom), (right, top) = (low - room).tolist(), (high + room).tolist()
    return left, right, bottom, top


def _draw(panel: Panel, axes: Axes, box: Box, top: float) -> PathCollection:
    """Draw one panel; return its dots."""
    regions, classes = decide(panel.folder, box)
    few = mpl.colormaps["tab10"](np.arange(classes))
    strong = (few if classes <= 10 else mpl.colormaps["turbo"](np.linspace(0, 1, classes)))[:, :3]
    pale = 1 - (0.35 if panel.weight is None else 0.15) * (1 - strong)
    axes.imshow(pale[regions], origin="lower", extent=box, interpolation="nearest", aspect="auto")
    labelled = np.flatnonzero(panel.label >= 0)
    shown = np.random.default_rng(0).permutation(labelled)[:SHOWN]
    x, y = panel.points[shown].T
    noisy = panel.noisy[shown]
    axes.scatter(x[noisy], y[noisy], s=20, facecolors="none", edgecolors="black", linewidths=0.5)
    axes.set(title=panel.title, xlim=box[:2], ylim=box[2:], xticks=[], yticks=[])
    if panel.weight is None:
        return axes.scatter(x, y, s=4, c=strong[panel.label[shown]], linewidths=0)
    return axes.scatter(x, y, s=8, c=panel.weight[shown], vmin=0, vmax=top, cmap="viridis", linewidths=0)


def _caption(panels: Sequence[Panel], best: str | None, seed: int) -> str:
    size = int((panels[0].label >= 0).sum())
    dots = f"Dots: {min(SHOWN, size)} of {size} labeled training points, in the colour of their label"
    if any(panel.weight is not None for panel in panels):
        dots += " or, where weights are learned, of its weight after training"
    sentences = ["Background: the class decided for", dots]
    if any(panel.noisy.any() for panel in panels):
        sentences.append("Rings: the label is wrong")
    sentences.append(f"Titles: test accuracy of seed {seed} at the best validation epoch")
    if best is not None:
        sentences.append(f"{best} is the KD student with the best mean test accuracy")
    return ". ".join(sentences) + "."
