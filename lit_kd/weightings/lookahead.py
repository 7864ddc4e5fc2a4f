"""ALM-KD's meta-step on the student in training, at its last layer; `whole_network` has that through all layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from lit_kd.data.resume import in_mid_epoch
from lit_kd.data.table import all_rows, all_sum
from lit_kd.models import last_linear
from lit_kd.models.taps import Tapped
from lit_kd.terms.task import check_outputs
from lit_kd.trust import exact
from lit_kd.trust.meta import Head, MetaRows, alignment, last_layer_derivative, look_ahead
from lit_kd.types import PENULTIMATE, Batch, Outputs, evaluating, full, index_of
from lit_kd.weightings.base import Align, MetaStep
from lit_kd.weightings.manual import learning_rate

if TYPE_CHECKING:
    from lit_kd.methods.almkd import ALMKD


class Seen(NamedTuple):
    """A training batch, and what student and sources give for it."""

    train: Batch
    student: Outputs  # with their graph
    sources: list[Outputs]  # what the terms compare it with
    losses: list[Tensor]  # the terms, S + 1 of (B,), with their graph


class LookAhead(ABC):
    """How the meta-step of a method that is set up looks ahead; extra terms are no part of its step."""

    taps: ClassVar[tuple[str, ...]] = ()
    parameter: Tensor | None = None
    """Whose learning rate the look-ahead takes."""

    def __init__(self, module: ALMKD) -> None:
        self.module, self.train_share = module, module.rule.train_share

    def before(self) -> None:  # noqa: B027 - not all need it
        """The student is about to see a training batch."""

    @abstractmethod
    def check(self, seen: Seen) -> None:
        """Refuse a student or terms that it is not made for."""

    def check_meta(self, outputs: Outputs, y: Tensor) -> None:
        """Refuse what the student makes of meta rows where it is no number."""
        check_outputs(self.module.task, y, {"student on meta rows": outputs}, self.module.num_classes, missing=True)

    @abstractmethod
    def align(self, seen: Seen) -> Align:
        """How well each term agrees with the validation gradient, on the meta batch of the same step.

        A row must not vouch for itself: those in the training batch of any process do not count.
        """

    def lr(self) -> float:
        """Of a real step, now; a ValueError where the optimizer does not have the parameter."""
        return 0.0 if self.parameter is None else learning_rate(self.module, self.parameter)

    def step(self, seen: Seen, teachers: list[Outputs]) -> MetaStep:
        """What a rule is told of a batch."""
        module, index, y = self.module, index_of(seen.train), seen.train.y
        logits = seen.student.logits.float(), [teacher.logits.float() for teacher in teachers]
        whole = all(teacher.known is None for teacher in teachers)
        known = None if whole else torch.stack([teacher.speaks for teacher in teachers], dim=1)
        step = MetaStep(index, y, *logits, self.align(seen), self.lr(), len(y) * module.trainer.world_size, known)
        return step.of_rows(seen.train.pairs)


class Unneeded(LookAhead):
    """For a rule that does not look ahead."""

    def check(self, seen: Seen) -> None:
        """All are fine."""

    def align(self, seen: Seen) -> Align:
        """There are no meta batches."""

        def align(weights: Tensor, lr: float) -> Tensor:
            raise NotImplementedError("expected a rule with looks_ahead, which asks for the meta-gradient")

        return align


class KeepMetaRows(Callback):
    """Keeps the meta rows of an epoch's latest steps in checkpoints of its middle, for a run that is resumed there."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep them."""
        ahead = getattr(pl_module, "look_ahead", None)
        if isinstance(ahead, LastLayer) and in_mid_epoch(trainer):
            checkpoint["meta_rows"] = list(ahead.rows)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with them."""
        ahead = getattr(pl_module, "look_ahead", None)
        if isinstance(ahead, LastLayer):
            ahead.rows.extend(move_data_to_device(checkpoint.get("meta_rows", []), pl_module.device))


class LastLayer(LookAhead):
    """At the last layer, on features of the meta batches of the latest steps."""

    taps = (PENULTIMATE,)

    def __init__(self, module: ALMKD) -> None:
        super().__init__(module)
        # over so many meta rows of each process the validation loss is taken
        self.meta_rows = max(min(module.rule.meta_rows or 0, module.data.meta_size), 1) / module.trainer.world_size
        if module.task.elements:
            raise ValueError("expected meta_gradient: exact where a sample has many elements, found last_layer: set it")
        self.path, self.layer = last_linear(module.student)
        self.parameter = getattr(self.layer, "weight_orig", self.layer.weight)  # so Lightning's ModelPruning renames it
        self.rows: deque[tuple[Tensor, Tensor, Tensor]] = deque()
        """Features, labels and sample indices of each of the latest meta batches."""

    def check(self, seen: Seen) -> None:
        """Does the layer taken for the last one really give the logits, and is it trained?"""
        self.lr()
        if not Head.of(self.layer).gives(seen.student.logits, seen.student.features.get(PENULTIMATE)):
            raise ValueError(
                f"expected the student's logits to be the output of its last linear layer, {self.path!r}; found "
                "others. The meta-gradient is taken at that layer: let the student end in torch.nn.Linear, or use "
                "meta_gradient: exact"
            )

    def align(self, seen: Seen) -> Align:
        """In closed form."""
        meta, used = self.module.meta_batch, all_rows(index_of(seen.train))
        with evaluating(self.module.student):  # so that the meta rows leave no trace in running statistics
            outputs = Tapped(self.module.student, self.taps)(self.module.tapped_student.laid_out(meta.x))
        self.check_meta(outputs, meta.y)
        self.rows.append((full(outputs.features[PENULTIMATE]), meta.y, index_of(meta)))
        while sum(len(y) for _, y, _ in self.rows) - len(self.rows[0][1]) >= self.meta_rows:
            self.rows.popleft()
        kept, y, index = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        features, head = full(seen.student.features[PENULTIMATE].detach()), Head.of(self.layer)
        rows = MetaRows(kept, y, keep=~torch.isin(index, used))
        own = MetaRows(features, seen.train.y, keep=torch.ones_like(index_of(seen.train), dtype=torch.bool))
        logits, label_loss = seen.student.logits, self.module.task.label_loss
        gradients = torch.stack([full(exact.gradient(loss, {"z": logits})["z"]) for loss in seen.losses], dim=1)

        def align(weights: Tensor, lr: float) -> Tensor:
            pull = torch.einsum("bk,bkc->bc", weights.to(gradients), gradients)
            ahead = look_ahead(head, features, pull, lr, all_sum) if lr else head
            moved = last_layer_derivative(ahead, features, rows, label_loss, all_sum)
            if self.train_share:
                moved = moved.lerp(last_layer_derivative(ahead, features, own, label_loss, all_sum), self.train_share)
            return alignment(gradients, moved)

        return align
