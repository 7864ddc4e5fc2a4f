"""Online distillation: a part of the teacher learns with the student."""

from typing import Any, cast

import torch
from torch import nn

from lit_kd.data.seeds import seeded
from lit_kd.models import Network
from lit_kd.models.files import optional
from lit_kd.teachers.lora import with_lora
from lit_kd.terms import OnlineTeacher, TaskName, Term
from lit_kd.types import Batch, Outputs, logits_of
from lit_kd.weightings.mean_teacher import Shares


class OnlineKD(Shares):
    """Online distillation (OKD, arXiv 2409.12512): a small adapter of the frozen teacher is trained along.

    ``(1 - weight) CE + weight OnlineTeacher``, see `lit_kd.terms.OnlineTeacher`. Nothing is sampled. The source's
    adapters are LoRA [memory]; without ``lora`` a residual module on the teacher's last features takes their place.
    No weight of the teacher changes [ours].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list, each with an adapter: modules or checkpoint paths.
        weight: The share of what is learned from teachers, and of what their adapters learn, in [0, 1].
        width: Of the residual module's hidden layer, without ``lora``.
        lora: The rank of LoRA adapters at the teacher's linear layers, see `lit_kd.teachers.lora.with_lora`.
        temperature: T > 0 of both divergences, dimensionless.
        task: Tokens, or classification.
        **base: See `lit_kd.Distiller`; with ``lora`` without ``teacher_cache`` and ``teacher_precision``.
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
        lora: int | None = None,
        temperature: float = 1.0,
        task: TaskName = "tokens",
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, weight=weight, task=task, **base)
        OnlineTeacher(width, temperature)  # refuses what cannot be
        self.width, self.lora, self.temperature = width, lora, temperature
        self._adapted: tuple[nn.Module, ...] = ()  # in a tuple, they are no submodules
        if lora is None:
            return
        optional("peft", "hf", "LoRA")
        if lora < 1:
            raise ValueError(f"expected as lora a rank from 1, found {lora}")
        if self.teacher_cache or self.speed.teacher_precision:
            raise ValueError("expected neither teacher_cache nor teacher_precision with lora, which trains the teacher")

    def default_term(self) -> Term:
        """With an adapter."""
        return OnlineTeacher(None if self.lora else self.width, self.temperature)

    def setup(self, stage: str) -> None:
        """Give the teachers their LoRA, which the terms keep."""
        super().setup(stage)
        if stage == "fit" and self.lora and not self._adapted:
            assert self.terms is not None
            with seeded("LoRA of teachers"):
                made = [with_lora(model, self.lora) for model in self.teachers.models]
            self._adapted = tuple(model for model, _ in made)
            for term, (_, adapter) in zip(self.terms.each, made, strict=True):
                term.adapter = adapter

    def on_fit_start(self) -> None:
        """Bring what the copies of teachers do not share, their buffers, to the device."""
        super().on_fit_start()
        for model in self._adapted:
            model.to(self.device, cast(torch.dtype, self.dtype))

    def ask(self, batch: Batch) -> list[Outputs]:
        """In the training, the teachers with their LoRA, of which gradients are wanted."""
        if not (self._adapted and self.trainer.training):
            return super().ask(batch)
        return [Outputs(logits_of(model, batch.x), {}).of(batch) for model in self._adapted]
