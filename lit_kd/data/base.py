"""The base of our data modules: splits, label noise, indices and loaders, written once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lit_kd.data.noise import check_matrix, transition_matrix
from lit_kd.data.partition import Partition, Source, partition
from lit_kd.data.rows import Indexed, Moved, as_is
from lit_kd.data.sampler import EpochLoader, EpochSampler
from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.models.images import ImageInput
from lit_kd.types import UNLABELED, Batch


class DataModule(LightningDataModule, ABC):
    """Gives every method its batches: `Batch(x, y, index)`.

    The rows are split into train, meta, val and test, stratified by class. Only training labels are
    corrupted. An index is the position in the training set, of ``N`` rows, whatever the order they come in;
    the ``M`` meta rows take the indices after them.

    A method tells what it needs by two attributes, read when its loaders are made: `needs_meta` (batches are
    then ``{"train": Batch, "meta": Batch}``) and `trains_on_meta` (the meta rows join the training rows). If it has a
    `rows_of_epoch`, that is called when an epoch's first batch is drawn: it gives the indices of the training rows to
    draw, which are repeated to the usual length, or None for all.

    A subclass sets `num_classes` and `input_shape`, at the latest in its ``__init__``, and implements `load`.

    Args:
        batch_size: Rows a batch, in each process.
        num_workers: Loader processes; 0 loads in the training process.
        on_device: Keep inputs on the device that trains, if they are tensors in memory, which image folders and
            wrapped data modules do not have. Batches are then cut, and images augmented, where they are needed.
        drop_last: Leave out the last training batch of an epoch if it is not full, as BatchNorm may need it.
        meta: Rows of the meta split, trusted and clean: a fraction (0.1) or a count (500).
        val: Rows of the validation split, likewise. A data set with validation rows of its own keeps those,
            and the meta split is cut from them.
        noise: Noise on the training labels, see `lit_kd.data.transition_matrix`.
        noise_rate: Probability of it.
        pairs: For asymmetric noise: the class that each class is mistaken for. Default: the data set's own
            confusable classes, or the next class.
        transition: Noise by a matrix of its own instead: row i holds P(given label = j | true label = i).
        train_on_meta: Let the meta rows join the training rows, with their clean labels: an honest baseline
            of methods that use them. Default: as the method asks.
        seed: Seed of split, noise, kept labels and order. Default: the one of `seed_everything`.
        labeled: Training rows that keep their label, a fraction (0.1) or a count (500) of those that have one; the
            others' is `UNLABELED`. They are drawn stratified by the given label, noise and all. Meta and validation
            rows keep theirs. Default: all.

    Attributes:
        num_classes: Number of classes ``C``.
        input_shape: Shape of one input, without the batch axis; None if it is unknown or `x` is a mapping.
        class_names: Their names, if they have any.
        image_input: How an image file becomes an input in evaluation, where inputs are images; checkpoints carry it.
    """

    confusable: ClassVar[dict[int, int] | None] = None
    num_classes: int
    input_shape: tuple[int, ...] | None = None
    class_names: list[str] | None = None
    image_input: ImageInput | None = None

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        # int comes first: read from a config, 500 must stay a count and not become the float 500.0.
        meta: int | float = 0.1,
        val: int | float = 0.1,
        noise: Literal["symmetric", "asymmetric"] | None = None,
        noise_rate: float = 0.0,
        pairs: dict[int, int] | None = None,
        transition: list[list[float]] | None = None,
        train_on_meta: bool | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        labeled: int | float | None = None,
        on_device: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"expected batch_size of at least 1, found {batch_size}. Give the rows of one batch.")
        if num_workers < 0:
            raise ValueError(f"expected num_workers of at least 0, found {num_workers}: 0 loads in the main process")
        if on_device and num_workers:
            raise ValueError(
                f"expected num_workers=0 with on_device, found {num_workers}: a worker cannot cut batches on a device"
            )
        if not 0 <= noise_rate <= 1:
            raise ValueError(f"expected noise_rate in [0, 1], found {noise_rate}. It is a probability, e.g. 0.4.")
        if transition is not None and (noise is not None or noise_rate or pairs is not None):
            raise ValueError(
                "expected either transition or noise, noise_rate and pairs, found both. "
                "Remove one: the matrix alone says which noise."
            )
        if noise_rate and noise is None and transition is None:
            raise ValueError(
                f"expected a kind of noise with noise_rate={noise_rate}, found none. "
                "Set noise to 'symmetric' or 'asymmetric'."
            )
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.meta = meta
        self.val = val
        self.noise = noise
        self.noise_rate = noise_rate
        self.pairs = pairs
        self.transition = transition
        self.train_on_meta = train_on_meta
        self.seed = seed
        # read from a config, a count may have become a float: typing takes int | float | None for float | int | None
        self.labeled = labeled
        self.on_device = on_device
        self._moved: Moved = {}
        self._partition: Partition | None = None
        self._seed = 0

    @abstractmethod
    def load(self) -> Source:
        """Load the rows and their true labels; called once, in each process."""

    def setup(self, stage: str | None = None) -> None:
        """Load, split, corrupt and take labels away; the first call does it for every stage."""
        if self._partition is not None:
            return
        if self.trainer is None:  # else it has done so
            self.prepare_data()
        self._seed = resolve_seed(self.seed)
        source = self.load()
        self._partition = partition(
            source, self.num_classes, self.meta, self.val, self.noise_matrix(), self._seed, self.labeled
        )

    def noise_matrix(self) -> npt.NDArray[np.float64] | None:
        """Return the transition matrix ``(C, C)`` of the training labels' noise, or None if there is none."""
        if self.transition is not None:
            return check_matrix(self.transition, self.num_classes)
        if self.noise is None:
            return None
        pairs = self.confusable if self.pairs is None else self.pairs
        return transition_matrix(self.noise, self.num_classes, self.noise_rate, pairs)

    @property
    def parts(self) -> Partition:
        """The split rows, known after `setup`."""
        if self._partition is None:
            # An AttributeError, so that hasattr and getattr with a default tell what is known so far.
            raise AttributeError("expected the data to be split, found it is not yet. Call setup() first.")
        return self._partition

    @property
    def train_size(self) -> int:
        """Number ``N`` of training rows, without meta rows."""
        return len(self.parts.positions["train"])

    @property
    def meta_size(self) -> int:
        """Number ``M`` of meta rows."""
        return len(self.parts.positions["meta"])

    @property
    def labels(self) -> Tensor:
        """Given labels, int64 ``(N + M,)``: of the training rows, noise included, then of the meta rows.

        Where there is none, it is `UNLABELED`.
        """
        return self.parts.given

    @property
    def clean_labels(self) -> Tensor:
        """True labels, int64 ``(N + M,)``, taken away or not: for diagnostics, never for a loss."""
        return self.parts.clean

    @property
    def noisy(self) -> Tensor:
        """Which given labels are wrong, bool ``(N + M,)``: for diagnostics. A missing label is not wrong."""
        return (self.labels != self.clean_labels) & (self.labels != UNLABELED)

    @property
    def knows_truth(self) -> bool:
        """Whether the true labels are known, because the data module made the noise or took labels away."""
        return self.noise_matrix() is not None or bool((self.labels != self.clean_labels).any())

    @property
    def trusted(self) -> Tensor:
        """Which labels are known to be clean, bool ``(N + M,)``: those of the meta rows."""
        return torch.arange(len(self.labels)) >= self.train_size

    @property
    def fingerprint(self) -> str:
        """Hex hash of data set, split and given labels: values kept per sample belong to one of them."""
        return self.parts.fingerprint

    def require_meta(self, who: str) -> None:
        """Refuse an empty meta split.

        Args:
            who: What needs it, for the message.

        Raises:
            ValueError: If there are no meta rows.
        """
        if self.meta_size == 0:
            raise ValueError(
                f"expected a meta split for {who}, found 0 rows. Set the data's argument meta, e.g. meta=0.1."
            )

    def train_dataloader(self) -> Any:
        """Return the shuffled training batches, with meta batches beside them if the method needs those.

        Raises:
            ValueError: If the method asks for meta rows, and there are none or `train_on_meta` forbids it.
        """
        module = None
        if self.trainer is not None:
            module = self.trainer.lightning_module
        needs_meta = bool(getattr(module, "needs_meta", False))
        trains_on_meta = bool(getattr(module, "trains_on_meta", False))
        if trains_on_meta and self.train_on_meta is False:
            raise ValueError(
                f"expected train_on_meta to be true or unset, as {type(module).__name__} trains on the meta "
                "rows, found false. Remove train_on_meta from the data's arguments, or change the method's."
            )
        joined = trains_on_meta or bool(self.train_on_meta)
        if needs_meta or joined:
            self.require_meta(type(module).__name__ if needs_meta or trains_on_meta else "train_on_meta")
        stream = self.parts.train_rows(joined)
        if self.drop_last and len(stream) < self.batch_size * (1 if self.trainer is None else self.trainer.world_size):
            raise ValueError(
                f"expected with drop_last at least one full batch in each process, found {len(stream)} training rows "
                f"for batch_size {self.batch_size}: lower batch_size, or set drop_last=false"
            )
        train = self._shuffled(stream, len(stream), "order", self._epoch_rows)
        if not needs_meta:
            return train
        # As many draws as the training stream, so as many batches: neither outlasts the other.
        meta = self._shuffled(self.parts.meta_rows(), len(stream), "meta order")
        return CombinedLoader({"train": train, "meta": meta}, mode="min_size")

    def val_dataloader(self) -> Any:
        """Return the validation batches; no loader if the split is empty, which skips validation."""
        rows = self.parts.val
        if not len(rows):
            rank_zero_warn("there are no validation rows: no best epoch can be told. Give the data a val split.")
        return self._loader(rows) if len(rows) else []

    def test_dataloader(self) -> Any:
        """Return the test batches.

        Raises:
            ValueError: If there are no test rows.
        """
        rows = self.parts.test
        if not len(rows):
            raise ValueError("expected test rows, found 0. Give the data a test split.")
        return self._loader(rows)

    def predict_dataloader(self) -> Any:
        """Return the test batches: predictions are made for the test rows."""
        return self.test_dataloader()

    def _epoch_rows(self) -> npt.NDArray[np.int64] | None:
        """Which training rows the method wants to draw in this epoch."""
        module = None if self.trainer is None else self.trainer.lightning_module
        ask: Callable[[], Tensor | None] | None = getattr(module, "rows_of_epoch", None)
        rows = None if ask is None else ask()
        return None if rows is None else rows.cpu().numpy()

    def _shuffled(
        self, rows: Indexed, length: int, purpose: str, chosen: Callable[[], npt.NDArray[np.int64] | None] | None = None
    ) -> DataLoader[Batch]:
        replicas, rank = 1, 0
        if self.trainer is not None:
            replicas, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = EpochSampler(len(rows), length, replicas, rank, derive_seed(self._seed, purpose), chosen)
        return self._loader(rows, sampler)

    def teardown(self, stage: str) -> None:
        """Free the device of the inputs."""
        self._moved.clear()

    def _loader(self, rows: Indexed, sampler: EpochSampler | None = None) -> DataLoader[Batch]:
        device = self.trainer.strategy.root_device if self.on_device and self.trainer is not None else None
        return EpochLoader(
            rows if device is None else rows.to(device, self._moved),
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=self.drop_last and sampler is not None,
            num_workers=self.num_workers,
            collate_fn=as_is,
            pin_memory=torch.cuda.is_available() and device is None,
            # Not persistent: the workers of an epoch start from its own seed, so that augmentation can be repeated.
            persistent_workers=False,
        )
