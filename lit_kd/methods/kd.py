"""Knowledge distillation with one fixed weight."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.distiller.base import Distiller
from lit_kd.losses import cross_entropy, kd_loss, mean_teacher
from lit_kd.losses.labels import LabelLoss, label_loss_named
from lit_kd.models import Network
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.revision import Revision


class KD(Distiller):
    """Knowledge distillation (Hinton et al., 2015): ``(1 - weight) CE + weight T^2 KL``, the same for every sample.

    Several teachers are averaged. A chain, in which each is the student of the one before, is TAKD (arXiv 1902.03393)
    where a student learns from the last, and DGKD (arXiv 2009.08825) where it learns from all before it, some of which
    each batch drops; that their mean is taken is ours.

    Of rows without a label, the teacher's term alone is learned. Each term is the mean over all rows of a batch, so
    that each row has one vote: where few rows have a label, the label term is small next to the teacher's [ours].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        weight: The teacher's share, in [0, 1].
        temperature: T > 0, dimensionless.
        hard: Distil by cross-entropy with the class that the teacher finds most probable, at no temperature.
        label_loss: In the place of CE, for labels that may be wrong: see `lit_kd.losses.labels`.
        average: What of several teachers is averaged, see `lit_kd.losses.mean_teacher`. The mean of the probabilities
            has the gradient of the mean of the losses.
        drop: With which probability, in [0, 1], a training batch drops each of several teachers; DGKD drops with 0.25.
            If it were to drop all, one of them, drawn at random, is kept [ours].
        revise: Eta of Label Revision, in [0, 1): where the teacher contradicts the label, what is distilled is revised,
            see `lit_kd.losses.revised_teacher`; ``None``: the teacher as it is.
        select: The fraction of rows to distil, see `lit_kd.weightings.revision.Revision`; the others have the label alone, with
            weight 1. Needs sample indices and a meta split.
        damping: Of the selection's scores.
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
        label_loss: LabelLoss = "cross_entropy",
        average: Literal["probabilities", "logits"] = "probabilities",
        drop: float = 0.0,
        revise: float | None = None,
        select: float | None = None,
        damping: float | None = None,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if not 0 <= weight <= 1:
            raise ValueError(f"expected a weight in [0, 1], the teacher's share of the loss; found {weight}")
        if not temperature > 0:
            raise ValueError(f"expected a temperature above 0, found {temperature}")
        if average not in ("probabilities", "logits"):
            raise ValueError(f"expected average 'probabilities' or 'logits', found {average!r}")
        if not 0 <= drop <= 1:
            raise ValueError(f"expected drop in [0, 1], the probability to drop a teacher; found {drop}")
        self.weight = weight
        self.temperature = temperature
        self.hard = hard
        self.label_loss = label_loss_named(label_loss)
        self.average = average
        self.drop = drop
        self.revision = Revision(revise, select, damping)
        self._draws = torch.Generator()

    def on_fit_start(self) -> None:
        """Select the rows to distil."""
        self.revision.prepare(self)

    def on_train_epoch_start(self) -> None:
        """Which teachers are dropped follows from seed and epoch: the same in all processes and after a resume."""
        super().on_train_epoch_start()
        self._draws.manual_seed(derive_seed(resolve_seed(None), f"teachers dropped in epoch {self.current_epoch}"))

    def distill(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> dict[str, Tensor]:
        """Two terms, ``label`` and ``teacher``."""
        heard = [teacher.logits for teacher in teachers]
        if len(heard) > 1:
            draws = torch.rand(len(heard), generator=self._draws)
            kept = draws >= self.drop
            kept[draws.argmax()] = True  # if all are below, each is as likely to be the largest
            heard = [logits for logits, keep in zip(heard, kept.tolist(), strict=True) if keep]
        together = mean_teacher(heard, self.temperature, self.average)
        target = self.revision.teacher(together, batch.y, self.temperature)
        weight: Any = float(np.float32(self.weight))  # as a tensor has it, with fewer operations
        if self.revision.selected is not None:
            weight = weight * self.revision.distils(batch)
        return {
            "label": (1 - weight) * self.label_loss(student.logits, batch.y),
            "teacher": weight * cross_entropy(student.logits, target.argmax(-1))
            if self.hard
            else kd_loss(student.logits, target, self.temperature, weight),
        }
