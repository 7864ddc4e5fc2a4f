"""Pictures of what a run has learned, for its directory, its loggers and its report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from lit_kd.models.files import write_whole
from lit_kd.report.distrust import Suspect, class_name

CLEAN, NOISY, PLAIN = "#2a78b5", "#d1495b", "#8a8f98"
# names are no formulas
STYLE: Any = {
    **{"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True},
    "text.parse_math": False,
}
KINDS = {"right": (CLEAN, "label is right"), "wrong": (NOISY, "label is wrong"), "all": (CLEAN, "all labels")}
"""Colour and name of training samples by what is known of their label."""


def to_png(figure: Figure) -> bytes:
    """A figure in 256 colours, which are enough for us, in a third of the bytes."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=160)
    Image.open(drawn).convert("RGB").quantize(dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG that is there whole or not at all."""
    write_whole(path, to_png(figure))


def draw_histogram(axes: Axes, weights: npt.NDArray[np.float32], wrong: npt.NDArray[np.bool_]) -> None:
    """How the weights of right and wrong labels are spread.

    Args:
        axes: Where to draw.
        weights: Of the label, ``(N,)``, of samples that have one.
        wrong: Which labels are known to be wrong, ``(N,)``.
    """
    bins = np.linspace(0.0, weights.max(initial=1.0), 41).tolist()
    for kind, mask in {"right" if wrong.any() else "all": ~wrong, "wrong": wrong}.items():
        if mask.any():
            color, name = KINDS[kind]
            share = np.full(int(mask.sum()), 100 / int(mask.sum()))
            axes.hist(weights[mask], bins=bins, weights=share, color=color, alpha=0.65, label=f"{name} ({share.size})")
    axes.set_xlabel("learned weight of the label")
    axes.set_ylabel("samples of the kind, %")
    ticks = [tick for tick in axes.get_yticks() if tick <= 100]
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend, above all bars
    axes.set_yticks(ticks)
    if len(weights):
        axes.legend(frameon=False, loc="upper center")


def draw_course(axes: Axes, epochs: Sequence[int], means: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """How the mean weights of right and wrong labels went, epoch by epoch.

    Args:
        axes: Where to draw.
        epochs: The epochs, E of them.
        means: For each of `KINDS` that there is, a curve of E values a seed; drawn are their mean and range.
    """
    for kind, seeds in means.items():
        values = np.array(seeds)
        color, name = KINDS[kind]
        axes.plot(epochs, values.mean(0), ".-", color=color, label=name, ms=4)
        axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean weight of the label")
    axes.legend(frameon=False)


def weights_picture(
    title: str,
    weights: npt.NDArray[np.float32],
    wrong: npt.NDArray[np.bool_],
    epochs: Sequence[int],
    means: Mapping[str, Sequence[float]],
) -> Figure:
    """Weights now, left, and their means since the start, right: see `draw_histogram` and `draw_course`."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.0, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_histogram(left, weights, wrong)
        draw_course(right, epochs, {kind: [curve] for kind, curve in means.items()})
        figure.suptitle(title, fontsize=10)
    return figure


def contact_sheet(
    pictures: npt.NDArray[np.uint8], found: Sequence[Suspect], names: Sequence[str] | None, title: str
) -> Image.Image:
    """Samples side by side, each above its index, its given label, the student's class and the label's weight.

    Where the truth is known, wrong labels have a red frame and right ones a blue one.

    Args:
        pictures: ``(n, H, W, 3)``.
        found: The n samples.
        names: Of the classes, where they have any.
        title: Above all.
    """
    cell, edge, line, gap, top = 96, 3, 15, 12, 34
    width, columns = cell + 2 * edge, min(8, max(5, len(found)))
    height = width + 4 * line
    rows = -(-len(found) // columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), top + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    fonts = Path(mpl.get_data_path()) / "fonts" / "ttf"
    plain, bold = (ImageFont.truetype(str(fonts / f"DejaVuSans{kind}.ttf"), 11) for kind in ("", "-Bold"))
    if any(suspect.true >= 0 for suspect in found):
        title += "; red frame: the label is wrong, blue: it is right"
    draw.text((gap, 10), title, "black", bold)
    for number, (suspect, pixels) in enumerate(zip(found, pictures, strict=True)):
        x, y = gap + number % columns * (width + gap), top + number // columns * (height + gap)
        color = "#d5d8dc" if suspect.true < 0 else CLEAN if suspect.true == suspect.label else NOISY
        draw.rectangle((x, y, x + width - 1, y + width - 1), fill=color)
        picture = Image.fromarray(pixels)
        scale = cell / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.NEAREST)
        sheet.paste(picture, (x + (width - size[0]) // 2, y + (width - size[1]) // 2))
        for text, font in (
            (f"#{suspect.index}", plain),
            (f"label: {class_name(names, suspect.label)}", bold),
            (f"student: {class_name(names, suspect.believed)} ({100 * suspect.probability:.0f}%)", plain),
            (f"weight: {suspect.weight:.2f}", plain),
        ):
            while draw.textlength(text, font) > width:
                text = text[:-2] + "…"
            draw.text((x, y + width), text, "black", font)
            y += line
    return sheet


def image_to_png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True)
    return written.getvalue()
