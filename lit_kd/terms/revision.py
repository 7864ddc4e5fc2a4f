"""What is learned from a teacher whose mistakes the label corrects."""

from typing import Literal

from torch import Tensor

from lit_kd.losses import contradicts, kd_loss, revise_labels, revised_teacher
from lit_kd.terms.logits import LogitTerm
from lit_kd.types import check_choice


class Revised(LogitTerm):
    """Label revision (arXiv 2404.03693): where the teacher contradicts the label, its probabilities are revised.

    ``"mse"`` has the losses of a reimplementation by others: ``4 mean_c (z - t)^2`` where both agree, else
    ``mean_c (softmax(z) - p)^2`` with the revised probabilities p; ``"kl"`` has KL to either, which is ours.

    Args:
        eta: In [0, 1): how much of a wrong teacher stays, see `lit_kd.losses.revise_labels`.
        form: The loss.
        weight: A constant factor.
    """

    def __init__(self, eta: float = 0.8, form: Literal["mse", "kl"] = "mse", weight: float = 1.0) -> None:
        super().__init__(1.0, weight)
        if not 0 <= eta < 1:
            raise ValueError(f"expected an eta of label revision in [0, 1), found {eta}")
        check_choice("form", form, ("mse", "kl"))
        self.eta = eta
        self.form = form

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """See above."""
        if self.form == "kl":
            return kd_loss(student, revised_teacher(teacher, y, self.eta))
        revised = (student.softmax(-1) - revise_labels(teacher.softmax(-1), y, self.eta)).square().mean(-1)
        return revised.where(contradicts(teacher, y), 4 * (student - teacher).square().mean(-1))
