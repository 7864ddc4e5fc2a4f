"""The results of a comparison: a csv file, tables, pictures and the page."""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

from lit_kd.models import load_student
from lit_kd.models.files import write_columns, write_whole
from lit_kd.report import charts
from lit_kd.report.page import write_page
from lit_kd.report.runs import POINTS, SAMPLES, TEACHER, Arrays, Job, Result, score_of, slug

COLUMNS = ["method", "seed", "test_accuracy", "test_accuracy_last", "ece", "teacher_agreement", "seconds", "nll"]
OPTIONAL = ["noise_auc", "noise_rate", "noise_rate_estimated", "picks_right"]
OPTIONAL += ["slope_unsure", "offset_unsure", "slope_sure", "offset_sure"]
_HEADS = {
    "test_accuracy": ("accuracy", 100.0, 1),
    "test_accuracy_last": ("at last", 100.0, 1),
    "test_r2": ("R²", 100.0, 1),
    "test_r2_last": ("at last", 100.0, 1),
    "ece": ("ECE", 100.0, 1),
    "teacher_agreement": ("agrees", 100.0, 1),
    "noise_auc": ("AUC", 1.0, 2),
    "picks_right": ("picks right", 100.0, 1),
    "seconds": ("time, s", 1.0, 0),
}
SHOWN = 800  # training points drawn; more would hide the regions
GRID = 300  # cells of the background in each direction


def write_report(folder: Path, done: Sequence[tuple[Job, Result]]) -> None:
    """Write ``results.csv``, ``table.md``, ``report.html`` and pictures into a comparison's folder; print the table.

    Pictures: ``accuracy.png``, of a regression ``r2.png``; ``weights-*.png`` of methods with sample weights, and
    ``teachers-*.png`` if they have several teachers; ``regions.png`` for inputs in the plane; ``queries.png`` for
    methods that query the teacher.
    """
    results = [result for _, result in done]
    word, _ = score_of(results[0])
    names = [name if word == "accuracy" else name.replace("accuracy", "r2") for name in COLUMNS]
    names += [name for name in OPTIONAL if any(name in result for result in results)]
    columns = {name: [result.get(name) for result in results] for name in names}
    write_columns(folder / "results.csv", columns, overwrite=True)

    by_method: dict[str, list[Result]] = {}
    for job, result in done:
        by_method.setdefault(job.method, []).append(result)
    teachers = list(dict.fromkeys(job.method for job, _ in done if job.is_teacher))
    head, rows = summary(by_method, teachers)
    named = [[re.sub(r"([\\*_<`])", r"\\\1", name), *cells] for name, *cells in rows]  # a name is no markup
    table = "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *named])
    write_whole(folder / "table.md", table)
    with mpl.rc_context(charts.STYLE):
        more = _draw(folder, done, by_method, teachers)
    write_page(folder / "report.html", done, (head, rows), more)
    console = Console()
    console.print(Markdown(table))
    console.print(
        f"Test {word} at the best validation epoch and the last, calibration error, agreement with the teacher (%)\n"
        f"report.html, results.csv, table.md and pictures are in {folder}"
    )


def _draw(
    folder: Path, done: Sequence[tuple[Job, Result]], by_method: dict[str, list[Result]], teachers: list[str]
) -> dict[str, Path]:
    """Draw all pictures; return those that the page shows too, by caption."""
    scores = {method: [score_of(result)[1] for result in each] for method, each in by_method.items()}
    word, _ = score_of(done[0][1])
    figures = {f"{'accuracy' if word == 'accuracy' else 'r2'}.png": charts.accuracy_chart(scores, teachers, word=word)}
    shown: dict[str, Path] = {}
    asking = {method: each for method, each in by_method.items() if "accuracy_by_queries" in each[0]}
    asked = {method: [result["accuracy_by_queries"] for result in each] for method, each in asking.items()}
    if asked:
        x, y = "rows that the teacher was asked about", "validation accuracy, %"
        figures["queries.png"] = charts.curves_chart(asked, x, y, width=7.5)
        shown["Accuracy against questions to the teacher"] = folder / "queries.png"
    regions = regions_chart(done)
    if regions is not None:
        figures["regions.png"] = regions
        shown["Which class is decided for where, side by side"] = folder / "regions.png"
    for method in by_method:
        jobs = [job for job, _ in done if job.method == method]
        seeds, name = [job.arrays(SAMPLES) for job in jobs], f"{slug(method)}.png"
        if not all(seeds):
            continue
        title = f"{method}: {charts.wrong_labels(seeds, 3)}"
        figures[f"weights-{name}"] = charts.weights_chart(seeds, title)
        if len(jobs[0].teachers) > 1:
            figures[f"teachers-{name}"] = charts.teachers_chart(method, jobs[0].teachers, seeds)
            shown[f"{method}: which teacher is right, and which is listened to"] = folder / f"teachers-{name}"
    for name, figure in figures.items():
        write_whole(folder / name, charts.to_png(figure))
    return shown


def summary(by_method: dict[str, list[Result]], teachers: list[str]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: each method's mean and standard deviation, the best students' accuracies in ``**``."""
    heads = {k: v for k, v in _HEADS.items() if any(r.get(k) is not None for rs in by_method.values() for r in rs)}
    rows = {method: [method.replace("|", "/")] for method in by_method}  # a table's own sign
    for name, (_, factor, digits) in heads.items():
        for method, results in by_method.items():
            values = [factor * result[name] for result in results if result.get(name) is not None]
            rows[method].append(charts.mean_and_deviation(values, digits))
        students = [row for method, row in rows.items() if method not in teachers]
        if name.startswith("test_") and students:
            means = [float(row[-1].split()[0]) for row in students]  # as printed: all that equal the best are
            for row, found in zip(students, means, strict=True):
                row[-1] = f"**{row[-1]}**" if found == max(means) else row[-1]
    return ["method", *(head for head, _, _ in heads.values())], list(rows.values())


def regions_chart(done: Sequence[tuple[Job, Result]]) -> Figure | None:
    """Decision regions of the first seed, side by side; ``None`` if the inputs are not points of the plane.

    Panels: the teacher, the KD student with the best mean test accuracy, and each student with learned weights, whose
    training points show the weight of their label.
    """
    seed = done[0][0].seed
    kd = dict.fromkeys(job.method for job, _ in done if job.config["model"]["class_path"].split(".")[-1] == "KD")
    best = max(kd, key=lambda name: mean(score_of(r)[1] for job, r in done if job.method == name), default=None)
    shown = [
        (job, result)
        for job, result in done
        if job.seed == seed
        and (job.folder / POINTS).is_file()
        and (job.method in (TEACHER, best) or (job.folder / SAMPLES).is_file())
    ]
    if not shown:
        return None
    points, samples = ([job.arrays(name) for job, _ in shown] for name in (POINTS, SAMPLES))
    weights = [each["weights"][:, 0] if each else None for each in samples]
    most = max([1.0, *(float(weight.max()) for weight in weights if weight is not None)])
    top = min(most, 2.0)  # L2RW's weights reach the size of the batch
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.6 * columns + 0.8, 3.6 * rows + 0.6), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    dots = None
    for axes, (job, result), each, weight in zip(places, shown, points, weights, strict=False):
        axes.set_title(f"{job.method}: {100 * score_of(result)[1]:.1f}%")
        drawn = _draw_regions(axes, job.folder, each, weight, top)
        dots = dots if weight is None else drawn
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    if dots is not None:
        label = "learned weight of the label (0: it is ignored)"
        extend = "max" if most > top else "neither"
        figure.colorbar(dots, ax=list(places), label=label, fraction=0.04, aspect=40, extend=extend)
    size = int((points[0]["label"] >= 0).sum())
    caption = (
        f"Background: the predicted class. Dots: {min(SHOWN, size)} of {size} labeled training points, in the colour "
        "of their label or, if weights are learned, of its final weight. Rings: the label is wrong. Titles: test "
        f"accuracy of seed {seed} at the best validation epoch."
    )
    if best is not None:
        caption += f" {best} is the KD student with the best mean test accuracy."
    figure.supxlabel(textwrap.fill(caption, 55 * columns), fontsize=8, ma="left")
    return figure


def _draw_regions(
    axes: Axes, folder: Path, points: Arrays, weight: npt.NDArray[np.float32] | None, top: float
) -> PathCollection:
    """Draw one panel; return its dots."""
    best = folder / "best.ckpt"  # none without validation data: then the test accuracy is the last epoch's, too
    student = load_student(best if best.is_file() else folder / "last.ckpt")
    room = 0.04 * np.ptp(points["x"], axis=0)
    low, high = points["x"].min(0) - room, points["x"].max(0) + room
    half = (high - low) / GRID / 2  # of a cell, which has the colour that is decided for at its centre
    x, y = (torch.linspace(low[i] + half[i], high[i] - half[i], GRID) for i in (0, 1))
    with torch.no_grad():
        logits = student(torch.cartesian_prod(y, x).flip(1))
    regions, classes = logits.argmax(1).view(GRID, GRID).numpy(), logits.shape[1]
    few = mpl.colormaps["tab10"](np.arange(classes))
    strong = (few if classes <= 10 else mpl.colormaps["turbo"](np.linspace(0, 1, classes)))[:, :3]
    pale = 1 - (0.35 if weight is None else 0.15) * (1 - strong)
    box = (low[0], high[0], low[1], high[1])
    axes.imshow(pale[regions], origin="lower", extent=box, interpolation="nearest", aspect="auto")
    shown = np.random.default_rng(0).permutation(np.flatnonzero(points["label"] >= 0))[:SHOWN]
    across, up = points["x"][shown].T
    noisy = points["noisy"][shown]
    axes.scatter(across[noisy], up[noisy], s=20, facecolors="none", edgecolors="black", linewidths=0.5)
    axes.axis(box)
    axes.set(xticks=[], yticks=[])
    if weight is None:
        return axes.scatter(across, up, s=4, c=strong[points["label"][shown]], linewidths=0)
    return axes.scatter(across, up, s=8, c=weight[shown], vmin=0, vmax=top, cmap="viridis", linewidths=0)
