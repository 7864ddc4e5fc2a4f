"""What Lightning and torch do in each step, without what only profilers and clipping need: a small network's time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from lightning import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from torch.optim import Optimizer

Hook = TypeVar("Hook", bound=Callable[..., Any])


def _unnoticed(hook: Hook) -> Hook:
    """Lightning takes a hook that wraps its own for that, and does not warn of what who overrides it may get wrong."""
    setattr(hook, "__wrapped__", getattr(LightningModule, hook.__name__))  # noqa: B010
    return hook


class Lean(LightningModule):
    """A module whose steps take Lightning less time, and which does the same."""

    def __setattr__(self, name: str, value: Any) -> None:
        """As any module's, but for what Lightning sets some fifty times a step: that goes past all checks."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @_unnoticed
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does, which takes a while to find out that nothing is to be clipped."""
        if gradient_clip_val or self.trainer.gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @_unnoticed
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """As Lightning does."""
        zero_grad(optimizer)


def zero_grad(optimizer: Optimizer) -> None:
    """As torch does, but without a note for its profiler, which takes longer than a small network's gradients."""
    if getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad:  # it has one of its own
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


class NoProfiler(PassThroughProfiler):
    """Lightning's profiler that does nothing, which makes a generator for each of fifty actions a step."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """Do nothing."""
        return self._nothing


def without_profiler(trainer: Trainer) -> None:
    """Let a trainer that does not profile do it faster."""
    if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]
        trainer.profiler = NoProfiler()  # type: ignore[attr-defined]
