"""Online distillation: a part of the teacher learns with the student."""

from typing import Any

from lit_kd.models import Network
from lit_kd.terms import OnlineTeacher, TaskName, Term
from lit_kd.weightings.mean_teacher import Shares


class OnlineKD(Shares):
    """Online distillation (OKD, arXiv 2409.12512): a small adapter of the frozen teacher is trained along.

    ``(1 - weight) CE + weight OnlineTeacher``, see `lit_kd.terms.OnlineTeacher`. Nothing is sampled, so
    that a step is as fast as with a teacher that stays as it is. The source's adapters are LoRA [memory]; here a
    residual module on the teacher's last features takes their place. No weight of the teacher changes [ours].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list, each with an adapter: modules or checkpoint paths.
        weight: The share of what is learned from teachers, and of what their adapters learn, in [0, 1].
        width: Of the adapter's hidden layer.
        temperature: T > 0 of both divergences, dimensionless.
        task: Tokens, or classification.
        **base: See `lit_kd.Distiller`.
    """

    tasks = ("tokens", "classification")
    settled = ("term",)

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 0.9,
        width: int = 16,
        temperature: float = 1.0,
        task: TaskName = "tokens",
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, task=task, **base)
        OnlineTeacher(width, temperature)  # refuses what cannot be
        self.width, self.temperature = width, temperature

    def default_term(self) -> Term:
        """With an adapter."""
        return OnlineTeacher(self.width, self.temperature)
