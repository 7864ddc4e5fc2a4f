"""Predictions for image files, read as in the student's own evaluation."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_kd.models.checkpoint import SavedStudent
from lit_kd.models.images import ImageInput
from lit_kd.types import evaluating, logits_of


class Prediction(NamedTuple):
    """An image file's most probable class and its probability, or why it cannot be read and 0."""

    file: Path
    label: int | str
    probability: float


def predict_images(
    student: SavedStudent, files: Sequence[Path], batch_size: int = 64, num_workers: int = 0
) -> Iterator[Prediction]:
    """Classify images, on the GPU if there is one, with ``num_workers`` processes that decode."""
    if student.task != "classification":
        raise ValueError(f"expected a student of one class an image, found {student.task}: use lit-kd predict --config")
    images = student.image_input
    if images is None or (student.input_shape or images.shape) != images.shape:
        raise ValueError(
            f"expected a checkpoint that tells how an image becomes its input of shape {student.input_shape}, found "
            f"{images}: train on images of lit_kd.data, or set image_input of your data module"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = student.model.to(device)
    loader = DataLoader(_Images(files, images), batch_size, num_workers=num_workers, collate_fn=list)
    rest = iter(files)
    with torch.inference_mode(), evaluating(model):
        for batch in loader:
            inputs = [x for x in batch if isinstance(x, Tensor)]
            found: Iterator[tuple[int, float]] = iter(())
            if inputs:
                probability, label = logits_of(model, torch.stack(inputs).to(device)).float().softmax(-1).max(-1)
                found = zip(label.tolist(), probability.tolist(), strict=True)
            for x in batch:
                yield Prediction(next(rest), *(next(found) if isinstance(x, Tensor) else (x, 0.0)))


class _Images(Dataset[Tensor | str]):
    """Inputs ``(C, H, W)``, or why there is no input."""

    def __init__(self, files: Sequence[Path], images: ImageInput) -> None:
        self.files, self.images, self.transform = files, images, images.transform()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.transform(self.images.open(self.files[index]))
        except Exception as error:  # for a damaged file, decoders raise anything: SyntaxError, struct.error, ...
            return f"{type(error).__name__}: {error}"
