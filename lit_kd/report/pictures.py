"""Pictures of training samples."""

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from lit_kd.report.charts import RIGHT, WRONG
from lit_kd.report.samples import Suspect, class_name
from lit_kd.types import Inputs

LARGEST = 96
"""Pixels of a picture's longer side; larger pictures are scaled down."""


def as_pictures(x: Inputs) -> npt.NDArray[np.uint8] | None:
    """Inputs as pictures ``(n, H, W, 3)``, each with its full range of brightness; ``None`` if they are not pictures.

    Pictures are tensors ``(n, 1, H, W)`` or ``(n, 3, H, W)``, normalised in any way.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 2:
        return None
    scale = LARGEST / max(x.shape[2:])
    x = x.float().cpu()
    if scale < 1:
        size = [max(1, round(side * scale)) for side in x.shape[2:]]
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    x = (x - low) / (high - low).clamp(min=1e-12)
    shown: npt.NDArray[np.uint8] = (255 * x).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return shown


def contact_sheet(
    pictures: npt.NDArray[np.uint8], found: Sequence[Suspect], names: Sequence[str] | None, title: str
) -> bytes:
    """A PNG of samples side by side, each above its index, label, student's class and label weight.

    Where the truth is known, wrong labels have a red frame and right ones a blue one.

    Args:
        pictures: ``(n, H, W, 3)``.
        found: The n samples.
        names: Of the classes, if they have any.
        title: Above all.
    """
    edge, line, gap, top = 3, 15, 12, 34
    width, columns = LARGEST + 2 * edge, min(8, max(5, len(found)))
    height, rows = width + 4 * line, -(-len(found) // columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), top + rows * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    plain, bold = (
        ImageFont.truetype(f"{mpl.get_data_path()}/fonts/ttf/{f}.ttf", 11) for f in ("DejaVuSans", "DejaVuSans-Bold")
    )
    if any(one.true >= 0 for one in found):
        title += "; red frame: the label is wrong, blue: it is right"
    draw.text((gap, 10), title, "black", bold)
    for number, (one, pixels) in enumerate(zip(found, pictures, strict=True)):
        x, y = gap + number % columns * (width + gap), top + number // columns * (height + gap)
        color = "#d5d8dc" if one.true < 0 else RIGHT if one.true == one.label else WRONG
        draw.rectangle((x, y, x + width - 1, y + width - 1), fill=color)
        picture = ImageOps.contain(Image.fromarray(pixels), (LARGEST, LARGEST), Image.Resampling.NEAREST)
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (width - picture.height) // 2))
        for text, font in (
            (f"#{one.index}", plain),
            (f"label: {class_name(names, one.label)}", bold),
            (f"student: {class_name(names, one.believed)} ({100 * one.probability:.0f}%)", plain),
            (f"weight: {one.weight:.2f}", plain),
        ):
            while draw.textlength(text, font) > width:
                text = text[:-2] + "…"
            draw.text((x, y + width), text, "black", font)
            y += line
    return to_png(sheet)


def to_png(image: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    written = io.BytesIO()
    image.save(written, "PNG", optimize=True)
    return written.getvalue()
