"""What the frozen teachers give for the training data, computed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor

from lit_kd.data import DataModule
from lit_kd.data.rows import Indexed, in_memory
from lit_kd.data.table import all_sum
from lit_kd.distiller.checks import check_batch
from lit_kd.distiller.rows_pass import to_device
from lit_kd.teachers.fingerprint import of_all, of_inputs, of_teacher
from lit_kd.teachers.row_store import Array, Indices, Precision, RowFiles, RowStore
from lit_kd.types import UNLABELED, Batch, Outputs

if TYPE_CHECKING:
    from lit_kd.distiller.base import Distiller

READ = 20000
"""How many rows, evenly spread, tell one data set from another, beside what is in memory: all of smaller ones."""
COMPARED = 64
"""How many of them are read again, to find augmentation."""
PROBED = 8
"""How many the teacher is asked about each time, whether it still says what is in the files."""
LOGITS = "logits"


@dataclass
class TeacherCache:
    """Where and how teachers' outputs are kept: each teacher is asked once about each training and meta row.

    Needs data of `lit_kd.data`. The features of `Distiller.teacher_taps` are kept too. ``select`` asks once more, for
    features that are not.

    In a directory, data are told apart by their inputs: all that are in memory, and of those that are read from files
    or a data set of yours 20000 rows, evenly spread. Where there are more, remove the directory after a change of few.

    Attributes:
        where: ``"memory"``, for one training; or a directory, for later ones too: those with the same teacher, inputs
            and precision share its files. ``"none"``: ask in each step.
        dtype: What is kept; float16 halves the size, and rounds to 3 digits.
        plain_view: Where training inputs are augmented, let the teachers see them without, the student with it. Else
            augmented inputs are refused.
    """

    where: str
    dtype: Precision = "float32"
    plain_view: bool = False

    def __post_init__(self) -> None:
        self.where = os.fspath(self.where)
        if not self.where:
            raise ValueError("expected a teacher_cache 'memory', a directory or 'none', found an empty string")
        if self.dtype not in get_args(Precision):
            raise ValueError(f"expected a teacher_cache's dtype of {list(get_args(Precision))}, found {self.dtype!r}")

    @classmethod
    def of(cls, given: str | TeacherCache | Mapping[str, Any] | None) -> TeacherCache:
        """What a user gave: a place, or as a checkpoint and a config hold it, with its options."""
        if isinstance(given, TeacherCache):
            return given
        return cls(**given) if isinstance(given, Mapping) else cls("none" if given is None else given)

    def __bool__(self) -> bool:
        return self.where != "none"


class FillTeacherCache(Callback):
    """Fills a distiller's cache before the training, and lets it go after it; a later one may be of another module."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the module's own hook, which may use it."""
        if getattr(pl_module, "teacher_cache", None) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            module = cast("Distiller", pl_module)
            module.teachers.cache = fill(module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the memory."""
        if getattr(pl_module, "teacher_cache", None):
            cast("Distiller", pl_module).teachers.cache = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Free it where the training fails, too."""
        self.on_fit_end(trainer, pl_module)


class Cached:
    """Teachers' outputs by sample index.

    Args:
        kept: Of each teacher the arrays by name, ``(N + M, ...)``, and the dtypes that it gave them in.
        plain: Gives rows ``(B,)`` as teachers saw them, to compare the first training batch with; ``None``: don't.
    """

    def __init__(
        self, kept: list[dict[str, tuple[Tensor, torch.dtype]]], plain: Callable[[Indices], Batch] | None = None
    ) -> None:
        self._kept = kept
        self._plain = plain

    def __call__(self, batch: Batch) -> list[Outputs]:
        """The outputs for a batch of training or meta rows, on the index's device.

        Raises:
            ValueError: If there is no index, or the first training batch has other inputs than the data.
        """
        if batch.index is None:
            raise ValueError(
                "expected batches with sample indices, (x, y, index), to look cached teacher outputs up; found one "
                "without: a hook or callback that changes batches must keep the index"
            )
        if self._plain is not None and torch.is_grad_enabled():  # in a pass over rows, nothing is between data and us
            # whole, as what rows are padded to may depend on the others
            if of_inputs(batch.x) != of_inputs(self._plain(batch.index.cpu().numpy()).x):
                raise ValueError(
                    "expected training batches that hold the data's inputs, to look up what teachers give for them; "
                    "found other inputs: a callback or hook changes batch.x in training. Set teacher_cache's "
                    "plain_view to true (teachers see inputs as the data give them), or leave teacher_cache unset"
                )
            self._plain = None
        return self.rows(batch.index)

    def rows(self, index: Tensor) -> list[Outputs]:
        """The outputs for rows ``(B,)``, on the index's device."""
        outputs = []
        for arrays in self._kept:
            found = {
                name: values[index.to(values.device)].to(index.device, dtype)
                for name, (values, dtype) in arrays.items()
            }
            outputs.append(Outputs(found.pop(LOGITS), {_tap(name): values for name, values in found.items()}))
        return outputs


def fill(module: Distiller) -> Cached:
    """Ask the teachers about all training and meta rows that the cache lacks; each process asks about its share.

    Args:
        module: In a training that is about to begin.

    Raises:
        ValueError: If the data are not ours, or differ from one reading to the next, there is no teacher, it gives
            values that are no finite numbers, or the files are damaged or of another teacher.
        OSError: If they cannot be written.
    """
    data, options = getattr(module.trainer, "datamodule", None), module.teacher_cache
    if not isinstance(data, DataModule):
        raise ValueError(
            "expected a data module of lit_kd.data for teacher_cache, which looks outputs up by sample index; found "
            f"{'none' if data is None else type(data).__name__}: wrap your own in "
            "lit_kd.data.DistillationDataModule(inner), or leave teacher_cache unset"
        )
    if not len(module.teachers):
        raise ValueError(f"expected a teacher for teacher_cache, found that {type(module).__name__} has none: unset it")
    read = partial(to_device, module)
    with isolate_rng(), torch.no_grad(), module.trainer.precision_plugin.forward_context():
        _check_views(module, data, read)
        data_print = "" if options.where == "memory" else _of_data(data, read)
        kept = [_fill_one(module, data, k, data_print, read) for k in range(len(module.teachers))]
    # under autocast, the training would find casts of the weights that know nothing of gradients
    torch.clear_autocast_cache()

    def plain(index: Indices) -> Batch:
        with isolate_rng():
            return _look(data, index, read)

    return Cached(kept, None if options.plain_view else plain)


def _fill_one(
    module: Distiller, data: DataModule, k: int, data_print: str, read: Callable[[Batch], Batch]
) -> dict[str, tuple[Tensor, torch.dtype]]:
    options, trainer, name = module.teacher_cache, module.trainer, f"teacher {k}"
    rows = len(data.labels)

    def ask(batch: Batch) -> dict[str, Tensor]:
        outputs = module.teachers.one(k, batch.x)
        check_batch(batch, {name: outputs}, module.num_classes, UNLABELED)
        for tap, values in outputs.features.items():
            if not isinstance(values, Tensor):
                raise ValueError(
                    f"expected tensors as {name}'s features, to cache them, found a {type(values).__name__} at the "
                    f"layer {tap}: tap a layer that gives a tensor, or leave teacher_cache unset"
                )
        return {LOGITS: outputs.logits} | {f"features.{tap}": values for tap, values in outputs.features.items()}

    some, own, about = _spread(np.arange(rows), PROBED), "", {}
    with _together(module, name):
        probe = ask(_look(data, some, read))
        shapes = {part: tuple(values.shape[1:]) for part, values in probe.items()}
        dtypes = {part: values.dtype for part, values in probe.items()}
        precision = f"{trainer.precision} {module.speed.teacher_precision}"
        if options.where != "memory":
            model, given = module.teachers.models[k], {part: str(dtype) for part, dtype in dtypes.items()}
            own = of_all(of_teacher(model), data_print, options.dtype, precision, repr(given))[:32]
            about = {"teacher": type(model).__name__, "data": type(data).__name__, "given": given}
    own = trainer.strategy.broadcast(own)
    store: RowStore
    with _together(module, name):
        if options.where == "memory":
            store = RowStore(rows, shapes, options.dtype)
        else:
            store = RowFiles(Path(options.where) / own, rows, shapes, options.dtype, about)
        share = np.array_split(np.arange(rows), trainer.world_size)[trainer.global_rank]
        missing = share[~store.written(share)]
        if isinstance(store, RowFiles):
            limit = 0.05 if "16" in precision else 0.01
            _check_kept(store, name, some, _as_stored(probe, options.dtype), limit)
            _announce(store, missing, share, trainer.world_size)
        loader: Any = data.loader(_rows(data, missing)) if len(missing) else []
        shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
        for batch in track(loader, f"Cache of {name}", disable=not shown):
            values = _as_stored(ask(read(batch)), options.dtype)
            index = batch.index.cpu().numpy()
            _check_values(name, index, values, shapes, options.dtype)
            store.write(index, values)
    if isinstance(store, RowFiles) and not store.begun(np.arange(rows)).all():
        raise ValueError(f"{store.folder}: expected a directory that all processes share, found rows of others missing")
    arrays = {part: torch.from_numpy(array) for part, array in store.finished().items()}
    if options.where == "memory" and trainer.world_size > 1:
        for block in (part for array in arrays.values() for part in torch.split(array, 2**16)):
            block.copy_(all_sum(block.to(module.device)))  # 0 but for one process's row
    return {part: (_placed(array, module.device), dtypes[part]) for part, array in arrays.items()}


@contextmanager
def _together(module: Distiller, name: str) -> Iterator[None]:
    """If one process fails, all do: the others must not wait for it for ever."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    failed = all_sum(torch.tensor(float(error is not None), device=module.device))
    if error is not None:
        raise error
    if failed:
        raise RuntimeError(f"expected all processes to fill the cache of {name}, found one that failed: see its error")


def _placed(array: Tensor, device: torch.device) -> Tensor:
    """On the accelerator where it fits well: else each step waits for its indices to come to the CPU."""
    if device.type == "cuda" and array.nbytes <= torch.cuda.mem_get_info(device)[0] / 4:
        return array.to(device)
    return array


def _announce(store: RowFiles, missing: Indices, share: Indices, processes: int) -> None:
    store.check_room(len(missing) * processes)
    torn = int(store.begun(missing).sum())
    if torn:
        rank_zero_warn(f"{store.folder}: {torn} of {len(share)} rows are damaged: they are filled again")
    rank_zero_info(f"teacher outputs in {store.folder}: {len(share) - len(missing)} of {len(share)} rows are there")


# what is refused


def _check_views(module: Distiller, data: DataModule, read: Callable[[Batch], Batch]) -> None:
    """Refuse inputs that differ from one reading to the next."""
    joined = module.trains_on_meta or bool(data.train_on_meta)
    some = _spread(np.arange(len(data.labels) if joined else data.train_size), COMPARED)
    plain, again = (of_inputs(_look(data, some, read).x) for _ in range(2))
    if plain != again:
        raise ValueError(
            "expected inputs that can be read again alike, to cache what teachers give for them; found random ones, "
            "and no view of the data without augmentation: turn the augmentation off, or leave teacher_cache unset"
        )
    if module.teacher_cache.plain_view:
        return
    trained_on = (of_inputs(_look(data, some, read, augmented=True).x) for _ in range(2))
    if any(view != plain for view in trained_on):
        raise ValueError(
            "expected training inputs without augmentation, to cache what teachers give for them; found inputs that "
            "change: set teacher_cache's plain_view to true (teachers see inputs without augmentation, students "
            "with it), turn the augmentation off (e.g. the data's augment=false), or leave teacher_cache unset"
        )


def _check_kept(store: RowFiles, name: str, index: Indices, values: dict[str, Array], limit: float) -> None:
    """Refuse files that hold something else than the teacher gives, up to so large a part of the largest value."""
    sound = store.written(index)
    for part, rows in values.items():
        found, now = store.arrays[part][index[sound]].astype(np.float64), rows[sound].astype(np.float64)
        if len(now) and not np.abs(found - now).max() <= limit * np.abs(now).max():
            raise ValueError(
                f"{store.folder}: expected what {name} gives now, found other {part}, though its weights and layers "
                "are the same: the code of teacher or data has changed. Remove the folder, to have it filled again"
            )


def _check_values(
    name: str, index: Indices, values: dict[str, Array], shapes: dict[str, tuple[int, ...]], dtype: Precision
) -> None:
    for part, rows in values.items():
        if rows.shape[1:] != shapes[part]:
            raise ValueError(
                f"expected {part} of one shape, {shapes[part]}, to cache them, found {rows.shape[1:]} of {name}: leave "
                "teacher_cache unset"
            )
        finite = np.isfinite(rows).reshape(len(rows), -1).all(1)
        if not finite.all():
            also = ", or take the dtype float32, as float16 ends at 65504" if dtype == "float16" else ""
            raise ValueError(
                f"expected finite numbers in {name}'s {part}, found nan or infinity in row {index[~finite][0]} of the "
                f"training data: check that the inputs are finite, or check its weights{also}"
            )


# rows


def _rows(data: DataModule, index: Indices, augmented: bool = False) -> Indexed:
    parts = data.parts
    positions = np.concatenate([parts.positions["train"], parts.positions["meta"]])[index]
    chosen = torch.from_numpy(index)
    return Indexed(parts.augmented if augmented else parts.plain, positions, parts.given[chosen], chosen)


def _of_data(data: DataModule, read: Callable[[Batch], Batch]) -> str:
    """Of the inputs as teachers see them, and of which row has which index; labels do not matter."""
    some = _spread(np.arange(len(data.labels)), READ)
    seen = (of_inputs(_look(data, part, read).x) for part in np.array_split(some, -(-len(some) // COMPARED)))
    return of_all(data.parts.rows_fingerprint, *map(of_inputs, in_memory(data.parts.plain)), *seen)


def _look(data: DataModule, index: Indices, read: Callable[[Batch], Batch], augmented: bool = False) -> Batch:
    return read(_rows(data, index, augmented).__getitems__(list(range(len(index)))))


def _spread(index: Indices, count: int) -> Indices:
    return index[np.unique(np.linspace(0, len(index) - 1, min(count, len(index))).astype(np.int64))]


def _as_stored(outputs: dict[str, Tensor], dtype: Precision) -> dict[str, Array]:
    return {part: values.to(getattr(torch, dtype)).cpu().numpy() for part, values in outputs.items()}


def _tap(name: str) -> str:
    return name.removeprefix("features.")
