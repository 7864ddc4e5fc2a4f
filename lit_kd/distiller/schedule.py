"""How long a training is, and a learning rate that follows from it."""

from __future__ import annotations

import math

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(optimizer: Optimizer, length: int | None) -> LambdaLR:
    """Anneals the learning rate to 0 over so many steps of the scheduler.

    torch's own cosine would take its length from the checkpoint where a run is resumed to train longer.

    Raises:
        ValueError: If the length is not known.
    """
    if length is None:
        raise ValueError("lr_scheduler 'cosine' needs to know the end: set the trainer's max_epochs or max_steps")

    def anneal(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(step, length) / length))

    return LambdaLR(optimizer, anneal)


def planned_length(trainer: Trainer, batches_per_update: int) -> tuple[int | None, int | None]:
    """How many epochs and how many updates a training has, the last epoch maybe cut; ``None``: not known."""
    epochs, updates = (end if end is not None and end >= 0 else None for end in (trainer.max_epochs, trainer.max_steps))
    trainer.fit_loop.setup_data()  # makes the loader, so that its length is known
    if math.isinf(trainer.num_training_batches):
        return epochs, updates
    each = updates_per_epoch(trainer, batches_per_update)
    ends = [end for end in (updates, None if epochs is None else epochs * each) if end is not None]
    return (math.ceil(min(ends) / each), min(ends)) if ends else (None, None)


def updates_per_epoch(trainer: Trainer, batches_per_update: int) -> int:
    """How many updates a whole epoch has, of a stream whose length is known."""
    return max(1, math.ceil(trainer.num_training_batches / batches_per_update))


def warn_of_warmup(warmup: int, epochs: int | None) -> None:
    """Say so where the training, of so many epochs, ends before its warm-up does."""
    if epochs is not None and warmup >= epochs:
        rank_zero_warn(
            f"all {epochs} epochs are warm-up ({warmup} epochs): the teacher is never listened to. Train longer, or "
            "pass a smaller warmup_epochs"
        )
