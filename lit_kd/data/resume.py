"""Where an epoch is, in checkpoints of its middle."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor


class Place:
    """Where the epoch of a data module's trainer is, and its random numbers: for a run that is resumed in mid-epoch.

    Args:
        data: The data module.
    """

    def __init__(self, data: LightningDataModule) -> None:
        self.data = data
        self.starts: dict[str, list[Tensor]] = {}  # where each loader's random numbers began
        self.resumed: dict[str, Any] = {}  # what a checkpoint says

    @property
    def done(self) -> int:
        """How many batches of the epoch are done."""
        trainer = self.data.trainer
        return 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint of an epoch's middle."""
        return {"starts": dict(self.starts), "now": random_state()} if in_mid_epoch(self.data.trainer) else {}


class Resumable(LightningDataModule):
    """A data module whose training loaders go on where they were when a run is resumed in mid-epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Place(self)

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is."""
        return self.place.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.place.resumed = state_dict


def in_mid_epoch(trainer: Trainer | None) -> bool:
    """Whether a training is between two batches of an epoch, be it in a validation there."""
    fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
    return fitting and not trainer.is_last_batch  # type: ignore[union-attr]


def random_state() -> list[Tensor]:
    """Where torch's random numbers are, on the CPU and on the GPU in use."""
    gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if gpu else [])]


def set_random_state(state: list[Tensor]) -> None:
    """Go on from there, as far as there are such devices."""
    torch.set_rng_state(state[0].cpu())
    if state[1:] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1].cpu())
