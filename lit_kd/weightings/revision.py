"""What a teacher's word becomes before it is distilled: revised by the label, on selected rows only."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_kd.data.rows import Indexed
from lit_kd.distiller.base import Distiller
from lit_kd.losses import revised_teacher
from lit_kd.models import last_linear
from lit_kd.teachers.modules import Teachers
from lit_kd.trust.influence import select_rows, selection_scores
from lit_kd.trust.meta import Head, MetaRows
from lit_kd.types import PENULTIMATE, Batch


class Revision:
    """Label revision and data selection (arXiv 2404.03693), as options of a method.

    Args:
        eta: Of `lit_kd.losses.revise_labels`, in [0, 1); ``None``: the teachers' word stays as it is.
        select: The fraction, in (0, 1], of the training rows with a label that are distilled, those with the highest
            `lit_kd.trust.influence.selection_scores`; rows without a label and meta rows always are. ``None``: all rows.
            Needs sample indices and a meta split.
        damping: Of the scores.
    """

    def __init__(self, eta: float | None, select: float | None = None, damping: float | None = None) -> None:
        if eta is not None and not 0 <= eta < 1:
            raise ValueError(f"expected an eta of label revision in [0, 1), found {eta}")
        if select is not None and not 0 < select <= 1:
            raise ValueError(f"expected select in (0, 1], the fraction of rows to distil, found {select}")
        if damping is not None and not damping > 0:
            raise ValueError(f"expected a damping above 0, or none, found {damping}")
        if damping is not None and select is None:
            raise ValueError("expected select beside damping, which is an option of the selection's scores; found none")
        self.eta = eta
        self.select = select
        self.damping = damping
        self.selected: Tensor | None = None
        """Which rows are distilled, bool ``(N + M,)``, where there is a selection."""

    def prepare(self, module: Distiller) -> None:
        """Select the rows, once, before the training: it depends on data and teachers alone.

        With several teachers by the mean of their scores, each divided by its root mean square [ours].

        Raises:
            ValueError: If rows are to be selected without a meta split, or with a teacher whose logits do not come from
                a last linear layer.
        """
        if self.select is None:
            return
        data = module.data
        data.require_meta(f"select={self.select}, by which rows are scored")
        models, untapped = module.teachers.models, module.teachers
        heads = [last_linear(model)[1] for model in models]
        n, parts = data.train_size, data.parts
        plain = Indexed(parts.plain, parts.positions["train"], data.labels[:n], torch.arange(n))
        module.teachers = Teachers(models, (PENULTIMATE,), module.speed)
        try:
            train, meta = module.predict_rows(plain), module.predict_rows(parts.meta_rows())
        finally:
            module.teachers = untapped
        total = torch.zeros(n, device=train.y.device)
        for layer, ours, trusted in zip(heads, train.teachers, meta.teachers, strict=True):
            head = Head.of(layer)
            if not head.gives(ours.logits, ours.features.get(PENULTIMATE)):
                raise ValueError(
                    "expected the teacher's logits to be the output of its last linear layer, at which rows are scored "
                    "for select; found others. Let the teacher end in torch.nn.Linear, or leave select unset"
                )
            rows = MetaRows(trusted.features[PENULTIMATE].float(), meta.y, torch.ones_like(meta.y, dtype=torch.bool))
            features = ours.features[PENULTIMATE].float()
            scores = selection_scores(head, features, train.y, rows)
            total += scores / scores.square().mean().sqrt().clamp(min=torch.finfo(scores.dtype).tiny)
        chosen = select_rows(total, train.y, self.select)
        self.selected = torch.cat([chosen, torch.ones(data.meta_size, dtype=torch.bool, device=chosen.device)])

    def teacher(self, logits: Tensor, y: Tensor, temperature: float) -> Tensor:
        """What `lit_kd.losses.kd_loss` compares with in the place of a teacher's logits, ``(B, C)``."""
        return logits if self.eta is None else revised_teacher(logits, y, self.eta, temperature)

    def distils(self, batch: Batch) -> Tensor:
        """1 for the rows of a batch that are distilled and 0 for others, ``(B,)``.

        Raises:
            ValueError: If there is a selection, and the batch has no indices.
        """
        if self.selected is None:
            return torch.ones(len(batch.y), device=batch.y.device)
        if batch.index is None:
            raise ValueError("expected batches with sample indices, (x, y, index), for select; found one without")
        return self.selected[batch.index].float()
