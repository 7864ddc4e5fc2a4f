"""Label Revision: where the teacher contradicts the label, it is corrected before it is distilled."""

from typing import Any, Literal

import torch

from lit_kd.losses import contradicts
from lit_kd.models import Network
from lit_kd.terms import Revised, Term, Weights
from lit_kd.types import Batch, Outputs, check_choice
from lit_kd.weightings.mean_teacher import as_one
from lit_kd.weightings.selection import Selective


class LabelRevision(Selective):
    """Label revision and data selection (arXiv 2404.03693): a wrong teacher's probabilities are mixed with the label.

    Where teacher and label agree, or there is no label, the student learns from both, else from the revised
    probabilities alone [text]. The label is taken for the truth: where it is wrong, so is the revision.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list, whose logits are averaged: modules or checkpoint paths.
        eta: In [0, 1): how much of a wrong teacher stays, see `lit_kd.losses.revise_labels`.
        form: See `lit_kd.terms.Revised`. With ``"mse"`` and ten classes, lower the learning rate about tenfold.
        cross_entropy: Whether the label counts where the teacher agrees (``"right"``), or always (``"all"``).
        **base: See `lit_kd.weightings.selection.Selective` and `lit_kd.Distiller`.
    """

    tasks = ("classification",)
    num_sources = 1
    by_sample = True

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        eta: float = 0.8,
        form: Literal["mse", "kl"] = "mse",
        cross_entropy: Literal["right", "all"] = "right",
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        check_choice("cross_entropy", cross_entropy, ("right", "all"))
        self.eta, self.cross_entropy = eta, cross_entropy
        self.form: Literal["mse", "kl"] = form

    def default_term(self) -> Term:
        """The revised teacher."""
        return Revised(self.eta, self.form)

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """The mean of the teachers' logits."""
        return [as_one(teachers, of="logits")]

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """1, but 0 for a label that the teacher contradicts, and for the teacher of rows that are not selected."""
        heard = self.distilled(batch)
        ignored = contradicts(sources[0].logits, batch.y) & (heard > 0) & (self.cross_entropy == "right")
        ignored &= sources[0].speaks
        return torch.stack([(~ignored).to(heard), heard], dim=1)
