"""The pictures of a comparison's report: small, drawn as SVG in the colour of the page's text."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from lit_kd.report.pictures import CLEAN, NOISY, PLAIN, STYLE, draw_course, draw_histogram

_INK = "#010203"
"""Stands for the colour of the page's text."""
COLOURS: Any = {
    **STYLE,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    "svg.fonttype": "none",
    "svg.hashsalt": "lit_kd",
}
SMALL, WIDE = (2.8, 2.5), 4.8
BINS = 10
DOTS = 400
"""Points of a scatter; more would only make the page large."""
_TICKS = {0.0001: "0.01", 0.01: "1", 0.1: "10", 0.5: "50", 0.9: "90", 0.99: "99", 0.9999: "99.99", 0.999999: "99.9999"}
Arrays = Mapping[str, npt.NDArray[Any]]


def to_svg(figure: Figure, told: str) -> str:
    """A figure as an ``<svg>`` element; ``told``, plain text, is for those who point at it or cannot see it."""
    text = io.StringIO()
    with mpl.rc_context(COLOURS):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    shown = html.escape(told)
    return re.sub(r"<svg[^>]*>", lambda tag: f'{tag[0][:-1]} role="img"><title>{shown}</title>', svg, count=1)


def curves_picture(curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]], teachers: Sequence[str]) -> Figure:
    """A figure, in %, over epochs: for each method the mean over its seeds; teachers are dashed.

    Args:
        curves: For each method and seed, pairs of epoch and a fraction.
        teachers: Which methods are teachers.
    """
    with mpl.rc_context(COLOURS):
        figure = Figure(figsize=(WIDE, 3.0 + 0.1 * len(curves)), layout="constrained")
        axes = figure.subplots()
        lines = []
        for number, (method, seeds) in enumerate(curves.items()):
            at: dict[int, list[float]] = {}
            for epoch, value in (pair for seed in seeds for pair in seed):
                at.setdefault(epoch, []).append(100 * value)
            x = sorted(at)
            y = [mean(at[epoch]) for epoch in x]
            teacher = method in teachers
            color = _INK if teacher else f"C{number % 10}"
            lines += axes.plot(x, y, "--" if teacher else "-", color=color, lw=1.5, marker="." * (len(x) == 1))
        axes.set_xlabel("epoch")
        axes.set_ylabel("%")
        axes.grid(color=PLAIN, alpha=0.25)
        # given by name, as matplotlib leaves out what begins with an underscore
        figure.legend(lines, list(curves), frameon=False, loc="outside lower center", ncols=2)
    return figure


def reliability_picture(seeds: Sequence[Arrays]) -> Figure:
    """How often a student is right, against how sure it is; seeds together.

    Args:
        seeds: For each seed ``confidence``, ``(n,)``, and whether it was ``correct``, ``(n,)``.
    """
    confidence, correct = (np.concatenate([seed[name] for seed in seeds]) for name in ("confidence", "correct"))
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    full = np.flatnonzero(count)
    sure, right = (100 * np.bincount(bins, values, BINS)[full] / count[full] for values in (confidence, correct))
    with mpl.rc_context(COLOURS):
        figure = Figure(figsize=SMALL, layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], "--", color=PLAIN, lw=1)
        axes.vlines(sure, np.minimum(sure, right), np.maximum(sure, right), color=NOISY, lw=1.5, alpha=0.7)
        axes.plot(sure, right, color=CLEAN, lw=1)
        axes.scatter(sure, right, s=8 + 120 * count[full] / count.sum(), color=CLEAN, zorder=3)
        axes.set(xlim=(0, 103), ylim=(0, 103), xlabel="how sure, %", ylabel="how often right, %")
    return figure


def slopes(seeds: Sequence[Arrays]) -> list[float]:
    """For each seed, the slope of the least-squares line of the student's log-odds on the teacher's.

    Examples:
        >>> lines = [{"teacher_log_odds": np.arange(4.0), "student_log_odds": 0.5 * np.arange(4.0) + 1}]
        >>> [round(slope, 6) for slope in slopes(lines)]
        [0.5]
    """
    return [_line(seed["teacher_log_odds"], seed["student_log_odds"])[0] for seed in seeds]


def _line(x: npt.NDArray[Any], y: npt.NDArray[Any]) -> tuple[float, float]:
    """Slope and height at 0 of the least-squares line."""
    away = x.astype(float) - x.mean(dtype=float)
    spread = float((away**2).sum())
    slope = float((away * y).sum()) / spread if spread else 0.0
    return slope, float(y.mean(dtype=float) - slope * x.mean(dtype=float))


def confidence_picture(seeds: Sequence[Arrays]) -> Figure:
    """The student's probability of the teacher's class against the teacher's own, as log-odds; seeds together.

    Args:
        seeds: For each seed ``teacher_log_odds`` and ``student_log_odds``, ``(n,)``.
    """
    x, y = (np.concatenate([seed[f"{who}_log_odds"] for seed in seeds]) for who in ("teacher", "student"))
    slope, height = _line(x, y)
    shown = np.random.default_rng(0).permutation(len(x))[:DOTS]
    ends = np.array([x[shown].min(), x[shown].max()])
    with mpl.rc_context(COLOURS):
        figure = Figure(figsize=SMALL, layout="constrained")
        axes = figure.subplots()
        axes.scatter(x[shown], y[shown], s=5, color=CLEAN, alpha=0.4, lw=0)
        axes.plot(ends, ends, "--", color=PLAIN, lw=1)
        axes.plot(ends, slope * ends + height, color=NOISY, lw=1.8)
        for axis, values in ((axes.xaxis, x[shown]), (axes.yaxis, y[shown])):
            at = {np.log(p / (1 - p)): name for p, name in _TICKS.items()}
            at = {place: name for place, name in at.items() if values.min() - 1 <= place <= values.max() + 1}
            axis.set_ticks(list(at), list(at.values()))
        axes.set_xlabel("teacher: how sure of its class, %")
        axes.set_ylabel("student of the same class, %")
    return figure


def weights_pictures(
    weights: npt.NDArray[np.float32],
    wrong: npt.NDArray[np.bool_],
    epochs: Sequence[int],
    means: Mapping[str, Sequence[Sequence[float]]],
) -> list[Figure]:
    """`lit_kd.report.pictures.draw_histogram` and, where there are curves, `lit_kd.report.pictures.draw_course`."""
    with mpl.rc_context(COLOURS):
        figures = [Figure(figsize=(WIDE, 2.8), layout="constrained") for _ in range(1 + bool(means))]
        draw_histogram(figures[0].subplots(), weights, wrong)
        if means:
            draw_course(figures[1].subplots(), epochs, means)
    return figures
