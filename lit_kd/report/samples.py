"""What a method has learned about each training sample: tables, the ranking of distrusted labels, their pictures."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from lit_kd.data import UNLABELED, DataModule
from lit_kd.data.table import SampleTable
from lit_kd.distiller import Distiller
from lit_kd.models.files import write_columns
from lit_kd.report.charts import RIGHT, WRONG
from lit_kd.types import Inputs
from lit_kd.weightings.sample_file import weight_columns

LARGEST = 96
"""Pixels of a picture's longer side; larger pictures are scaled down."""


def write_samples(path: str | Path, table: SampleTable, data: DataModule, overwrite: bool = False) -> None:
    """Write `sample_columns` to a .csv or .parquet file, one row a sample; floats read back exactly."""
    columns = {name: column.tolist() for name, column in sample_columns(table, data).items()}
    write_columns(Path(path), columns, overwrite)


def sample_columns(table: SampleTable, data: DataModule) -> dict[str, Tensor]:
    """What was learned about the training samples, columns ``(N,)``; a ValueError if the table belongs to other data.

    They are index, label (-1 where missing), label_weight, teacher_weight (teacher_weight_0, ... for several teachers),
    clean_probability if the method estimates it, and clean_label and is_noisy if the data module knows the truth.
    """
    table.check(len(data.labels), data.fingerprint)
    rows = slice(data.train_size)
    weights = table["weights"][rows]
    found = {"index": torch.arange(data.train_size)} | ({"label": data.labels[rows]} if data.labels.dim() == 1 else {})
    found |= dict(zip(weight_columns(weights.shape[1] - 1), weights.T, strict=True))
    if "clean_probability" in table:
        found["clean_probability"] = table["clean_probability"][rows]
    if data.knows_truth:
        found |= {"clean_label": data.clean_labels[rows]} if data.labels.dim() == 1 else {}
        found["is_noisy"] = data.noisy[rows]
    return found


def learned(model: object) -> SampleTable | None:
    """The table of a method that learns weights for samples of one class each; ``None`` for others."""
    table = getattr(model, "table", None)
    if not isinstance(table, SampleTable) or model.data.task != "classification":  # type: ignore[attr-defined]
        return None
    return table if "weights" in table else None


def label_weights(model: Distiller) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Of each training sample the label's weight, the given label, and whether that is known to be wrong."""
    assert model.table is not None
    model.table.sync()  # what the method would do next
    rows = slice(model.data.train_size)
    weights: npt.NDArray[np.float32] = model.table["weights"][rows, 0].float().cpu().numpy()
    return weights, model.data.labels[rows].numpy(), model.data.noisy[rows].numpy()


@dataclass(frozen=True)
class Suspect:
    """A training sample, and what is believed about it."""

    index: int
    label: int
    believed: int  # the student's most probable class
    probability: float  # of that class
    weight: float  # the learned weight of the label
    distrust: float  # from 0 (the label is believed) to 1
    true: int  # the true class if it is known, else `UNLABELED`


def distrust(table: SampleTable, size: int) -> Tensor:
    """How little the labels of the first rows are believed, ``(size,)``, in [0, 1].

    This is 1 - ``clean_probability`` if the method estimates it, else 0 for the largest weight and 1 for weight 0.
    """
    if "clean_probability" in table:
        return (1 - table["clean_probability"][:size]).clamp(0, 1)
    weights = table["weights"][:size, 0]
    return 1 - weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)


def most_distrusted(table: SampleTable, data: DataModule, count: int | None = None) -> Tensor:
    """Indices of the labeled training samples, the most distrusted first; the lighter label breaks ties."""
    size = data.train_size
    value, weight = distrust(table, size).cpu().numpy(), table["weights"][:size, 0].cpu().numpy()
    order = torch.from_numpy(np.lexsort((weight, -value)))
    return order[data.labels[order] != UNLABELED][:count]


def suspects(table: SampleTable, data: DataModule, index: Tensor, logits: Tensor) -> list[Suspect]:
    """What is believed about the samples of an index, ``(n,)``, given the student's logits for them, ``(n, C)``."""
    probability, believed = logits.float().softmax(-1).max(-1)
    true = data.clean_labels[index] if data.knows_truth else torch.full_like(index, UNLABELED)
    weight, doubt = table["weights"][:, 0].cpu()[index], distrust(table, data.train_size).cpu()[index]
    columns = (index, data.labels[index], believed, probability, weight, doubt, true)
    return [Suspect(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def any_distrusted(found: Sequence[Suspect]) -> bool:
    """Whether any of the samples is distrusted; early in a training none is."""
    return any(one.distrust > 1e-6 for one in found)


def class_name(names: Sequence[str] | None, label: int) -> str:
    """The name of a class, or its number."""
    return names[label] if names else str(label)


def as_pictures(x: Inputs, largest: int = LARGEST) -> npt.NDArray[np.uint8] | None:
    """Inputs as pictures ``(n, H, W, 3)``, each with its full range of brightness; ``None`` if they are not pictures.

    Pictures are tensors ``(n, 1, H, W)`` or ``(n, 3, H, W)``, normalised in any way. The longer side gets at most
    ``largest`` pixels.
    """
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 2:
        return None
    scale = largest / max(x.shape[2:])
    x = x.float().cpu()
    if scale < 1:
        size = [max(1, round(side * scale)) for side in x.shape[2:]]
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    x = (x - low) / (high - low).clamp(min=1e-12)
    shown: npt.NDArray[np.uint8] = (255 * x).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return shown


def distrusted_by(model: Distiller, count: int) -> tuple[list[Suspect], npt.NDArray[np.uint8] | None]:
    """The training samples that a method distrusts most, and their pictures; each process must call it."""
    assert model.table is not None
    index = most_distrusted(model.table, model.data, count)
    if not len(index):
        return [], None
    rows = model.data.parts.rows(index)
    logits = model.predict_rows(rows, teachers=False).student.logits.cpu()
    return suspects(model.table, model.data, index, logits), as_pictures(rows.rows.fetch(rows.positions.tolist()))


def contact_sheet(
    pictures: npt.NDArray[np.uint8], found: Sequence[Suspect], names: Sequence[str] | None, title: str
) -> bytes:
    """A PNG of n pictures ``(n, H, W, 3)`` side by side, below a title, each above what is believed of it.

    Where the truth is known, wrong labels have a red frame and right ones a blue one.
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
        picture = ImageOps.pad(Image.fromarray(pixels), (LARGEST, LARGEST), Image.Resampling.NEAREST, color)
        sheet.paste(ImageOps.expand(picture, edge, color), (x, y))
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
