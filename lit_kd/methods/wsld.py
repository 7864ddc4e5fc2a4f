"""Weighted soft labels."""

from typing import Any

import torch

from lit_kd.losses import cross_entropy
from lit_kd.models import Network
from lit_kd.terms import KL, Term, Weights
from lit_kd.types import Batch, Outputs, class_labels
from lit_kd.weightings.mean_teacher import Beside, MeanTeacher


class WSLD(Beside, MeanTeacher):
    """Weighted soft labels (WSLD, arXiv 2102.00650): ``CE + weight w T^2 KL``, w by sample from both losses.

    ``w = 1 - exp(-CE(student) / CE(teacher))`` at temperature 1: near 0 where the student already has the label, near 1
    where the teacher is sure of it. So it is a closed form of what ALM-KD learns, but for right labels: where one is
    wrong, a good teacher has a large loss, and is heard less [derived]. KL has the gradient of the paper's
    cross-entropy. Without a label, w is 1 [ours].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: What is distilled, beside 1 for the label: 2.5 on ImageNet, 2.25 at T = 4 on CIFAR-100 [code].
        temperature: T > 0, dimensionless.
        **base: See `lit_kd.weightings.mean_teacher.MeanTeacher` and `lit_kd.Distiller`.
    """

    tasks = ("classification",)
    by_sample = True

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 2.5,
        temperature: float = 2.0,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, **base)
        self.temperature = temperature

    def default_term(self) -> Term:
        """KL divergence."""
        return KL(self.temperature)

    @torch.no_grad()
    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The label's, and w of each source, ``(B, S + 1)``."""
        y = class_labels(batch.y)
        own, *theirs = (cross_entropy(outputs.logits.float(), y) for outputs in (student, *sources))
        w = [torch.where(y < 0, 1, 1 - torch.exp(-own / (loss + 1e-7))) for loss in theirs]
        label, *others = super().weigh(student, sources, batch)
        return torch.stack([torch.full_like(own, label), *(c * one for c, one in zip(others, w, strict=True))], dim=1)
