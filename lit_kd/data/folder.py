"""Images in one folder a class, decoded when needed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeAlias

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from lit_kd.data.base import DataModule
from lit_kd.data.labels import Labels
from lit_kd.data.partition import Source
from lit_kd.data.rows import ItemRows
from lit_kd.models.images import HIDDEN, ImageInput, image_files

# ImageNet's statistics, which pretrained networks expect
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]
Sample: TypeAlias = tuple[str, int]  # an image's path and its class


class ImageFolderDataModule(DataModule):
    """Images in ``root/train/CLASS/*`` and ``root/test/CLASS/*``.

    ``root/val`` beside both is the validation split, from which the meta split is cut; without ``root/test`` it is the
    test split. Classes are the subfolders of ``train`` in alphabetical order; hidden files and folders are left out.

    Args:
        root: The directory.
        image_size: Height and width in pixels.
        augment: Train on random crops of random size and on random mirror images.
        **shared: See `DataModule`.
    """

    def __init__(self, root: str = "data", image_size: int = 64, augment: bool = True, **shared: Any) -> None:
        super().__init__(**shared)
        self.root = Path(root).expanduser().resolve()
        self.image_size = image_size
        self.augment = augment
        self.image_input: ImageInput = ImageInput(3, image_size, MEAN, STD)
        self.input_shape = self.image_input.shape
        # read here, as the model is built before setup lists the files
        self.class_names = _subfolders(self.root / "train")
        self.num_classes = len(self.class_names)
        self.test_folder = "test" if (self.root / "test").is_dir() else "val"

    def load(self) -> Source:
        """List the files."""
        _subfolders(self.root / self.test_folder, also="" if self.test_folder == "test" else "test/ or ")
        train, test = self._list("train"), self._list(self.test_folder)
        rows, plain, labels = self._rows(train, self.augment), self._rows(train), _classes(train)
        source = Source(rows, plain, labels, self._rows(test), _classes(test))
        source.ids, source.test_ids = self._names(train), self._names(test)
        if self.test_folder == "test" and (self.root / "val").is_dir():
            val = self._list("val")
            source.val, source.val_labels = self._rows(val), _classes(val)
            source.val_train = self._rows(val, self.augment)
            source.val_ids = self._names(val)
        # file names tell data sets apart; decoded pixels depend on the library
        source.identity = "\n".join([*source.ids, *(source.val_ids or ())]).encode()
        return source

    def _list(self, split: str) -> list[Sample]:
        """The images of a split, with train's numbers of their classes: the split may lack a class."""
        folder = self.root / split
        images, others = image_files(folder)
        number = {name: c for c, name in enumerate(self.class_names or [])}
        found = [path.relative_to(folder).parts[0] for path in images]
        unknown, missing = sorted({*found} - {*number}), sorted({*number} - {*found})
        if unknown:
            raise ValueError(f"expected in {folder} class folders of train, found {unknown}: remove or rename them")
        if others:
            rank_zero_warn(f"{folder}: left out {len(others)} files that are no images by name, as {others[0].name}")
        if missing and split == "train":
            raise ValueError(
                f"expected images in each folder of {folder}, found none in {missing}: fill or remove them"
            )
        if missing:
            rank_zero_warn(
                f"{folder}: no images of class {shorten(', '.join(missing), 80)}: nothing is measured for it"
            )
        return [(str(path), number[name]) for path, name in zip(images, found, strict=True)]

    def _rows(self, samples: list[Sample], augment: bool = False) -> ItemRows:
        return image_rows([path for path, _ in samples], _classes(samples), self.image_input, augment)

    def _names(self, samples: list[Sample]) -> list[str]:
        return [Path(path).relative_to(self.root).as_posix() for path, _ in samples]


def image_rows(files: Sequence[Any], labels: Labels, images: ImageInput, augment: bool = False) -> ItemRows:
    """Images, in files by path or open, with their classes; with `augment`, as random crops and mirror images."""
    from torchvision import transforms as t

    transform = images.transform()
    if augment:
        view = [t.RandomResizedCrop(images.size, scale=(0.25, 1.0)), t.RandomHorizontalFlip()]
        transform = t.Compose([*view, t.ToTensor(), t.Normalize(images.mean, images.std)])
    return ItemRows(_ImageFiles(files, labels.tolist(), images, transform))


class _ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files and their classes."""

    def __init__(
        self, files: Sequence[Any], labels: list[int], images: ImageInput, transform: Callable[[Any], Tensor]
    ) -> None:
        self.files, self.labels, self.images, self.transform = files, labels, images, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        path, label = self.files[row], self.labels[row]
        try:
            image = self.images.open(path)
        except Exception as error:  # for a damaged file, decoders raise anything: SyntaxError, struct.error, ...
            raise ValueError(f"expected an image in {path}, found another file ({error}): replace it") from error
        return self.transform(image), label


def _classes(samples: list[Sample]) -> Labels:
    return np.array([label for _, label in samples], dtype=np.int64)


def _subfolders(folder: Path, also: str = "") -> list[str]:
    """The names of the class folders."""
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    names = [entry.name for entry in inner if entry.is_dir() and not entry.name.startswith(HIDDEN)]
    if not names:
        raise FileNotFoundError(
            f"expected in {folder.parent} a folder {also}{folder.name}/ with one folder of images a class, "
            f"found {'no class folder in it' if folder.is_dir() else 'no such folder'}. "
            "Set root to the directory that holds train/ and test/."
        )
    return names
