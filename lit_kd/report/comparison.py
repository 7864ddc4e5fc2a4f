"""The results of a comparison: a csv file, tables, pictures and the page."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from lit_kd.models.files import write_whole
from lit_kd.report.charts import STYLE, accuracy_chart, curves_chart, mean_and_deviation, save
from lit_kd.report.page import write_page
from lit_kd.report.regions import regions_chart
from lit_kd.report.runs import SAMPLES, Job, Result, slug
from lit_kd.report.weights import chart_of, draw_histogram, pooled_weights, teachers_chart, wrong_labels

COLUMNS = ["method", "seed", "test_accuracy", "test_accuracy_last", "ece", "teacher_agreement", "seconds", "nll"]
OPTIONAL = ["noise_auc", "noise_rate", "noise_rate_estimated", "picks_right"]
_HEADS = {
    "test_accuracy": ("accuracy", 100.0, 1),
    "test_accuracy_last": ("at last", 100.0, 1),
    "ece": ("ECE", 100.0, 1),
    "teacher_agreement": ("agrees", 100.0, 1),
    "noise_auc": ("AUC", 1.0, 2),
    "picks_right": ("picks right", 100.0, 1),
    "seconds": ("time, s", 1.0, 0),
}


def write_report(folder: Path, done: Sequence[tuple[Job, Result]]) -> None:
    """Write ``results.csv``, ``table.md``, ``report.html`` and pictures, and print the table.

    Pictures: ``accuracy.png``; ``weights-*.png`` of methods with sample weights, and ``teachers-*.png`` if they have
    several teachers; ``regions.png`` for inputs in the plane; ``queries.png`` for methods that query the teacher.

    Args:
        folder: The comparison's folder.
        done: Trainings and their results, in the recipe's order.
    """
    results = [result for _, result in done]
    columns = COLUMNS + [name for name in OPTIONAL if any(name in result for result in results)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    write_whole(folder / "results.csv", text.getvalue())

    by_method: dict[str, list[Result]] = {}
    for job, result in done:
        by_method.setdefault(job.method, []).append(result)
    teachers = list(dict.fromkeys(job.method for job, _ in done if job.is_teacher))
    head, rows = summary(by_method, teachers)
    named = [[re.sub(r"([\\*_<`])", r"\\\1", name), *cells] for name, *cells in rows]  # a name is no markup
    table = "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *named])
    write_whole(folder / "table.md", table)
    with mpl.rc_context(STYLE):
        more = _draw(folder, done, by_method, teachers)
    write_page(folder / "report.html", done, (head, rows), more)
    _print(folder, table)


def _draw(
    folder: Path, done: Sequence[tuple[Job, Result]], by_method: dict[str, list[Result]], teachers: list[str]
) -> dict[str, Path]:
    """Draw all pictures; return those that the page shows too, by caption."""
    more: dict[str, Path] = {}
    accuracies = {m: [r["test_accuracy"] for r in rs] for m, rs in by_method.items()}
    save(accuracy_chart(accuracies, teachers), folder / "accuracy.png")
    asked = {m: [r["accuracy_by_queries"] for r in rs if "accuracy_by_queries" in r] for m, rs in by_method.items()}
    asked = {method: curves for method, curves in asked.items() if curves}
    if asked:
        more["Accuracy against questions to the teacher"] = folder / "queries.png"
        chart = curves_chart(asked, "rows that the teacher was asked about", "validation accuracy, %", width=7.5)
        save(chart, folder / "queries.png")
    regions = regions_chart(done)
    if regions is not None:
        more["Which class is decided for where, side by side"] = folder / "regions.png"
        save(regions, folder / "regions.png")
    for method in by_method:
        jobs = [job for job, _ in done if job.method == method]
        if not all((job.folder / SAMPLES).is_file() for job in jobs):
            continue
        seeds, name = [np.load(job.folder / SAMPLES) for job in jobs], f"{slug(method)}.png"
        chart = chart_of(draw_histogram, *pooled_weights(seeds), title=f"{method}: {wrong_labels(seeds, 3)}")
        save(chart, folder / f"weights-{name}")
        if len(jobs[0].teachers) > 1:
            more[f"{method}: which teacher is right, and which is listened to"] = folder / f"teachers-{name}"
            save(teachers_chart(method, jobs[0].teachers, seeds), folder / f"teachers-{name}")
    return more


def summary(by_method: dict[str, list[Result]], teachers: list[str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: each method's mean and standard deviation, the best students' accuracies in ``**``."""
    heads = {k: v for k, v in _HEADS.items() if any(r.get(k) is not None for rs in by_method.values() for r in rs)}
    rows = []
    for method, results in by_method.items():
        row = [method.replace("|", "/")]  # a table's own sign
        for name, (_, factor, digits) in heads.items():
            row.append(mean_and_deviation([factor * r[name] for r in results if r.get(name) is not None], digits))
        rows.append(row)
    students = [row for row, method in zip(rows, by_method, strict=True) if method not in teachers]
    for column, name in enumerate(heads, start=1):
        if name in ("test_accuracy", "test_accuracy_last") and students:
            means = [float(row[column].split()[0]) for row in students]  # as printed: all that equal the best are
            for row, found in zip(students, means, strict=True):
                if found == max(means):
                    row[column] = f"**{row[column]}**"
    return ["method", *(head for head, _, _ in heads.values())], rows


def _print(folder: Path, table: str) -> None:
    console = Console()
    if max(map(len, table.splitlines())) >= console.width:
        table = re.sub(r" ± [0-9.]+", "", table)  # table.md has them
    console.print(Markdown(table))
    console.print(
        "Test accuracy at the best validation epoch and the last, calibration error, agreement with the teacher (%)"
    )
    console.print(f"report.html, results.csv, table.md and pictures are in {folder}")
