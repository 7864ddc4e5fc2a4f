"""Somebody else's data module with our splits, noise, indices and meta batches."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from lit_kd.data import item_labels, items
from lit_kd.data.base import DataModule
from lit_kd.data.labels import TaskName
from lit_kd.data.partition import Source
from lit_kd.data.rows import Indexed, ItemRows, as_is, padded
from lit_kd.data.sampler import EpochSampler
from lit_kd.models.checkpoint import known_names
from lit_kd.types import Batch, label_name

HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class DistillationDataModule(DataModule):
    """Wraps any data module whose training and validation data sets are map-style.

    Its loaders give rows, batches, loader processes and collate functions, so tokenised text works. Splits, noise,
    indices and the order of the training rows are ours. Test and predict loaders stay its own. Each fit sets it up
    anew. What of a loader cannot be kept is refused, and a batch whose labels are not those of its rows, too.

    Args:
        inner: The data module to wrap.
        task: What labels are, see `lit_kd.terms.tasks`. Default: `inner.task`, or classes of samples.
        num_classes: Number of classes. Default: `inner.num_classes`, or the highest label plus one.
        input_shape: Shape of one input, which models built by name may need. Default: `inner.input_shape`.
        meta: Size of the meta split, a fraction or a count of the validation rows of `inner`.
        meta_from: Which of several validation loaders gives the meta rows, its position or name.
        label_key: Where the labels are in a batch, see `lit_kd.types.as_batch`.
        input_key: Where the only input is in a batch, likewise.
        ignore_index: The number in labels of pixels or tokens that count for nothing, such as 255; -100 always is.
        batch_size: Default, as for the next three: as in its training loader.
        num_workers: See `DataModule`.
        drop_last: See `DataModule`.
        row_weights: See `DataModule`; ``"uniform"`` takes the place of a sampler that cannot be kept, too.
        val_train: The validation data set with the training's augmentation, for methods that train on meta rows.
            Default: the validation data set with the `transform` of the training data set, if both have one.
        **shared: See `DataModule`; not `val`.

    Examples:
        >>> import torch
        >>> rows = torch.utils.data.TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
        >>> held = torch.utils.data.TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
        >>> data = DistillationDataModule.from_datasets(rows, held, batch_size=4)
        >>> data.setup()
        >>> data.train_size, data.meta_size, data.num_classes
        (12, 6, 2)
    """

    def __init__(
        self,
        inner: LightningDataModule,
        *,
        task: TaskName | None = None,
        num_classes: int | None = None,
        input_shape: list[int] | None = None,
        meta: int | float = 0.5,
        meta_from: int | str | None = None,
        label_key: str | int | None = None,
        input_key: str | int | None = None,
        ignore_index: int | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
        drop_last: bool | None = None,
        row_weights: Literal["uniform", "balanced"] | list[float] | None = None,
        val_train: Any = None,
        **shared: Any,
    ) -> None:
        items.check_inner(inner, DataModule)
        super().__init__(meta=meta, val=0, num_workers=num_workers or 0, **shared)
        self.inner, self.task = inner, item_labels.task_of(inner, task)
        for name in ("prepare_data_per_node", "allow_zero_length_dataloader_with_multiple_devices"):
            setattr(self, name, getattr(inner, name))
        self.meta_from = meta_from
        self.label_key, self.input_key = label_key, input_key
        told: dict[str, Any] = {"ignore_index": ignore_index, "label_key": label_key, "input_key": input_key}
        self.unpack: Callable[..., Batch] = partial(item_labels.as_theirs_say, task=self.task, **told)
        self.val_train = val_train
        self._given = {"batch_size": batch_size, "num_workers": num_workers}
        self._given_to_train = {"drop_last": drop_last, "row_weights": row_weights}
        self._stages: set[str] = set()
        self._options: dict[str, dict[str, Any]] = {}  # of the loaders
        self._several: Any = None  # the validation loaders, if there are several
        self.num_classes = num_classes or 0  # not known yet
        if input_shape is not None:
            self.input_shape = tuple(input_shape)
        self._adopt_shapes()
        for hook in HOOKS:
            # set only where inner has its own: ours would otherwise replace the model's
            if is_overridden(hook, inner, DataHooks):
                if isinstance(label_key, int) and label_key != 1:
                    raise ValueError(f"expected (x, y) for {hook}, found label_key {label_key}: let items be pairs")
                setattr(self, hook, partial(self._hook, hook))

    @classmethod
    def from_loaders(cls, train: Any, val: Any = None, test: Any = None, **options: Any) -> "DistillationDataModule":
        """Wrap loaders; `options` are those of the wrapper."""
        inner = LightningDataModule()
        for name, loaders in (("train", train), ("val", val), ("test", test)):
            if loaders is not None:
                setattr(inner, f"{name}_dataloader", partial(as_is, loaders))
        return cls(inner, **options)

    @classmethod
    def from_datasets(  # type: ignore[override]  # other options follow
        cls, train_dataset: Any, val_dataset: Any = None, test_dataset: Any = None, batch_size: int = 64, **options: Any
    ) -> "DistillationDataModule":
        """Wrap data sets; `options` are those of the wrapper."""
        datasets = train_dataset, val_dataset, test_dataset
        return cls(LightningDataModule.from_datasets(*datasets, None, batch_size), **options)

    def prepare_data(self) -> None:
        """Prepare the wrapped data."""
        self.inner.trainer = self.trainer
        self.inner.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the wrapped data, for training in any case, and split: anew for each training and validation."""
        self.inner.trainer = self.trainer
        if self.trainer is not None and self.trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            raise ValueError(
                "expected rows that stay the same, found reload_dataloaders_every_n_epochs: set it to 0, or train "
                "without the wrapper"
            )
        if stage not in ("test", "predict"):
            self._stages.discard("fit")
            self._partition = None
        super().setup(stage)
        if stage in ("test", "predict"):
            self._setup_inner(stage)

    def teardown(self, stage: str) -> None:
        """Let the wrapped data clean up."""
        self._stages.discard(stage)
        self.inner.teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        """Let the wrapped data clean up."""
        self.inner.on_exception(exception)

    def state_dict(self) -> dict[str, Any]:
        """The state of the wrapped data, and where the epoch is."""
        return {"inner": self.inner.state_dict(), "place": super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the wrapped data, on which its rows may depend."""
        self.inner.load_state_dict(state_dict["inner"])
        super().load_state_dict(state_dict["place"])
        before, self._partition = self._partition, None
        if before is None:
            return
        super().setup()
        used = self.trainer is not None and self.trainer.train_dataloader is not None
        if used and self.fingerprint != before.fingerprint:
            raise ValueError(
                "expected the rows that the method was set up with, found others by the state of the wrapped data: "
                "restore it before fit, by load_state_dict"
            )

    def load(self) -> Source:
        """Take the data sets out of the wrapped loaders and read their labels."""
        self._setup_inner("fit")
        redrawn = self._given_to_train["row_weights"] is not None
        train = items.read_loader(self.inner.train_dataloader(), "train", redrawn)
        self._adopt(train)
        rows, given = self._items(train, "train")
        soft = self.task == "classification" and given.is_floating_point()
        labels = item_labels.class_numbers(given) if soft else given.numpy()
        source = Source(rows, rows, labels, identity=type(train.dataset).__qualname__.encode())
        if soft:
            source.soft = given
            source.identity += given.numpy().tobytes()
            source.unlike = (
                "expected class numbers as labels of training rows where meta rows join them, found soft labels: "
                "choose a rule that does not train on meta rows"
            )
        loaders = self.inner.val_dataloader() if is_overridden("val_dataloader", self.inner, DataHooks) else None
        named = items.by_name(loaders)
        self._several, self.split_loader = (loaders, -1) if len(named) > 1 else (None, 0)  # -1: none is ours
        loader = items.loader_of_meta(named, self.meta_from, self.meta)
        if loader is not None:
            self.split_loader = 0 if self.meta_from is None else list(named).index(self.meta_from)
            val = items.read_loader(loader, "val")
            items.check_disjoint(train.dataset, val.dataset)
            items.check_classes(train=train, val=val)
            self._options["val"] = val.options | {key: given for key, given in self._given.items() if given is not None}
            held, own = self._items(val, "val")
            source.val, source.val_labels = held, own.numpy()
            if self.task == "tokens":
                both = padded([given, own]).numpy()  # a table of one width
                source.labels, source.val_labels = both[: len(given)], both[len(given) :]
            items.augment_meta_rows(source, rows, held, self.val_train)
        if not self.num_classes and getattr(self.inner, "num_classes", None) is None:
            self.num_classes = item_labels.classes_of((given, source.val_labels), self.task)
        self._adopt_shapes()
        return source

    def val_dataloader(self) -> Any:
        """The validation batches; of several loaders, those that give no meta rows stay the wrapped module's own."""
        if self._several is None:
            return super().val_dataloader()
        ours = {} if self.meta_from is None else {self.meta_from: super().val_dataloader()}
        loaders = items.by_name(self._several) | ours
        return loaders if isinstance(self._several, dict) else list(loaders.values())

    def test_dataloader(self) -> Any:
        """The wrapped module's own test loader."""
        self._setup_inner("test")
        loaders = self.inner.test_dataloader()
        items.check_classes(train=self._partition and self._partition.source.train, test=loaders)
        return loaders

    def predict_dataloader(self) -> Any:
        """The wrapped module's own predict loader, or else its test loader."""
        if not is_overridden("predict_dataloader", self.inner, DataHooks):
            return self.test_dataloader()
        self._setup_inner("predict")
        return self.inner.predict_dataloader()

    def loader(self, rows: Indexed, sampler: EpochSampler | None = None, **options: Any) -> DataLoader[Batch]:
        """As in the base, with the settings of the wrapped loader."""
        options = self._options["val" if rows is self.parts.val else "train"] | options
        if not options.get("num_workers", self.num_workers):
            options = {key: value for key, value in options.items() if key not in items.WORKERS}
        return super().loader(rows, sampler, **options)

    def _setup_inner(self, stage: str) -> None:
        if stage not in self._stages:
            self.inner.setup(stage)
            self._stages.add(stage)

    def _adopt_shapes(self) -> None:
        """Take over what the wrapped module knows of its data so far."""
        for name in ("num_classes", "input_shape", "image_input"):
            value = getattr(self.inner, name, None)
            if value is not None and not getattr(self, name):
                setattr(self, name, value)
        if self.num_classes:
            self.class_names = known_names(getattr(self.inner, "class_names", None), self.num_classes)

    def _adopt(self, train: items.Loading) -> None:
        """Take over what the training loader says, unless the user says otherwise."""
        found = train.options | {"row_weights": train.weights}
        for name, given in (self._given | self._given_to_train).items():
            setattr(self, name, found[name] if given is None else given)
        if self.batch_size is None:
            raise ValueError(
                "expected train_dataloader with a batch_size, found one with a batch sampler of its own: set batch_size"
            )
        self.draws = train.draws if self._given_to_train["row_weights"] is None else None
        self._options["train"] = {key: found[key] for key in items.WORKERS}
        with isolate_rng():
            first = train.collate([train.dataset[0]]) if len(train.dataset) else None
        self.labels_at = label_name(first, self.label_key) if isinstance(first, Mapping) else None

    def _items(self, found: items.Loading, name: str) -> tuple[ItemRows, Tensor]:
        rows = ItemRows(found.dataset, found.collate, self.unpack, own=self.task in ("dense", "tokens"))
        labels = item_labels.read_labels(rows, name, self.task)
        rows.labels = None if self.task == "dense" else labels
        return rows, labels

    def _hook(self, hook: str, batch: Any, *args: Any) -> Any:
        """The wrapped module's hook, then that of who is trained, which Lightning would leave out."""
        found = self._call_hook(hook, batch, *args)
        module = None if self.trainer is None else self.trainer.lightning_module
        return found if module is None or hook != HOOKS[2] else module.on_after_batch_transfer(found, *args)

    def _call_hook(self, hook: str, batch: Any, *args: Any) -> Any:
        """Give the wrapped module the batch that its hook expects, then put the index back."""
        if isinstance(batch, dict) and batch and all(isinstance(part, Batch) for part in batch.values()):
            return {name: self._call_hook(hook, part, *args) for name, part in batch.items()}
        if not isinstance(batch, Batch):
            return getattr(self.inner, hook)(batch, *args)
        given: Any = batch.x, batch.y
        if self.labels_at is not None:
            inputs = batch.x if isinstance(batch.x, Mapping) else {self.input_key: batch.x}
            given = {**inputs, self.labels_at: batch.y}
        x, y, _ = self.unpack(getattr(self.inner, hook)(given, *args))
        # labels of another shape are of mixed rows, which are none of the data's
        index = batch.index if y.shape == batch.y.shape else None
        if index is not None and hook == "transfer_batch_to_device":
            index = index.to(args[0])
        return Batch(x, y, index)
