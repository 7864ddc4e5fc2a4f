"""Probabilistic knowledge transfer."""

from typing import Any

from lit_kd.methods.fitnet import FitNet
from lit_kd.models import Network
from lit_kd.terms import Affinity, Term


class PKT(FitNet):
    """Probabilistic knowledge transfer (PKT, arXiv 1803.10837): as `FitNet`, with `Affinity` in place of hints.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: What is distilled, beside 1 for the label; 30000 in the benchmarks, a mean over all pairs [code].
        **base: See `FitNet` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 30000.0,
        **base: Any,
    ) -> None:
        super().__init__(student, teacher, weight=weight, **base)

    def default_term(self) -> Term:
        """Affinities."""
        return Affinity(self.student_tap, self.teacher_tap)
