"""A comparison's report: one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

from lit_kd.cli.recipe import Job
from lit_kd.cli.training import SAMPLES, Result
from lit_kd.models.files import write_whole
from lit_kd.report.distrust import class_name
from lit_kd.report.evidence import EVIDENCE
from lit_kd.report.page_pictures import (
    COLOURS,
    WIDE,
    Arrays,
    confidence_picture,
    curves_picture,
    reliability_picture,
    slopes,
    to_svg,
    weights_pictures,
)
from lit_kd.report.page_text import CONFIDENCE, CURVES, PAGE, RELIABILITY, distrusted, results, weights
from lit_kd.report.pictures import image_to_png
from lit_kd.report.plots import (
    accuracy_picture,
    knows_wrong,
    mean_and_deviation,
    pooled_weights,
    wrong_labels,
)
from lit_kd.version import __version__

HEADS = {
    "accuracy": "share of the test samples that are classified right, in %, at the epoch with the best validation",
    "at last": "the same after the last epoch",
    "ECE": "expected calibration error, in %: how far the stated confidence is from the share that is right; 0 is best",
    "agrees": "share of the test samples for which student and teacher name the same class, in %",
    "AUC": "how well a low learned weight tells wrong training labels from right ones: 1 perfectly, 0.5 by chance",
    "picks right": "where teachers differ, how often the one with the largest weight is right, in %",
    "time, s": "seconds of training",
}


@dataclass(frozen=True)
class Run:
    """A training, and what it left behind; old ones left less.

    Attributes:
        epochs: What was logged, by epoch.
        evidence: See `lit_kd.report.evidence.KeepEvidence`.
        samples: Weights, labels and the most distrusted samples, of methods that have them.
    """

    epochs: Mapping[int, Mapping[str, float]]
    evidence: Arrays
    samples: Arrays


def write_page(
    path: Path,
    done: Sequence[tuple[Job, Result]],
    table: tuple[list[str], list[list[str]]],
    pictures: Mapping[str, Path],
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
    runs = {method: [_read(job) for job, _ in done if job.method == method] for method in methods}
    accuracies = {m: [r["test_accuracy"] for r in (r for j, r in done if j.method == m)] for m in methods}
    kept = [run.samples for each in runs.values() for run in each if run.samples]
    several = len({job.seed for job, _ in done}) > 1
    known = knows_wrong(kept)
    parts = [
        _section(
            "Results", results(len(teachers), several), _table(*table) + _cards([_accuracy(accuracies, teachers)])
        ),
        _section("While they learned", CURVES, _cards(_curves(runs, teachers))),
        _section("Are they as sure as they should be?", RELIABILITY, _cards(_reliability(runs), "small")),
        _section("Student against teacher", CONFIDENCE, _cards(_confidence(runs), "small")),
        _section("Which labels were believed?", weights(known, several), _cards(_weights(runs))),
        _section(
            "Most distrusted labels", distrusted(known, several), "".join(_distrusted(*each) for each in runs.items())
        ),
        _section("More pictures", "", _cards([_png(text, file) for text, file in pictures.items()])),
    ]
    body = "\n".join(part for part in parts if part)
    lacking = sum(not run.evidence for each in runs.values() for run in each)
    if lacking:
        body += f"<p>{lacking} trainings were made by a version of lit_kd that kept less; they lack some pictures.</p>"
    title = html.escape(path.parent.resolve().name)
    write_whole(path, PAGE.substitute(title=title, lead=_lead(done, teachers), body=body, version=__version__))


def _read(job: Job) -> Run:
    epochs: dict[int, dict[str, float]] = {}
    for file in sorted(job.folder.glob("lightning_logs/version_*/metrics.csv"))[-1:]:
        with file.open(newline="") as opened:
            for row in csv.DictReader(opened):
                if not row["epoch"]:
                    continue  # some callbacks, such as LearningRateMonitor, log without
                values = {k: float(v) for k, v in row.items() if v and k not in ("epoch", "step")}
                epochs.setdefault(int(row["epoch"]), {}).update(values)
    kept = [dict(np.load(file)) if (file := job.folder / name).is_file() else {} for name in (EVIDENCE, SAMPLES)]
    return Run(epochs, *kept)


def _lead(done: Sequence[tuple[Job, Result]], teachers: Sequence[str]) -> str:
    """What was compared on what, in words."""
    data = [job.config.get("data") or {} for job, _ in done]
    shared = [
        item for item in (data[0].get("init_args") or {}).items() if all(_has(d.get("init_args"), item) for d in data)
    ]
    options = ", ".join(f"{name} {value}" for name, value in shared)
    seeds = len({job.seed for job, _ in done})
    students = len({job.method for job, _ in done}) - len(teachers)
    noise = [result["noise_rate"] for _, result in done if result.get("noise_rate")]
    known = f" ({options})" if options else ""
    words = [
        f"{_count(students, 'way')} to train a network, the student, on the same data,",
        f"each with {_count(seeds, 'random seed')}. A teacher is a network that was trained before, and that a student",
        f"may imitate (here: {', '.join(teachers) or 'none'}).",
        f"Data: {data[0].get('class_path', 'as configured')}{known}.",
    ]
    if noise:
        words.append(f"{100 * np.mean(noise):.0f}% of the training labels are wrong on purpose; test labels are right.")
    return html.escape(" ".join(words))


def _has(options: Mapping[str, Any] | None, item: tuple[str, Any]) -> bool:
    return item in (options or {}).items()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _section(title: str, text: str, content: str) -> str:
    """Nothing where there is nothing to show."""
    return f"<section><h2>{html.escape(title)}</h2><p>{text}</p>\n{content}</section>" if content else ""


def _cards(cards: Sequence[str], kind: str = "") -> str:
    return f'<div class="cards {kind}">{"".join(cards)}</div>' if cards else ""


def _card(title: str, picture: str, text: str = "") -> str:
    told = f"<br>{html.escape(text)}" * bool(text)
    return f"<figure>{picture}<figcaption><b>{html.escape(title)}</b>{told}</figcaption></figure>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    tops = "".join(
        f'<th scope="col" title="{html.escape(HEADS.get(name, ""))}">{html.escape(name)}</th>' for name in head
    )
    lines = []
    for row in rows:
        cells = [html.escape(cell.strip("*")) for cell in row[1:]]
        cells = [f"<b>{c}</b>" if old.startswith("**") else c for c, old in zip(cells, row[1:], strict=True)]
        lines.append(f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>')
    words = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(HEADS[name])}</dd>" for name in head if name in HEADS
    )
    table = f'<div class="scroll"><table><thead><tr>{tops}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    return f"{table}<details open><summary>What the columns mean</summary><dl>{words}</dl></details>"


def _accuracy(accuracies: Mapping[str, Sequence[float]], teachers: Sequence[str]) -> str:
    with mpl.rc_context(COLOURS):
        figure = accuracy_picture(accuracies, teachers, WIDE)
    means = ", ".join(f"{name} {100 * np.mean(values):.1f}%" for name, values in accuracies.items())
    return _card("Test accuracy", to_svg(figure, f"Mean test accuracy: {means}"))


def _curves(runs: Mapping[str, Sequence[Run]], teachers: Sequence[str]) -> list[str]:
    cards = []
    for name, title in (("val/accuracy", "Validation accuracy"), ("val/ece", "Calibration error (lower is better)")):
        curves = {
            method: [[(e, row[name]) for e, row in run.epochs.items() if name in row] for run in each]
            for method, each in runs.items()
        }
        curves = {method: seeds for method, seeds in curves.items() if any(seeds)}
        if curves:
            cards.append(
                _card(title, to_svg(curves_picture(curves, teachers), f"{title} by epoch of {', '.join(curves)}"))
            )
    return cards


def _with(runs: Mapping[str, Sequence[Run]], name: str) -> dict[str, list[Arrays]]:
    """By method, the evidence of its seeds, of those that have some of this kind."""
    found = {method: [run.evidence for run in each if name in run.evidence] for method, each in runs.items()}
    return {method: seeds for method, seeds in found.items() if seeds}


def _reliability(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    cards = []
    for method, seeds in _with(runs, "confidence").items():
        sure, right = (100 * np.mean([seed[name].mean() for seed in seeds]) for name in ("confidence", "correct"))
        text = f"on average {sure:.0f}% sure and {right:.0f}% right"
        cards.append(_card(method, to_svg(reliability_picture(seeds), f"{method}: {text}"), text))
    return cards


def _confidence(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    cards = []
    for method, seeds in _with(runs, "teacher_log_odds").items():
        text = f"slope {mean_and_deviation(slopes(seeds), 2)}"
        cards.append(_card(method, to_svg(confidence_picture(seeds), f"{method}: {text}"), text))
    return cards


def _weights(runs: Mapping[str, Sequence[Run]]) -> list[str]:
    cards = []
    for method, each in runs.items():
        seeds = [run for run in each if run.samples]
        if not seeds:
            continue
        kept = [run.samples for run in seeds]
        pooled, wrong, _ = pooled_weights(kept)
        if not len(pooled):
            continue
        epochs, means = _course(seeds)
        found = wrong_labels(kept, 2)
        titles = (f"{method}: weights after training", f"{method}: weights by epoch")
        for title, figure in zip(titles, weights_pictures(pooled, wrong, epochs, means), strict=False):
            cards.append(_card(title, to_svg(figure, f"{title}; {found}"), found))
    return cards


def _course(runs: Sequence[Run]) -> tuple[list[int], dict[str, list[list[float]]]]:
    """The epochs, and for right and wrong labels the mean weight in these, a curve a run, if all runs logged them."""
    names = {kind: f"samples/{kind}_label_weight" for kind in ("right", "wrong")}
    logged = [{e for e, row in run.epochs.items() if all(name in row for name in names.values())} for run in runs]
    epochs = sorted(set.intersection(*logged))
    means = {kind: [[run.epochs[e][name] for e in epochs] for run in runs] for kind, name in names.items()}
    return epochs, means if epochs else {}


def _distrusted(method: str, runs: Sequence[Run]) -> str:
    """The samples whose label the first seed's run believes least."""
    kept = next((run.samples for run in runs if "shown_index" in run.samples), None)
    if kept is None:
        return ""
    names = [str(name) for name in kept["class_names"]] if "class_names" in kept else None
    cards = []
    for row, index in enumerate(kept["shown_index"]):
        label, believed, true = (int(kept[f"shown_{name}"][row]) for name in ("label", "believed", "true"))
        lines = [f"label: {class_name(names, label)}", f"student: {class_name(names, believed)}"]
        lines[1] += f" ({100 * kept['shown_probability'][row]:.0f}%)"
        lines.append(f"weight: {kept['shown_weight'][row]:.2f}")
        kind = "" if true < 0 else "right" if true == label else "wrong"
        if kind:
            lines.append("the label is right" if kind == "right" else f"truly: {class_name(names, true)}")
        told = html.escape(f"training sample {index}; " + "; ".join(lines))
        picture = ""
        if "pictures" in kept:
            source = _data(image_to_png(Image.fromarray(kept["pictures"][row])))
            picture = f'<img src="{source}" alt="{told}" title="{told}">'
        label_line, *others = (html.escape(line) for line in lines)
        caption = "<br>".join([f"<b>{label_line}</b>", *others])
        cards.append(f'<figure class="{kind}" title="{told}">{picture}<figcaption>{caption}</figcaption></figure>')
    none = "" if (kept["shown_distrust"] > 1e-6).any() else "<p>No label is distrusted.</p>"
    return f'<h3>{html.escape(method)}</h3>{none}<div class="samples">{"".join(cards)}</div>'


def _png(title: str, path: Path) -> str:
    told = html.escape(title)
    return _card(title, f'<img class="chart" src="{_data(path.read_bytes())}" alt="{told}" title="{told}">')


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
