"""Several teachers as one, and teachers that the label corrects."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.distiller import Distiller
from lit_kd.losses import mean_teacher, median_shares, revised_teacher
from lit_kd.losses.logits import Average
from lit_kd.terms import Task, Weights
from lit_kd.types import Batch, Outputs, check_choice, class_labels


def as_one(teachers: Sequence[Outputs], temperature: float = 1.0, of: Average = "probabilities") -> Outputs:
    """`lit_kd.losses.mean_teacher` of those that speak of each row; a single teacher keeps its features."""
    if len(teachers) == 1:
        return teachers[0]
    if all(teacher.known is None for teacher in teachers):
        return Outputs(mean_teacher([teacher.logits for teacher in teachers], temperature, of), {})
    logits = torch.zeros_like(teachers[0].logits)
    for rows, numbers in by_speakers(teachers):
        logits[rows] = mean_teacher([teachers[k].logits[rows] for k in numbers], temperature, of).to(logits)
    return Outputs(logits, {}, torch.stack([teacher.speaks for teacher in teachers]).any(0))


def by_speakers(teachers: Sequence[Outputs]) -> Iterator[tuple[Tensor, list[int]]]:
    """Rows of which the same teachers speak, bool ``(B,)``, and the numbers of these, at least one."""
    speak = torch.stack([teacher.speaks for teacher in teachers], dim=1)
    for pattern in torch.unique(speak, dim=0):
        if numbers := pattern.nonzero().flatten().tolist():
            yield (speak == pattern).all(1), numbers


def revised(teachers: list[Outputs], y: Tensor, eta: float | None, temperature: float) -> list[Outputs]:
    """`lit_kd.losses.revised_teacher` of each teacher; ``None``: the teachers as they are."""
    if eta is None:
        return teachers
    return [t._replace(logits=revised_teacher(t.logits, class_labels(y), eta, temperature)) for t in teachers]


def check_eta(revise: float | None, task: Task) -> None:
    """Refuse an eta of `lit_kd.losses.revise_labels` outside of [0, 1), and any where labels are no class numbers."""
    if revise is not None and not (0 <= revise < 1 and task.name == "classification"):
        raise ValueError(f"expected an eta of label revision in [0, 1), and one class a sample, found {revise}")


class MeanTeacher(Distiller):
    """Distils the mean of several teachers; each by itself where features are compared.

    Args:
        average: What is averaged, see `lit_kd.losses.mean_teacher`. The mean of the probabilities has the gradient of
            the mean of the losses, for KL. The median cannot be moved by a minority of bad teachers;
            ``teachers/median_share_K`` then logs how often teacher K supplies it, see `lit_kd.losses.median_shares`.
        drop: With which probability, in [0, 1], a training batch drops each of several teachers; DGKD drops with 0.25.
            If it were to drop all, it keeps one, drawn at random [ours].
        revise: Eta of Label Revision, in [0, 1): where the teacher contradicts the label, it is revised before it is
            distilled, see `lit_kd.losses.revised_teacher`; ``None``: the teacher as it is.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(
        self,
        *,
        average: Average = "probabilities",
        drop: float = 0.0,
        revise: float | None = None,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if not 0 <= drop <= 1:
            raise ValueError(f"expected drop in [0, 1], the probability to drop a teacher; found {drop}")
        check_eta(revise, self.task)
        check_choice("average", average, get_args(Average))
        self.average: Average = average
        self.drop = drop
        self.revise = revise
        self._draws = torch.Generator()
        if (drop or average != "probabilities") and self.num_sources > 1:
            raise ValueError(
                "expected neither drop nor average with features, or for another task than classes: each counts"
            )

    @property
    def num_sources(self) -> int:
        """One, unless features are compared, or a sample has no class of its own."""
        features = any(one is not None and one.teacher_taps for one in (self._templates[0], *self._templates[2]))
        apart = features or self.task.name != "classification"
        return super().num_sources if apart else min(1, super().num_sources)

    def on_train_epoch_start(self) -> None:
        """Which teachers are dropped follows from seed and epoch: the same in all processes and after a resume."""
        super().on_train_epoch_start()
        self._draws.manual_seed(derive_seed(resolve_seed(None), f"teachers dropped in epoch {self.current_epoch}"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in the base, and where these draws are, for a run that is resumed in mid-epoch."""
        super().on_save_checkpoint(checkpoint)
        checkpoint |= {"teacher_draws": self._draws.get_state()} if self.drop else {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in the base, and go on with these draws."""
        super().on_load_checkpoint(checkpoint)
        if "teacher_draws" in checkpoint:
            self._draws.set_state(checkpoint["teacher_draws"].cpu())

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """The mean of the teachers that are not dropped, revised by the label."""
        assert self.terms is not None
        if self.num_sources < len(teachers):
            draws = torch.rand(len(teachers), generator=self._draws)
            kept = draws >= self.drop
            kept[draws.argmax()] = True  # if all are below, each is as likely to be the largest
            numbers = kept.nonzero().flatten().tolist()
            heard = [teachers[k] for k in numbers]
            if self.average == "median":
                rows = torch.stack([teacher.speaks for teacher in heard]).all(0)
                shares = median_shares([teacher.logits[rows] for teacher in heard], self.terms.temperature)
                names = [f"teachers/median_share_{k}" for k in numbers]
                self.log_means(dict(zip(names, shares.nan_to_num(), strict=True)), int(rows.sum()))
            teachers = [as_one(heard, self.terms.temperature, self.average)]
        return revised(teachers, batch.y, self.revise, self.terms.temperature)


class Beside(Distiller):
    """The label counts 1, and what is distilled a fixed weight, which several sources share.

    Args:
        weight: What is distilled, at least 0.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(self, *, weight: float, **base: Any) -> None:
        super().__init__(**base)
        if weight < 0:
            raise ValueError(f"expected a weight of at least 0, found {weight}")
        self.weight = weight

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The same for every sample."""
        return [1.0, *[self.weight / len(sources)] * len(sources)]


def warm_up(epoch: int, epochs: int) -> float:
    """What a weight is multiplied by in an epoch, counted from 0: ``1 / epochs`` in the first, then up to 1."""
    return min((epoch + 1) / max(1, epochs), 1.0)


class Shares(Distiller):
    """The label counts ``1 - weight``, and what is distilled the weight, which several sources share.

    Args:
        weight: The teachers' share, in [0, 1].
        **base: See `lit_kd.Distiller`.
    """

    def __init__(self, *, weight: float, **base: Any) -> None:
        super().__init__(**base)
        if not 0 <= weight <= 1:
            raise ValueError(f"expected a weight in [0, 1], the teacher's share of the loss; found {weight}")
        self.weight = weight

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The same for every sample."""
        return [1 - self.weight, *[self.weight / len(sources)] * len(sources)]
