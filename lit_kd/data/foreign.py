"""A data module of someone else's, with our splits, noise, indices and meta batches."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lit_kd.data.augmentation import is_random, with_transform_of
from lit_kd.data.base import DataModule
from lit_kd.data.labels import known_names, read_labels
from lit_kd.data.partition import Source
from lit_kd.data.rows import ItemRows
from lit_kd.types import Batch

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class DistillationDataModule(DataModule):
    """Wraps any data module whose training and validation data sets are map-style, of ``(x, y)`` items.

    Data sets, batch size, number of workers and collate function come from its loaders. Inputs go through its
    own transforms and collate function, so mappings and tokenised text work. Splits, noise, indices and the
    order of the training rows are ours. Test and predict loaders are passed through as they are.

    Args:
        inner: The data module to wrap.
        num_classes: Number of classes. Default: `inner.num_classes`, or the highest label plus one.
        meta: Rows of the meta split: a fraction or a count of the validation rows of `inner`; the others
            remain for validation.
        batch_size: Default: that of its training loader.
        num_workers: Default: that of its training loader.
        drop_last: Default: that of its training loader.
        val_train: The validation data set with the training's augmentation, for methods that train on meta rows.
            Default: the validation data set with the `transform` of the training data set, where both have one.
        **shared: Arguments of every data module, see `DataModule`; not `val`.

    Examples:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> rows = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
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
            raise ValueError(
                f"expected a data module to wrap, found {type(inner).__name__}, which is one of lit_kd "
                "already. Use it as it is."
            )
        super().__init__(
            batch_size=batch_size or 1,
            num_workers=num_workers or 0,
            drop_last=bool(drop_last),
            meta=meta,
            val=0,
            **shared,
        )
        self.inner = inner
        self.prepare_data_per_node = inner.prepare_data_per_node
        self._given = {
            "num_classes": num_classes,
            "batch_size": batch_size,
            "num_workers": num_workers,
            "drop_last": drop_last,
        }
        self.val_train = val_train
        self._stages: set[str] = set()
        self._adopt_shapes()
        for hook in HOOKS:
            # Set only where inner has its own: ours would otherwise take the place of the model's.
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
        """Take the data sets out of the wrapped loaders, and read their labels.

        Raises:
            TypeError: If they are not what can be wrapped.
            ValueError: If a meta split is wanted and there are no validation rows.
        """
        self._setup_inner("fit")
        train = _only_loader(self.inner.train_dataloader(), "train")
        self._adopt_loader(train)
        rows, labels = _rows(train, "train")
        source = Source(rows, rows, labels, identity=type(train.dataset).__qualname__.encode())
        val = self.inner.val_dataloader() if is_overridden("val_dataloader", self.inner, DataHooks) else None
        if val not in (None, []):
            held = _only_loader(val, "val")
            source.val, source.val_labels = _rows(held, "val")
            self._augment_meta_rows(source, train, held)
        elif self.meta:
            raise ValueError(
                "expected a val_dataloader of the wrapped data module, to cut the meta split from, found "
                "none. Give it validation rows, or set meta=0 if the method needs no meta split."
            )
        self._adopt_shapes()
        if not hasattr(self, "num_classes"):
            highest = [y.max(initial=-1) for y in (labels, source.val_labels) if y is not None]
            self.num_classes = int(max(highest)) + 1
            self._adopt_shapes()
        return source

    def test_dataloader(self) -> Any:
        """Return the wrapped module's own test loader."""
        self._setup_inner("test")
        return self.inner.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Return the wrapped module's own predict loader, or its test loader if it has none."""
        if not is_overridden("predict_dataloader", self.inner, DataHooks):
            return self.test_dataloader()
        self._setup_inner("predict")
        return self.inner.predict_dataloader()

    def _setup_inner(self, stage: str) -> None:
        if stage not in self._stages:
            self.inner.setup(stage)
            self._stages.add(stage)

    def _adopt_shapes(self) -> None:
        """Take over what the wrapped module knows of its data, now or only once it is set up."""
        for name in ("num_classes", "input_shape", "image_input"):
            value = self._given.get(name)
            value = getattr(self.inner, name, None) if value is None else value
            if value is not None:
                setattr(self, name, value)
        names = getattr(self.inner, "class_names", None)
        if names is not None and hasattr(self, "num_classes"):
            self.class_names = known_names(names, self.num_classes)

    def _adopt_loader(self, loader: DataLoader[Any]) -> None:
        if self._given["batch_size"] is None:
            if loader.batch_size is None:
                raise ValueError(
                    "expected a train_dataloader with a batch_size, found one with a batch sampler of its "
                    "own. Set batch_size of the wrapper."
                )
            self.batch_size = loader.batch_size
        if self._given["num_workers"] is None:
            self.num_workers = loader.num_workers
        if self._given["drop_last"] is None:
            self.drop_last = loader.drop_last
        if not isinstance(loader.sampler, (RandomSampler, SequentialSampler, DistributedSampler)):
            warnings.warn(
                f"the training loader's {type(loader.sampler).__name__} is not used: rows are drawn uniformly, each "
                "once an epoch",
                stacklevel=2,
            )

    def _augment_meta_rows(self, source: Source, train: DataLoader[Any], val: DataLoader[Any]) -> None:
        """Meta rows that are trained on must look like training rows, or they cannot speak for them."""
        if self.val_train is not None:
            if len(self.val_train) != len(val.dataset):  # type: ignore[arg-type]
                raise ValueError(
                    f"expected val_train to hold the {len(val.dataset)} validation rows, "  # type: ignore[arg-type]
                    f"found {len(self.val_train)} rows"
                )
            augmented = self.val_train
        else:
            augmented = with_transform_of(train.dataset, val.dataset)
        if augmented is not None:
            source.val_train = ItemRows(augmented, train.collate_fn)
        elif is_random(train.dataset) and not is_random(val.dataset):
            source.unlike = (
                "expected meta rows with the training's augmentation, as they are trained on: found random training "
                "items and fixed validation items. Pass val_train to DistillationDataModule, the validation data set "
                "with the training's augmentation, or choose a rule that does not train on meta rows"
            )

    def _call_hook(self, hook: str, batch: Any, *args: Any) -> Any:
        """Give the wrapped module the ``(x, y)`` that its hook expects, and put the index back."""
        if isinstance(batch, dict) and all(isinstance(part, Batch) for part in batch.values()):
            return {name: self._call_hook(hook, part, *args) for name, part in batch.items()}
        if not isinstance(batch, Batch):
            return getattr(self.inner, hook)(batch, *args)
        x, y = getattr(self.inner, hook)((batch.x, batch.y), *args)
        index = batch.index
        if index is not None and hook == "transfer_batch_to_device":
            index = index.to(args[0])
        return Batch(x, y, index)


def _only_loader(loaders: Any, name: str) -> DataLoader[Any]:
    """Return the one map-style loader, given by itself or as a list of one."""
    if isinstance(loaders, (list, tuple)) and len(loaders) == 1:
        loaders = loaders[0]
    if not isinstance(loaders, DataLoader):
        found = type(loaders).__name__ + (f" of {len(loaders)}" if isinstance(loaders, (list, dict)) else "")
        raise TypeError(
            f"expected {name}_dataloader of the wrapped data module to return one DataLoader, found {found}. "
            "Let it return one, e.g. over a ConcatDataset."
        )
    if isinstance(loaders.dataset, IterableDataset) or not hasattr(loaders.dataset, "__len__"):
        raise TypeError(
            f"expected a map-style data set in {name}_dataloader, found {type(loaders.dataset).__name__}, "
            "which is iterable. Rows need a position: give a data set with __getitem__ and __len__."
        )
    return loaders


def _rows(loader: DataLoader[Any], name: str) -> tuple[ItemRows, Any]:
    return ItemRows(loader.dataset, loader.collate_fn), read_labels(loader.dataset, name)
