"""One pass of student and teachers over chosen rows, which leaves no trace in the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_kd.data.rows import Indexed
from lit_kd.data.table import of_first_process
from lit_kd.distiller.checks import check_batch, check_finite
from lit_kd.models.taps import Tapped
from lit_kd.teachers.cache import to_device
from lit_kd.teachers.modules import Teachers
from lit_kd.types import UNLABELED, Batch, Outputs, evaluating

if TYPE_CHECKING:
    from lit_kd.distiller.base import Distiller


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
    student: Tapped,
    teachers: Callable[[Batch], list[Outputs]],
    rows: Indexed,
    batch_size: int,
    move: Callable[[Batch], Batch],
) -> RowOutputs:
    """The outputs for all rows: without gradients, in evaluation mode, with no random number taken from the training.

    After a training step, each process may have running statistics of its own: all get the outputs of the first one,
    so that what follows from them is the same everywhere.

    Args:
        student: The student; its mode and buffers stay as they are.
        teachers: Give each teacher's outputs for a batch.
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
            taught.append(teachers(batch))
    # under autocast, the training would find casts of the weights that know nothing of gradients
    torch.clear_autocast_cache()
    index = [batch.index for batch in batches if batch.index is not None]
    return RowOutputs(
        student=_joined(students),
        teachers=[_joined(parts) for parts in zip(*taught, strict=True)],
        y=torch.cat([batch.y for batch in batches]),
        index=torch.cat(index) if index else None,
    )


def module_pass(module: Distiller, teachers: Teachers, rows: Indexed) -> RowOutputs:
    """The outputs of a method's student, and of teachers, for chosen rows of its data; see `rows_pass`.

    Raises:
        ValueError: If there are no rows, or outputs of other classes or that are not finite.
    """
    data = module.data
    # the cache knows the data's own rows alone
    cached = rows.indices is not None and rows.rows in (data.parts.plain, data.parts.augmented)
    ask = teachers.trained_on if cached else lambda batch: teachers(batch.x)
    with module.trainer.precision_plugin.forward_context():
        found = rows_pass(module.tapped_student, ask, rows, data.batch_size, partial(to_device, module))
    outputs = {f"teacher {k}": teacher for k, teacher in enumerate(found.teachers)} | {"student": found.student}
    check_batch(Batch(found.student.logits, found.y), outputs, module.num_classes, UNLABELED)
    check_finite({f"{name}'s logits": given.logits.sum() for name, given in outputs.items()})
    return found


def _joined(parts: Sequence[Outputs]) -> Outputs:
    features = {tap: of_first_process(torch.cat([p.features[tap] for p in parts])) for tap in parts[0].features}
    return Outputs(of_first_process(torch.cat([part.logits for part in parts])), features)
