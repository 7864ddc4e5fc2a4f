"""The report of a comparison: one HTML page that needs no other file. The words stand in ``page.html``."""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from lit_kd.models.files import write_whole
from lit_kd.report import charts
from lit_kd.report.charts import Arrays
from lit_kd.report.runs import EVIDENCE, SAMPLES, Job, Metrics, Result, read_metrics
from lit_kd.report.samples import Suspect, any_distrusted, class_name, to_png
from lit_kd.version import __version__

Card = dict[str, Any]  # a picture for the template, ``svg`` or the address of a ``png``, with ``title`` and ``text``


class Record(NamedTuple):
    """What a training left behind."""

    epochs: Metrics
    evidence: Arrays  # see `lit_kd.report.evidence`
    samples: Arrays  # see `lit_kd.report.evidence.keep_samples`; empty for methods without weights


Records = Mapping[str, Sequence[Record]]


def write_page(
    path: Path, done: Sequence[tuple[Job, Result]], table: tuple[list[str], list[list[str]]], pictures: dict[str, Path]
) -> None:
    """Write the report of trainings, with a table (head and rows, the best in asterisks) and PNG files by caption."""
    records: dict[str, list[Record]] = {}
    accuracies: dict[str, list[float]] = {}
    for job, result in done:
        records.setdefault(job.method, []).append(_read(job))
        accuracies.setdefault(job.method, []).append(result["test_accuracy"])
    teachers = list(dict.fromkeys(job.method for job, _ in done if job.is_teacher))
    noise = [result["noise_rate"] for _, result in done if result.get("noise_rate")]
    data = [job.config.get("data") or {} for job, _ in done]
    options = [each.get("init_args") or {} for each in data]
    environment = Environment(loader=PackageLoader("lit_kd", "report"), autoescape=True, undefined=StrictUndefined)
    with mpl.rc_context(charts.PAGE):
        html = environment.get_template("page.html").render(
            title=path.parent.resolve().name,
            version=__version__,
            students=len(records) - len(teachers),
            seeds=len({job.seed for job, _ in done}),
            teachers=teachers,
            data=data[0].get("class_path", "as configured"),
            options={k: v for k, v in options[0].items() if all((k, v) in each.items() for each in options)},
            noise=float(np.mean(noise)) if noise else 0.0,
            head=table[0],
            rows=table[1],
            accuracy=_card("Test accuracy", charts.accuracy_chart(accuracies, teachers, charts.WIDE)),
            curves=list(_curves(records, teachers)),
            reliability=list(_evidence(records, "confidence", charts.reliability_chart, _sure_and_right)),
            confidence=list(_evidence(records, "teacher_log_odds", charts.confidence_chart, _slope)),
            weights=list(_weights(records)),
            knows_wrong=charts.knows_wrong([one.samples for each in records.values() for one in each if one.samples]),
            distrusted=list(_distrusted(records)),
            class_name=class_name,
            pictures=[{"title": title, "png": _data_url(file.read_bytes())} for title, file in pictures.items()],
        )
    write_whole(path, html)


def _read(job: Job) -> Record:
    logs = sorted(job.folder.glob("lightning_logs/version_*/metrics.csv"))
    kept = [dict(np.load(file)) if (file := job.folder / name).is_file() else {} for name in (EVIDENCE, SAMPLES)]
    return Record(read_metrics(logs[-1]) if logs else {}, *kept)


def _card(title: str, figure: Figure, text: str = "") -> Card:
    return {"title": title, "text": text, "svg": charts.to_svg(figure, f"{title}: {text}" if text else title)}


def _curves(records: Records, teachers: Sequence[str]) -> Iterator[Card]:
    for name, title in (("val/accuracy", "Validation accuracy"), ("val/ece", "Calibration error (lower is better)")):
        curves = {
            method: [[(e, row[name]) for e, row in one.epochs.items() if name in row] for one in each]
            for method, each in records.items()
        }
        curves = {method: seeds for method, seeds in curves.items() if any(seeds)}
        if curves:
            yield _card(title, charts.curves_chart(curves, "epoch", "%", dashed=teachers))


def _evidence(
    records: Records, name: str, draw: Callable[[list[Arrays]], Figure], tell: Callable[[list[Arrays]], str]
) -> Iterator[Card]:
    """A card for each method whose seeds have some evidence."""
    for method, each in records.items():
        seeds = [one.evidence for one in each if name in one.evidence]
        if seeds:
            yield _card(method, draw(seeds), tell(seeds))


def _sure_and_right(seeds: list[Arrays]) -> str:
    sure, right = (100 * np.mean([seed[name].mean() for seed in seeds]) for name in ("confidence", "correct"))
    return f"on average {sure:.0f}% sure and {right:.0f}% right"


def _slope(seeds: list[Arrays]) -> str:
    odds = [(seed["teacher_log_odds"].astype(float), seed["student_log_odds"]) for seed in seeds]
    slopes = [float(np.polyfit(teacher, student, 1)[0]) for teacher, student in odds]
    return f"slope {charts.mean_and_deviation(slopes, 2)}"


def _weights(records: Records) -> Iterator[Card]:
    names = {kind: f"samples/{kind}_label_weight" for kind in ("right", "wrong")}
    for method, each in records.items():
        seeds = [one for one in each if one.samples]
        kept = [one.samples for one in seeds]
        if not any((seed["label"] >= 0).any() for seed in kept):
            continue
        found = charts.wrong_labels(kept, 2)
        yield _card(f"{method}: weights after training", charts.weights_chart(kept), found)
        logged = [{e for e, row in one.epochs.items() if all(name in row for name in names.values())} for one in seeds]
        epochs = sorted(set.intersection(*logged))
        if epochs:
            means = {kind: [[one.epochs[e][name] for e in epochs] for one in seeds] for kind, name in names.items()}
            figure, axes = charts.new_chart((charts.WIDE, 2.8))
            charts.draw_course(axes, epochs, means)
            yield _card(f"{method}: weights by epoch", figure, found)


def _distrusted(records: Records) -> Iterator[dict[str, Any]]:
    """For each method the samples whose label the first seed's training believes least."""
    for method, each in records.items():
        kept = next((one.samples for one in each if "shown_index" in one.samples), None)
        if kept is not None:
            columns = [kept[f"shown_{field.name}"].tolist() for field in fields(Suspect)]
            found = [Suspect(*row) for row in zip(*columns, strict=True)]
            pixels: Any = kept.get("pictures", [])
            pictures = [_data_url(to_png(Image.fromarray(one))) for one in pixels] or [""] * len(found)
            names = kept["class_names"].tolist() if "class_names" in kept else None
            samples = list(zip(found, pictures, strict=True))
            yield {"name": method, "none": not any_distrusted(found), "classes": names, "samples": samples}


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
