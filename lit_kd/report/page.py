"""The report of a comparison: one HTML page that needs no other file. The words stand in ``page.html``."""

from __future__ import annotations

import base64
import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from lit_kd.models.files import write_whole
from lit_kd.report import charts
from lit_kd.report.charts import Arrays
from lit_kd.report.pictures import to_png
from lit_kd.report.runs import EVIDENCE, SAMPLES, Job, Result
from lit_kd.report.samples import class_name
from lit_kd.report.weights import (
    chart_of,
    draw_course,
    draw_histogram,
    knows_wrong,
    pooled_weights,
    wrong_labels,
)
from lit_kd.version import __version__


@dataclass(frozen=True)
class Record:
    """What a training left behind.

    Attributes:
        epochs: What was logged, by epoch.
        evidence: See `lit_kd.report.evidence.KeepEvidence`.
        samples: Weights, labels and the most distrusted samples; empty for methods without weights.
    """

    epochs: Mapping[int, Mapping[str, float]]
    evidence: Arrays
    samples: Arrays


@dataclass(frozen=True)
class Card:
    """A picture, ``svg`` or the address of a ``png``, with a title and perhaps a text."""

    title: str
    svg: str = ""
    png: str = ""
    text: str = ""


Records = Mapping[str, Sequence[Record]]


def write_page(
    path: Path, done: Sequence[tuple[Job, Result]], table: tuple[list[str], list[list[str]]], pictures: dict[str, Path]
) -> None:
    """Write the report from what finished trainings left behind.

    Args:
        path: Where.
        done: Trainings and their results, in the recipe's order.
        table: Head and rows, the best in asterisks.
        pictures: More pictures to show, PNG files by caption.
    """
    methods = list(dict.fromkeys(job.method for job, _ in done))
    teachers = list(dict.fromkeys(job.method for job, _ in done if job.is_teacher))
    records = {method: [_read(job) for job, _ in done if job.method == method] for method in methods}
    accuracies = {m: [r["test_accuracy"] for r in (r for j, r in done if j.method == m)] for m in methods}
    means = ", ".join(f"{name} {100 * np.mean(values):.1f}%" for name, values in accuracies.items())
    noise = [result["noise_rate"] for _, result in done if result.get("noise_rate")]
    data, options = _shared_data([job for job, _ in done])
    page = Environment(loader=PackageLoader("lit_kd", "report"), autoescape=True, undefined=StrictUndefined)
    with mpl.rc_context(charts.PAGE):
        chart = charts.accuracy_chart(accuracies, teachers, charts.WIDE)
        html = page.get_template("page.html").render(
            title=path.parent.resolve().name,
            version=__version__,
            students=len(methods) - len(teachers),
            seeds=len({job.seed for job, _ in done}),
            teachers=teachers,
            data=data,
            options=options,
            noise=float(np.mean(noise)) if noise else 0.0,
            head=table[0],
            rows=table[1],
            accuracy=_card("Test accuracy", chart, description=f"Mean test accuracy: {means}"),
            curves=list(_curves(records, teachers)),
            reliability=list(_reliability(records)),
            confidence=list(_confidence(records)),
            weights=list(_weights(records)),
            knows_wrong=knows_wrong([one.samples for each in records.values() for one in each if one.samples]),
            distrusted=list(_distrusted(records)),
            pictures=[Card(title, png=_data_url(file.read_bytes())) for title, file in pictures.items()],
        )
    write_whole(path, html)


def _read(job: Job) -> Record:
    epochs: dict[int, dict[str, float]] = {}
    for file in sorted(job.folder.glob("lightning_logs/version_*/metrics.csv"))[-1:]:
        with file.open(newline="") as opened:
            for row in csv.DictReader(opened):
                if not row["epoch"]:
                    continue  # some callbacks, such as LearningRateMonitor, log without
                values = {k: float(v) for k, v in row.items() if v and k not in ("epoch", "step")}
                epochs.setdefault(int(row["epoch"]), {}).update(values)
    kept = [dict(np.load(file)) if (file := job.folder / name).is_file() else {} for name in (EVIDENCE, SAMPLES)]
    return Record(epochs, *kept)


def _shared_data(jobs: Sequence[Job]) -> tuple[str, str]:
    """The data module, and the options that all trainings share."""
    data = [job.config.get("data") or {} for job in jobs]
    given = [each.get("init_args") or {} for each in data]
    shared = [f"{k} {v}" for k, v in given[0].items() if all(k in each and each[k] == v for each in given)]
    return str(data[0].get("class_path", "as configured")), ", ".join(shared)


def _card(title: str, figure: Figure, text: str = "", description: str = "") -> Card:
    return Card(title, charts.to_svg(figure, description or f"{title}: {text}"), text=text)


def _curves(records: Records, teachers: Sequence[str]) -> Iterator[Card]:
    for name, title in (("val/accuracy", "Validation accuracy"), ("val/ece", "Calibration error (lower is better)")):
        curves = {
            method: [[(e, row[name]) for e, row in one.epochs.items() if name in row] for one in each]
            for method, each in records.items()
        }
        curves = {method: seeds for method, seeds in curves.items() if any(seeds)}
        if curves:
            chart = charts.curves_chart(curves, "epoch", "%", dashed=teachers)
            yield _card(title, chart, description=f"{title} by epoch of {', '.join(curves)}")


def _evidence_with(records: Records, name: str) -> Iterator[tuple[str, list[Arrays]]]:
    """Methods that have some of this evidence, and that of their seeds."""
    for method, each in records.items():
        seeds = [one.evidence for one in each if name in one.evidence]
        if seeds:
            yield method, seeds


def _reliability(records: Records) -> Iterator[Card]:
    for method, seeds in _evidence_with(records, "confidence"):
        sure, right = (100 * np.mean([seed[name].mean() for seed in seeds]) for name in ("confidence", "correct"))
        yield _card(method, charts.reliability_chart(seeds), f"on average {sure:.0f}% sure and {right:.0f}% right")


def _confidence(records: Records) -> Iterator[Card]:
    for method, seeds in _evidence_with(records, "teacher_log_odds"):
        slope = charts.mean_and_deviation(charts.slopes(seeds), 2)
        yield _card(method, charts.confidence_chart(seeds), f"slope {slope}")


def _weights(records: Records) -> Iterator[Card]:
    names = {kind: f"samples/{kind}_label_weight" for kind in ("right", "wrong")}
    for method, each in records.items():
        seeds = [one for one in each if one.samples]
        if not seeds:
            continue
        kept = [one.samples for one in seeds]
        weights, wrong = pooled_weights(kept)
        if not len(weights):
            continue
        found = wrong_labels(kept, 2)
        yield _card(f"{method}: weights after training", chart_of(draw_histogram, weights, wrong), found)
        logged = [{e for e, row in one.epochs.items() if all(name in row for name in names.values())} for one in seeds]
        epochs = sorted(set.intersection(*logged))
        if epochs:
            means = {kind: [[one.epochs[e][name] for e in epochs] for one in seeds] for kind, name in names.items()}
            yield _card(f"{method}: weights by epoch", chart_of(draw_course, epochs, means), found)


def _distrusted(records: Records) -> Iterator[dict[str, Any]]:
    """For each method the samples whose label the first seed's training believes least."""
    for method, each in records.items():
        kept = next((one.samples for one in each if "shown_index" in one.samples), None)
        if kept is None:
            continue
        names = [str(name) for name in kept["class_names"]] if "class_names" in kept else None
        columns = [kept[f"shown_{name}"].tolist() for name in ("index", "label", "believed", "true")]
        samples = [
            {
                "index": index,
                "label": class_name(names, label),
                "believed": class_name(names, believed),
                "truth": class_name(names, true) if true >= 0 else "",
                "kind": "" if true < 0 else "right" if true == label else "wrong",
                "probability": float(kept["shown_probability"][row]),
                "weight": float(kept["shown_weight"][row]),
                "png": _data_url(to_png(Image.fromarray(kept["pictures"][row]))) if "pictures" in kept else "",
            }
            for row, (index, label, believed, true) in enumerate(zip(*columns, strict=True))
        ]
        yield {"name": method, "none": not (kept["shown_distrust"] > 1e-6).any(), "samples": samples}


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
