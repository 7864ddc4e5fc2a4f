"""The pictures of a comparison."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from lit_kd.data import UNLABELED
from lit_kd.report.distrust import noise_auc
from lit_kd.report.pictures import CLEAN, PLAIN, STYLE, draw_histogram, save


def draw_accuracy(accuracies: Mapping[str, Sequence[float]], teachers: Sequence[str], path: Path) -> None:
    """Draw `accuracy_picture` into a PNG file."""
    save(accuracy_picture(accuracies, teachers), path)


def accuracy_picture(accuracies: Mapping[str, Sequence[float]], teachers: Sequence[str], width: float = 7.5) -> Figure:
    """Every method's mean and standard deviation, and each seed as a point; a single teacher as a dashed line.

    Args:
        accuracies: Test accuracies, fractions, a list over seeds for each method and teacher.
        teachers: Which of them are teachers.
        width: In inches.
    """
    line = teachers[0] if len(teachers) == 1 else None
    students = {name: [100 * a for a in values] for name, values in accuracies.items() if name != line}
    means = [mean(values) for values in students.values()]
    errors = [stdev(values) if len(values) > 1 else 0.0 for values in students.values()]
    best = max((name for name in students if name not in teachers), key=lambda name: mean(students[name]), default=None)
    with mpl.rc_context(STYLE):
        ink, paper = mpl.rcParams["text.color"], mpl.rcParams["axes.facecolor"]
        figure = Figure(figsize=(width, max(2.0, 1.2 + 0.36 * len(students))), layout="constrained")
        axes = figure.subplots()
        rows = np.arange(len(students))
        axes.hlines(rows, 0, 100, color=PLAIN, lw=1, alpha=0.25)
        for row, (name, values) in enumerate(students.items()):
            color = CLEAN if name == best else ink
            fill = paper if name in teachers else color
            axes.errorbar(means[row], row, xerr=errors[row], fmt="o", color=color, mfc=fill, ms=7, capsize=3, lw=1.4)
            axes.plot(values, [row] * len(values), "o", color=PLAIN, ms=3.5, zorder=3)
        points = [a for values in students.values() for a in values]
        points += [value + sign * error for value, error in zip(means, errors, strict=True) for sign in (-1, 1)]
        if line is not None:
            teacher = 100 * mean(accuracies[line])
            points.append(teacher)
            axes.axvline(teacher, color=ink, ls="--", lw=1)
            name = f"{line} {teacher:.1f}"
            axes.text(teacher, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=8)
        low, high = min(points), max(points)
        room = max(high - low, 1.0)
        axes.set_xlim(low - 0.1 * room, high + 0.1 * room)
        for row, value in enumerate(means):  # in a column of their own, where nothing else is drawn
            axes.text(1.01, row, f"{value:.1f}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
        axes.set_yticks(rows, list(students))
        axes.set_ylim(len(students) - 0.5, -0.5)  # the first one at the top
        label = "test accuracy at the best validation epoch, %: mean ± standard deviation; small dots: seeds"
        figure.supxlabel(textwrap.fill(label, round(13 * width)), fontsize=9)
    return figure


def draw_weights(method: str, samples: Sequence[Path], path: Path) -> None:
    """How much a method listens to the label of clean and of noisy training samples that have one, all seeds together.

    Args:
        method: For the title.
        samples: Per seed an npz file with ``weights``, ``(N, K + 1)``, label first, given ``label``, ``(N,)``, and
            ``noisy``, bool ``(N,)``.
        path: Where the PNG is written.
    """
    seeds = [np.load(file) for file in samples]
    weights, wrong, _ = pooled_weights(seeds)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.0), layout="constrained")
        axes = figure.subplots()
        draw_histogram(axes, weights, wrong)
        axes.set_title(f"{method}: {wrong_labels(seeds, 3)}", fontsize=10)
        save(figure, path)


def pooled_weights(
    seeds: Sequence[Mapping[str, npt.NDArray[Any]]],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], list[float]]:
    """The weights of all seeds' labels, which of these are wrong, and each seed's AUC where there is one."""
    each = [(seed["weights"][:, 0], seed["label"], seed["noisy"]) for seed in seeds]
    areas = [area for seed in each if (area := noise_auc(*seed)) is not None]
    weights, given, wrong = (np.concatenate(column) for column in zip(*each, strict=True))
    return weights[given != UNLABELED], wrong[given != UNLABELED], areas


def wrong_labels(seeds: Sequence[Mapping[str, npt.NDArray[Any]]], digits: int) -> str:
    """How well the wrong labels were found, in words.

    Args:
        seeds: As for `pooled_weights`.
        digits: Of the AUC.
    """
    _, wrong, areas = pooled_weights(seeds)
    if areas:
        return f"finds wrong labels with AUC {mean_and_deviation(areas, digits)}"
    if wrong.any():
        return "every label is wrong"
    return "no label is wrong" if knows_wrong(seeds) else "which labels are wrong is not known"


def knows_wrong(seeds: Sequence[Mapping[str, npt.NDArray[Any]]]) -> bool:
    """Whether it is known which labels are wrong; what shows samples keeps their true class where it is."""
    return any(seed["noisy"].any() or ("shown_true" in seed and seed["shown_true"].max() >= 0) for seed in seeds)


def draw_queries(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], path: Path) -> None:
    """Accuracy against the number of queries: a line of means for each method, and a band of a standard deviation.

    Args:
        curves: For each method a curve a seed: pairs of queries and validation accuracy, a fraction.
        path: Where the PNG is written.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        lines = []
        for number, seeds in enumerate(curves.values()):
            at: dict[int, list[float]] = {}
            for queries, accuracy in (pair for seed in seeds for pair in seed):
                at.setdefault(queries, []).append(100 * accuracy)
            x = sorted(at)
            means = np.array([mean(at[queries]) for queries in x])
            errors = np.array([stdev(at[queries]) if len(at[queries]) > 1 else 0.0 for queries in x])
            color = f"C{number}"
            lines += axes.plot(x, means, "o-", color=color, ms=4, lw=1.6)
            axes.fill_between(x, means - errors, means + errors, color=color, alpha=0.06, lw=0)  # many lie over another
        axes.set_xlabel("rows that the teacher was asked about")
        axes.set_ylabel("validation accuracy, %: mean ± standard deviation")
        axes.grid(color="#e6e8eb")
        figure.legend(lines, list(curves), frameon=False, loc="outside right upper")
        save(figure, path)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Mean and, of several values, standard deviation.

    Examples:
        >>> mean_and_deviation([1.0, 3.0], 1), mean_and_deviation([2.0], 1), mean_and_deviation([], 1)
        ('2.0 ± 1.4', '2.0', '')
    """
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"
