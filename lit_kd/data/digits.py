"""The handwritten digits that ship with scikit-learn: a study in seconds, without a download."""

from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch

from lit_kd.data.base import DataModule
from lit_kd.data.partition import Source
from lit_kd.data.rows import TensorRows
from lit_kd.models.images import ImageInput


class DigitsDataModule(DataModule):
    """scikit-learn's digits: 1797 images of 1 x 8 x 8 pixels in ``[0, 1]``, 10 classes.

    Args:
        test: Size of the test split, a fraction or a count; its rows are the same under every seed.
        **shared: See `DataModule`.

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

    def __init__(self, test: int | float = 0.2, **shared: Any) -> None:
        super().__init__(**shared)
        self.test = test
        self.class_names = list(self.names)

    def load(self) -> Source:
        """Read the images from the installed scikit-learn."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        x = torch.from_numpy(digits.images.astype(np.float32) / 16).unsqueeze(1)
        rows = TensorRows(x)
        return Source(rows, rows, digits.target, test_size=self.test, identity=b"digits" + x.numpy().tobytes())


class DigitAttributesDataModule(DigitsDataModule):
    """The same images with five labels of 0 or 1: what is true of the digit. Noise must be symmetric.

    Examples:
        >>> data = DigitAttributesDataModule(seed=0)
        >>> data.setup()
        >>> data.labels.shape, data.class_names[1]
        (torch.Size([1258, 5]), 'prime')
    """

    confusable = None
    multilabel = True
    num_classes = 5
    names: ClassVar[dict[str, tuple[int, ...]]] = {
        "even": (0, 2, 4, 6, 8),
        "prime": (2, 3, 5, 7),
        "above 4": (5, 6, 7, 8, 9),
        "closed loop": (0, 4, 6, 8, 9),
        "multiple of 3": (0, 3, 6, 9),
    }

    def load(self) -> Source:
        """Read the images and look up the labels of each digit."""
        source = super().load()
        source.labels = np.stack([np.isin(source.labels, own) for own in self.names.values()], axis=1).astype(np.int64)
        return source
