"""Charts of a run and of a comparison, in the style that is set around them: `STYLE` for files, `PAGE` for the page."""

import html
import io
import textwrap
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import roc_auc_score

from lit_kd.data import UNLABELED
from lit_kd.report.deviations import PARTS, deviations, log_odds
from lit_kd.report.runs import Arrays

RIGHT, WRONG, PLAIN = "#2a78b5", "#d1495b", "#8a8f98"
_INK = "#010203"  # stands for the text colour of the page
STYLE: Any = {
    **{"font.size": 9, "axes.titlesize": 10, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False},
    "text.parse_math": False,  # names are not formulas
}
PAGE: Any = {
    **STYLE,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    "svg.fonttype": "none",
    "svg.hashsalt": "lit_kd",
}
SMALL, WIDE = (2.8, 2.5), 4.8
BINS = 10
DOTS = 400  # of a scatter plot; more would only make the page large
_TICKS = {0.0001: "0.01", 0.01: "1", 0.1: "10", 0.5: "50", 0.9: "90", 0.99: "99", 0.9999: "99.99", 0.999999: "99.9999"}
KINDS = {"right": (RIGHT, "label is right"), "wrong": (WRONG, "label is wrong"), "all": (RIGHT, "all labels")}
"""Colour and name of training samples by what is known of their label."""
MOST_NUMBERS = 20  # with more classes, the cells of `teachers_chart` are too narrow for them
Curve = Sequence[tuple[int, float]]
"""Pairs of a place on the x axis and a fraction."""


def to_png(figure: Figure) -> bytes:
    """A figure as a PNG of 256 colours, which takes a third of the bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=160)
    Image.open(drawn).convert("RGB").quantize(dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def to_svg(figure: Figure, description: str) -> Markup:
    """A figure in the style `PAGE` as an ``<svg>`` element in the page's text colour, with a description."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue().replace(_INK, "currentColor")
    head, _, rest = svg[svg.index("<svg") :].partition(">")
    return Markup(f'{head} role="img"><title>{html.escape(description)}</title>{rest}')


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """The mean and, of several values, the standard deviation; of none an empty text."""
    if not values:
        return ""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def new_chart(size: tuple[float, float], **axes: Any) -> tuple[Figure, Axes]:
    """An empty figure of a size in inches, and its axes with some properties, such as ``xlabel``."""
    figure = Figure(figsize=size, layout="constrained")
    drawn: Axes = figure.subplots()
    drawn.set(**axes)
    return figure, drawn


def accuracy_chart(
    accuracies: Mapping[str, Sequence[float]], teachers: Sequence[str], width: float = 7.5, word: str = "accuracy"
) -> Figure:
    """The mean and standard deviation of every method's seeds, and each seed as a dot; a single teacher is a line."""
    single = teachers[0] if len(teachers) == 1 else None
    rows = {name: [100 * a for a in values] for name, values in accuracies.items() if name != single}
    best = max((name for name in rows if name not in teachers), key=lambda name: mean(rows[name]), default=None)
    ink, paper = mpl.rcParams["text.color"], mpl.rcParams["axes.facecolor"]
    figure, axes = new_chart((width, max(2.0, 1.2 + 0.36 * len(rows))))
    for row, (name, values) in enumerate(rows.items()):
        color = RIGHT if name == best else ink
        fill = paper if name in teachers else color
        error = stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(mean(values), row, xerr=error, fmt="o", color=color, mfc=fill, ms=7, capsize=3, lw=1.4)
        axes.plot(values, [row] * len(values), "o", color=PLAIN, ms=3.5, zorder=3)
    if single is not None:
        teacher = 100 * mean(accuracies[single])
        axes.axvline(teacher, color=ink, ls="--", lw=1)
        axes.set_title(f"dashed: {single} {teacher:.1f}", fontsize=8)
    axes.margins(x=0.1)
    axes.grid(axis="y", color=PLAIN, alpha=0.25)
    axes.set_yticks(range(len(rows)), [f"{name}  {mean(values):.1f}" for name, values in rows.items()])
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first one at the top
    label = f"test {word} at the best validation epoch, %: mean ± standard deviation; small dots: seeds"
    figure.supxlabel(textwrap.fill(label, round(13 * width)), fontsize=9)
    return figure


def differences_chart(
    differences: Mapping[str, Sequence[float]], reference: str, width: float = WIDE, word: str = "accuracy"
) -> Figure:
    """Differences to a reference, points: a dot a seed, a bar to the mean, a line at zero."""
    figure, axes = new_chart((width, max(2.0, 1.0 + 0.3 * len(differences))))
    for row, values in enumerate(differences.values()):
        color = RIGHT if mean(values) >= 0 else WRONG
        axes.barh(row, mean(values), color=color, alpha=0.3, height=0.7)
        axes.plot(values, [row] * len(values), "o", color=color, ms=4)
    axes.axvline(0, color=mpl.rcParams["text.color"], lw=1)
    axes.grid(axis="x", color=PLAIN, alpha=0.25)
    axes.set_yticks(range(len(differences)), [f"{name}  {mean(v):+.1f}" for name, v in differences.items()])
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.set_xlim(*(1.1 * end for end in (min(-1, *axes.get_xlim()), max(1, *axes.get_xlim()))))
    figure.supxlabel(textwrap.fill(f"points of test {word} against {reference}", round(13 * width)), fontsize=9)
    return figure


def curves_chart(
    curves: Mapping[str, Sequence[Curve]], x: str, y: str, dashed: Sequence[str] = (), width: float = WIDE
) -> Figure:
    """For each method the mean of its seeds' curves, in %, with a band of one standard deviation."""
    figure, axes = new_chart((width, 0.62 * width + 0.1 * len(curves)), xlabel=x, ylabel=y)
    lines = []
    for number, (method, seeds) in enumerate(curves.items()):
        values: dict[int, list[float]] = {}
        for place, value in (pair for seed in seeds for pair in seed):
            values.setdefault(place, []).append(100 * value)
        places = sorted(values)
        means = np.array([mean(values[place]) for place in places])
        errors = np.array([stdev(values[place]) if len(values[place]) > 1 else 0.0 for place in places])
        color, style = (mpl.rcParams["text.color"], "--") if method in dashed else (f"C{number % 10}", "-")
        lines += axes.plot(places, means, style, color=color, lw=1.5, marker="." * (len(places) < 20))
        axes.fill_between(places, means - errors, means + errors, color=color, alpha=0.06, lw=0)
    axes.grid(color=PLAIN, alpha=0.25)
    # given by name, because matplotlib leaves out names that begin with an underscore
    figure.legend(lines, list(curves), frameon=False, loc="outside lower center", ncols=2)
    return figure


def reliability_chart(seeds: Sequence[Arrays]) -> tuple[Figure, str]:
    """How often it is right, against how sure it is, from the `lit_kd.report.evidence` of all seeds; and in words."""
    confidence, correct = (np.concatenate([seed[name] for seed in seeds]) for name in ("confidence", "correct"))
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    full = np.flatnonzero(count)
    sure, right = (100 * np.bincount(bins, values, BINS)[full] / count[full] for values in (confidence, correct))
    labels = {"xlabel": "how sure, %", "ylabel": "how often right, %"}
    figure, axes = new_chart(SMALL, xlim=(0, 103), ylim=(0, 103), **labels)
    axes.plot([0, 100], [0, 100], "--", color=PLAIN, lw=1)
    axes.vlines(sure, np.minimum(sure, right), np.maximum(sure, right), color=WRONG, lw=1.5, alpha=0.7)
    axes.plot(sure, right, color=RIGHT, lw=1)
    axes.scatter(sure, right, s=8 + 120 * count[full] / count.sum(), color=RIGHT, zorder=3)
    return figure, f"on average {100 * confidence.mean():.0f}% sure and {100 * correct.mean():.0f}% right"


def confidence_chart(seeds: Sequence[Arrays]) -> tuple[Figure, str]:
    """The student's log-odds of the teacher's class against the teacher's own, from all seeds; in words the slopes."""
    x, y = np.concatenate([log_odds(seed) for seed in seeds], axis=1)
    parts = deviations({"teacher_log_odds": x, "student_log_odds": y})
    slope, intercept = np.polyfit(x, y, 1)
    shown = np.random.default_rng(0).permutation(len(x))[:DOTS]
    ends = np.array([x[shown].min(), x[shown].max()])
    labels = {"xlabel": "teacher: how sure of its class, %", "ylabel": "student of the same class, %"}
    figure, axes = new_chart(SMALL, **labels)
    axes.scatter(x[shown], y[shown], s=5, color=RIGHT, alpha=0.4, lw=0)
    axes.plot(ends, ends, "--", color=PLAIN, lw=1)
    axes.plot(ends, slope * ends + intercept, color=WRONG, lw=1.8)
    told = f"slope {slope:.2f}"
    for part, quantiles in PARTS.items():
        local, offset = parts[f"slope_{part}"], parts[f"offset_{part}"]
        if local is not None and offset is not None:
            ends = np.quantile(x, quantiles)
            axes.plot(ends, local * ends + offset, color=WRONG, lw=1.2, ls=":")
            told += f"; where the teacher is {part} {local:.2f}"
    for axis, values in ((axes.xaxis, x[shown]), (axes.yaxis, y[shown])):
        at = {np.log(p / (1 - p)): name for p, name in _TICKS.items()}
        at = {place: name for place, name in at.items() if values.min() - 1 <= place <= values.max() + 1}
        axis.set_ticks(list(at), list(at.values()))
    return figure, told


def draw_histogram(axes: Axes, weights: npt.NDArray[np.float32], wrong: npt.NDArray[np.bool_]) -> None:
    """How the label weights of right and of wrong labels are distributed, ``(N,)`` each."""
    bins = np.linspace(0.0, weights.max(initial=1.0), 41).tolist()
    for kind, mask in {"right" if wrong.any() else "all": ~wrong, "wrong": wrong}.items():
        if mask.any():
            color, name = KINDS[kind]
            share = np.full(int(mask.sum()), 100 / int(mask.sum()))
            axes.hist(weights[mask], bins=bins, weights=share, color=color, alpha=0.65, label=f"{name} ({share.size})")
    axes.set(xlabel="learned weight of the label", ylabel="samples of the kind, %")
    axes.margins(y=0.35)  # room for the legend, above all bars
    if len(weights):
        axes.legend(frameon=False, loc="upper center")


def draw_course(axes: Axes, epochs: Sequence[int], means: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The label weight by epoch and kind of label (see `KINDS`): the mean and the range of the seeds' means."""
    for kind, seeds in means.items():
        values = np.array(seeds)
        color, name = KINDS[kind]
        axes.plot(epochs, values.mean(0), ".-", color=color, label=name, ms=4)
        axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="epoch", ylabel="mean weight of the label")
    axes.legend(frameon=False)


def weights_chart(seeds: Sequence[Arrays], title: str = "") -> Figure:
    """The label weights of the labeled samples of all seeds together; wider with a title."""
    weights = np.concatenate([seed["weights"][seed["label"] != UNLABELED, 0] for seed in seeds])
    noisy = np.concatenate([seed["noisy"][seed["label"] != UNLABELED] for seed in seeds])
    figure, axes = new_chart((7.5, 3.0) if title else (WIDE, 2.8), title=title)
    draw_histogram(axes, weights, noisy)
    return figure


def noise_auc(
    weights: npt.NDArray[np.float32], label: npt.NDArray[np.int64], noisy: npt.NDArray[np.bool_]
) -> float | None:
    """The AUC of a low weight of the label as a sign of a wrong (noisy) one; ``None`` if all or none are wrong."""
    known = label != UNLABELED
    if not noisy.any() or noisy[known].all():
        return None
    return round(float(roc_auc_score(noisy[known], -weights[known])), 6)


def wrong_labels(seeds: Sequence[Arrays], digits: int) -> str:
    """How well the wrong labels were found, in words; the AUC with so many digits."""
    areas = [noise_auc(seed["weights"][:, 0], seed["label"], seed["noisy"]) for seed in seeds]
    known = [area for area in areas if area is not None]
    if known:
        return f"finds wrong labels with AUC {mean_and_deviation(known, digits)}"
    if any(seed["noisy"].any() for seed in seeds):
        return "every label is wrong"
    return "no label is wrong" if knows_wrong(seeds) else "which labels are wrong is not known"


def knows_wrong(seeds: Sequence[Arrays]) -> bool:
    """Whether it is known which labels are wrong; shown samples keep their true class if it is known."""
    return any(seed["noisy"].any() or ("shown_true" in seed and seed["shown_true"].max() >= 0) for seed in seeds)


def teachers_chart(method: str, teachers: Sequence[str], seeds: Sequence[Arrays]) -> Figure:
    """By true class, how often label and teachers are right, and below it how much a method listens to each of them."""
    true, weights = (np.concatenate([seed[name] for seed in seeds]) for name in ("true", "weights"))
    said = np.concatenate([np.column_stack([seed["label"], seed["teachers"]]) for seed in seeds])
    classes = np.unique(true[true >= 0])
    right, listens = (
        np.stack([values[true == c].mean(0) for c in classes], axis=1) for values in (said == true[:, None], weights)
    )
    figure = Figure(figsize=(7.5, 1.8 + 0.6 * len(right)), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    _draw_cells(top, 100 * right, 100.0, "{:.0f}", "who is right: share of the training samples of a class, %")
    _draw_cells(bottom, listens, float(listens.max()), "{:.2f}", "who is listened to: mean learned weight")
    for axes in (top, bottom):
        axes.set_yticks(range(len(right)), ["label", *teachers])
    if len(classes) <= MOST_NUMBERS:
        bottom.set_xticks(range(len(classes)), [str(c) for c in classes])
    bottom.set_xlabel("true class")
    figure.suptitle(method, fontsize=9)
    return figure


def _draw_cells(axes: Axes, values: npt.NDArray[Any], top: float, form: str, title: str) -> None:
    """A row for the label and each teacher, a column for each class; the darker, the more."""
    axes.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if values.shape[1] <= MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > 0.6 * top else "black"
            axes.text(column, row, form.format(value), ha="center", va="center", color=color, fontsize=8)
