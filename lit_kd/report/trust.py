"""What ``lit-kd trust`` found of teachers: numbers for JSON, words, and one HTML page that needs no other file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from lit_kd.report import charts
from lit_kd.report.render import render
from lit_kd.trust.reliability import accuracy_curve, margin
from lit_kd.trust.teachers import Interval, agreement, repeated_share, shared_errors, shares_by_class, wilson
from lit_kd.trust.verdict import Rehearsal, Verdict
from lit_kd.version import __version__

EXIT = {"distil": 0, "learned weights": 0, "labels": 3, "trusted rows": 3, "more rows": 4, "unclear": 4}
"""Exit codes of the advice."""
ADVICE = {
    "distil": "Distil",
    "learned weights": "Distil, with learned weights",
    "labels": "Train on the labels alone",
    "trusted rows": "Train on the trusted rows alone",
    "more rows": "Ask for more trusted rows",
    "unclear": "Cannot tell",
}
WAYS = {
    "distil": "KD with a weight of 0.9",
    "learned weights": "ALM-KD, learned weights",
    "trusted rows": "the trusted rows alone",
}


class Asked(NamedTuple):
    """What teachers and labels say of N training rows that have a label, and of M trusted rows behind them."""

    names: list[str]  # of K teachers
    logits: Tensor  # (K, N + M, C)
    known: Tensor  # of which rows each teacher speaks, bool (K, N + M)
    y: Tensor  # given labels, (N + M,)
    trusted: Tensor  # bool (N + M,)
    classes: list[str]  # their names
    notes: list[str]  # what the reader should know


def summary(asked: Asked, found: Rehearsal, verdict: Verdict) -> dict[str, Any]:
    """All that was found, in plain values; what is not known is None."""
    y, trusted = asked.y, asked.trusted
    named = asked.logits.argmax(-1).where(asked.known, -1).T
    teachers = [_teacher(asked, k, found) for k in range(len(asked.names))]
    told: dict[str, Any] = _plain(
        {
            "lit_kd": __version__,
            "verdict": verdict.advice,
            "exit_code": EXIT[verdict.advice],
            "words": words(verdict, found),
            "gains": {WAYS[way]: gain._asdict() for way, gain in verdict.gains.items()},
            "training_rows": int((~trusted).sum()),
            "trusted_rows": found.trusted,
            "classes": asked.classes,
            "wrong_labels": found.wrong._asdict(),
            "probe_accuracy": found.accuracy,
            "teachers": teachers,
            "agreement": agreement(torch.cat([named, y.unsqueeze(1)], dim=1)[~trusted]).tolist(),
            "shared_errors": shared_errors(named[trusted] != y[trusted].unsqueeze(1), asked.known.T[trusted]).tolist(),
            "notes": asked.notes,
        }
    )
    return told


def _teacher(asked: Asked, k: int, found: Rehearsal) -> dict[str, Any]:
    heard, others = asked.known[k] & asked.trusted, asked.known[k] & ~asked.trusted
    if not heard.any() or not others.any():
        raise ValueError(f"expected answers of {asked.names[k]} about trusted and about training rows, found none")
    logits, y = asked.logits[k][heard], asked.y[heard]
    right, margins = logits.argmax(-1) == y, margin(logits)
    accuracy = wilson(int(right.sum()), len(right))
    agreed = (asked.logits[k].argmax(-1) == asked.y)[others].double().mean().item()
    curve = accuracy_curve(margins, right)
    classes = logits.shape[1]
    return {
        "name": asked.names[k],
        "answers": float(asked.known[k].double().mean()),
        "accuracy": accuracy._asdict(),
        "by_class": [share._asdict() for share in shares_by_class(right, y, classes)],
        "ece": float(multiclass_calibration_error(logits.softmax(-1), y, classes, n_bins=15)),
        "by_margin": {"margin": curve.x.tolist(), "accuracy": curve.y.tolist()},
        "agrees_with_labels": agreed,
        "repeats_wrong_labels": repeated_share(agreed, accuracy.estimate, found.wrong.estimate)._asdict(),
    }


def words(verdict: Verdict, found: Rehearsal) -> str:
    """Why, in a few sentences."""
    gains, ways = verdict.gains, {way: f"{WAYS[way]}: {points(gain)}" for way, gain in verdict.gains.items()}
    told = f"Predicted gain over labels, in points of accuracy, with its range: {'; '.join(ways.values())}."
    if verdict.advice == "distil":
        said = "A teacher with a fixed weight should help, and learned weights promise little more."
    elif verdict.advice == "learned weights":
        part = "the teacher" if gains["distil"].estimate > 0 else "doubt in wrong labels, hardly from this teacher"
        said = f"Learned weights should help; most of it should come from {part}."
    elif verdict.advice in ("labels", "trusted rows"):
        said = "Neither way to distil promises a gain of a point."
    elif verdict.advice == "more rows":
        said = f"{found.trusted} trusted rows are too few to tell; some {verdict.rows} would do."
    else:
        said = "A gain is likely, but students differ by more than that: try a way on a few seeds."
    return f"{said} {told}"


def points(gain: Interval) -> str:
    """A gain in points of accuracy."""
    return f"{100 * gain.estimate:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"


def percent(share: dict[str, Any]) -> str:
    """A share with its interval, in %."""
    interval = f"{100 * share['low']:.0f} to {100 * share['high']:.0f}%"
    return interval if share["estimate"] is None else f"{100 * share['estimate']:.1f}% ({interval})"


def write_verdict(path: Path, told: dict[str, Any]) -> None:
    """Write the page of a `summary`."""
    with mpl.rc_context(charts.PAGE):
        drawn = [
            {
                "teacher": one,
                "by_class": charts.to_svg(by_class(one, told["classes"]), f"accuracy by class of {one['name']}"),
                "by_margin": charts.to_svg(by_margin(one), f"accuracy by margin of {one['name']}"),
            }
            for one in told["teachers"]
        ]
        gains = charts.to_svg(gains_chart(told["gains"]), "predicted gains")
    numbers = [(f"{100 * gain['estimate']:+.1f}", f"points predicted: {way}") for way, gain in told["gains"].items()]
    values = {"told": told, "drawn": drawn, "gains": gains, "percent": percent}
    render(path, "trust.html", title=ADVICE[told["verdict"]], numbers=numbers, **values)


def gains_chart(gains: dict[str, dict[str, float]]) -> Figure:
    """Predicted gains with their intervals, beside 0."""
    figure, axes = charts.new_chart((6.4, 2.0), xlabel="points of accuracy over training on the labels")
    for row, gain in enumerate(gains.values()):
        middle, low, high = (100 * gain[name] for name in ("estimate", "low", "high"))
        axes.errorbar(middle, row, xerr=[[middle - low], [high - middle]], fmt="o", color=charts.RIGHT, capsize=3)
    axes.axvline(0, color=mpl.rcParams["text.color"], lw=1)
    axes.set_yticks(range(len(gains)), list(gains))
    axes.set_ylim(len(gains) - 0.5, -0.5)
    return figure


def by_class(teacher: dict[str, Any], classes: Sequence[str]) -> Figure:
    """Accuracy by class with intervals, the lowest first; of more than 20 classes the 20 lowest."""
    shares = zip(classes, teacher["by_class"], strict=True)
    known = sorted((each for each in shares if each[1]["estimate"] is not None), key=lambda each: each[1]["estimate"])
    figure, axes = charts.new_chart((4.8, 1.0 + 0.24 * min(len(known), 20)), xlabel="right, % of trusted rows")
    for row, (_, share) in enumerate(known[:20]):
        low, middle, high = (100 * share[name] for name in ("low", "estimate", "high"))
        axes.errorbar(middle, row, xerr=[[middle - low], [high - middle]], fmt="o", ms=4, color=charts.RIGHT)
    axes.set_yticks(range(len(known[:20])), [name for name, _ in known[:20]])
    axes.set_ylim(len(known[:20]) - 0.5, -0.5)
    return figure


def by_margin(teacher: dict[str, Any]) -> Figure:
    """How often it is right by how sure it is: the isotonic regression."""
    x, y = teacher["by_margin"]["margin"], teacher["by_margin"]["accuracy"]
    figure, axes = charts.new_chart((4.8, 2.6), xlabel="margin of its two likeliest classes", ylabel="right, %")
    axes.plot([0.0, *x, 1.0], [100 * v for v in (y[0], *y, y[-1])], color=charts.RIGHT)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 103)
    return figure


def _plain(value: Any) -> Any:
    """The same with None for nan, which JSON has no word for."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
