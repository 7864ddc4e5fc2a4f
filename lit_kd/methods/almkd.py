"""ALM-KD: for every sample, learn how much to listen to the teacher and how much to the label."""

from __future__ import annotations

import copy
import os
from collections.abc import Sized
from typing import Any, Literal, cast

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DistributedSampler

from lit_kd.data import DataModule
from lit_kd.data.table import SampleTable, all_rows, all_sum
from lit_kd.distiller.tabled import TableDistiller
from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.models import Network, last_linear
from lit_kd.types import UNLABELED, Batch, Outputs, as_batch
from lit_kd.weightings import Amal, MetaStep, Paper, Robust, Rule
from lit_kd.weightings.lookahead import LOOK_AHEADS
from lit_kd.weightings.manual import check_manual, check_trainer_options, learning_rate, manual_update, step_plateaus
from lit_kd.weightings.revision import Revision
from lit_kd.weightings.sample_file import check_start, starting_weights

RULES: dict[str, type[Rule]] = {"robust": Robust, "paper": Paper, "amal": Amal}


class ALMKD(TableDistiller):
    """Adaptive loss mixing (arXiv 2202.03250): per-sample weights of label and teachers, learned on a meta split.

    The loss of sample i is ``lam_i0 CE_i + sum_k lam_ik T^2 KL_ik``. In each training step the rule first takes the
    meta-step: how would the validation loss on meta rows change with this batch's weights? Then the student learns with
    the weights of the sample table. Needs a data module with sample indices and a meta split: any of `lit_kd.data`, or
    `lit_kd.data.DistillationDataModule` around your own. Where a label is missing its weight is 0 and the teachers have
    theirs.

    The meta-gradient ``"last_layer"`` (the authors' code's) holds all layers but the last, which must be linear,
    constant. It costs three small matrix products and one forward pass of the step's meta batch; features of earlier
    ones are used again. ``"exact"`` [derived] goes through all layers of any student, on the step's meta batch alone.
    It costs a forward and a backward pass of that and a forward-mode pass of the training batch, for the rules
    ``"paper"`` and ``"amal"``, which look ahead, also a backward pass, and all of it at each repeat: a step of resnet20
    took 2.6 times as long as with ``"last_layer"`` for the rule ``"robust"``, and 12 times with 5 repeats.
    ``"central"`` is the same by central differences, for students with operators that have no forward mode. Both take
    the learning rate of the last parameter for all of them.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        rule: How weights follow from the meta-gradient: ``"robust"`` (the default, ours), ``"paper"`` or ``"amal"``
            (published), or a `lit_kd.weightings.Rule` with constants of its own.
        meta_gradient: ``"last_layer"``, ``"exact"`` or ``"central"``, see above.
        temperature: T > 0, dimensionless; 4 in the published experiments and the robust rule's tuning.
        gradient_clip_val: Largest norm of the student's gradient, in place of the trainer's option.
        accumulate_grad_batches: Batches an update; likewise.
        start_weights: Weights before the rule's first update: the teachers' share in [0, 1], or a .csv, .parquet or
            .ckpt file, see `lit_kd.weightings.sample_file.starting_weights`.
        revise: Eta of Label Revision, in [0, 1): see `lit_kd.losses.revised_teacher`.
        select: The fraction of rows that teachers teach, see `lit_kd.weightings.revision.Revision`.
        damping: Of the selection's scores.
        **base: See `lit_kd.Distiller`.
    """

    needs_meta = True

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
        damping: float | None = None,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if not temperature > 0:
            raise ValueError(f"expected a temperature above 0, found {temperature}")
        if accumulate_grad_batches < 1:
            raise ValueError(f"expected accumulate_grad_batches of at least 1, found {accumulate_grad_batches}")
        start_weights = os.fspath(start_weights) if isinstance(start_weights, os.PathLike) else start_weights
        check_start(start_weights)
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
        self.revision = Revision(revise, select, damping)
        self.meta_gradient = meta_gradient
        self.student_taps = LOOK_AHEADS[meta_gradient].taps
        self._look_ahead_checked = False
        # of a validation: who was wrong how often, of how many rows, and how many are to be counted
        self._wrong, self._counted = torch.zeros(0), 0
        self._to_count: int | None = None
        if meta_gradient == "last_layer":
            last_linear(self.student)  # fail now if there is none
        elif self.speed.compile:
            raise ValueError(
                f"expected compile=False with meta_gradient {meta_gradient!r}, which differentiates the student as no "
                "compiled one can be: take one of the two"
            )

    @property
    def trains_on_meta(self) -> bool:
        """As the rule wants it."""
        return self.rule.trains_on_meta

    # what we believe about samples

    def configure_callbacks(self) -> Any:
        """Refuse options of the trainer that do not reach here: Lightning would, after this hook, not naming ours."""
        check_trainer_options(self)
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        """Refuse data without indices or a meta split, and precisions and strategies that would be wrong."""
        super().setup(stage)
        if stage == "fit":
            check_manual(self)
            data = self.data
            rows, batch = len(data.labels), data.batch_size * self.trainer.world_size
            if self.trains_on_meta and batch >= rows:
                raise ValueError(
                    f"expected batches smaller than the {rows} rows that are trained on, found {batch} rows: a meta "
                    "row speaks for other batches' rows only, and there would be none. Lower the data's batch_size"
                )
            wanted = min(self.rule.meta_rows or 0, data.meta_size)
            share = max(wanted, 1) / self.trainer.world_size
            self.look_ahead = LOOK_AHEADS[self.meta_gradient](self.student, share, self.laid_out)

    @property
    def table_maker(self) -> str:
        """The rule's name."""
        return type(self.rule).__name__

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """The rule's columns; and select the rows that teachers teach."""
        self.revision.prepare(self)
        epochs = self.planned_length()[0]
        self.rule.start(table, len(self.teachers), self.data.trusted, self.data.labels, epochs)
        if fresh and self.start_weights is not None:
            weights = starting_weights(self.start_weights, len(self.teachers), self.data)
            table["weights"][: self.data.train_size] = weights
        table["weights"][self.data.labels == UNLABELED, 0] = 0  # nothing to listen to
        every, given = self.trainer.check_val_every_n_epoch, type(self.data).val_dataloader
        rows = len(self.data.parts.val) or given is not DataModule.val_dataloader
        in_time = self.trainer.enable_validation and rows and not (epochs and every and every >= epochs)
        if self.rule.wants_validation and not in_time:
            rank_zero_warn(
                f"the rule {self.table_maker} compares teachers and student on validation rows, and this training has "
                "none in time: labels that are right are heard alone, unless an earlier part of the run compared both. "
                "Give the data a val split, and leave limit_val_batches and check_val_every_n_epoch unset"
            )
        if epochs is not None and not any(map(self.rule.active, range(epochs))):
            name = self.table_maker
            rank_zero_warn(
                f"the rule {name} learns nothing in {epochs} epochs: its weights stay as they start. Train longer, or "
                f"pass rule=lit_kd.weightings.{name}(warmup_epochs=...)"
            )

    def _batches_per_update(self) -> int:
        return self.accumulate_grad_batches

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
        super().on_validation_epoch_start()
        self._wrong = torch.zeros(1 + len(self.teachers), dtype=torch.int64, device=self.device)
        self._counted, self._to_count = 0, None
        sampler = getattr(self.trainer.val_dataloaders, "sampler", None)
        if isinstance(sampler, DistributedSampler):  # it repeats rows, for all processes to have equally many
            self._to_count = len(range(sampler.rank, len(cast(Sized, sampler.dataset)), sampler.num_replicas))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure, and count who is wrong; rows that are repeated count once."""
        batch = as_batch(batch)
        outputs = self._evaluate(batch, "val")
        if self._tells_errors:
            y = batch.y if self._to_count is None else batch.y[: self._to_count - self._counted]
            self._counted += len(y)
            classes = torch.stack([outputs["logits"], *outputs["teachers"]]).argmax(-1)[:, : len(y)]
            self._wrong += (classes != y).sum(1)

    def on_validation_epoch_end(self) -> None:
        """Tell the rule, before a checkpoint is written."""
        super().on_validation_epoch_end()
        if self._tells_errors:
            assert self.table is not None
            *wrong, rows = all_sum(torch.cat([self._wrong, self._wrong.new_tensor([self._counted])]))
            if rows > 0:
                self.rule.validated(self.table, torch.stack(wrong), rows)

    @property
    def _tells_errors(self) -> bool:
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        return fitting and self.rule.wants_validation

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """The meta-step, then the student's step with the table's weights."""
        assert self.table is not None
        train, meta = as_batch(batch["train"]), as_batch(batch["meta"])
        if train.index is None or meta.index is None:
            raise ValueError(
                "expected batches with sample indices, (x, y, index), found one without: a hook or callback that "
                "changes batches must keep the index"
            )
        self.look_ahead.before()
        student, teachers = self.outputs(train)
        lr = learning_rate(self, self.look_ahead.parameter)  # fails now if the parameter is frozen
        if not self._look_ahead_checked:
            with torch.no_grad():
                self.look_ahead.check(train, student)
            self._look_ahead_checked = True
        if self.rule.active(self.current_epoch):
            # float32: a look-ahead is a small change of the weights, which bfloat16 cannot hold
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self.rule.observe(self.table, self._meta_step(train, meta, student, teachers, lr))
        loss = self.total(self.distill(student, teachers, train), train)
        manual_update(self, loss, batch_idx, self.gradient_clip_val, self.accumulate_grad_batches)
        if self.trainer.is_last_batch:  # before validation, so that checkpoints hold the renewed weights
            self.check_finite()
            self.table.sync()
            with torch.autocast(self.device.type, enabled=False):  # counts are no matter for bfloat16
                self.rule.renew(self.table, self.current_epoch)

    def distill(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> dict[str, Tensor]:
        """Two terms, ``label`` and ``teacher``, with the table's weights."""
        assert self.table is not None
        weights = self.table["weights"][batch.index]
        targets = self._targets(student, teachers, batch)
        distilled = torch.stack([kd_loss(student.logits, t, self.temperature) for t in targets], dim=1)
        return {
            "label": weights[:, 0] * cross_entropy(student.logits, batch.y),
            "teacher": (weights[:, 1:] * distilled).sum(1),
        }

    def _targets(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Tensor]:
        """What the student is to say: what it says itself, where a row is not distilled."""
        revised = [self.revision.teacher(t.logits, batch.y, self.temperature) for t in teachers]
        if self.revision.selected is None:
            return revised
        distils = self.revision.distils(batch).bool().unsqueeze(1)
        return [t.where(distils, student.logits.detach().to(t.dtype)) for t in revised]

    def _meta_step(self, train: Batch, meta: Batch, student: Outputs, teachers: list[Outputs], lr: float) -> MetaStep:
        assert train.index is not None
        look = self.look_ahead.derivative(train, student, meta, used=all_rows(train.index))

        def derivative(pull: Tensor, lr: float) -> Tensor:
            moved = look(pull, lr)
            self.watch_finite("the validation gradient of the meta rows", moved)
            return moved

        return MetaStep(
            index=train.index,
            y=train.y,
            logits=student.logits.detach().float(),
            teachers=[t.logits.float() for t in teachers],
            derivative=derivative,
            lr=lr,
            batch_size=len(train.y) * self.trainer.world_size,
            temperature=self.temperature,
            targets=[t.float() for t in self._targets(student, teachers, train)],
        )
