"""Images: data sets that torchvision reads, held in memory as bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_kd.data.base import DataModule
from lit_kd.data.labels import stratified_split
from lit_kd.data.partition import Source
from lit_kd.data.rows import TensorRows
from lit_kd.models.images import ImageInput

# superclass of each class, as in the data set's own files
CIFAR100_SUPERCLASS = [
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7),
    *(6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10),
    *(16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16),
    *(12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
]


def next_in_group(groups: Sequence[int]) -> dict[int, int]:
    """Pair each class with the next one of its group, the last with the first."""
    members = [[c for c, own in enumerate(groups) if own == group] for group in sorted(set(groups))]
    return {c: after for own in members for c, after in zip(own, own[1:] + own[:1], strict=True)}


class ImageTransform:
    """Turns bytes into normalised floats, with random crops after `padding` and random flips if asked for.

    Draws come from torch's global generator on the CPU, wherever the images are.
    """

    def __init__(self, mean: list[float], std: list[float], padding: int = 0, flip: bool = False) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.white = torch.tensor(255.0)  # no number: a GPU would multiply by its reciprocal and round differently
        self.padding = padding
        self.flip = flip

    def __call__(self, x: Tensor) -> Tensor:
        """Transform bytes ``(B, C, H, W)`` to floats of the same shape."""
        if self.padding:
            x = random_crop(x, self.padding)
        if self.flip:
            x = random_flip(x)
        white, mean, std = (part.to(x.device) for part in (self.white, self.mean, self.std))
        return (x.float() / white - mean) / std


def random_crop(x: Tensor, padding: int) -> Tensor:
    """Shift each image of ``(B, C, H, W)`` by up to `padding` pixels each way, filling with zeros."""
    b, _, h, w = x.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, b)).to(x.device)
    rows = top[:, None] + torch.arange(h, device=x.device)
    columns = left[:, None] + torch.arange(w, device=x.device)
    # the channel axis moves to the end while three index tensors pick image, row and column
    padded = pad(x, (padding,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(b, device=x.device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(x: Tensor) -> Tensor:
    """Mirror each image of ``(B, C, H, W)`` left to right with probability one half."""
    chosen = (torch.rand(len(x)) < 0.5).to(x.device)
    return torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x)


class _TorchvisionDataModule(DataModule):
    """A subclass names its class in `torchvision.datasets` and the folder below the root that holds its files.

    Args:
        root: Directory of the data sets, in torchvision's layout.
        download: Download missing files.
        limit: Use so many rows for train, meta and val, stratified and the same under every seed.
        **shared: See `DataModule`.
    """

    dataset: ClassVar[str]
    folder: ClassVar[str]
    names: ClassVar[str] = ""
    num_classes = 10
    input_shape: tuple[int, int, int]
    mean: ClassVar[list[float]]
    std: ClassVar[list[float]]

    def __init__(self, root: str = "data", download: bool = False, limit: int | None = None, **shared: Any) -> None:
        super().__init__(**shared)
        self.root = root
        self.download = download
        self.limit = limit
        self.augment = False
        self.class_names = self.names.split(", ") if self.names else None
        self.image_input: ImageInput = ImageInput(*self.input_shape[:2], self.mean, self.std)

    def prepare_data(self) -> None:
        """Download the files if asked to."""
        if self.download:
            self._open(download=True)

    def load(self) -> Source:
        """Read all files into memory; a FileNotFoundError or ValueError if some are missing or damaged."""
        pool, test = self._open(train=True), self._open(train=False)
        if self.class_names is None:
            self.class_names = list(pool.classes)
        x, labels = _images(pool), np.asarray(pool.targets)
        if self.limit is not None and self.limit < len(x):
            kept = stratified_split(labels, {"limit": self.limit}, seed=0)["limit"]
            x, labels = x[torch.from_numpy(kept)], labels[kept]
        plain = ImageTransform(self.mean, self.std)
        train = ImageTransform(self.mean, self.std, padding=4, flip=True) if self.augment else plain
        test_rows, test_labels = TensorRows(_images(test), plain), np.asarray(test.targets)
        identity = self.dataset.encode() + x[[0, -1]].numpy().tobytes()
        return Source(TensorRows(x, train), TensorRows(x, plain), labels, test_rows, test_labels, identity=identity)

    def _open(self, **options: bool) -> Any:
        from torchvision import datasets  # late, as it takes a second

        try:
            return getattr(datasets, self.dataset)(self.root, **options)
        except (RuntimeError, ValueError, IndexError, AssertionError, EOFError) as error:
            folder = Path(self.root).expanduser().resolve() / self.folder
            kind = FileNotFoundError if "not found" in str(error) else ValueError  # of the file, or of its checksum
            raise kind(
                f"expected in {folder} the files of {self.dataset}, found some missing or damaged ({error}). Set "
                f"download=true, after removing damaged ones, or root to the directory that holds {self.folder}."
            ) from error


class MNISTDataModule(_TorchvisionDataModule):
    """MNIST: 60000 + 10000 handwritten digits of 1 x 28 x 28 pixels, in ``root/MNIST/raw``."""

    confusable: ClassVar[dict[int, int] | None] = {7: 1, 2: 7, 5: 6, 6: 5, 3: 8}
    input_shape = (1, 28, 28)
    dataset = "MNIST"
    folder = "MNIST/raw"
    names = "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    mean: ClassVar[list[float]] = [0.1307]
    std: ClassVar[list[float]] = [0.3081]


class FashionMNISTDataModule(_TorchvisionDataModule):
    """Fashion-MNIST: 60000 + 10000 pieces of clothing of 1 x 28 x 28 pixels, in ``root/FashionMNIST/raw``."""

    # shirt and T-shirt, pullover and coat, sandal and sneaker, ankle boot for sneaker
    confusable: ClassVar[dict[int, int] | None] = {6: 0, 0: 6, 2: 4, 4: 2, 5: 7, 7: 5, 9: 7}
    input_shape = (1, 28, 28)
    dataset = "FashionMNIST"
    folder = "FashionMNIST/raw"
    names = "T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"
    mean: ClassVar[list[float]] = [0.2860]
    std: ClassVar[list[float]] = [0.3530]


class CIFAR10DataModule(_TorchvisionDataModule):
    """CIFAR-10: 50000 + 10000 photographs of 3 x 32 x 32 pixels, in ``root/cifar-10-batches-py``.

    Args:
        augment: Train on random crops after padding by 4 pixels, and on random mirror images.
        root: Directory of the data sets, in torchvision's layout.
        **shared: As of `MNISTDataModule`.
    """

    # truck for car, bird for plane, deer for horse, cat and dog for each other
    confusable: ClassVar[dict[int, int] | None] = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
    input_shape = (3, 32, 32)
    dataset = "CIFAR10"
    folder = "cifar-10-batches-py"
    names = "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
    mean: ClassVar[list[float]] = [0.4914, 0.4822, 0.4465]
    std: ClassVar[list[float]] = [0.2470, 0.2435, 0.2616]

    def __init__(self, augment: bool = True, root: str = "data", **shared: Any) -> None:
        super().__init__(root=root, **shared)
        self.augment = augment


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: as CIFAR-10, with 100 classes, in ``root/cifar-100-python``.

    Asymmetric noise without pairs turns each class into the next one of its superclass, and the last into the first.
    """

    confusable: ClassVar[dict[int, int] | None] = next_in_group(CIFAR100_SUPERCLASS)
    num_classes = 100
    dataset = "CIFAR100"
    folder = "cifar-100-python"
    names = ""  # read with the files
    mean: ClassVar[list[float]] = [0.5071, 0.4865, 0.4409]
    std: ClassVar[list[float]] = [0.2673, 0.2564, 0.2762]


def _images(dataset: Any) -> Tensor:
    """The images of a torchvision data set as bytes ``(n, C, H, W)``."""
    data = torch.as_tensor(dataset.data)
    return data.unsqueeze(1) if data.ndim == 3 else data.permute(0, 3, 1, 2).contiguous()
