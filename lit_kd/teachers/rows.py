"""A pass of student and teachers over chosen rows, which leaves no trace in the training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lit_kd.data.rows import Indexed
from lit_kd.data.table import of_first_process
from lit_kd.teachers.cache import to_device
from lit_kd.teachers.modules import Teachers, first_batch
from lit_kd.terms.task import check_outputs
from lit_kd.types import IGNORED, Outputs, evaluating

if TYPE_CHECKING:
    from lit_kd.distiller.base import Distiller


class RowOutputs(NamedTuple):
    """Outputs of the student and of each teacher for R rows, and their labels."""

    student: Outputs
    teachers: list[Outputs]
    y: Tensor


def predict_rows(module: Distiller, teachers: Teachers, rows: Indexed) -> RowOutputs:
    """The outputs for all rows, in evaluation mode.

    Every process computes all rows and gets the first process's outputs, as running statistics may differ. A
    ValueError for no rows, and for values that are not finite.
    """
    if not len(rows):
        raise ValueError("expected rows to predict, found none. Give the data a split of this kind, e.g. meta=0.1.")
    data, trainer, student = module.data, module.trainer, module.tapped_student
    # the cache knows only the data's own training and meta rows
    own = rows.indices is not None and rows.rows in (data.parts.plain, data.parts.augmented)
    cached = own and int(rows.indices.max()) < len(data.labels) and teachers.cache is not None  # type: ignore[union-attr]
    students, taught, labels = [], [], []
    with isolate_rng(), evaluating(student.model), torch.no_grad(), trainer.precision_plugin.forward_context():
        for first in range(0, len(rows), data.batch_size):
            some = list(range(first, min(first + data.batch_size, len(rows))))
            batch = to_device(module, rows.__getitems__(some))
            students.append(student(batch.x))
            taught.append(teachers.trained_on(batch) if cached else teachers(batch))
            labels.append(batch.y)
    # under autocast, the training would find casts of the weights without gradients
    torch.clear_autocast_cache()
    found = RowOutputs(_joined(students), [_joined(p) for p in zip(*taught, strict=True)], _cat(labels, IGNORED))
    named = {f"teacher {k}": teacher for k, teacher in enumerate(found.teachers)} | {"student": found.student}
    check_outputs(module.task, found.y, named, module.num_classes, missing=True)
    return found


def first_outputs(module: Distiller) -> tuple[Outputs, list[Outputs]]:
    """Of student and teachers for that batch."""
    batch = first_batch(module)
    with isolate_rng(), torch.no_grad(), evaluating(module.student):
        return module.tapped_student(batch.x), module.teachers(batch)


def _joined(parts: Sequence[Outputs]) -> Outputs:
    features = {tap: of_first_process(_cat([p.features[tap] for p in parts])) for tap in parts[0].features}
    known = None if parts[0].known is None else torch.cat([part.speaks for part in parts])
    return Outputs(of_first_process(_cat([part.logits for part in parts])), features, known)


def _cat(parts: Sequence[Tensor], fill: int = 0) -> Tensor:
    """Batches one after the other; tokens are padded to the longest."""
    longest = max(part.shape[1:2] for part in parts)
    if all(part.shape[1:2] == longest for part in parts):
        return torch.cat(list(parts))
    return torch.cat(
        [
            part.new_full((len(part), *longest, *part.shape[2:]), fill).index_copy_(
                1, torch.arange(part.shape[1], device=part.device), part
            )
            for part in parts
        ]
    )
