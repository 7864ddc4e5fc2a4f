"""Data selection: which rows are distilled (arXiv 2404.03693)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_kd.data.rows import Indexed
from lit_kd.models import last_linear
from lit_kd.teachers.modules import Teachers
from lit_kd.terms import Task
from lit_kd.trust.influence import select_rows, selection_scores
from lit_kd.trust.meta import Head, MetaRows
from lit_kd.types import PENULTIMATE, Batch

if TYPE_CHECKING:
    from lit_kd.distiller import Distiller


def check_options(task: Task, revise: float | None, select: float | None) -> None:
    """Refuse an eta outside of [0, 1), a fraction of rows outside of (0, 1], and both without class numbers."""
    if revise is not None and not 0 <= revise < 1:
        raise ValueError(f"expected an eta of label revision in [0, 1), found {revise}")
    if select is not None and not 0 < select <= 1:
        raise ValueError(f"expected select in (0, 1], the fraction of rows to distil, found {select}")
    if task.name != "classification" and (revise is not None or select is not None):
        raise ValueError(f"expected no revise or select with {task.name}: they compare class numbers")


def selected_rows(module: Distiller, fraction: float | None) -> Tensor | None:
    """Which rows are distilled, chosen once before the training: it depends on data and teachers alone.

    Of the training rows with a label the fraction with the highest `lit_kd.trust.influence.selection_scores`; rows
    without a label and meta rows always are. With several teachers the mean of their scores counts, each divided by its
    root mean square [ours].

    Args:
        module: In a training that is about to begin.
        fraction: In (0, 1]; ``None``: there is no selection.

    Returns:
        Bool, ``(N + M,)``.

    Raises:
        ValueError: If there is no meta split, or a teacher's logits do not come from a last linear layer.
    """
    if fraction is None:
        return None
    data, models = module.data, module.teachers.models
    data.require_meta(f"select={fraction}, by which rows are scored")
    n, parts = data.train_size, data.parts
    plain = Indexed(parts.plain, parts.positions["train"], data.labels[:n], torch.arange(n))
    untapped, module.teachers = module.teachers, Teachers(models, (PENULTIMATE,), module.speed)
    try:
        train, meta = module.predict_rows(plain), module.predict_rows(parts.meta_rows())
    finally:
        module.teachers = untapped
    total = torch.zeros(n, device=train.y.device)
    for model, ours, trusted in zip(models, train.teachers, meta.teachers, strict=True):
        head = Head.of(last_linear(model)[1])
        if not head.gives(ours.logits, ours.features.get(PENULTIMATE)):
            raise ValueError(
                "expected the teacher's logits to be the output of its last linear layer, at which rows are scored "
                "for select; found others. Let the teacher end in torch.nn.Linear, or leave select unset"
            )
        rows = MetaRows(trusted.features[PENULTIMATE].float(), meta.y, torch.ones_like(meta.y, dtype=torch.bool))
        scores = selection_scores(head, ours.features[PENULTIMATE].float(), train.y, rows)
        total += scores / scores.square().mean().sqrt().clamp(min=torch.finfo(scores.dtype).tiny)
    chosen = select_rows(total, train.y, fraction)
    return torch.cat([chosen, torch.ones(data.meta_size, dtype=torch.bool, device=chosen.device)])


def selected_in(selected: Tensor, batch: Batch) -> Tensor:
    """1 for the rows of a batch that are distilled and 0 for others, ``(B,)``; a ValueError without indices."""
    if batch.index is None:
        raise ValueError("expected batches with sample indices, (x, y, index), for select; found one without")
    return selected[batch.index].float()
