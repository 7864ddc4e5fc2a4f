"""Decoupled knowledge distillation."""

from typing import Any

from lit_kd.models import Network
from lit_kd.terms import DecoupledKL, Term, Weights
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.mean_teacher import MeanTeacher, warm_up


class DKD(MeanTeacher):
    """Decoupled distillation (DKD, arXiv 2203.08679): ``CE + w T^2 (alpha TCKD + beta NCKD)``, see `lit_kd.terms`.

    w rises from 1 / warm-up to 1 [code]. Where labels are wrong, beta amplifies the teacher on exactly these rows.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        alpha: Weight of the labelled class against all others.
        beta: Weight of the distribution over the others. In the authors' code 8, and 2 to 6 for some pairs.
        temperature: T > 0, dimensionless.
        warmup_epochs: Epochs until w is 1; 20 of 240 in the authors' code.
        **base: See `lit_kd.weightings.mean_teacher.MeanTeacher` and `lit_kd.Distiller`.
    """

    rises = "warmup_epochs"

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup_epochs: int = 20,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if min(alpha, beta, warmup_epochs) < 0:
            raise ValueError(f"expected alpha, beta and warmup_epochs >= 0, found {alpha}, {beta} and {warmup_epochs}")
        self.alpha, self.beta, self.temperature, self.warmup_epochs = alpha, beta, temperature, warmup_epochs

    def default_term(self) -> Term:
        """Decoupled KL."""
        return DecoupledKL(self.alpha, self.beta, self.temperature)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """1, and w, which several sources share."""
        return [1.0] + [warm_up(self.current_epoch, self.warmup_epochs) / len(sources)] * len(sources)
