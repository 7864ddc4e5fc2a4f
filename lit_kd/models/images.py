"""How an image file becomes a model's input in evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
HIDDEN = (".", "__MACOSX", "@eaDir")  # how names of files and folders begin that programs leave, with copies of images


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

    def open(self, path: str | Path | BinaryIO) -> Any:
        """Decode a file to a PIL image, turned as its EXIF says, and grey or RGB as the model expects."""
        from PIL import Image, ImageOps

        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return _as_bytes(image).convert("L" if self.channels == 1 else "RGB")


def _as_bytes(image: Any) -> Any:
    """A PIL image with 8 bits a channel: Pillow's own conversion of longer numbers cuts them off at 255."""
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    pixels, white = np.asarray(image, dtype=np.float64), 1 if image.mode == "F" else 65535
    if not (pixels.min() >= 0 and pixels.max() <= white):
        raise ValueError(
            f"expected grey values in [0, {white}], found {pixels.min():g} to {pixels.max():g}: scale them"
        )
    return Image.fromarray((pixels * 255 / white).round().astype(np.uint8))


def image_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The images below a folder, in order, and its other files, both without hidden ones."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no directory at {folder}: expected one with images, in any subfolders")
    files = []
    for place, inner, names in os.walk(folder, onerror=_refuse, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(HIDDEN)]
        files += [Path(place, name) for name in names if not name.startswith(HIDDEN)]
    images = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
    if not images:
        raise FileNotFoundError(f"{folder}: expected images ({', '.join(SUFFIXES)}), found {len(files)} other files")
    return images, sorted(path for path in files if path.suffix.lower() not in SUFFIXES)


def _refuse(error: OSError) -> None:
    raise error  # of a folder that cannot be read, which os.walk would leave out
