"""Faster ways to run a network, with the same numbers up to rounding."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor
from torch.fx.experimental.optimization import fuse

from lit_kd.models.taps import Tapped
from lit_kd.teachers.adapted import AdaptedTeacher
from lit_kd.types import PENULTIMATE, Inputs, Outputs

KNOWN = {"torch", "torchvision", "timm", "lit_kd"}
"""Packages whose networks do not depend on the memory layout of their tensors."""


class Speed(NamedTuple):
    """How networks run."""

    channels_last: bool | None = None  # whether 2d convolutions use that memory layout; None: where it is safe
    compile: bool = False  # whether networks without tapped layers are compiled
    teacher_precision: Literal["bf16"] | None = None  # teachers run under autocast to it, and give float32


USUAL = Speed()


def reads_channels_last(student: nn.Module, taps: Sequence[str], speed: Speed) -> bool:
    """Whether a student gets its images channels last: by default where only `KNOWN` layers read features."""
    if speed.channels_last is not None:
        return speed.channels_last
    foreign = (fx.GraphModule, torch.jit.ScriptModule)  # classes of torch that hold anybody's code
    known = (type(m).__module__.split(".")[0] in KNOWN and not isinstance(m, foreign) for m in student.modules())
    return set(taps) <= {PENULTIMATE} and all(known)


def prepare_student(student: nn.Module, taps: Sequence[str], speed: Speed) -> Tapped:
    """The student as it is trained; compiled if wanted and no layers are tapped, as compiled code runs no hooks."""
    tapped = Tapped(student, taps, reads_channels_last(student, taps, speed))
    if speed.compile and not taps:
        student.compile()
    return tapped


class Frozen:
    """A frozen network in eval mode, run as fast as it goes.

    At the first batch, a copy for inference takes its place if both give the same outputs. In the copy, BatchNorm is
    folded into the convolution before it and convolutions are channels last; the network's own hooks do not run.
    Networks with taps other than the penultimate layer have no copy.
    """

    def __init__(self, model: nn.Module, taps: Sequence[str], speed: Speed) -> None:
        self._plain, self._taps, self.speed = Tapped(model, taps), taps, speed
        self._run: Tapped | None = None

    def forget(self) -> None:
        """Drop the copy: the network has changed or moved."""
        self._run = None

    def __call__(self, x: Inputs) -> Outputs:
        """The outputs for a batch; in float32 if ``teacher_precision`` is set."""
        run = self._run or self._choose
        if self.speed.teacher_precision is None:
            with torch.no_grad():
                return run(x)
        device = (next(iter(x.values())) if isinstance(x, Mapping) else x).device.type
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            outputs = run(x)
        features = {tap: f.float() if isinstance(f, Tensor) else f for tap, f in outputs.features.items()}
        return Outputs(outputs.logits.float(), features)

    def _choose(self, x: Inputs) -> Outputs:
        """Choose how to run the network, and run it so."""
        self._run, outputs = self._plain, self._plain(x)
        if isinstance(self._plain.model, AdaptedTeacher):  # a copy would not follow
            return outputs
        convolves = any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for m in self._plain.model.modules())
        sharded = any(isinstance(p, DTensor) for p in self._plain.model.parameters())  # a copy would be of parts
        if convolves and not sharded and set(self._taps) <= {PENULTIMATE}:
            with suppress(Exception), isolate_rng():  # if a foreign network objects, it runs unchanged
                fast = Tapped(_copy_for_inference(self._plain.model, self.speed.channels_last), self._taps)
                found = fast(x)
                if _agree(found, outputs):
                    self._run, outputs = fast, found
        if self.speed.compile and not self._taps:
            compiled = copy.deepcopy(self._run.model)
            compiled.compile()
            self._run = Tapped(compiled)
        return outputs


def _copy_for_inference(model: nn.Module, channels_last: bool | None) -> nn.Module:
    copied = copy.deepcopy(model)
    with suppress(Exception), warnings.catch_warnings(action="ignore"):  # not every network can be traced
        copied = fuse(copied, inplace=True)
    for name in ("lit_kd_logits", "lit_kd_head"):  # which a traced copy has not
        if hasattr(model, name):
            setattr(copied, name, getattr(model, name))
    return copied if channels_last is False else copied.to(memory_format=torch.channels_last)


def _agree(found: Outputs, expected: Outputs) -> bool:
    pairs = [(found.logits, expected.logits), *((found.features[tap], f) for tap, f in expected.features.items())]
    limit = 0.05 if expected.logits.dtype.itemsize < 4 else 0.01
    return all(a.shape == b.shape and bool((a - b).norm() <= limit * b.norm()) for a, b in pairs)
