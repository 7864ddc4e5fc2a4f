"""A teacher that reads the target, for sequences whose alignment nobody knows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.text import WordErrorRate

from lit_kd.distiller import Distiller
from lit_kd.losses.ctc import BLANK, ctc_loss, greedy
from lit_kd.losses.logits import kl_divergence
from lit_kd.models import Network
from lit_kd.terms import TASKS, Task, TaskName, Term, Weights
from lit_kd.terms.task import EvaluationMetrics
from lit_kd.types import IGNORED, Batch, Outputs, full


def _check_targets(y: Tensor, num_classes: int, missing: bool) -> None:
    """Symbols, then padding, ``(B, T)``, of which T frames can tell."""
    if y.dim() != 2 or y.is_floating_point():
        found = f"{tuple(y.shape)} and {y.dtype}"
        raise ValueError(f"expected targets of an integer type, padded to one number a frame, (B, T), found {found}")
    there = y != IGNORED
    if not there[:, 0].all() or (there[:, 1:] & ~there[:, :-1]).any():
        raise ValueError(f"expected targets of at least 1 symbol, padded behind their end with {IGNORED}, found others")
    if y[there].min() <= BLANK or y[there].max() >= num_classes:
        found = f"{int(y[there].min())} to {int(y[there].max())}"
        raise ValueError(f"expected symbols from 1 to {num_classes - 1}, as {BLANK} is the blank, found {found}")
    needed = int((there.sum(1) + (y[:, 1:].eq(y[:, :-1]) & there[:, 1:]).sum(1)).max())
    if needed > y.shape[1]:
        raise ValueError(f"expected at least {needed} frames for the longest target, found {y.shape[1]}: shorten it")


class SymbolErrorRate(WordErrorRate):
    """Edits, which turn what is decoded greedily into the target, as a share of the targets' symbols."""

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]  # numbers, no text
        """From probabilities ``(B, T, C)`` and targets ``(B, T)``."""
        targets = [[c for c in row if c != IGNORED] for row in target.tolist()]
        super().update(*([" ".join(map(str, row)) for row in rows] for rows in (greedy(preds), targets)))


def _metrics(num_classes: int) -> dict[str, Metric]:
    """The rate of symbol errors, and in how many frames the class is the teachers'."""
    agreement = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
    return {"error_rate": SymbolErrorRate(), "agreement": agreement}


class CTC(Term):
    """`ctc_loss` of the target."""

    reads_teacher = False
    tasks = ("tokens",)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """See `ctc_loss`."""
        return ctc_loss(student.logits, batch.y)


class FrameKL(Term):
    """``KL(p_T || p_S)`` at temperature 1, the mean over all frames, silent ones too."""

    tasks = ("tokens",)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """See the class."""
        assert teacher is not None
        log_p, log_q = (full(of.logits).log_softmax(-1) for of in (teacher, student))
        return kl_divergence(log_p, log_q).mean(1)


SEQUENCES: Task = replace(
    TASKS["tokens"],
    label_term=CTC,
    teacher_term=lambda temperature: FrameKL(),
    label_loss=ctc_loss,
    check_labels=_check_targets,
    metrics=_metrics,
    score="error_rate",
    best="min",
)


class OracleCTC(Distiller):
    """Sequences without alignment, with a teacher that reads the target, too (Oracle Teacher, arXiv 2111.03664).

    The loss is ``(1 - weight) CTC + weight KL``, the CTC loss per symbol of the target, the KL a mean over frames
    [ours]. Teachers are called with ``frames`` and ``target``, the student with frames alone: so a teacher knows better
    which frames are of which symbol. Without a teacher, it is CTC alone; with ``reads_target`` that trains an oracle.
    A teacher that just copies its target would teach nothing: see `lit_kd.models.worlds.FrameNet` for how ours is kept
    from it. Inputs are ``(B, T, F)``, logits ``(B, T, C)`` with the blank as class 0, targets ``(B, T)``.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list, modules or checkpoint paths; or none.
        weight: The teachers' share, in [0, 1].
        reads_target: Whether the trained network is an oracle: it reads targets in evaluation, too.
        task: ``"tokens"``.
        **base: See `lit_kd.Distiller`; without ``mix`` and ``teacher_cache``, as there are targets to go along.
    """

    needs_teacher = False
    tasks = ("tokens",)

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        weight: float = 0.5,
        reads_target: bool = False,
        task: TaskName = "tokens",
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, task=task, **base)
        if not 0 <= weight <= 1:
            raise ValueError(f"expected a weight in [0, 1], found {weight}")
        if self.mix is not None or self.teacher_cache:
            raise ValueError("expected neither mix nor teacher_cache, as teachers read targets, too: leave it out")
        self.task, self.weight, self.reads_target = SEQUENCES, weight, reads_target

    def make_metrics(self, stage: str) -> EvaluationMetrics:
        """Those of sequences: a target's symbols belong to no frame."""
        return EvaluationMetrics(stage, replace(SEQUENCES, elements=False), self.num_classes, self._own_metrics[0])

    def unpack(self, batch: Any) -> Batch:
        """The batch, to an oracle with its targets."""
        batch = super().unpack(batch)
        return _with_target(batch) if self.reads_target else batch

    def ask(self, batch: Batch) -> list[Outputs]:
        """The teachers' outputs, who read the target."""
        return super().ask(_with_target(batch))

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """``1 - weight`` for the label, the teachers share the weight; the label alone without any."""
        return [1 - self.weight, *[self.weight / len(sources)] * len(sources)] if sources else [1.0]


def _with_target(batch: Batch) -> Batch:
    return batch if isinstance(batch.x, Mapping) else batch._replace(x={"frames": batch.x, "target": batch.y})
