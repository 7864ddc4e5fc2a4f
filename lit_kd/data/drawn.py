"""Data drawn for tasks beside classification, of which some training labels are wrong: made without a download."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.ndimage import shift

from lit_kd.data.labels import Labels
from lit_kd.data.partition import Source
from lit_kd.data.seeds import derive_seed
from lit_kd.data.small import Points, SmallDataModule
from lit_kd.types import IGNORED


class DrawnDataModule(SmallDataModule):
    """The inputs, their true labels and the test rows are the same under every seed, which draws the wrong labels.

    Args:
        wrong: The share of rows whose labels are wrong where they are trained on, in [0, 1].
        test: Size of the test split, a fraction or a count.
        meta: Size of the meta split.
        val: Size of the validation split.
        batch_size: Rows per batch and process.
        **shared: See `DataModule`.
    """

    def __init__(
        self,
        wrong: float = 0.4,
        test: int | float = 0.2,
        meta: int | float = 0.05,
        val: int | float = 0.05,
        batch_size: int = 32,
        **shared: Any,
    ) -> None:
        super().__init__(test=test, meta=meta, val=val, batch_size=batch_size, **shared)
        if not 0 <= wrong <= 1:
            raise ValueError(f"expected wrong, a share of rows, in [0, 1]; found {wrong}")
        self.wrong = wrong

    @abstractmethod
    def spoil(self, labels: Labels, rng: np.random.Generator) -> Labels:
        """Make wrong ones of the labels of some rows, ``(n, ...)``."""

    def load(self) -> Source:
        """Make the rows, and spoil what the training is given."""
        source = super().load()
        rng = np.random.default_rng(derive_seed(self._seed, "wrong labels"))
        rows = rng.permutation(len(source.labels))[: round(self.wrong * len(source.labels))]
        given = source.labels.copy()
        given[rows] = self.spoil(given[rows], rng)
        return replace(source, given=given)


class ShapesDataModule(DrawnDataModule):
    """800 noisy images of 1 x 24 x 24 pixels with two shapes each: a pixel is background, disc or square.

    The masks of wrong rows have discs and squares swapped, are shifted by 3 to 6 pixels on both axes, or are empty.
    """

    task = "dense"
    num_classes = 3
    input_shape = (1, 24, 24)
    names: ClassVar[list[str]] = ["background", "disc", "square"]
    identity = b"shapes"

    def draw(self) -> tuple[Points, Labels]:
        """Draw two shapes of half-width 3 to 5 into each image, the later above; noise has standard deviation 0.7."""
        rng, n, side = np.random.default_rng(42), 800, 24
        masks = np.zeros((n, side, side), dtype=np.int64)
        axis = np.arange(side)
        for _ in range(2):
            kind, half = rng.integers(1, 3, n)[:, None, None], rng.integers(3, 6, n)[:, None, None]
            down, across = (np.abs(np.expand_dims(axis - rng.integers(5, side - 5, (n, 1)), last)) for last in (2, 1))
            inside = np.where(kind == 1, down**2 + across**2 <= half**2, np.maximum(down, across) <= half)
            masks = np.where(inside, kind, masks)
        return (masks > 0)[:, None] + 0.7 * rng.standard_normal((n, 1, side, side)), masks

    def spoil(self, labels: Labels, rng: np.random.Generator) -> Labels:
        """Swap, shift or empty masks, each as often."""
        by = rng.integers(3, 7, (len(labels), 2)) * rng.choice([-1, 1], (len(labels), 2))
        return spoiled(labels, by, rng)


class TagsDataModule(DrawnDataModule):
    """1000 sequences of 12 to 24 symbols out of 24, in which spans of two kinds are tagged: 0, outside, 1 or 2.

    A cue opens a span, symbols 1 and 2 one of the first kind, 3 and 4 one of the second. It covers what follows, at
    most five symbols, up to the next cue or to a stop, symbols 5 to 8. So most tags depend on symbols before. Symbol 0
    pads sequences and counts for nothing. Of wrong rows the kinds are swapped, the spans shifted by one or two places,
    or dropped.
    """

    task = "tokens"
    num_classes = 3
    input_shape = (24,)
    names: ClassVar[list[str]] = ["outside", "first", "second"]
    identity = b"tags"
    symbols = 24

    def draw(self) -> tuple[Points, Labels]:
        """Draw symbols, all equally often, and tag what follows."""
        rng, n, length = np.random.default_rng(42), 1000, 24
        x = rng.integers(1, self.symbols, (n, length))
        x[np.arange(length) >= rng.integers(12, length + 1, (n, 1))] = 0
        tags, kind, left = np.zeros_like(x), np.zeros(n, np.int64), np.zeros(n, np.int64)
        for place in range(length):
            now = x[:, place]
            cue = (now >= 1) & (now <= 4)
            left = np.where(cue | ((now >= 5) & (now <= 8)), 0, left)
            tags[:, place] = np.where(left > 0, kind, 0)
            kind, left = np.where(cue, (now + 1) // 2, kind), np.where(cue, 5, np.maximum(left - 1, 0))
        return x, np.where(x == 0, IGNORED, tags)

    def spoil(self, labels: Labels, rng: np.random.Generator) -> Labels:
        """Swap, shift or drop the spans of a row, each as often."""
        by = rng.integers(1, 3, (len(labels), 1)) * rng.choice([-1, 1], (len(labels), 1))
        counts = labels != IGNORED
        return np.where(counts, spoiled(np.where(counts, labels, 0), by, rng), IGNORED)


class OutliersDataModule(DrawnDataModule):
    """Friedman's first function: 2000 rows of 10 inputs, of which 5 matter, with noise of standard deviation 1.

    The targets are scaled to mean 0 and standard deviation 1, of which the noise has 0.2. Wrong ones are uniform draws
    from 0 to 6: gross errors, nearly all of them too large.
    """

    task = "regression"
    num_classes = 1
    input_shape = (10,)
    identity = b"friedman"

    def draw(self) -> tuple[Points, Labels]:
        """Draw by scikit-learn's `make_friedman1`."""
        from sklearn.datasets import make_friedman1

        x, y = make_friedman1(2000, noise=1.0, random_state=42)
        return x, ((y - y.mean()) / y.std())[:, None].astype(np.float32)

    def spoil(self, labels: Labels, rng: np.random.Generator) -> Labels:
        """Draw other targets."""
        return rng.uniform(0, 6, labels.shape).astype(np.float32)


def spoiled(labels: Labels, by: npt.NDArray[np.int64], rng: np.random.Generator) -> Labels:
    """Classes 0 to 2 of elements, ``(n, ...)``: 1 and 2 swapped, shifted by so many places, or all 0, each as often.

    The shifts, ``(n, axes)``, bring in zeros.
    """
    found = np.zeros_like(labels)
    for row, kind in enumerate(rng.permutation(len(labels)) % 3):
        if kind == 0:
            found[row] = np.array([0, 2, 1])[labels[row]]
        elif kind == 1:
            found[row] = shift(labels[row], by[row], order=0)
    return found
