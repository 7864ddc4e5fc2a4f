"""Image data sets that torchvision reads, held in memory as bytes and transformed a batch at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lit_kd.data.base import DataModule
from lit_kd.data.partition import Source
from lit_kd.data.rows import TensorRows
from lit_kd.data.splits import stratified_split
from lit_kd.data.transforms import ImageTransform
from lit_kd.models.images import ImageInput


class _TorchvisionDataModule(DataModule):
    """What the data sets of torchvision share.

    A subclass names its class in `torchvision.datasets`, and where below the root which files are.

    Args:
        root: Directory of the data sets, in torchvision's layout.
        download: Download the files if they are not there.
        limit: Use this many rows for train, meta and val, stratified; they are the same whatever the seed.
        **shared: Arguments of every data module, see `DataModule`.
    """

    dataset: ClassVar[str]
    folder: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    names: ClassVar[tuple[str, ...]] = ()
    input_shape: tuple[int, int, int]
    mean: ClassVar[list[float]]
    std: ClassVar[list[float]]

    def __init__(self, root: str = "data", download: bool = False, limit: int | None = None, **shared: Any) -> None:
        super().__init__(**shared)
        self.root = root
        self.download = download
        self.limit = limit
        self.augment = False
        self.class_names = list(self.names) or None
        self.image_input: ImageInput = ImageInput(self.input_shape[0], self.input_shape[1], self.mean, self.std)

    def prepare_data(self) -> None:
        """Download the files, if that is wanted."""
        if self.download:
            self._open(train=True, download=True)

    def load(self) -> Source:
        """Read both files into memory.

        Raises:
            FileNotFoundError: If they are not there.
        """
        pool, test = self._open(train=True), self._open(train=False)
        if self.class_names is None:
            self.class_names = list(pool.classes)
        x, labels = _images(pool), np.asarray(pool.targets)
        if self.limit is not None and self.limit < len(x):
            kept = stratified_split(labels, {"limit": self.limit}, seed=0)["limit"]
            x, labels = x[torch.from_numpy(kept)], labels[kept]
        mean, std = self.image_input.mean, self.image_input.std
        plain = ImageTransform(mean, std)
        train = ImageTransform(mean, std, padding=4, flip=True) if self.augment else plain
        return Source(
            train=TensorRows(x, train),
            plain=TensorRows(x, plain),
            labels=labels,
            test=TensorRows(_images(test), plain),
            test_labels=np.asarray(test.targets),
            identity=self.dataset.encode() + x[[0, -1]].numpy().tobytes(),
        )

    def _open(self, train: bool, download: bool = False) -> Any:
        from torchvision import datasets  # imported late: it takes a second that other data sets need not pay

        try:
            return getattr(datasets, self.dataset)(self.root, train=train, download=download)
        except (RuntimeError, ValueError, IndexError, AssertionError, EOFError) as error:
            folder = Path(self.root).expanduser().resolve() / self.folder
            # Also of a file that is there but has the wrong checksum; not of a failed download.
            if "not found" not in str(error):
                if download:
                    raise
                raise ValueError(
                    f"expected in {folder} the files of {self.dataset}, found damaged ones ({error}). Replace them, or "
                    "remove them and set download=true."
                ) from error
            found = [name for name in self.files if (folder / name).exists()]
            state = "all, but not all intact" if len(found) == len(self.files) else ", ".join(found) or "none"
            raise FileNotFoundError(
                f"expected in {folder} the files {', '.join(self.files)}, found {state}. "
                "Set download=true, or root to the directory that holds them."
            ) from error


class MNISTDataModule(_TorchvisionDataModule):
    """MNIST: 60000 + 10000 handwritten digits of 1 x 28 x 28 pixels, in ``root/MNIST/raw``."""

    confusable: ClassVar[dict[int, int] | None] = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}
    num_classes = 10
    input_shape = (1, 28, 28)
    dataset = "MNIST"
    folder = "MNIST/raw"
    files = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    names = tuple("0123456789")
    mean: ClassVar[list[float]] = [0.1307]
    std: ClassVar[list[float]] = [0.3081]


class FashionMNISTDataModule(_TorchvisionDataModule):
    """Fashion-MNIST: 60000 + 10000 pieces of clothing of 1 x 28 x 28 pixels, in ``root/FashionMNIST/raw``."""

    # Shirt and T-shirt, pullover and coat, sandal and sneaker, ankle boot taken for a sneaker.
    confusable: ClassVar[dict[int, int] | None] = {6: 0, 0: 6, 2: 4, 4: 2, 5: 7, 7: 5, 9: 7}
    num_classes = 10
    input_shape = (1, 28, 28)
    dataset = "FashionMNIST"
    folder = "FashionMNIST/raw"
    files = MNISTDataModule.files
    names = (
        "T-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    )
    mean: ClassVar[list[float]] = [0.2860]
    std: ClassVar[list[float]] = [0.3530]


class CIFAR10DataModule(_TorchvisionDataModule):
    """CIFAR-10: 50000 + 10000 photographs of 3 x 32 x 32 pixels, in ``root/cifar-10-batches-py``.

    Args:
        augment: Train on random crops, after padding by 4 pixels, and random mirror images.
        root: Directory of the data sets, in torchvision's layout.
        **shared: Arguments of every image data set and of every data module.
    """

    # Truck for car, bird for plane, deer for horse, cat and dog for each other.
    confusable: ClassVar[dict[int, int] | None] = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
    num_classes = 10
    input_shape = (3, 32, 32)
    dataset = "CIFAR10"
    folder = "cifar-10-batches-py"
    files: ClassVar[tuple[str, ...]] = (
        *(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
    )
    names: ClassVar[tuple[str, ...]] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    mean: ClassVar[list[float]] = [0.4914, 0.4822, 0.4465]
    std: ClassVar[list[float]] = [0.2470, 0.2435, 0.2616]

    def __init__(self, augment: bool = True, root: str = "data", **shared: Any) -> None:
        super().__init__(root=root, **shared)
        self.augment = augment


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: as CIFAR-10, with 100 classes, in ``root/cifar-100-python``."""

    # Given asymmetric noise without pairs, a class becomes the next one; names are read with the files.
    confusable: ClassVar[dict[int, int] | None] = None
    num_classes = 100
    dataset = "CIFAR100"
    folder = "cifar-100-python"
    files: ClassVar[tuple[str, ...]] = ("train", "test", "meta")
    names: ClassVar[tuple[str, ...]] = ()
    mean: ClassVar[list[float]] = [0.5071, 0.4865, 0.4409]
    std: ClassVar[list[float]] = [0.2673, 0.2564, 0.2762]


def _images(dataset: Any) -> Tensor:
    """Return the images of a torchvision data set as bytes ``(n, C, H, W)``."""
    data = torch.as_tensor(dataset.data)
    return data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2).contiguous()
