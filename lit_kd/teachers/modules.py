"""Frozen teachers: none, one or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_kd.models import Network, resolve_model
from lit_kd.models.files import CHECKPOINTS
from lit_kd.teachers.speed import USUAL, Frozen, Speed
from lit_kd.types import Batch, Outputs


class Teachers:
    """Teachers in eval mode, without gradients.

    Deliberately not a `torch.nn.Module`: what holds it has no teacher among its parameters, so none reaches an
    optimizer, a checkpoint, a gradient synchronisation or a switch to training mode.

    Args:
        models: The teachers; they are put into eval mode and frozen.
        taps: Layers whose features are wanted, see `lit_kd.models.taps.Tapped`.
        speed: How they are run.
    """

    def __init__(self, models: Sequence[nn.Module] = (), taps: Sequence[str] = (), speed: Speed = USUAL) -> None:
        self.models = [model.eval().requires_grad_(False) for model in models]
        self._frozen = [Frozen(model, taps, speed) for model in self.models]
        self.cache: Callable[[Batch], list[Outputs]] | None = None  # of the training data, by sample index

    def __len__(self) -> int:
        return len(self.models)

    def __call__(self, x: Tensor | Mapping[str, Tensor]) -> list[Outputs]:
        """The outputs of every teacher for a batch, without gradients."""
        return [self.one(k, x) for k in range(len(self))]

    def one(self, k: int, x: Tensor | Mapping[str, Tensor]) -> Outputs:
        """The outputs of teacher k alone."""
        # without gradients, but not in inference_mode: its tensors may not take part in a loss that is differentiated
        return self._frozen[k](x)

    def trained_on(self, batch: Batch) -> list[Outputs]:
        """The outputs for a batch of training or meta rows: no teacher is called where they are cached."""
        return self(batch.x) if self.cache is None else self.cache(batch)

    def forget(self) -> None:
        """Notice whatever has changed in the teachers since they were called; compiled ones are not compiled again."""
        for frozen in self._frozen:
            if not frozen.speed.compile:
                frozen.forget()

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move every parameter and buffer, as `torch.nn.Module._apply` does: device and dtype follow the student's."""
        for model, frozen in zip(self.models, self._frozen, strict=True):
            model._apply(fn)  # type: ignore[no-untyped-call]
            frozen.forget()


def as_specs(teacher: Network | list[Network] | None) -> tuple[Network, ...]:
    """None, one or several teachers as a tuple: there, modules are no submodules of what holds it."""
    if teacher is None:
        return ()
    teachers = teacher if isinstance(teacher, (list, tuple)) else [teacher]
    return tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in teachers)


def is_path(spec: str) -> bool:
    """Whether a teacher or student is told by a file and not by a model's name."""
    return Path(spec).suffix in CHECKPOINTS or Path(spec).is_file()


def missing_files(specs: Sequence[Network]) -> list[str]:
    """Checkpoints that are not there."""
    return [spec for spec in specs if isinstance(spec, str) and is_path(spec) and not Path(spec).is_file()]


def load_teachers(
    specs: Sequence[Network], student: nn.Module, num_classes: int, input_shape: Sequence[int] | None
) -> list[nn.Module]:
    """The teachers as modules.

    Args:
        specs: Modules, paths of checkpoints, or model names, which have random weights.
        student: Who learns from them.
        num_classes: C.
        input_shape: Shape of one sample, which models built by name may need.

    Raises:
        ValueError: If a teacher shares layers with the student.
    """
    models = [resolve_model(spec, num_classes, input_shape) for spec in specs]
    for spec in specs:
        if isinstance(spec, str) and not is_path(spec):
            rank_zero_warn(f"teacher {spec!r} is a model name: its weights are random. Give a checkpoint's path.")
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for model in models for parameter in model.parameters()):
        raise ValueError(
            "expected a teacher that shares no layers with the student, which would be frozen with it; "
            "pass a copy.deepcopy of the teacher"
        )
    return models
