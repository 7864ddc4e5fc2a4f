"""Data selection: which rows are distilled (arXiv 2404.03693)."""

from typing import Any

import torch
from torch import Tensor

from lit_kd.distiller import Distiller
from lit_kd.models import last_linear
from lit_kd.teachers.modules import Teachers, find_heads
from lit_kd.trust.meta import Head, MetaRows, select_rows, selection_scores
from lit_kd.types import PENULTIMATE, Batch, full, index_of


class Selective(Distiller):
    """Distils a selection of the rows: those that help most on trusted rows.

    Args:
        select: The fraction of rows to distil, in (0, 1], see `lit_kd.weightings.selection`; the others learn from the
            label alone. Needs sample indices and a meta split. ``None``: all.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(self, *, select: float | None = None, **base: Any) -> None:
        super().__init__(**base)
        if select is not None and not (0 < select <= 1 and self.task.name == "classification"):
            raise ValueError(f"expected select in (0, 1], and one class a sample, found {select}")
        self.select, self.by_sample = select, self.by_sample or select is not None
        self.selected: Tensor | None = None
        """Which rows are distilled, bool ``(N + M,)``; ``None``: all."""

    def on_fit_start(self) -> None:
        """Select the rows."""
        super().on_fit_start()
        self.selected = None if self.select is None else selected_rows(self, self.select)

    def distilled(self, batch: Batch) -> Tensor:
        """1 for the rows of a batch that are distilled and 0 for others, ``(B,)``."""
        if self.selected is None:
            return torch.ones(len(batch.y), device=batch.y.device)
        return self.selected[index_of(batch)].float()

    def of_distilled(self, losses: list[Tensor], batch: Batch) -> list[Tensor]:
        """The terms, first the label's; those of teachers are 0 where a row is not distilled."""
        if self.selected is None:
            return losses
        return [losses[0], *(loss * self.distilled(batch) for loss in losses[1:])]


def selected_rows(module: Distiller, fraction: float) -> Tensor:
    """The rows to distil, bool ``(N + M,)``, chosen once before the training, by data and teachers alone.

    Of the training rows with a label the fraction with the highest `lit_kd.trust.meta.selection_scores`; rows
    without a label and meta rows always are. With several teachers the mean of their scores counts, each divided by its
    root mean square [ours].
    """
    data, models = module.data, module.teachers.models
    data.require_meta(f"select={fraction}, by which rows are scored")
    n, parts = data.train_size, data.parts
    find_heads(module, models)
    untapped, module.teachers = module.teachers, Teachers(models, (PENULTIMATE,), module.speed)
    try:
        train, meta = module.predict_rows(parts.rows(torch.arange(n))), module.predict_rows(parts.meta_rows())
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
        rows = MetaRows(full(trusted.features[PENULTIMATE]), meta.y, torch.ones_like(meta.y, dtype=torch.bool))
        scores = selection_scores(head, full(ours.features[PENULTIMATE]), train.y, rows)
        total += scores / scores.square().mean().sqrt().clamp(min=torch.finfo(scores.dtype).tiny)
    chosen = select_rows(total, train.y, fraction)
    return torch.cat([chosen, torch.ones(data.meta_size, dtype=torch.bool, device=chosen.device)])
