"""Predictions for image files, read as in the student's own evaluation."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lit_kd.models.checkpoint import SavedStudent
from lit_kd.types import logits_of


class Prediction(NamedTuple):
    """An image file's most probable class and its probability; neither counts where the file is unreadable."""

    file: Path
    label: int
    probability: float
    unreadable: str  # why, else empty


def predict_images(student: SavedStudent, files: Sequence[Path]) -> Iterator[Prediction]:
    """Classify images, on the GPU if there is one; threads decode them."""
    if student.task != "classification":
        raise ValueError(f"expected a student of one class an image, found {student.task}: use lit-kd predict --config")
    images = student.image_input
    if images is None or (student.input_shape or images.shape) != images.shape:
        raise ValueError(
            f"expected a checkpoint that tells how an image becomes its input of shape {student.input_shape}, found "
            f"{images}: train on images of lit_kd.data, or set image_input of your data module"
        )
    transform = images.transform()

    def read(file: Path) -> tuple[Tensor, str]:
        try:
            return transform(images.open(file)), ""
        except Exception as error:  # for a damaged file, decoders raise anything: SyntaxError, struct.error, ...
            return torch.zeros(images.shape), f"{type(error).__name__}: {error}"

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = student.model.to(device)
    with ThreadPoolExecutor() as pool, torch.inference_mode():
        for start in range(0, len(files), 64):
            some = files[start : start + 64]
            inputs, why = zip(*pool.map(read, some), strict=True)
            probability, label = logits_of(model, torch.stack(inputs).to(device)).float().softmax(-1).max(-1)
            yield from map(Prediction, some, label.tolist(), probability.tolist(), why)
