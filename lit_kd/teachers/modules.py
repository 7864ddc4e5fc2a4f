"""Frozen teachers: none, one or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_kd.data import DataModule
from lit_kd.models import Network, is_path, resolve_model
from lit_kd.models.checkpoint import compare_data
from lit_kd.models.shim import move
from lit_kd.models.taps import find_head, unsure_of_head
from lit_kd.teachers.adapted import adapting
from lit_kd.teachers.answers import is_answers
from lit_kd.teachers.file import FileTeacher, check_file_teachers, join_files, speaks_of
from lit_kd.teachers.speed import USUAL, Frozen, Speed
from lit_kd.types import Batch, Outputs, reads_head

if TYPE_CHECKING:
    from lit_kd.distiller.base import Distiller


class Teachers:
    """Frozen teachers in eval mode, unless they adapt, with the taps of `lit_kd.models.taps.Tapped`.

    This is no `torch.nn.Module`, so that no teacher reaches an optimizer, a checkpoint or a switch to training mode.
    """

    def __init__(self, models: Sequence[nn.Module] = (), taps: Sequence[str] = (), speed: Speed = USUAL) -> None:
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.taps = tuple(taps)
        self._frozen = [Frozen(model, taps, speed) for model in self.models]
        self.cache: Callable[[Batch], list[Outputs]] | None = None  # of the training data, by sample index

    def __len__(self) -> int:
        return len(self.models)

    def __call__(self, batch: Batch) -> list[Outputs]:
        """The outputs of every teacher for a batch."""
        return [self.one(k, batch) for k in range(len(self))]

    def one(self, k: int, batch: Batch, training: bool = False) -> Outputs:
        """The outputs of teacher k alone; those of a file belong to the rows, whatever the inputs look like."""
        model = self.models[k]
        return model.answers(batch, training) if isinstance(model, FileTeacher) else self._frozen[k](batch.x)

    def join(self, module: Distiller, stage: str) -> None:
        """Read teachers that are files for the module's data."""
        files = [model for model in self.models if isinstance(model, FileTeacher)]
        if stage != "predict" and files:
            join_files(module, files, stage)

    @property
    def known(self) -> Tensor | None:
        """Which training and meta rows each speaks of, bool ``(N + M, K)``; None: all."""
        files = [model for model in self.models if isinstance(model, FileTeacher)]
        if all(model.complete for model in files):
            return None
        rows = torch.ones_like(files[0].known)
        return torch.stack([m.known if isinstance(m, FileTeacher) else rows for m in self.models], dim=1)

    def speak_of(self, split: str) -> bool:
        """Whether some of them say something of rows of a split, ``"train"``, ``"val"`` or ``"test"``."""
        return any(speaks_of(model, split) for model in self.models)

    def trained_on(self, batch: Batch) -> list[Outputs]:
        """The outputs for each label of a training or meta batch, from the cache if there is one."""
        if self.cache is not None:
            return self.cache(batch)
        with adapting(self.models if len(batch.y) > 1 else ()):  # a single row has no statistics
            return [self.one(k, batch, training=True).of(batch) for k in range(len(self))]

    def forget(self) -> None:
        """Drop copies for inference, except compiled ones."""
        for frozen in self._frozen:
            if not frozen.speed.compile:
                frozen.forget()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Change all parameters and buffers, e.g. to another device."""
        for model, frozen in zip(self.models, self._frozen, strict=True):
            move(model, fn)
            frozen.forget()


def as_specs(teacher: Network | list[Network] | None) -> tuple[Network, ...]:
    """None, one or several teachers as a tuple, whose modules are no submodules of what holds it."""
    if teacher is None:
        return ()
    teachers = teacher if isinstance(teacher, (list, tuple)) else [teacher]
    return tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in teachers)


def first_batch(module: Distiller, most: int | None = None) -> Batch:
    """A training batch, or its first rows, to learn shapes from; the epoch's order is not asked for."""
    data = getattr(module.trainer, "datamodule", None)
    with isolate_rng():
        if isinstance(data, DataModule):
            rows = data.parts.train_rows(False)
            batch: Any = rows.__getitems__(list(range(min(len(rows), most or data.batch_size))))
        else:
            module.trainer.fit_loop.setup_data()
            batch = next(iter(module.trainer.train_dataloader))  # type: ignore[arg-type]
        for hooks in (module, data) if data is not None else (module,):
            batch = hooks.on_before_batch_transfer(batch, 0)
        return module.unpack(module.trainer.strategy.batch_to_device(batch, module.device))


def find_heads(module: Distiller, models: Sequence[nn.Module]) -> None:
    """Find out which layer gives the logits, where that may be another than the last linear one."""
    unsure = [model for model in models if unsure_of_head(model)]
    x = first_batch(module, most=4).x if unsure else None
    for model in unsure:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        find_head(model, x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x)  # type: ignore[arg-type]


def ready_teachers(module: Distiller, specs: Sequence[Network], stage: str, new: bool) -> Teachers:
    """The teachers of a method for a stage: loaded where it has none yet or is new, and files joined with its data."""
    found = module.teachers
    if stage != "predict" and (new or len(found) < len(specs)):
        found = load_teachers(module, specs, required=stage == "fit")
    found.join(module, stage)
    return found


def load_teachers(module: Distiller, specs: Sequence[Network], required: bool) -> Teachers:
    """The teachers of a method: modules, checkpoints, files of answers, class paths, or names, with random weights.

    Unless they are required, where a checkpoint is not there, there are no teachers, and a warning. A ValueError if a
    teacher shares parameters with the student.
    """
    taps = module.terms.taps("teacher") if module.terms else ()
    specs = [FileTeacher(spec) if is_answers(spec) else spec for spec in specs]  # type: ignore[arg-type]
    missing = [spec for spec in specs if is_path(spec) and not Path(str(spec)).is_file()]
    if missing and not required:
        rank_zero_warn(f"teacher {missing} not found: evaluating without the agreement with the teacher")
        return Teachers()
    for spec in specs:
        if isinstance(spec, str) and not is_path(spec):
            rank_zero_warn(f"teacher {spec!r} is a model name: its weights are random. Give a checkpoint's path.")
    models = [resolve_model(spec, module.num_classes, module.input_shape, module.task.name) for spec in specs]
    known = module.known or {}
    for k, (spec, model) in enumerate(zip(specs, models, strict=True)):
        known = compare_data(f"teacher {spec if isinstance(spec, str) else k}", model, known)
    own = set(module.student.parameters())
    if any(not own.isdisjoint(model.parameters()) for model in models):
        raise ValueError("expected a teacher that shares no layers with the student: pass a copy.deepcopy of it")
    dtype = cast(torch.dtype, module.dtype)
    for model in models:
        move(model, lambda t: t.to(module.device, dtype if t.is_floating_point() else None))
    taps = module.terms.taps("teacher") if module.terms else ()
    if required and any(isinstance(model, FileTeacher) for model in models):
        check_file_teachers(module)
    if required and reads_head(taps):
        find_heads(module, models)
    return Teachers(models, taps, module.speed)
