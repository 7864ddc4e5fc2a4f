"""The results of a comparison: a csv file, tables, pictures and the page."""

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
from lit_kd.report.charts import STYLE, accuracy_chart, curves_chart, mean_and_deviation, to_png
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
    """Write ``results.csv``, ``table.md``, ``report.html`` and pictures into a comparison's folder; print the table.

    Pictures: ``accuracy.png``; ``weights-*.png`` of methods with sample weights, and ``teachers-*.png`` if they have
    several teachers; ``regions.png`` for inputs in the plane; ``queries.png`` for methods that query the teacher.
    """
    results = [result for _, result in done]
    columns = COLUMNS + [name for name in OPTIONAL if any(name in result for result in results)]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
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
    console = Console()
    console.print(Markdown(table))
    console.print(
        "Test accuracy at the best validation epoch and the last, calibration error, agreement with the teacher (%)\n"
        f"report.html, results.csv, table.md and pictures are in {folder}"
    )


def _draw(
    folder: Path, done: Sequence[tuple[Job, Result]], by_method: dict[str, list[Result]], teachers: list[str]
) -> dict[str, Path]:
    """Draw all pictures; return those that the page shows too, by caption."""
    accuracies = {method: [result["test_accuracy"] for result in each] for method, each in by_method.items()}
    figures = {"accuracy.png": accuracy_chart(accuracies, teachers)}
    shown: dict[str, Path] = {}
    asked = {m: [r["accuracy_by_queries"] for r in rs if "accuracy_by_queries" in r] for m, rs in by_method.items()}
    asked = {method: curves for method, curves in asked.items() if curves}
    if asked:
        x, y = "rows that the teacher was asked about", "validation accuracy, %"
        figures["queries.png"] = curves_chart(asked, x, y, width=7.5)
        shown["Accuracy against questions to the teacher"] = folder / "queries.png"
    regions = regions_chart(done)
    if regions is not None:
        figures["regions.png"] = regions
        shown["Which class is decided for where, side by side"] = folder / "regions.png"
    for method in by_method:
        jobs = [job for job, _ in done if job.method == method]
        if not all((job.folder / SAMPLES).is_file() for job in jobs):
            continue
        seeds, name = [np.load(job.folder / SAMPLES) for job in jobs], f"{slug(method)}.png"
        title = f"{method}: {wrong_labels(seeds, 3)}"
        figures[f"weights-{name}"] = chart_of(draw_histogram, *pooled_weights(seeds), title=title)
        if len(jobs[0].teachers) > 1:
            figures[f"teachers-{name}"] = teachers_chart(method, jobs[0].teachers, seeds)
            shown[f"{method}: which teacher is right, and which is listened to"] = folder / f"teachers-{name}"
    for name, figure in figures.items():
        write_whole(folder / name, to_png(figure))
    return shown


def summary(by_method: dict[str, list[Result]], teachers: list[str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: each method's mean and standard deviation, the best students' accuracies in ``**``."""
    heads = {k: v for k, v in _HEADS.items() if any(r.get(k) is not None for rs in by_method.values() for r in rs)}
    rows = {method: [method.replace("|", "/")] for method in by_method}  # a table's own sign
    for name, (_, factor, digits) in heads.items():
        for method, results in by_method.items():
            values = [factor * result[name] for result in results if result.get(name) is not None]
            rows[method].append(mean_and_deviation(values, digits))
        students = [row for method, row in rows.items() if method not in teachers]
        if name.startswith("test_accuracy") and students:
            means = [float(row[-1].split()[0]) for row in students]  # as printed: all that equal the best are
            for row, found in zip(students, means, strict=True):
                row[-1] = f"**{row[-1]}**" if found == max(means) else row[-1]
    return ["method", *(head for head, _, _ in heads.values())], list(rows.values())
