"""Label Revision: where the teacher contradicts the label, it is corrected before it is distilled."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_kd.distiller import Distiller
from lit_kd.distiller.base import Weights
from lit_kd.losses import contradicts, mean_teacher
from lit_kd.models import Network
from lit_kd.terms import Term
from lit_kd.terms.revision import Revised
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.selection import check_options, selected_in, selected_rows


class LabelRevision(Distiller):
    """Label revision and data selection (arXiv 2404.03693): a wrong teacher's probabilities are mixed with the label.

    Where teacher and label agree, the student learns from both; where they do not, from the revised probabilities, see
    `lit_kd.terms.Revised` [text]. Means are taken over the batch and not over each kind of row [ours]. Rows that are not
    selected learn from their label alone [text]; the scores of `lit_kd.trust.influence.selection_scores` are ours. A row
    without a label is distilled from the teacher's own probabilities, as if they agreed.

    Its limit: the label is taken for the truth. Where it is the label that is wrong, a teacher that is right is
    "corrected" to repeat the mistake. `KD` and `ALMKD` have revision and selection as their options ``revise`` and
    ``select``.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list, whose logits are averaged: modules or checkpoint paths.
        eta: In [0, 1): how much of a wrong teacher stays, see `lit_kd.losses.revise_labels`.
        form: The distillation loss, see `lit_kd.terms.Revised`. ``"mse"`` is steep, the steeper the fewer the classes:
            with ten of them, lower the learning rate about tenfold.
        cross_entropy: Whether the label's cross-entropy is taken where the teacher agrees with it (``"right"``), or on
            every row (``"all"``).
        select: The fraction of rows to distil, see `lit_kd.weightings.selection`; needs indices and a meta split.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        eta: float = 0.8,
        form: Literal["mse", "kl"] = "mse",
        cross_entropy: Literal["right", "all"] = "right",
        select: float | None = None,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if cross_entropy not in ("right", "all"):
            raise ValueError(f"expected cross_entropy 'right' or 'all', found {cross_entropy!r}")
        check_options(self.task, None, select)
        self.eta = eta
        self.form: Literal["mse", "kl"] = form
        self.cross_entropy = cross_entropy
        self.select = select
        self.selected: Tensor | None = None
        self.default_term()  # refuses what it cannot take

    num_sources = 1

    def default_term(self) -> Term:
        """The revised teacher."""
        return Revised(self.eta, self.form)

    def on_fit_start(self) -> None:
        """Select the rows to distil."""
        super().on_fit_start()
        self.selected = selected_rows(self, self.select)

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """The mean of the teachers' logits."""
        mean = mean_teacher([t.logits for t in teachers], of="logits")
        return [teachers[0]._replace(logits=mean)]

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """1, but 0 for the label where the teacher contradicts it, and for the teacher of rows that are not selected."""
        heard = torch.ones_like(batch.y) if self.selected is None else selected_in(self.selected, batch)
        label = torch.ones_like(heard)
        if self.cross_entropy == "right":
            label = (~contradicts(sources[0].logits, batch.y) | (heard == 0)).to(heard)
        return torch.stack([label, heard], dim=1)
