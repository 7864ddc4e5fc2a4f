"""What lit_kd overrides of Lightning's and torch's private names, as there is no public way; no other file does."""

from collections.abc import Callable
from typing import Any, Self

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lit_kd.models.checkpoint import keep_plain
from lit_kd.models.classes import check_numbers


class Shim(LightningModule):
    """A module whose checkpoints hold plain values only, and with which its teachers move, which are no submodules."""

    teachers: Any

    @property
    def datamodule(self) -> Any:
        """The trainer's, if there is one; Lightning's ``trainer`` raises where there is no trainer yet."""
        return getattr(self._trainer, "datamodule", None)

    def _set_hparams(self, hp: Any) -> None:  # Lightning copies the hyperparameters next, live modules too
        super()._set_hparams(hp)
        keep_plain(self.hparams)
        check_numbers(type(self), self.hparams)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # by which all modules move
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.teachers.apply(fn)
        return self


def move(model: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Change all parameters and buffers, as `Shim` does."""
    model._apply(fn)  # type: ignore[no-untyped-call]


def in_training(module: LightningModule) -> bool:
    """Whether a trainer is about to train the module, or does; Lightning's ``trainer`` raises where there is none."""
    return getattr(module._trainer, "training", False)


def only_statistics(trainer: Trainer) -> bool:
    """Whether this is StochasticWeightAveraging's last pass, for BatchNorm, in which automatic optimisation rests."""
    return trainer.fit_loop._skip_backward


def given_epochs(trainer: Trainer) -> int | None:
    """The trainer's ``max_epochs``, without the one that StochasticWeightAveraging adds to it for that pass."""
    averages = (one for one in trainer.callbacks if isinstance(one, StochasticWeightAveraging))  # type: ignore[attr-defined]
    return getattr(next(averages, None), "_max_epochs", trainer.max_epochs)


class GivenOptionsWin(LightningCLI):
    """A command line on which a checkpoint's hyperparameters do not override the options that are given."""

    def _parse_ckpt_path(self) -> None:
        """Lightning's own would."""
