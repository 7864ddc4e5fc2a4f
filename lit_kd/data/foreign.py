"""Somebody else's data module with our splits, noise, indices and meta batches."""

import copy
import operator
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from lit_kd.data.base import DataModule
from lit_kd.data.labels import Labels
from lit_kd.data.partition import Source
from lit_kd.data.rows import ItemRows, equal_inputs
from lit_kd.models.checkpoint import known_names
from lit_kd.types import Batch

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class DistillationDataModule(DataModule):
    """Wraps any data module whose training and validation data sets are map-style, with ``(x, y)`` items.

    Its loaders give data sets, batch size, number of workers and collate function, so tokenised text works. Splits,
    noise, indices and the order of the training rows are ours. Test and predict loaders stay its own.

    Args:
        inner: The data module to wrap.
        num_classes: Number of classes. Default: `inner.num_classes`, or the highest label plus one.
        meta: Size of the meta split, a fraction or a count of the validation rows of `inner`.
        batch_size: Default, as for the next two: as in its training loader.
        num_workers: See `DataModule`.
        drop_last: See `DataModule`.
        val_train: The validation data set with the training's augmentation, for methods that train on meta rows.
            Default: the validation data set with the `transform` of the training data set, if both have one.
        **shared: See `DataModule`; not `val`.

    Examples:
        >>> rows = torch.utils.data.TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
        >>> inner = LightningDataModule.from_datasets(rows, val_dataset=rows, batch_size=4)
        >>> data = DistillationDataModule(inner)
        >>> data.setup()
        >>> data.train_size, data.meta_size, data.num_classes
        (12, 6, 2)
    """

    def __init__(
        self,
        inner: LightningDataModule,
        *,
        num_classes: int | None = None,
        meta: int | float = 0.5,
        batch_size: int | None = None,
        num_workers: int | None = None,
        drop_last: bool | None = None,
        val_train: Any = None,
        **shared: Any,
    ) -> None:
        if isinstance(inner, DataModule):
            raise ValueError(f"found {type(inner).__name__}, which is one of lit_kd already: use it without a wrapper")
        super().__init__(meta=meta, val=0, num_workers=num_workers or 0, **shared)
        self.inner = inner
        self.prepare_data_per_node = inner.prepare_data_per_node
        self.val_train = val_train
        self._given = {"batch_size": batch_size, "num_workers": num_workers, "drop_last": drop_last}
        self._stages: set[str] = set()
        if num_classes is not None:
            self.num_classes = num_classes
        self._adopt_shapes()
        for hook in HOOKS:
            # set only where inner has its own: ours would otherwise replace the model's
            if is_overridden(hook, inner, DataHooks):
                setattr(self, hook, partial(self._call_hook, hook))

    def prepare_data(self) -> None:
        """Prepare the wrapped data."""
        self.inner.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the wrapped data, for training in any case, and split."""
        self.inner.trainer = self.trainer
        super().setup(stage)
        if stage in ("test", "predict"):
            self._setup_inner(stage)

    def teardown(self, stage: str) -> None:
        """Let the wrapped data clean up."""
        self._stages.discard(stage)
        self.inner.teardown(stage)

    def load(self) -> Source:
        """Take the data sets out of the wrapped loaders and read their labels."""
        self._setup_inner("fit")
        train = _only_loader(self.inner.train_dataloader(), "train")
        self._adopt_loader(train)
        rows, labels = ItemRows(train.dataset, train.collate_fn), read_labels(train.dataset, "train")
        source = Source(rows, rows, labels, identity=type(train.dataset).__qualname__.encode())
        loaders = self.inner.val_dataloader() if is_overridden("val_dataloader", self.inner, DataHooks) else None
        if loaders not in (None, []):
            val = _only_loader(loaders, "val")
            source.val, source.val_labels = ItemRows(val.dataset, val.collate_fn), read_labels(val.dataset, "val")
            self._augment_meta_rows(source, train, val.dataset)
        elif self.meta:
            raise ValueError(
                "expected a val_dataloader of the wrapped data module, to cut the meta split from, found none. Give it "
                "validation rows, or set meta=0 if the method needs no meta split."
            )
        if not hasattr(self, "num_classes") and getattr(self.inner, "num_classes", None) is None:
            self.num_classes = 1 + int(max(y.max(initial=-1) for y in (labels, source.val_labels) if y is not None))
        self._adopt_shapes()
        return source

    def test_dataloader(self) -> Any:
        """The wrapped module's own test loader."""
        self._setup_inner("test")
        return self.inner.test_dataloader()

    def predict_dataloader(self) -> Any:
        """The wrapped module's own predict loader, or else its test loader."""
        if not is_overridden("predict_dataloader", self.inner, DataHooks):
            return self.test_dataloader()
        self._setup_inner("predict")
        return self.inner.predict_dataloader()

    def _setup_inner(self, stage: str) -> None:
        if stage not in self._stages:
            self.inner.setup(stage)
            self._stages.add(stage)

    def _adopt_shapes(self) -> None:
        """Take over what the wrapped module knows of its data so far."""
        for name in ("num_classes", "input_shape", "image_input"):
            value = getattr(self.inner, name, None)
            if value is not None and getattr(self, name, None) is None:
                setattr(self, name, value)
        if hasattr(self, "num_classes"):
            self.class_names = known_names(getattr(self.inner, "class_names", None), self.num_classes)

    def _adopt_loader(self, loader: DataLoader[Any]) -> None:
        for name, given in self._given.items():
            setattr(self, name, getattr(loader, name) if given is None else given)
        if self.batch_size is None:
            raise ValueError(
                "expected train_dataloader with a batch_size, found one with a batch sampler of its own: set batch_size"
            )
        if not isinstance(loader.sampler, (RandomSampler, SequentialSampler, DistributedSampler)):
            name = type(loader.sampler).__name__
            rank_zero_warn(f"the training loader's {name} is not used: rows are drawn uniformly, each once an epoch")

    def _augment_meta_rows(self, source: Source, train: DataLoader[Any], val: Any) -> None:
        # meta rows that are trained on must look like training rows, or they cannot speak for them
        augmented = with_transform_of(train.dataset, val) if self.val_train is None else self.val_train
        if augmented is not None:
            if len(augmented) != len(val):
                raise ValueError(f"expected {len(val)} validation rows in val_train, found {len(augmented)} rows")
            source.val_train = ItemRows(augmented, train.collate_fn)
        elif is_random(train.dataset) and not is_random(val):
            source.unlike = (
                "expected meta rows with the training's augmentation, as they are trained on: found random training "
                "items and fixed validation items. Pass val_train to DistillationDataModule, or choose a rule that "
                "does not train on meta rows"
            )

    def _call_hook(self, hook: str, batch: Any, *args: Any) -> Any:
        """Give the wrapped module the ``(x, y)`` that its hook expects, then put the index back."""
        if isinstance(batch, dict) and all(isinstance(part, Batch) for part in batch.values()):
            return {name: self._call_hook(hook, part, *args) for name, part in batch.items()}
        if not isinstance(batch, Batch):
            return getattr(self.inner, hook)(batch, *args)
        x, y = getattr(self.inner, hook)((batch.x, batch.y), *args)
        index = batch.index
        if index is not None and hook == "transfer_batch_to_device":
            index = index.to(args[0])
        return Batch(x, y, index)


def with_transform_of(train: Any, val: Any) -> Any:
    """A copy of `val` with the `transform` of `train`, also through `Subset`; None if they do not both have one."""
    while isinstance(train, Subset):
        train = train.dataset
    if isinstance(val, Subset):
        whole = with_transform_of(train, val.dataset)
        return None if whole is None else Subset(whole, val.indices)
    if getattr(train, "transform", None) is None or not hasattr(val, "transform") or type(train) is not type(val):
        return None
    augmented = copy.copy(val)
    for name in ("transform", "transforms"):  # torchvision's data sets apply the second, made of the first
        if hasattr(train, name):
            setattr(augmented, name, getattr(train, name))
    return augmented


def is_random(dataset: Any) -> bool:
    """Whether items differ when they are read again; the global random numbers are left as they were."""
    with isolate_rng():
        return not all(equal_inputs(dataset[i][0], dataset[i][0]) for i in range(min(2, len(dataset))))


def _only_loader(loaders: Any, name: str) -> DataLoader[Any]:
    """The one map-style loader, given by itself or as a list of one."""
    found = type(loaders).__name__ + (f" of {len(loaders)}" if isinstance(loaders, (list, dict)) else "")
    if isinstance(loaders, (list, tuple)) and len(loaders) == 1:
        loaders = loaders[0]
    if isinstance(loaders, DataLoader):
        if not isinstance(loaders.dataset, IterableDataset) and hasattr(loaders.dataset, "__len__"):
            return loaders
        found = f"one of {type(loaders.dataset).__name__}, whose rows have no position"
    raise TypeError(
        f"expected {name}_dataloader of the wrapped data module to return one DataLoader of a map-style data set, "
        f"found {found}. Let it return one, e.g. over a ConcatDataset; give the data set __getitem__ and __len__."
    )


def read_labels(dataset: Any, name: str) -> Labels:
    """The class number of every ``(x, y)`` item, ``(n,)``: as the data set gives them if a few items agree, or read."""
    n, known = len(dataset), _known(dataset)
    with isolate_rng():  # items may be augmented
        some = np.unique(np.linspace(0, n - 1, num=min(n, 8)).astype(int))
        seen = [_label(dataset, int(i), name) for i in some]
        if known is not None and len(known) == n and known[some].tolist() == seen:
            return known
        walk = track(range(n), description=f"Reading labels of the {name} data", disable=n <= 2000)
        return np.array([_label(dataset, i, name) for i in walk], dtype=np.int64)


def _known(dataset: Any) -> Labels | None:
    """Labels that the data set gives without reading items, in torchvision's attributes or a tensor; or None."""
    if isinstance(dataset, Subset):
        whole = _known(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [labels for labels in map(_known, dataset.datasets) if labels is not None]
        return np.concatenate(parts) if len(parts) == len(dataset.datasets) else None
    if isinstance(dataset, TensorDataset):
        found: Any = dataset.tensors[1] if len(dataset.tensors) == 2 else None
    else:
        found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if found is None:
        return None
    try:
        labels = np.asarray(found.cpu() if isinstance(found, torch.Tensor) else found)
    except ValueError:  # a ragged list, e.g. of boxes
        return None
    return labels.astype(np.int64) if labels.ndim == 1 and labels.dtype.kind in "iu" else None


def _label(dataset: Any, i: int, name: str) -> int:
    item = dataset[i]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        found = type(item).__name__ + (f" of {len(item)}" if isinstance(item, (tuple, list)) else "")
        raise TypeError(f"expected items (x, y) of the {name} data set, found a {found}: return such pairs")
    try:
        return operator.index(item[1])
    except (TypeError, ValueError):
        raise TypeError(
            f"expected class numbers as labels of the {name} data set, found {item[1]!r} in item {i}. "
            "Let its items be (x, y), y an integer."
        ) from None
