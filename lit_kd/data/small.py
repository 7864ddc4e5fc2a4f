"""Data sets made without a download: scikit-learn's digits and the ALM-KD code's synthetic studies."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from lit_kd.data.base import DataModule
from lit_kd.data.labels import Labels
from lit_kd.data.partition import Source
from lit_kd.data.rows import TensorRows
from lit_kd.models.images import ImageInput

Points = npt.NDArray[Any]


class SmallDataModule(DataModule):
    """The inputs and test rows are the same under every seed, which draws split, label noise and order.

    Args:
        test: Size of the test split, a fraction or a count.
        **shared: See `DataModule`.
    """

    identity: ClassVar[bytes] = b""
    names: ClassVar[Iterable[str]] = ()

    def __init__(self, test: int | float = 0.2, **shared: Any) -> None:
        super().__init__(**shared)
        self.test = test
        self.class_names = list(self.names) or None

    @abstractmethod
    def draw(self) -> tuple[Points, Labels]:
        """Make the inputs, ``(n, ...)``, and their labels, always the same ones; not standardised."""

    def load(self) -> Source:
        """Make the rows."""
        points, labels = self.draw()
        x = torch.from_numpy(points if points.dtype.kind == "i" else points.astype(np.float32))
        rows = TensorRows(x)
        return Source(rows, rows, labels, test_size=self.test, identity=self.identity + x.numpy().tobytes())


class DigitsDataModule(SmallDataModule):
    """scikit-learn's digits: 1797 images of 1 x 8 x 8 pixels in ``[0, 1]``, 10 classes.

    Examples:
        >>> data = DigitsDataModule(noise="symmetric", noise_rate=0.4, seed=0)
        >>> data.setup()
        >>> data.train_size, data.meta_size
        (1078, 180)
    """

    confusable: ClassVar[dict[int, int] | None] = {0: 6, 6: 0, 1: 7, 7: 1, 2: 3, 3: 2, 4: 9, 9: 4, 5: 8, 8: 5}
    num_classes = 10
    input_shape = (1, 8, 8)
    image_input = ImageInput(1, 8, [0.0], [1.0])
    names: ClassVar[Iterable[str]] = "0123456789"
    identity = b"digits"

    def draw(self) -> tuple[Points, Labels]:
        """Read the images from the installed scikit-learn."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images[:, None] / 16, digits.target


class DigitAttributesDataModule(DigitsDataModule):
    """The same images with five labels of 0 or 1: what is true of the digit. Noise must be symmetric."""

    confusable = None
    task = "multilabel"
    num_classes = 5
    names: ClassVar[dict[str, tuple[int, ...]]] = {
        "even": (0, 2, 4, 6, 8),
        "prime": (2, 3, 5, 7),
        "above 4": (5, 6, 7, 8, 9),
        "closed loop": (0, 4, 6, 8, 9),
        "multiple of 3": (0, 3, 6, 9),
    }

    def draw(self) -> tuple[Points, Labels]:
        """Read the images and look up the labels of each digit, ``(n, 5)``."""
        images, digits = super().draw()
        return images, np.stack([np.isin(digits, own) for own in self.names.values()], axis=1).astype(np.int64)


class _SyntheticDataModule(SmallDataModule):
    """Points of the ALM-KD code's synthetic studies.

    Args:
        test: Size of the test split, a fraction or a count.
        meta: Size of the meta split. The GMM's 8100/900/1000 rows for train, validation and test are [code]; there, the
            same 900 serve to learn weights and to select epochs. Here, half of them are meta and half val [ours].
        val: Size of the validation split.
        batch_size: Rows per batch and process.
        **shared: See `DataModule`.
    """

    def __init__(
        self,
        test: int | float = 0.1,
        meta: int | float = 0.045,
        val: int | float = 0.045,
        batch_size: int = 128,
        **shared: Any,
    ) -> None:
        super().__init__(test=test, meta=meta, val=val, batch_size=batch_size, **shared)


class GMMDataModule(_SyntheticDataModule):
    """20 Gaussian clusters at corners of a cube, one a class: 10000 points of 14 features [code].

    The source's noisy variant redraws labels with probability 0.2 (scikit-learn's ``flip_y``), also in validation and
    test. Here, ``noise="symmetric", noise_rate=0.2`` makes the same draw, for training labels only [ours].
    """

    num_classes = 20
    input_shape = (14,)

    def draw(self) -> tuple[Points, Labels]:
        """Draw by scikit-learn's `make_classification`."""
        from sklearn.datasets import make_classification

        features = {"n_features": 14, "n_informative": 14, "n_redundant": 0}
        x, y = make_classification(
            10000, **features, n_classes=20, n_clusters_per_class=1, class_sep=1.0, flip_y=0.0, random_state=42
        )
        return x, y


class SpiralDataModule(_SyntheticDataModule):
    """4 spiral arms around one centre, 1500 points each, in the plane [code]; the seed of the jitter is [ours]."""

    num_classes = 4
    input_shape = (2,)

    def draw(self) -> tuple[Points, Labels]:
        """Draw arm after arm, each from the centre outwards."""
        arms, points = self.num_classes, 1500
        labels = np.repeat(np.arange(arms), points)
        radius = np.tile(np.linspace(0, 4, points), arms)
        turn = np.tile(np.linspace(0, 4.74, points), arms)
        angle = 4.74 * labels + turn + 0.2 * np.random.default_rng(42).standard_normal(len(labels))
        return radius[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1), labels


class BlobsDataModule(_SyntheticDataModule):
    """8 round blobs of unequal spread, 1250 points each, in the plane [code]."""

    num_classes = 8
    input_shape = (2,)
    spreads: ClassVar[list[float]] = [1.4, 2.8, 1.7, 4.0, 2.0, 3.5, 1.5, 2.5]

    def draw(self) -> tuple[Points, Labels]:
        """Draw by scikit-learn's `make_blobs`."""
        from sklearn.datasets import make_blobs

        x, y = make_blobs(10000, centers=8, cluster_std=self.spreads, center_box=(-20.0, 20.0), random_state=20)
        return x, y
