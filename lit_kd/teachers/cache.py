"""A cache of the teachers' outputs for the training data."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor

from lit_kd.data import DataModule
from lit_kd.data.rows import equal_inputs, in_memory
from lit_kd.data.table import all_sum
from lit_kd.teachers.adapted import AdaptedTeacher
from lit_kd.teachers.answers import LOGITS, read_arrays, write_arrays
from lit_kd.teachers.file import FileTeacher
from lit_kd.types import Batch, Outputs

if TYPE_CHECKING:
    from lit_kd.distiller.base import Distiller

Indices = npt.NDArray[np.int64]
Arrays = dict[str, tuple[Tensor, torch.dtype]]
"""A teacher's outputs by name, ``(N + M, ...)``, and the dtypes that it gives."""


@dataclass
class TeacherCache:
    """Where to keep the teachers' outputs, so that a teacher sees each training and meta row only once.

    Runs with the same teachers, rows and precision share a directory. Remove it when you change some of your files.
    Each folder in it serves as a `lit_kd.teachers.FileTeacher`, for data with rows of the same ids.

    Attributes:
        where: ``"memory"``, a directory, or ``"none"``.
        dtype: Of the stored values; float16 halves the size and keeps 3 digits.
        plain_view: Let only the student see augmented training inputs.
    """

    where: str
    dtype: Literal["float32", "float16"] = "float32"
    plain_view: bool = False

    @classmethod
    def of(cls, given: str | os.PathLike[str] | TeacherCache | Mapping[str, Any] | None) -> TeacherCache:
        """Read the option as users, configs and checkpoints give it."""
        if isinstance(given, TeacherCache):
            return given
        return cls(**given) if isinstance(given, Mapping) else cls("none" if given is None else os.fspath(given))

    def __bool__(self) -> bool:
        return self.where != "none"


class FillTeacherCache(Callback):
    """Fills the cache of a method before its training and frees it afterwards."""

    def __init__(self, method: Distiller) -> None:
        self.method = method

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Fill it before the module's own hook, which may use it."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.method.teachers.cache = Cached(follow(self.method, pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Free the memory."""
        self.method.teachers.cache = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Free the memory after an error too."""
        self.on_fit_end(trainer, pl_module)


class Cached:
    """The teachers' outputs by sample index: each process asks about its share of the rows, then has all of them.

    The module is a method whose training is about to begin. A ValueError says that teacher or data cannot be cached,
    or that a stored cache does not hold what the teacher gives.
    """

    def __init__(self, module: Any) -> None:
        self.module, self.options, self.teachers = module, module.teacher_cache, module.teachers
        data = getattr(module.trainer, "datamodule", None)
        if not isinstance(data, DataModule) or not len(self.teachers):
            raise ValueError(
                "teacher_cache needs a teacher and a data module of lit_kd.data (DistillationDataModule wraps yours), "
                f"found {len(self.teachers)} teachers and {type(data).__name__}"
            )
        files = [isinstance(model, FileTeacher) for model in self.teachers.models]
        if any(isinstance(model, AdaptedTeacher) for model in self.teachers.models):
            raise ValueError("expected no teacher_cache with an AdaptedTeacher, whose answers change: leave it out")
        self.data = data
        some = np.linspace(0, data.train_size - 1, 64).astype(np.int64)
        with isolate_rng(), torch.no_grad(), module.trainer.precision_plugin.forward_context():
            first, *views = (self._read(some, augmented).x for augmented in (False, False, True, True))
            alike = [equal_inputs(first, view) for view in views]
            if not (all(alike) or all(files) or (alike[0] and self.options.plain_view)):
                raise ValueError(
                    "teacher_cache needs training inputs without augmentation, found that they change: turn it off, "
                    "or set plain_view to true if the data have a view without it"
                )
            # a file is heard as it is now: its answers are in memory already
            self._kept = [None if file else self._outputs(k) for k, file in enumerate(files)]
        torch.clear_autocast_cache()  # it holds casts of weights without gradients
        self._compared = self.options.plain_view or all(files)

    def __call__(self, batch: Batch) -> list[Outputs]:
        """The outputs for a batch of training or meta rows, on the index's device."""
        index, outputs = batch.index, []
        if index is None:
            raise ValueError("teacher_cache needs batches (x, y, index), found no index: let your hooks keep it")
        if not self._compared and torch.is_grad_enabled():  # without gradients, we read the rows ourselves
            with isolate_rng():
                self._compared = equal_inputs(batch.x, self._read(index.cpu().numpy()).x)
            if not self._compared:
                raise ValueError("teacher_cache found that a hook or callback changes batch.x: set plain_view to true")
        for k, arrays in enumerate(self._kept):
            if arrays is None:
                outputs.append(self.teachers.one(k, batch, training=True))
                continue
            found = {name: a[index.to(a.device)].to(index.device, dtype) for name, (a, dtype) in arrays.items()}
            outputs.append(Outputs(found.pop(LOGITS), {name.removeprefix("features."): f for name, f in found.items()}))
        return outputs

    def _outputs(self, k: int) -> Arrays:
        """The outputs of one teacher for all rows."""
        trainer, device = self.module.trainer, self.module.device
        folder = None if self.options.where == "memory" else Path(self.options.where) / self._key(k)
        stored = trainer.strategy.broadcast(folder is not None and (folder / f"{LOGITS}.npy").is_file())
        if folder and stored:
            found = self._stored(k, folder)
        else:
            found = self._asked(k)
            if folder and trainer.is_global_zero:
                write_arrays(folder, self._ids, {name: array for name, (array, _) in found.items()})
        # on the GPU where they fit well: else each step waits for the indices to come to the CPU
        room = torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else 0
        return {name: (a.to(device) if a.nbytes <= room else a, dtype) for name, (a, dtype) in found.items()}

    def _stored(self, k: int, folder: Path) -> Arrays:
        """The stored outputs, of which a few are compared with what the teacher gives now."""
        some = np.linspace(0, len(self.data.labels) - 1, 8).astype(np.int64)
        found = self._ask(k, some)
        _, arrays = read_arrays(folder, list(found))
        for name, (now, dtype) in found.items():
            array = arrays[name]
            apart, largest = (array[some].double() - now[some].double()).abs().max(), now.double().abs().max()
            if not apart <= (0.05 if dtype.itemsize < 4 else 0.01) * largest:
                raise ValueError(f"teacher {k} gives other {name} than stored (new code or data): remove {folder}")
            found[name] = array, dtype
        return found

    @property
    def _ids(self) -> list[str]:
        return self.data.parts.ids[: len(self.data.labels)]

    def _asked(self, k: int) -> Arrays:
        """What the teacher gives for each process's share of the rows, in all processes."""
        trainer = self.module.trainer
        found = self._ask(k, np.array_split(np.arange(len(self.data.labels)), trainer.world_size)[trainer.global_rank])
        for name, (array, _) in found.items():
            for block in torch.split(array, 2**16) if trainer.world_size > 1 else ():
                block.copy_(all_sum(block.to(self.module.device)))  # 0 but for one process's rows
            sick = (~array.flatten(1).isfinite().all(1)).nonzero()
            if len(sick):
                kept = f"in row {int(sick[0])}: check its weights, the inputs and the dtype {self.options.dtype}"
                raise ValueError(f"teacher {k} gives {name} with nan or infinity {kept}")
        return found

    def _ask(self, k: int, index: Indices) -> Arrays:
        """The outputs of one teacher for some rows, and 0 for the others."""
        found: Arrays = {}
        shown = self.module.trainer.is_global_zero and self.module.trainer.progress_bar_callback is not None
        loader = self.data.loader(self.data.parts.rows(torch.from_numpy(index)))
        for given in track(loader, f"Cache of teacher {k}", disable=not shown):
            out = self.teachers.one(k, to_device(self.module, given))
            outputs = {LOGITS: out.logits} | {f"features.{tap}": f for tap, f in out.features.items()}
            for name, values in outputs.items():
                if name not in found:
                    array = np.zeros((len(self.data.labels), *values.shape[1:]), self.options.dtype)
                    found[name] = torch.from_numpy(array), values.dtype
                if found[name][0].shape[1:] != values.shape[1:]:
                    told = f"{tuple(found[name][0].shape[1:])} and {tuple(values.shape[1:])}"
                    raise ValueError(
                        f"expected {name} of teacher {k} of one shape for all rows with teacher_cache, found {told}: "
                        "pad all inputs alike, or leave it out"
                    )
                found[name][0][given.index.cpu()] = values.to(found[name][0])
        return found

    def _key(self, k: int) -> str:
        """Hash what decides a teacher's outputs, except code and inputs that are not in memory."""
        model, parts, precision = self.teachers.models[k], self.data.parts, self.module.trainer.precision
        layers = re.sub(" at 0x[0-9a-f]+", "", repr(model))  # functions have another address in each run
        told = (self.options.dtype, precision, self.module.speed.teacher_precision, self.teachers.taps, layers)
        digest = hashlib.sha256(f"{told} {type(model).__qualname__} {parts.rows_fingerprint} {self._ids}".encode())
        tensors = {**model.state_dict(), **dict(model.named_buffers())}.items()
        for name, value in (*tensors, *(("x", x) for x in in_memory(parts.plain))):
            is_tensor = isinstance(value, Tensor)
            digest.update(f"{name} {(value.dtype, value.shape) if is_tensor else value}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() if is_tensor else b"")
        return digest.hexdigest()[:32]

    def _read(self, index: Indices, augmented: bool = False) -> Batch:
        rows = self.data.parts.rows(torch.from_numpy(index), augmented)
        return to_device(self.module, rows.__getitems__(list(range(len(index)))))


def follow(method: Distiller, module: LightningModule) -> Distiller:
    """Bring a method to the device, and if it has changed to the dtype, of the module that it is part of."""
    method.to(module.device)
    return method if method.dtype == module.dtype else method.to(cast(torch.dtype, module.dtype))


def to_device(module: Distiller, batch: Batch) -> Batch:
    """Bring a batch to the module's device as Lightning does, with the hooks of module and data."""
    trainer = module.trainer
    batch = module.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
    batch = trainer.datamodule.on_before_batch_transfer(batch, 0)  # type: ignore[attr-defined]
    return module.unpack(trainer.strategy.batch_to_device(batch))
