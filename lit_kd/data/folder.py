"""Image files in one folder per class, decoded when they are needed."""

from pathlib import Path
from typing import Any

import numpy as np

from lit_kd.data.base import DataModule
from lit_kd.data.partition import Source
from lit_kd.data.rows import ItemRows
from lit_kd.data.splits import Labels
from lit_kd.models.images import ImageInput

# ImageNet's statistics, which pretrained networks expect
MEAN = [0.485, 0.456, 0.406]
STD = [0.229, 0.224, 0.225]


class ImageFolderDataModule(DataModule):
    """Images in ``root/train/CLASS/*`` and ``root/test/CLASS/*``.

    ``root/val`` beside both is the validation split, from which the meta split is cut; without ``root/test`` it is the
    test split. Classes are the subfolders of ``train`` in alphabetical order.

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
        _subfolders(self.root / self.test_folder, also="test/ or ")

    def load(self) -> Source:
        """List the files."""
        train, labels = self._read("train", self.augment)
        plain, _ = self._read("train")
        test, test_labels = self._read(self.test_folder)
        source = Source(train, plain, labels, test, test_labels, identity=self._names(plain))
        if self.test_folder == "test" and (self.root / "val").is_dir():
            source.val, source.val_labels = self._read("val")
            source.val_train, _ = self._read("val", self.augment)
            source.identity += self._names(source.val)
        return source

    def _read(self, name: str, augment: bool = False) -> tuple[ItemRows, Labels]:
        from torchvision import transforms as t
        from torchvision.datasets import ImageFolder

        transform = self.image_input.transform()
        if augment:
            view = [t.RandomResizedCrop(self.image_size, scale=(0.25, 1.0)), t.RandomHorizontalFlip()]
            transform = t.Compose([*view, t.ToTensor(), t.Normalize(MEAN, STD)])
        folder = ImageFolder(str(self.root / name), transform, loader=_read_image)
        known = {c: number for number, c in enumerate(self.class_names or [])}
        unknown = [c for c in folder.classes if c not in known]
        if unknown:
            raise ValueError(f"expected in {folder.root} class folders of train, found {unknown}: remove or rename")
        # A split may lack a class: its own numbering is then another.
        return ItemRows(folder), np.array([known[folder.classes[c]] for c in folder.targets], dtype=np.int64)

    def _names(self, rows: ItemRows) -> bytes:
        """File names, which tell data sets apart; decoded pixels depend on the library."""
        paths = (Path(path).relative_to(self.root).as_posix() for path, _ in rows.dataset.samples)
        return "\n".join(paths).encode()


def _read_image(path: str) -> Any:
    """Decode a file; the decoder's own error would not name it."""
    from torchvision.datasets.folder import default_loader

    try:
        return default_loader(path)
    except (OSError, ValueError, SyntaxError) as error:  # the last of a PNG with a broken chunk
        raise ValueError(f"expected an image in {path}, found another file ({error}): replace it") from error


def _subfolders(folder: Path, also: str = "") -> list[str]:
    """The names of the class folders."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(
            f"expected in {folder.parent} a folder {also}{folder.name}/ with one folder of images a class, "
            f"found {'no class folder in it' if folder.is_dir() else 'no such folder'}. "
            "Set root to the directory that holds train/ and test/."
        )
    return names
