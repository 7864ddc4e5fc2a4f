"""A comparison's results: csv, tables and pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_kd.compare.pictures import draw_accuracy, draw_weights
from lit_kd.compare.recipe import TEACHER, Job
from lit_kd.compare.regions import draw_regions
from lit_kd.compare.training import SAMPLES, Result, write_whole

COLUMNS = ["method", "seed", "test_accuracy", "test_accuracy_last", "ece", "teacher_agreement", "seconds", "nll"]
OPTIONAL = ["noise_auc", "noise_rate", "noise_rate_estimated"]
_HEADS = {
    "test_accuracy": ("accuracy", 100.0, 1),
    "test_accuracy_last": ("at last", 100.0, 1),
    "ece": ("ECE", 100.0, 1),
    "teacher_agreement": ("agrees", 100.0, 1),
    "noise_auc": ("AUC", 1.0, 2),
    "seconds": ("time, s", 1.0, 0),
}


def write_report(folder: Path, done: Sequence[tuple[Job, Result]]) -> None:
    """Write ``results.csv``, ``table.md``, ``accuracy.png`` and, for methods with sample weights, ``weights-*.png``.

    For inputs in the plane there is also ``regions.png``.

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

    methods = list(dict.fromkeys(job.method for job, _ in done))
    by_method = {method: [r for r in results if r["method"] == method] for method in methods}
    head, rows = _table(by_method)
    lines = [head, ["---"] * len(head), *rows]
    write_whole(folder / "table.md", "".join(f"| {' | '.join(line)} |\n" for line in lines))
    _print(folder, head, rows)

    draw_accuracy({m: [r["test_accuracy"] for r in rs] for m, rs in by_method.items()}, folder / "accuracy.png")
    draw_regions(done, folder / "regions.png")
    for method in methods:
        samples = [job.folder / SAMPLES for job, _ in done if job.method == method]
        if all(path.is_file() for path in samples):
            draw_weights(method, samples, folder / f"weights-{samples[0].parent.parent.name}.png")


def _table(by_method: dict[str, list[Result]]) -> tuple[list[str], list[list[str]]]:
    """Mean and standard deviation of every method."""
    heads = {k: v for k, v in _HEADS.items() if any(r.get(k) is not None for rs in by_method.values() for r in rs)}
    rows = []
    for method, results in by_method.items():
        row = [method.replace("|", "/")]  # a table's own sign
        for name, (_, factor, digits) in heads.items():
            row.append(_mean_and_deviation([factor * r[name] for r in results if r.get(name) is not None], digits))
        rows.append(row)
    names = list(by_method)
    students = [row for row, method in enumerate(names) if method != TEACHER]
    for column, name in enumerate(heads, start=1):
        if name in ("test_accuracy", "test_accuracy_last") and students:
            best = max(students, key=lambda row: mean(r[name] for r in by_method[names[row]]))
            rows[best][column] = f"**{rows[best][column]}**"
    return ["method", *(head for head, _, _ in heads.values())], rows


def _mean_and_deviation(values: list[float], digits: int) -> str:
    if not values:
        return ""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{deviation}"


def _print(folder: Path, head: list[str], rows: list[list[str]]) -> None:
    caption = (
        "test accuracy at the best validation epoch and the last, calibration error, agreement with the teacher (%)"
    )
    table = Table(box=box.SIMPLE_HEAD, title=folder.name, caption=caption, padding=(0, 1, 0, 0))
    for name in head:
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        narrow = [escape(row[0]), *(cell.replace(" ± ", "±") for cell in row[1:])]
        table.add_row(*(f"[bold]{cell.strip('*')}[/bold]" if cell.startswith("**") else cell for cell in narrow))
    console = Console()
    console.print(table)
    console.print(f"results.csv, table.md and pictures are in {folder}")
