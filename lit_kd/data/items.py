"""What loaders of other people's data modules say: rows, and how they are drawn and loaded."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lit_kd.data.labels import Positions
from lit_kd.data.partition import Source
from lit_kd.data.rows import ItemRows, equal_inputs

WORKERS = ("timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor", "persistent_workers", "in_order")
"""Settings of a loader's processes."""


@dataclass
class Loading:
    """How a loader of somebody else draws and loads its rows."""

    dataset: Any  # with the rows that it draws alone
    collate: Callable[[list[Any]], Any]
    options: dict[str, Any]  # further ones of the loader
    weights: list[float] | None = None  # how often it draws each row, with replacement
    draws: int | None = None  # rows an epoch, if not all


def by_name(loaders: Any) -> dict[Any, Any]:
    """Loaders by name or position: one or none, or a dict or list of them."""
    if isinstance(loaders, dict):
        return loaders
    found = [] if loaders is None else loaders if isinstance(loaders, (list, tuple)) else [loaders]
    return dict(enumerate(found))


def loader_of_meta(loaders: dict[Any, Any], which: int | str | None, meta: int | float) -> Any:
    """The validation loader from which to take so many meta rows, if there is any."""
    if which is not None and which not in loaders:
        raise ValueError(f"expected meta_from as one of {list(loaders)}, found {which!r}")
    if len(loaders) > 1 and which is None and meta:
        raise ValueError(
            f"expected meta_from, which of the validation loaders {list(loaders)} gives the meta rows, found None: "
            "set it, or meta=0 if the method needs no meta split"
        )
    if not loaders and meta:
        raise ValueError(
            "expected a val_dataloader of the wrapped data module, to cut the meta split from, found none. Give it "
            "validation rows, or set meta=0 if the method needs no meta split."
        )
    return loaders.get(next(iter(loaders), None) if len(loaders) == 1 else which)


def read_loader(loaders: Any, name: str, redrawn: bool = False) -> Loading:
    """What a loader says; an error if that cannot be kept, unless the rows are `redrawn`, drawn in another way."""
    named = by_name(loaders)
    loader = next(iter(named.values())) if len(named) == 1 else loaders
    if not isinstance(loader, DataLoader):
        found = type(loader).__name__ + (f" of {len(loader)}" if isinstance(loader, (list, tuple, dict)) else "")
    elif isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        found = f"one of {type(loader.dataset).__name__}, whose rows have no position"
    elif loader.batch_sampler is None:
        found = "one whose data set gives whole batches, of rows without a position"
    else:
        if loader.generator is not None or type(loader).__iter__ is not DataLoader.__iter__:
            what = "own __iter__" if loader.generator is None else "generator"
            rank_zero_warn(f"the {name} loader's {what} is not used: order and random numbers follow from the seed")
        return _drawn(loader, name, redrawn)
    raise TypeError(
        f"expected {name}_dataloader of the wrapped data module to return one DataLoader of a map-style data set, "
        f"found {found}. Let it return one, e.g. over a ConcatDataset; give the data set __getitem__ and __len__."
    )


def _drawn(loader: DataLoader[Any], name: str, redrawn: bool) -> Loading:
    batches: Any = loader.batch_sampler
    plain = type(batches) is BatchSampler
    sampler: Any = batches.sampler if plain else batches
    kind, n = type(sampler), len(loader.dataset)  # type: ignore[arg-type]
    options = {key: getattr(loader, key) for key in ("num_workers", *WORKERS)}
    options |= {"batch_size": batches.batch_size if plain else None, "drop_last": plain and batches.drop_last}
    found = Loading(loader.dataset, loader.collate_fn, options)
    if plain and kind in (SubsetRandomSampler, range, list, tuple):
        found.dataset = Subset(loader.dataset, [int(i) for i in getattr(sampler, "indices", sampler)])
        return found
    source = getattr(sampler, "dataset", getattr(sampler, "data_source", ()))
    if kind in (RandomSampler, SequentialSampler, DistributedSampler) and len(source) == n:
        if kind is RandomSampler:
            found.weights = [1.0] * n if sampler.replacement else None
            found.draws = None if sampler.num_samples == n else sampler.num_samples
    elif kind is WeightedRandomSampler and sampler.replacement and len(sampler.weights) == n:
        found.weights, found.draws = sampler.weights.tolist(), sampler.num_samples
    elif not redrawn:
        cure = "give it the rows as a torch.utils.data.Subset"
        if name == "train":
            batch_size = "" if plain else ", and batch_size"
            cure += f", and say how to draw them by row_weights: 'uniform', 'balanced' or a number a row{batch_size}"
        raise ValueError(
            f"expected a {name} loader with one of torch's samplers of rows, found {kind.__name__}: {cure}"
        )
    if name != "train" and (found.weights or found.draws):
        raise ValueError(f"expected each {name} row once, found a {kind.__name__} that draws otherwise: remove it")
    return found


def check_disjoint(train: Any, val: Any) -> None:
    """Refuse validation rows that are training rows of the same data set, also through `Subset` and `ConcatDataset`."""
    for dataset, rows in _leaves(train, np.arange(len(train))):
        for other, held in _leaves(val, np.arange(len(val))):
            shared = np.intersect1d(rows, held) if other is dataset else rows[:0]
            if len(shared):
                raise ValueError(
                    f"expected validation rows that are not trained on, found {len(shared)} rows of the same "
                    f"{type(dataset).__name__} in both, such as row {shared[0]}: split it by torch.utils.data.Subset"
                )


def check_classes(**parts: Any) -> None:
    """Refuse parts, loaders or rows by name, whose data sets call a class number by different names in `classes`."""
    names: dict[int, tuple[str, str]] = {}
    for part, loaders in parts.items():
        for loader in by_name(loaders).values():
            for leaf, _ in _leaves(getattr(loader, "dataset", None), np.arange(0)):
                known = getattr(leaf, "classes", None)
                for c, name in enumerate(known if isinstance(known, (list, tuple)) else ()):
                    first, where = names.setdefault(c, (name, part))
                    if name != first:
                        raise ValueError(
                            f"expected the same classes in one order, found that class {c} is {first!r} in the {where} "
                            f"data and {name!r} in the {part} data: number them alike, those of folders by their names"
                        )


def _leaves(dataset: Any, rows: Positions) -> Iterator[tuple[Any, Positions]]:
    """The data sets that others are made of, each with its rows."""
    if isinstance(dataset, Subset):
        yield from _leaves(dataset.dataset, np.asarray(dataset.indices, dtype=np.int64)[rows])
    elif isinstance(dataset, ConcatDataset):
        for start, part in zip([0, *dataset.cumulative_sizes], dataset.datasets, strict=False):
            inside = (rows >= start) & (rows < start + len(part))  # type: ignore[arg-type]
            yield from _leaves(part, rows[inside] - start)
    else:
        yield dataset, rows


def check_inner(inner: Any, ours: type) -> None:
    """Refuse what cannot be wrapped, or needs no wrapper."""
    if isinstance(inner, ours):
        raise ValueError(f"found {type(inner).__name__}, which is one of lit_kd already: use it without a wrapper")
    if not hasattr(inner, "prepare_data_per_node"):
        found = inner.__name__ if isinstance(inner, type) else type(inner).__name__
        raise TypeError(f"expected a LightningDataModule, found {found}: see from_loaders and from_datasets")


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


def is_random(rows: ItemRows) -> bool:
    """Whether rows differ when they are read again; the global random numbers are left as they were."""
    with isolate_rng():
        return not all(equal_inputs(rows.fetch([i]), rows.fetch([i])) for i in range(min(2, len(rows))))


def augment_meta_rows(source: Source, train: ItemRows, val: ItemRows, augmented: Any = None) -> None:
    """Let meta rows that are trained on look like training rows, or they cannot speak for them; else note why not."""
    if augmented is None:
        augmented = with_transform_of(train.dataset, val.dataset)
    if augmented is not None and len(augmented) != len(val):
        raise ValueError(f"expected {len(val)} validation rows in val_train, found {len(augmented)} rows")
    dataset = val.dataset if augmented is None else augmented
    rows = ItemRows(dataset, train.collate, val.unpack, val.labels, val.own)
    source.val_train = rows
    if augmented is None and is_random(train) and not is_random(rows):
        source.unlike = (
            "expected meta rows with the training's augmentation, as they are trained on: found random training "
            "items and fixed validation items. Pass val_train to DistillationDataModule, or choose a rule that "
            "does not train on meta rows"
        )
