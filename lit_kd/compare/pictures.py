"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from lit_kd.compare.training import noise_auc
from lit_kd.data import UNLABELED

CLEAN, NOISY, PLAIN = "#2a78b5", "#d1495b", "#8a8f98"


def draw_accuracy(accuracies: Mapping[str, Sequence[float]], teachers: Sequence[str], path: Path) -> None:
    """Every method's mean and standard deviation, and each seed as a point; a single teacher as a dashed line.

    Args:
        accuracies: Test accuracies, fractions, a list over seeds for each method and teacher.
        teachers: Which of them are teachers.
        path: Where the PNG is written.
    """
    line = teachers[0] if len(teachers) == 1 else None
    students = {name: [100 * a for a in values] for name, values in accuracies.items() if name != line}
    means = [mean(values) for values in students.values()]
    errors = [stdev(values) if len(values) > 1 else 0.0 for values in students.values()]
    best = max((name for name in students if name not in teachers), key=lambda name: mean(students[name]), default=None)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.9 + 0.36 * len(students)), layout="constrained")
        axes = figure.subplots()
        rows = np.arange(len(students))
        axes.hlines(rows, 0, 100, color="#e6e8eb", lw=1)
        for row, (name, values) in enumerate(students.items()):
            color = CLEAN if name == best else "black"
            fill = "white" if name in teachers else color
            axes.errorbar(means[row], row, xerr=errors[row], fmt="o", color=color, mfc=fill, ms=7, capsize=3, lw=1.4)
            axes.plot(values, [row] * len(values), "o", color=PLAIN, ms=3.5, zorder=3)
        points = [a for values in students.values() for a in values]
        points += [value + sign * error for value, error in zip(means, errors, strict=True) for sign in (-1, 1)]
        if line is not None:
            teacher = 100 * mean(accuracies[line])
            points.append(teacher)
            axes.axvline(teacher, color="black", ls="--", lw=1)
            axes.text(teacher, -0.75, f"{line} {teacher:.1f}", ha="center", va="bottom", fontsize=8)
        low, high = min(points), max(points)
        room = max(high - low, 1.0)
        axes.set_xlim(low - 0.1 * room, high + 0.2 * room)
        for row, (value, error) in enumerate(zip(means, errors, strict=True)):
            top = max(value + error, *list(students.values())[row])
            axes.text(top + 0.03 * room, row, f"{value:.1f}", va="center", fontsize=9)
        axes.set_yticks(rows, list(students))
        axes.invert_yaxis()
        label = "test accuracy at the best validation epoch, %: mean ± standard deviation; small dots: seeds"
        figure.supxlabel(label, fontsize=9)
        save(figure, path)


def draw_weights(method: str, samples: Sequence[Path], path: Path) -> None:
    """How much a method listens to the label of clean and of noisy training samples that have one, all seeds together.

    Args:
        method: For the title.
        samples: Per seed an npz file with ``weights``, ``(N, K + 1)``, label first, given ``label``, ``(N,)``, and
            ``noisy``, bool ``(N,)``.
        path: Where the PNG is written.
    """
    seeds = [np.load(file) for file in samples]
    each = [(seed["weights"][:, 0], seed["label"], seed["noisy"]) for seed in seeds]
    areas = [area for seed in each if (area := noise_auc(*seed)) is not None]
    pooled, given, wrong = (np.concatenate(column) for column in zip(*each, strict=True))
    pooled, wrong = pooled[given != UNLABELED], wrong[given != UNLABELED]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 3.0), layout="constrained")
        axes = figure.subplots()
        bins = np.linspace(0.0, pooled.max(initial=1.0), 41).tolist()
        parts: list[tuple[Any, str, str]] = [(~wrong, CLEAN, "label is right")]
        if wrong.any():
            parts.append((wrong, NOISY, "label is wrong"))
        for mask, color, label in parts:
            share = np.full(int(mask.sum()), 100 / max(1, int(mask.sum())))
            axes.hist(pooled[mask], bins=bins, weights=share, color=color, alpha=0.65, label=f"{label} ({share.size})")
        spread = f" ± {stdev(areas):.3f}" if len(areas) > 1 else ""
        found = f"; finds wrong labels with AUC {mean(areas):.3f}{spread}" if areas else "; no label is wrong"
        axes.set_title(f"{method}{found}", fontsize=10)
        axes.set_xlabel("learned weight of the label")
        axes.set_ylabel("samples of the kind, %")
        axes.legend(frameon=False, loc="upper center")
        save(figure, path)


def draw_queries(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], path: Path) -> None:
    """Accuracy against the number of queries: a line of means for each method, and a band of a standard deviation.

    Args:
        curves: For each method a curve a seed: pairs of queries and validation accuracy, a fraction.
        path: Where the PNG is written.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.subplots()
        for number, (method, seeds) in enumerate(curves.items()):
            at: dict[int, list[float]] = {}
            for queries, accuracy in (pair for seed in seeds for pair in seed):
                at.setdefault(queries, []).append(100 * accuracy)
            x = sorted(at)
            means = np.array([mean(at[queries]) for queries in x])
            errors = np.array([stdev(at[queries]) if len(at[queries]) > 1 else 0.0 for queries in x])
            color = f"C{number}"
            axes.plot(x, means, "o-", color=color, ms=4, lw=1.6, label=method)
            axes.fill_between(x, means - errors, means + errors, color=color, alpha=0.06, lw=0)  # many lie over another
        axes.set_xlabel("rows that the teacher was asked about")
        axes.set_ylabel("validation accuracy, %: mean ± standard deviation")
        axes.grid(color="#e6e8eb")
        figure.legend(frameon=False, loc="outside right upper")
        save(figure, path)


STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG that is there whole or not at all."""
    part = path.with_suffix(".part")
    figure.savefig(part, format="png", dpi=160)
    # 256 colours are enough for us, in a third of the bytes
    Image.open(part).convert("RGB").quantize(dither=Image.Dither.NONE).save(part, "PNG", optimize=True)
    part.replace(path)
