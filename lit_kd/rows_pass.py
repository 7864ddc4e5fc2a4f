"""One pass of student and teachers over chosen rows, which leaves no trace in the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_kd.data.batch import Batch, as_batch
from lit_kd.data.rows import Indexed
from lit_kd.features import Outputs, Tapped, evaluating
from lit_kd.samples import of_first_process
from lit_kd.teachers import Teachers


class RowOutputs(NamedTuple):
    """What student and teachers give for R rows, in the order of the rows.

    Attributes:
        student: Logits ``(R, C)`` and tapped features.
        teachers: The same of each teacher.
        y: Given labels, ``(R,)``, `lit_kd.data.UNLABELED` where there is none.
        index: Sample indices, ``(R,)``; ``None`` where the rows have none.
    """

    student: Outputs
    teachers: list[Outputs]
    y: Tensor
    index: Tensor | None  # type: ignore[assignment]  # tuple.index is of no use here


def rows_pass(
    student: Tapped, teachers: Teachers, rows: Indexed, batch_size: int, move: Callable[[Batch], Batch]
) -> RowOutputs:
    """The outputs for all rows: without gradients, in evaluation mode, with no random number taken from the training.

    After a training step, each process may have running statistics of its own: all get the outputs of the first one,
    so that what follows from them is the same everywhere.

    Args:
        student: The student; its mode and buffers stay as they are.
        teachers: The teachers.
        rows: The rows, taken in their order.
        batch_size: Rows at a time.
        move: Brings a batch to the models' device.

    Raises:
        ValueError: If there are no rows.
    """
    if not len(rows):
        raise ValueError("expected rows to predict, found none. Give the data a split of this kind, e.g. meta=0.1.")
    batches, students, taught = [], [], []
    with isolate_rng(), evaluating(student.model), torch.no_grad():
        for first in range(0, len(rows), batch_size):
            batch = move(rows.__getitems__(list(range(first, min(first + batch_size, len(rows))))))
            batches.append(batch)
            students.append(student(batch.x))
            taught.append(teachers(batch.x))
    # under autocast, the training would find casts of the weights that know nothing of gradients
    torch.clear_autocast_cache()
    index = [batch.index for batch in batches if batch.index is not None]
    return RowOutputs(
        student=_joined(students),
        teachers=[_joined(parts) for parts in zip(*taught, strict=True)],
        y=torch.cat([batch.y for batch in batches]),
        index=torch.cat(index) if index else None,
    )


def to_device(module: LightningModule, batch: Batch) -> Batch:
    """Bring a batch to the module's device as Lightning does, through the hooks of a wrapped data module too."""
    trainer = module.trainer
    moved = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
    return as_batch(trainer.strategy.batch_to_device(moved))


def _joined(parts: Sequence[Outputs]) -> Outputs:
    features = {tap: of_first_process(torch.cat([p.features[tap] for p in parts])) for tap in parts[0].features}
    return Outputs(of_first_process(torch.cat([part.logits for part in parts])), features)
