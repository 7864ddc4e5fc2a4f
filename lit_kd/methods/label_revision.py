"""Label Revision: where the teacher contradicts the label, it is corrected before it is distilled."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lit_kd.distiller.base import Distiller
from lit_kd.losses import contradicts, cross_entropy, kd_loss, mean_teacher, revise_labels
from lit_kd.models import Network
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.revision import Revision


class LabelRevision(Distiller):
    """Label revision and data selection (arXiv 2404.03693): a wrong teacher's probabilities are mixed with the label.

    Where teacher and label agree, the student learns from both; where they do not, from the revised probabilities p of
    `lit_kd.losses.revise_labels` [text], in which the label's class is on top. With ``form="mse"`` the losses of a
    reimplementation by others: ``CE + 4 mean_c (z - t)^2`` and ``mean_c (softmax(z) - p)^2``. With ``form="kl"``
    ``CE + KL`` and ``KL`` to p, which is ours, as are means over the batch and not over each kind of row.

    Rows that are not selected learn from their label alone [text]; the scores of `lit_kd.trust.influence.selection_scores`
    are ours. A row without a label is distilled from the teacher's own probabilities, as if they agreed.

    Its limit: the label is taken for the truth. Where it is the label that is wrong, a teacher that is right is
    "corrected" to repeat the mistake.

    `KD` and `ALMKD` take revision and selection as their options ``revise`` and ``select``.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list, whose logits are averaged: modules or checkpoint paths.
        eta: In [0, 1): how much of a wrong teacher stays, see `lit_kd.losses.revise_labels`.
        form: The distillation loss, see above. ``"mse"`` is steep, the steeper the fewer the classes: with ten of them,
            lower the learning rate about tenfold.
        cross_entropy: Whether the label's cross-entropy is taken where the teacher agrees with it (``"right"``), or on
            every row (``"all"``).
        select: The fraction of rows to distil, see `lit_kd.weightings.revision.Revision`; needs indices and a meta split.
        damping: Of the selection's scores.
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
        damping: float | None = None,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if form not in ("mse", "kl"):
            raise ValueError(f"expected form 'mse' or 'kl', found {form!r}")
        if cross_entropy not in ("right", "all"):
            raise ValueError(f"expected cross_entropy 'right' or 'all', found {cross_entropy!r}")
        self.eta = eta
        self.form = form
        self.cross_entropy = cross_entropy
        self.revision = Revision(eta, select, damping)

    def on_fit_start(self) -> None:
        """Select the rows to distil."""
        self.revision.prepare(self)

    def distill(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> dict[str, Tensor]:
        """Two terms, ``label`` and ``teacher``."""
        z, y = student.logits, batch.y
        t = mean_teacher([teacher.logits for teacher in teachers], of="logits")
        wrong, distils = contradicts(t, y), self.revision.distils(batch)
        if self.form == "kl":
            taught = kd_loss(z, self.revision.teacher(t, y, 1.0))
        else:
            revised = (z.softmax(-1) - revise_labels(t.softmax(-1), y, self.eta)).square().mean(-1)
            taught = revised.where(wrong, 4 * (z - t).square().mean(-1))
        label = cross_entropy(z, y)
        if self.cross_entropy == "right":
            label = label * (~wrong | (distils == 0))
        return {"label": label, "teacher": distils * taught}
