"""ALM-KD: for every sample, learn how much to listen to the teacher and how much to the label."""

from __future__ import annotations

import copy
import os
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_kd.data import DataModule
from lit_kd.data.table import SampleTable, all_rows, all_sum
from lit_kd.distiller import Distiller
from lit_kd.distiller.base import Weights
from lit_kd.losses import revised_teacher
from lit_kd.models import Network, last_linear
from lit_kd.terms import Term
from lit_kd.types import UNLABELED, Batch, Outputs, as_batch
from lit_kd.weightings import Amal, MetaStep, Paper, Robust, Rule
from lit_kd.weightings.lookahead import LOOK_AHEADS
from lit_kd.weightings.manual import check_manual, check_trainer_options, learning_rate, manual_update, step_plateaus
from lit_kd.weightings.sample_file import check_start, starting_weights
from lit_kd.weightings.selection import check_options, selected_in, selected_rows

RULES: dict[str, type[Rule]] = {"robust": Robust, "paper": Paper, "amal": Amal}


class ALMKD(Distiller):
    """Adaptive loss mixing (arXiv 2202.03250): weights of label and teachers by sample, learned on a meta split.

    The loss of sample i is ``lam_i0 label_i + sum_k lam_ik term_ik``. In each training step the rule first takes the
    meta-step: how would the validation loss on meta rows change with this batch's weights? Then the student learns with
    the weights of the table. Needs a data module with sample indices and a meta split: any of `lit_kd.data`, or
    `lit_kd.data.DistillationDataModule` around your own. Where a label is missing its weight is 0.

    The meta-gradient ``"last_layer"`` (the authors' code's) holds all layers but the last, which must be linear,
    constant: it weighs terms of the logits, and costs one forward pass of the meta batch. ``"exact"`` [derived] goes
    through all layers, for any term of one number a sample, on the step's meta batch alone; ``"central"`` is the same by
    central differences, for operators without forward mode. Both take the last parameter's learning rate for all.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        rule: How weights follow from the meta-gradient: ``"robust"`` (the default, ours), ``"paper"`` or ``"amal"``
            (published), or a `lit_kd.weightings.Rule` with constants of its own.
        meta_gradient: ``"last_layer"``, ``"exact"`` or ``"central"``, see above.
        temperature: T > 0 of the default term, dimensionless.
        gradient_clip_val: Largest norm of the student's gradient, in place of the trainer's option.
        accumulate_grad_batches: Batches an update; likewise.
        start_weights: Weights before the rule's first update: the teachers' share in [0, 1], or a .csv, .parquet or
            .ckpt file, see `lit_kd.weightings.sample_file.starting_weights`.
        revise: Eta of Label Revision, in [0, 1): see `lit_kd.losses.revised_teacher`.
        select: The fraction of rows that teachers teach, see `lit_kd.weightings.selection`.
        **base: See `lit_kd.Distiller`.
    """

    needs_meta = True
    needs_table = True

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        rule: Literal["robust", "paper", "amal"] | Rule = "robust",
        meta_gradient: Literal["last_layer", "exact", "central"] = "last_layer",
        temperature: float = 4.0,
        gradient_clip_val: float | None = None,
        accumulate_grad_batches: int = 1,
        start_weights: float | str | None = None,
        revise: float | None = None,
        select: float | None = None,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if accumulate_grad_batches < 1:
            raise ValueError(f"expected accumulate_grad_batches of at least 1, found {accumulate_grad_batches}")
        start_weights = os.fspath(start_weights) if isinstance(start_weights, os.PathLike) else start_weights
        check_start(start_weights)
        check_options(self.task, revise, select)
        if isinstance(rule, str) and rule not in RULES:
            raise ValueError(f"expected a rule of {list(RULES)} or a lit_kd.weightings.Rule, found {rule!r}")
        if meta_gradient not in LOOK_AHEADS:
            raise ValueError(f"expected a meta_gradient of {list(LOOK_AHEADS)}, found {meta_gradient!r}")
        self.automatic_optimization = False
        self.rule: Rule = RULES[rule]() if isinstance(rule, str) else copy.deepcopy(rule)  # it holds a run's state
        self.temperature = temperature
        self.gradient_clip_val = gradient_clip_val
        self.accumulate_grad_batches = accumulate_grad_batches
        self.start_weights = start_weights
        self.revise = revise
        self.select = select
        self.selected: Tensor | None = None
        self.meta_gradient = meta_gradient
        self.trains_on_meta = self.rule.trains_on_meta
        self.student_taps = LOOK_AHEADS[meta_gradient].taps
        self._checked = False
        self._wrong = torch.zeros(0)  # of a validation: who was wrong how often, and of how many rows
        self.default_term()  # refuses a temperature that is none
        if meta_gradient == "last_layer":
            last_linear(self.student)  # fail now if there is none
        elif self.speed.compile:
            raise ValueError(f"expected compile=False with meta_gradient {meta_gradient!r}: take one of the two")

    def default_term(self) -> Term:
        """KL divergence."""
        return self.task.teacher_term(self.temperature)

    # before the training

    def configure_callbacks(self) -> Any:
        """Refuse options of the trainer that do not reach here: Lightning would, after this hook, not naming ours."""
        check_trainer_options(self)
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        """Refuse data, terms, precisions and strategies that would be wrong."""
        super().setup(stage)
        if stage != "fit":
            return
        check_manual(self)
        data, world = self.data, self.trainer.world_size
        rows, batch = len(data.labels), data.batch_size * world
        if self.trains_on_meta and batch >= rows:
            raise ValueError(
                f"expected batches smaller than the {rows} rows that are trained on, found {batch} rows: a meta row "
                "speaks for other batches' rows only, and there would be none. Lower the data's batch_size"
            )
        assert self.terms is not None
        for term in self.terms.weighted:
            reason = "couples the rows of a batch" if term.couples_batch else None
            if term.reads_features and self.meta_gradient == "last_layer":
                reason = "compares features, which the last layer's meta-gradient does not reach"
            if reason:
                cure = "pass it as extra" if term.couples_batch else "set meta_gradient to exact, or pass it as extra"
                raise ValueError(f"ALMKD cannot weigh {type(term).__name__} by sample: it {reason}. Instead, {cure}")
        wanted = max(min(self.rule.meta_rows or 0, data.meta_size), 1)
        self.look_ahead = LOOK_AHEADS[self.meta_gradient](self, wanted / world, self.rule.train_share)

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """The rule's columns; and select the rows that teachers teach."""
        name, data = type(self.rule).__name__, self.data
        if not fresh and table.maker != name:
            raise ValueError(
                f"expected the rule that made the checkpoint's sample table, {table.maker}, found {name}: pass the same "
                "rule, or start without the checkpoint"
            )
        table.maker = name
        self.selected = selected_rows(self, self.select)
        epochs = self.planned_length()[0]
        self.rule.start(table, len(self.teachers), data.trusted, data.labels, epochs)
        if fresh and self.start_weights is not None:
            weights = starting_weights(self.start_weights, len(self.teachers), data)
            table["weights"][: data.train_size] = weights
        missing = (data.labels == UNLABELED).view(len(data.labels), -1).all(1)
        table["weights"][missing, 0] = 0  # nothing to listen to
        every, given = self.trainer.check_val_every_n_epoch, type(data).val_dataloader
        rows = len(data.parts.val) or given is not DataModule.val_dataloader
        in_time = self.trainer.enable_validation and rows and not (epochs and every and every >= epochs)
        if self.rule.wants_validation and not in_time:
            rank_zero_warn(
                f"the rule {name} compares teachers and student on validation rows, and this training has none in time: "
                "labels that are right are heard alone, unless an earlier part of the run compared both. Give the data "
                "a val split, and leave limit_val_batches and check_val_every_n_epoch unset"
            )
        if epochs is not None and not any(map(self.rule.active, range(epochs))):
            rank_zero_warn(
                f"the rule {name} learns nothing in {epochs} epochs: its weights stay as they start. Train longer, or "
                f"pass rule=lit_kd.weightings.{name}(warmup_epochs=...)"
            )

    # the steps

    def on_train_epoch_start(self) -> None:
        """As in the base; the look-ahead starts anew, as it does for a run that is resumed here."""
        super().on_train_epoch_start()
        self.look_ahead.on_epoch()

    def on_train_epoch_end(self) -> None:
        """What Lightning does by itself only in automatic optimisation."""
        super().on_train_epoch_end()
        step_plateaus(self)

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients: validation may come between accumulated batches."""

    def on_validation_epoch_start(self) -> None:
        """Count anew who is wrong."""
        self._wrong = torch.zeros(2 + len(self.teachers), dtype=torch.int64, device=self.device)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Measure, and count who is wrong."""
        found = super().validation_step(batch, batch_idx, dataloader_idx)
        if self.rule.wants_validation:
            classes = torch.stack([found["logits"], *found["teachers"]]).argmax(-1)
            rows = self._wrong.new_tensor([len(found["y"])])
            self._wrong += torch.cat([(classes != found["y"]).sum(1), rows])
        return found

    def on_validation_epoch_end(self) -> None:
        """Tell the rule, before a checkpoint is written."""
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if fitting and self.rule.wants_validation and self.table is not None:
            *wrong, rows = all_sum(self._wrong)
            if rows > 0:
                self.rule.validated(self.table, torch.stack(wrong), rows)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """The meta-step, then the student's step with the table's weights."""
        assert self.table is not None
        assert self.terms is not None
        train, meta = self.prepare_batch(as_batch(batch["train"])), as_batch(batch["meta"])
        if train.index is None or meta.index is None:
            raise ValueError(
                "expected batches with sample indices, (x, y, index), found one without: a hook or callback that "
                "changes batches must keep the index"
            )
        self.look_ahead.before()
        student, teachers = self.outputs(train)
        lr = learning_rate(self, self.look_ahead.parameter)  # fails now if the parameter is frozen
        sources = self.sources(student, teachers, train)
        losses, extra = self.losses(student, sources, train)
        if not self._checked:
            with torch.no_grad():
                self.look_ahead.check(train, student, sources)
            self._checked = True
        if self.rule.active(self.current_epoch):
            # float32: a look-ahead is a small change of the weights, which bfloat16 cannot hold
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                align = self.look_ahead.align(train, student, sources, losses, meta, used=all_rows(train.index))
                outputs = student.logits.detach().float(), [t.logits.float() for t in teachers]
                rows = len(train.y) * self.trainer.world_size
                self.rule.observe(self.table, MetaStep(train.index, train.y, *outputs, align, lr, rows))
        loss = self.total(losses, self.weigh(student, sources, train), extra, len(train.y))
        self.terms.update(student, sources, train)
        manual_update(self, loss, batch_idx, self.gradient_clip_val, self.accumulate_grad_batches)
        if self.trainer.is_last_batch:  # before validation, so that checkpoints hold the renewed weights
            self.table.sync()
            with torch.autocast(self.device.type, enabled=False):  # counts are no matter for bfloat16
                self.rule.renew(self.table, self.current_epoch)

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """The teachers, revised by the label."""
        if self.revise is None:
            return teachers
        return [t._replace(logits=revised_teacher(t.logits, batch.y, self.revise, self.temperature)) for t in teachers]

    def losses(self, student: Outputs, sources: list[Outputs], batch: Batch) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The terms; those of teachers are 0 where a row is not distilled, so that no weight is learned there."""
        assert self.terms is not None
        (label, *taught), extra = self.terms(student, sources, batch)
        if self.selected is not None:
            taught = [term * selected_in(self.selected, batch) for term in taught]
        return [label, *taught], extra

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The table's."""
        assert self.table is not None
        return self.table["weights"][batch.index]
