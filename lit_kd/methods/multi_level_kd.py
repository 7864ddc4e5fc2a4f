"""Multi-level logit distillation."""

from typing import Any

from lit_kd.models import Network
from lit_kd.terms import MultiLevel, Term
from lit_kd.weightings.mean_teacher import Shares


class MultiLevelKD(Shares):
    """Multi-level logit distillation (MLKD, CVPR 2023): ``(1 - weight) CE + weight MultiLevel``, see `lit_kd.terms`.

    Probabilities at five temperatures, and how they relate the rows of a batch, and the classes. The paper has two
    views of each image, here is one: what the authors' code does with the other, strongly augmented one is left out.
    Several teachers have equal shares.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: The teacher's share, in [0, 1].
        published: See `lit_kd.terms.MultiLevel`.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 0.9,
        published: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        self.published = published

    def default_term(self) -> Term:
        """All levels."""
        return MultiLevel(self.published)
