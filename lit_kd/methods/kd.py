"""Knowledge distillation with one fixed weight."""

from typing import Any

import torch

from lit_kd.models import Network
from lit_kd.terms import HardLabel, Term, Weights
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.mean_teacher import MeanTeacher, Shares
from lit_kd.weightings.selection import Selective


class KD(Selective, Shares, MeanTeacher):
    """Knowledge distillation (Hinton et al., 2015): ``(1 - weight) CE + weight T^2 KL``, the same for every sample.

    Teach a chain of students, each by the one before: this is TAKD (arXiv 1902.03393), or DGKD (arXiv 2009.08825) where
    each learns from all before it and batches drop some; that their mean is taken is ours. Rows without a label learn
    from the teacher alone. Each term is the mean over all rows: where few have a label, the label counts little [ours].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: The teacher's share, in [0, 1].
        temperature: T > 0, dimensionless.
        hard: Distil the class that the teacher finds most probable, by cross-entropy at no temperature.
        **base: See `lit_kd.weightings.selection.Selective`, `lit_kd.weightings.mean_teacher.MeanTeacher` and
            `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 0.9,
        temperature: float = 4.0,
        hard: bool = False,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        self.temperature, self.hard = temperature, hard

    def default_term(self) -> Term:
        """KL divergence, or cross-entropy with the teacher's class."""
        return HardLabel() if self.hard else self.task.teacher_term(self.temperature)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """``(1 - weight, weight)``, several sources sharing the weight; the label alone where rows are not selected."""
        shares = super().weigh(student, sources, batch)
        if self.selected is None:
            return shares
        distilled = self.distilled(batch).unsqueeze(1)
        return distilled * distilled.new_tensor(shares) + (1 - distilled) * torch.eye(1, len(shares)).to(distilled)
