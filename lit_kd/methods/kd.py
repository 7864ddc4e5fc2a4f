"""Knowledge distillation with one fixed weight."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.distiller import Distiller
from lit_kd.distiller.base import Weights
from lit_kd.losses import mean_teacher, revised_teacher
from lit_kd.models import Network
from lit_kd.terms import HardLabel, Term
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.selection import check_options, selected_in, selected_rows


class KD(Distiller):
    """Knowledge distillation (Hinton et al., 2015): ``(1 - weight) CE + weight T^2 KL``, the same for every sample.

    Several teachers are averaged; where features are compared, or a sample has several labels, they have equal shares.
    A chain, in which each is the student of the one before, is TAKD (arXiv 1902.03393) where a student learns from the
    last, and DGKD (arXiv 2009.08825) where it learns from all before it, some of which each batch drops; that their
    mean is taken is ours.

    Of rows without a label, the teacher's term alone is learned. Each term is the mean over all rows of a batch: where
    few rows have a label, the label term is small next to the teacher's [ours].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: The teacher's share, in [0, 1].
        temperature: T > 0, dimensionless.
        hard: Distil by cross-entropy with the class that the teacher finds most probable, at no temperature.
        average: What of several teachers is averaged, see `lit_kd.losses.mean_teacher`. The mean of the probabilities
            has the gradient of the mean of the losses.
        drop: With which probability, in [0, 1], a training batch drops each of several teachers; DGKD drops with 0.25.
            If it were to drop all, one of them, drawn at random, is kept [ours].
        revise: Eta of Label Revision, in [0, 1): where the teacher contradicts the label, what is distilled is revised,
            see `lit_kd.losses.revised_teacher`; ``None``: the teacher as it is.
        select: The fraction of rows to distil, see `lit_kd.weightings.selection`; the others have the label alone, with
            weight 1. Needs sample indices and a meta split.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 0.9,
        temperature: float = 4.0,
        hard: bool = False,
        average: Literal["probabilities", "logits"] = "probabilities",
        drop: float = 0.0,
        revise: float | None = None,
        select: float | None = None,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if not 0 <= weight <= 1:
            raise ValueError(f"expected a weight in [0, 1], the teacher's share of the loss; found {weight}")
        if average not in ("probabilities", "logits"):
            raise ValueError(f"expected average 'probabilities' or 'logits', found {average!r}")
        if not 0 <= drop <= 1:
            raise ValueError(f"expected drop in [0, 1], the probability to drop a teacher; found {drop}")
        if drop and self._apart:
            raise ValueError(
                "expected no drop where teachers are not averaged: with features, or several labels a sample"
            )
        check_options(self.task, revise, select)
        self.weight = weight
        self.temperature = temperature
        self.hard = hard
        self.average = average
        self.drop = drop
        self.revise = revise
        self.select = select
        self.selected: Tensor | None = None
        self._draws = torch.Generator()
        self.default_term()  # refuses a temperature that is none

    def default_term(self) -> Term:
        """KL divergence, or cross-entropy with the teacher's class."""
        return HardLabel() if self.hard else self.task.teacher_term(self.temperature)

    @property
    def _apart(self) -> bool:
        return self.reads_features or self.task.name == "multilabel"

    @property
    def num_sources(self) -> int:
        """One mean teacher, unless features are compared or there are several labels a sample."""
        return super().num_sources if self._apart else min(1, super().num_sources)

    def on_fit_start(self) -> None:
        """Select the rows to distil."""
        super().on_fit_start()
        self.selected = selected_rows(self, self.select)

    def on_train_epoch_start(self) -> None:
        """Which teachers are dropped follows from seed and epoch: the same in all processes and after a resume."""
        super().on_train_epoch_start()
        self._draws.manual_seed(derive_seed(resolve_seed(None), f"teachers dropped in epoch {self.current_epoch}"))

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """The mean of the teachers that are not dropped, revised by the label."""
        if self.num_sources < len(teachers):
            draws = torch.rand(len(teachers), generator=self._draws)
            kept = draws >= self.drop
            kept[draws.argmax()] = True  # if all are below, each is as likely to be the largest
            heard = [teacher.logits for teacher, keep in zip(teachers, kept.tolist(), strict=True) if keep]
            teachers = [Outputs(mean_teacher(heard, self.temperature, self.average), {})]
        if self.revise is None:
            return teachers
        return [t._replace(logits=revised_teacher(t.logits, batch.y, self.revise, self.temperature)) for t in teachers]

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """``(1 - weight, weight)``, several sources sharing the weight; the label alone where rows are not selected."""
        shares = [1 - self.weight] + [self.weight / len(sources)] * len(sources)
        if self.selected is None:
            return shares
        distils = selected_in(self.selected, batch).unsqueeze(1)
        return torch.tensor(shares, device=distils.device).lerp(torch.eye(len(shares))[0].to(distils), 1 - distils)
