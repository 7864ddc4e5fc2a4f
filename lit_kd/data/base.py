"""The base of our data modules: splits, label noise, indices and loaders, written once."""

from abc import ABC, abstractmethod
from functools import cache, partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lit_kd.data.labels import Matrix, Positions, check_matrix, draw_weights, transition_matrix
from lit_kd.data.partition import Partition, Source
from lit_kd.data.relabel import relabel
from lit_kd.data.resume import Resumable
from lit_kd.data.rows import Indexed, Move, as_is
from lit_kd.data.sampler import EpochLoader, EpochSampler
from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.models.classes import check_numbers
from lit_kd.models.images import ImageInput
from lit_kd.types import UNLABELED, Batch


class DataModule(Resumable, ABC):
    """Gives every method its batches, `Batch(x, y, index)`.

    It splits the rows into train, meta, val and test, stratified by class, and corrupts training labels only. An index
    is a position in the training set of ``N`` rows; the ``M`` meta, the validation and the test rows follow.

    A method tells its needs by attributes. With `needs_meta`, batches are ``{"train": Batch, "meta": Batch}``; with
    `trains_on_meta`, the meta rows, if any, join the training rows. `rows_of_epoch`, if there is one, runs at the first
    batch of an epoch and returns the indices to draw from, or None for all.

    A subclass implements `load`, and sets `num_classes` and `input_shape`, at the latest in its ``__init__``.

    Args:
        batch_size: Rows per batch and process.
        num_workers: Loader processes; 0 loads in the training process.
        meta: Size of the meta split, trusted and clean: a fraction (0.1) or a count (500).
        val: Size of the validation split, likewise. A data set's own validation rows take its place, and then the meta
            split is cut from them.
        noise: Noise on the training labels, see `lit_kd.data.transition_matrix`. With several labels a sample, each is
            redrawn from {0, 1}.
        noise_rate: Its probability; a symmetrically redrawn label may stay, so fewer labels are wrong.
        pairs: What asymmetric noise makes of each class. Default: the data set's confusable classes, or the next class.
        transition: Noise by a matrix instead: row i holds P(given label = j | true label = i).
        train_on_meta: Train on the meta rows and their clean labels too. Default: as the method asks.
        seed: Seed of split, noise, kept labels and order. Default: the one of `seed_everything`.
        drop_last: Drop the last training batch if it is not full, as BatchNorm may need it.
        labeled: Training rows that keep their label, a fraction or a count of those that have one, stratified by the
            given label; the others get `UNLABELED`. Default: all.
        labels: A table of labels to train with in the place of these, after all noise: see `lit_kd.data.relabel`.
        row_weights: How often to draw each training row, with replacement: a number a row, or ``"balanced"``: all
            classes of the given labels equally often. Default, as ``"uniform"``: each row once an epoch.
        on_device: Keep inputs on the training device, and cut and augment batches there. The inputs must be tensors in
            memory, so not image folders or wrapped data modules.

    Attributes:
        num_classes: Number of classes ``C``.
        task: What labels are, see `lit_kd.terms.tasks`; for ``"multilabel"``, 0 or 1 for each class.
        input_shape: Shape of one input; None if it is unknown or `x` is a mapping.
        class_names: Names of the classes, if they have any.
        image_input: How an image file becomes an input in evaluation; checkpoints carry it.
        split_loader: Of several validation loaders, the position of the one that reads the split val.
    """

    confusable: ClassVar[dict[int, int] | None] = None
    task: str = "classification"
    num_classes: int
    input_shape: tuple[int, ...] | None = None
    class_names: list[str] | None = None
    image_input: ImageInput | None = None
    split_loader: int = 0

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        # int comes first: read from a config, 500 must stay a count and not become the float 500.0.
        meta: int | float = 0.1,
        val: int | float = 0.1,
        noise: Literal["symmetric", "asymmetric"] | None = None,
        noise_rate: float | None = None,
        pairs: dict[int, int] | None = None,
        transition: list[list[float]] | None = None,
        train_on_meta: bool | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        labeled: int | float | None = None,
        labels: str | None = None,
        row_weights: Literal["uniform", "balanced"] | list[float] | None = None,
        on_device: bool = False,
    ) -> None:
        super().__init__()
        if on_device and num_workers:
            raise ValueError(f"expected num_workers=0 with on_device, found {num_workers}: workers have no device")
        if transition is not None and (noise is not None or noise_rate or pairs is not None):
            raise ValueError("expected either transition or noise, noise_rate and pairs, found both: remove one")
        if (noise_rate is None) != (noise is None) and noise_rate != 0:
            raise ValueError(f"expected noise and noise_rate, found {noise!r} and {noise_rate}: set both or neither")
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
        self.labeled = labeled
        self.labels_file = labels
        self.row_weights = row_weights
        self.draws: int | None = None  # rows an epoch, if not all
        self.on_device = on_device
        check_numbers(type(self), vars(self))
        self._move: Move | None = None
        self._partition: Partition | None = None

    @abstractmethod
    def load(self) -> Source:
        """Load the rows and their true labels; called once, in each process."""

    def setup(self, stage: str | None = None) -> None:
        """Load, split, corrupt and hide labels; the first call serves every stage."""
        if self._partition is not None:
            return
        if self.trainer is None:  # else the trainer has done so
            self.prepare_data()
        self._seed = resolve_seed(self.seed)
        source, matrix = self.load(), self.noise_matrix()
        sizes = self.num_classes, self.meta, self.val
        self._partition = Partition(source, *sizes, matrix, self._seed, self.labeled, self.task)
        if self.labels_file is not None:
            relabel(self._partition, self.labels_file, self.num_classes, self.class_names)
        if self.trainer is not None and self.trainer.world_size > 1:
            strategy = self.trainer.strategy
            alike = strategy.broadcast(self.fingerprint) == self.fingerprint
            if not strategy.reduce_boolean_decision(alike):
                raise ValueError(
                    "expected the same rows, labels and split in each process, as indices mean them, found others in "
                    f"{'some' if alike else 'this one'}: list files in one order, and give each process the same seed"
                )

    def noise_matrix(self) -> Matrix | None:
        """The transition matrix of the label noise, ``(C, C)``; with several labels a sample, ``(2, 2)``."""
        several = self.task == "multilabel"
        if several and (self.transition is not None or self.noise == "asymmetric"):
            raise ValueError("expected symmetric noise or none with several labels a sample: set noise='symmetric'")
        if self.transition is not None:
            return check_matrix(self.transition, self.num_classes)
        if self.noise is None:
            return None
        pairs = self.confusable if self.pairs is None else self.pairs
        return transition_matrix(self.noise, 2 if several else self.num_classes, self.noise_rate or 0, pairs)

    @property
    def parts(self) -> Partition:
        """The split rows, known after `setup`."""
        if self._partition is None:
            # AttributeError, so that hasattr and getattr with a default work
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
        """Given labels of training and meta rows, noisy or `UNLABELED`: int64 ``(N + M,)`` or ``(N + M, C)``."""
        return self.parts.given

    @property
    def clean_labels(self) -> Tensor:
        """True labels of the same rows, hidden or not: for diagnostics, never for a loss."""
        return self.parts.clean

    @property
    def noisy(self) -> Tensor:
        """Which rows have a wrong label, bool ``(N + M,)``; a missing label is not wrong."""
        given = self.labels
        wrong = (given != self.clean_labels) & (given != UNLABELED) & ~given.isnan()
        return wrong.flatten(1).any(dim=1) if wrong.dim() > 1 else wrong

    @property
    def knows_truth(self) -> bool:
        """Whether the data module made the noise or hid labels, and so knows the true labels."""
        return self.parts.knows_truth

    @property
    def trusted(self) -> Tensor:
        """Which labels are known to be clean, those of the meta rows: bool ``(N + M,)``."""
        return torch.arange(len(self.labels)) >= self.train_size

    @property
    def fingerprint(self) -> str:
        """Hex hash of data set, split and given labels, which values kept by row belong to."""
        return self.parts.fingerprint

    def require_meta(self, who: str) -> None:
        """Raise a ValueError if there are no meta rows, which `who` needs."""
        if self.meta_size == 0:
            raise ValueError(f"expected a meta split for {who}, found 0 rows. Set the data's meta, e.g. meta=0.1.")

    def train_dataloader(self) -> Any:
        """The shuffled training batches, with meta batches beside them if the method needs those."""
        module = self._method
        needs_meta, trains_on_meta = (bool(getattr(module, name, False)) for name in ("needs_meta", "trains_on_meta"))
        if trains_on_meta and self.train_on_meta is False:
            name = type(module).__name__
            raise ValueError(f"expected no train_on_meta, as {name} trains on the meta rows, found false. Remove it.")
        if needs_meta or self.train_on_meta:
            self.require_meta(type(module).__name__ if needs_meta else "train_on_meta")
        joined = self.meta_size > 0 and (trains_on_meta or bool(self.train_on_meta))
        stream = self.parts.train_rows(joined)
        if self.drop_last and len(stream) < self.batch_size * (1 if self.trainer is None else self.trainer.world_size):
            raise ValueError(
                f"expected with drop_last at least one full batch in each process, found {len(stream)} training rows "
                f"for batch_size {self.batch_size}: lower batch_size, or set drop_last=false"
            )
        draws = self.draws or len(stream)
        weights = draw_weights(self.row_weights, self.labels[: len(stream)].numpy(), self.train_size)
        train = self._shuffled(stream, draws, "order", rows=self._epoch_rows, weights=weights)
        if not needs_meta:
            return train
        meta = self._shuffled(self.parts.meta_rows(), draws, "meta order")  # as many batches
        return CombinedLoader({"train": train, "meta": meta}, mode="min_size")

    def val_dataloader(self) -> Any:
        """The validation batches; no loader if the split is empty, which skips validation."""
        if len(self.parts.val):
            return self.loader(self.parts.val)
        rank_zero_warn("there are no validation rows: no best epoch can be told. Give the data a val split.")
        return []

    def test_dataloader(self) -> Any:
        """The test batches; raises a ValueError if there are none."""
        if not len(self.parts.test):
            raise ValueError("expected test rows, found 0. Give the data a test split.")
        return self.loader(self.parts.test)

    def predict_dataloader(self) -> Any:
        """The test batches: predictions are made for the test rows."""
        return self.test_dataloader()

    def loader(self, rows: Indexed, sampler: EpochSampler | None = None, **options: Any) -> DataLoader[Batch]:
        """Batches of some rows, in their order or, for training, in a sampler's; other options are the loader's."""
        if self.on_device and self.trainer is not None:
            device = self.trainer.strategy.root_device
            if self._move is None:  # all loaders share one copy of each tensor
                self._move = cache(partial(Tensor.to, device=device))
            rows = rows.to(device, self._move)
        own = {
            "batch_size": self.batch_size,
            "drop_last": self.drop_last and sampler is not None,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available() and self._move is None,
        }
        return EpochLoader(rows, sampler=sampler, collate_fn=as_is, **(own | options))

    def teardown(self, stage: str) -> None:
        """Free the device of the inputs."""
        self._move = None

    @property
    def _method(self) -> LightningModule | None:
        return None if self.trainer is None else self.trainer.lightning_module

    def _epoch_rows(self) -> Positions | None:
        rows: Tensor | None = getattr(self._method, "rows_of_epoch", lambda: None)()
        return None if rows is None else rows.cpu().numpy()

    def _shuffled(self, source: Indexed, length: int, purpose: str, **drawing: Any) -> DataLoader[Batch]:
        share: Any = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        sampler = EpochSampler(len(source), length, seed=derive_seed(self._seed, purpose), **share, **drawing)
        return self.loader(source, sampler, place=self.place, name=purpose)


def data_of(module: LightningModule) -> DataModule:
    """The data module of lit_kd that a module is trained on; a ValueError if there is none, or another one."""
    data = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, DataModule):
        raise ValueError(
            f"{type(module).__name__} needs sample indices: pass a data module of lit_kd.data, or wrap your own in "
            f"lit_kd.data.DistillationDataModule(inner); found {'none' if data is None else type(data).__name__}"
        )
    return data
