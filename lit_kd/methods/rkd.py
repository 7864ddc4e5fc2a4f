"""Relational knowledge distillation."""

from typing import Any

from lit_kd.methods.fitnet import FitNet
from lit_kd.models import Network
from lit_kd.terms import Relational, Term


class RKD(FitNet):
    """Relational distillation (RKD, arXiv 1904.05068): as `FitNet`, with `Relational` in place of hints.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: What is distilled, beside 1 for the label; 1 in the benchmarks [code].
        distance: What distances count in it; 25 there.
        angle: What angles count; 50 there.
        **base: See `FitNet` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 1.0,
        distance: float = 25.0,
        angle: float = 50.0,
        **base: Any,
    ) -> None:
        super().__init__(student, teacher, weight=weight, **base)
        self.distance, self.angle = distance, angle

    def default_term(self) -> Term:
        """Distances and angles."""
        return Relational(self.student_tap, self.teacher_tap, self.distance, self.angle)
