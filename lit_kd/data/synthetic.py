"""The data of the ALM-KD code's synthetic studies: a study in seconds, and inputs that can be plotted."""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from lit_kd.data.base import DataModule
from lit_kd.data.partition import Source
from lit_kd.data.rows import TensorRows
from lit_kd.data.splits import Labels

Points = npt.NDArray[np.float64]


class _SyntheticDataModule(DataModule):
    """The points and test rows are the same under every seed, which draws split, label noise and order.

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
        super().__init__(meta=meta, val=val, batch_size=batch_size, **shared)
        self.test = test

    @abstractmethod
    def draw(self) -> tuple[Points, Labels]:
        """Draw the points, ``(n, F)``, and their classes, ``(n,)``, always the same ones."""

    def load(self) -> Source:
        """Draw the points; they are not standardised, as in the source."""
        points, labels = self.draw()
        x = torch.from_numpy(points.astype(np.float32))
        rows = TensorRows(x)
        return Source(rows, rows, labels, test_size=self.test, identity=x.numpy().tobytes())


class GMMDataModule(_SyntheticDataModule):
    """20 Gaussian clusters at corners of a cube, one a class: 10000 points of 14 features [code].

    The source's noisy variant redraws labels with probability 0.2 (scikit-learn's ``flip_y``), also in validation and
    test. Here, ``noise="symmetric", noise_rate=0.2`` makes the same draw, for training labels only [ours].

    Examples:
        >>> data = GMMDataModule(noise="symmetric", noise_rate=0.2, seed=0)
        >>> data.setup()
        >>> data.train_size, data.meta_size
        (8100, 450)
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
