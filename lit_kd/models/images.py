"""How an image file becomes a model's input in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageInput:
    """Resize the shorter side, crop the centre, scale to ``[0, 1]``, normalise.

    There are 1 (grey) or 3 channels (RGB), each with its mean and standard deviation, and `size` squared pixels.
    """

    channels: int
    size: int
    mean: list[float]
    std: list[float]

    def __post_init__(self) -> None:
        if not (
            (self.channels in (1, 3) and isinstance(self.size, int) and self.size >= 1)
            and len(self.mean) == len(self.std) == self.channels
            and all(isinstance(number, (int, float)) for number in [*self.mean, *self.std])
            and min(self.std) > 0
        ):
            raise ValueError(
                f"expected 1 or 3 channels, a size of 1 or more, and a mean and a positive std for each channel, "
                f"found {asdict(self)}"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one input, ``(C, H, W)``."""
        return self.channels, self.size, self.size

    def transform(self) -> Callable[[Any], Tensor]:
        """Maps a PIL image in the right mode to a float tensor ``(C, H, W)``."""
        from torchvision import transforms as t  # late, as it takes a second

        steps = [t.Resize(self.size), t.CenterCrop(self.size), t.ToTensor(), t.Normalize(self.mean, self.std)]
        transform: Callable[[Any], Tensor] = t.Compose(steps)
        return transform

    def open(self, path: Path) -> Any:
        """Decode a file to a PIL image, grey or RGB as the model expects."""
        from PIL import Image

        with Image.open(path) as image:
            return image.convert("L" if self.channels == 1 else "RGB")


def image_files(folder: Path) -> tuple[list[Path], int]:
    """The images below a folder, in order, and the number of its other files."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no directory at {folder}: expected one with images, in any subfolders")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not images:
        raise FileNotFoundError(f"{folder}: expected images ({', '.join(SUFFIXES)}), found {len(files)} other files")
    return images, len(files) - len(images)
