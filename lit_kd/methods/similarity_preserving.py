"""Similarity-preserving distillation."""

from typing import Any

from lit_kd.methods.fitnet import FitNet
from lit_kd.models import Network
from lit_kd.terms import Similarity, Term


class SimilarityPreserving(FitNet):
    """Similarity-preserving distillation (SP, arXiv 1907.09682): as `FitNet`, with `Similarity` in place of hints.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: What is distilled, beside 1 for the label; 3000 in the benchmarks, for the last maps [code].
        **base: See `FitNet` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 3000.0,
        **base: Any,
    ) -> None:
        super().__init__(student, teacher, weight=weight, **base)

    def default_term(self) -> Term:
        """Which samples resemble each other."""
        return Similarity(self.student_tap, self.teacher_tap)
