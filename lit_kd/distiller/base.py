"""The base of every method: it owns the teachers' inference and the student's optimisation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lit_kd.data import DataModule
from lit_kd.data.rows import Indexed
from lit_kd.data.seeds import seed_epoch
from lit_kd.distiller.checks import check_batch, data_of, keep_plain, stalls
from lit_kd.distiller.lean import Lean, without_profiler
from lit_kd.distiller.ledger import Ledger
from lit_kd.distiller.metrics import EvaluationMetrics
from lit_kd.distiller.rows_pass import RowOutputs, module_pass
from lit_kd.distiller.saved import Saved, distrust_files
from lit_kd.distiller.schedule import cosine, planned_length
from lit_kd.models import Network, resolve_model, student_name
from lit_kd.models.taps import Tapped
from lit_kd.teachers.cache import FillTeacherCache, TeacherCache
from lit_kd.teachers.modules import Teachers, as_specs, is_path, load_teachers, missing_files
from lit_kd.teachers.speed import Speed, channels_last, compile_in_place, reads_channels_last
from lit_kd.types import UNLABELED, Batch, Outputs, as_batch


def sgd(params: Iterable[nn.Parameter]) -> Optimizer:
    """The default optimizer: SGD, lr 0.05, Nesterov momentum 0.9, weight decay 5e-4; RepDistiller's has no Nesterov."""
    return SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


class Distiller(Lean, Saved):
    """Trains a student with the help of frozen teachers.

    A method overrides `distill`, and holds no logging, optimiser, device or checkpoint code. Checkpoints hold the
    student and never a teacher; ``load_from_checkpoint`` needs no teacher's file.

    Args:
        student: A module that gives logits ``(B, C)`` (or an object with ``.logits``), or a name such as
            ``"resnet20"``, see `lit_kd.models.model_names`.
        teacher: One teacher or a list: modules, or paths of lit_kd checkpoints.
        num_classes: C.
        input_shape: Shape of one sample, which models built by name may need.
        optimizer: Maps parameters to an optimizer.
        lr_scheduler: Maps an optimizer to a scheduler; ``"cosine"`` anneals to 0 over the whole training, ``None``
            keeps the learning rate.
        lr_interval: Whether the scheduler steps once an epoch or once an update.
        teacher_cache: ``"memory"`` or a directory: ask teachers once a row, see `lit_kd.teachers.cache.TeacherCache`.
        channels_last: The layout of convolutions: faster; ``None``: where it is safe, see `lit_kd.teachers.speed`.
        compile: Compile student and teachers (`torch.compile`), which takes minutes.
        teacher_precision: ``"bf16"`` runs teachers in bfloat16; ``None``: as the trainer says.
    """

    needs_teacher: ClassVar[bool] = True
    """Whether training is impossible without a teacher."""
    needs_meta: ClassVar[bool] = False
    """Whether a training batch is ``{"train": ..., "meta": ...}``, the second from the meta split."""
    student_taps: tuple[str, ...] = ()
    """Layers of the student whose features `distill` wants."""
    teacher_taps: ClassVar[tuple[str, ...]] = ()
    """The same for the teachers."""

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        num_classes: int,
        input_shape: list[int] | None = None,
        optimizer: OptimizerCallable = sgd,
        lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        teacher_cache: str | TeacherCache | None = None,
        channels_last: bool | None = None,
        compile: bool = False,
        teacher_precision: Literal["bf16"] | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"expected num_classes of at least 2, found {num_classes}")
        if teacher_precision not in ("bf16", None):
            raise ValueError(f"expected a teacher_precision 'bf16', or None, found {teacher_precision!r}")
        self.save_hyperparameters()
        self.student = resolve_model(student, num_classes, input_shape)
        if isinstance(student, (str, os.PathLike)) and is_path(os.fspath(student)):
            # its name and not its path, so that the checkpoint of this training stands by itself
            self.hparams["student"], self.hparams["input_shape"] = student_name(student)
        self.num_classes = num_classes
        self.input_shape = input_shape
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.teacher_cache = TeacherCache.of(teacher_cache)
        self.speed = Speed(channels_last, compile, teacher_precision)
        self.metrics = nn.ModuleDict({f"at_{s}": EvaluationMetrics(s, num_classes) for s in ("val", "test")})
        self._teacher_specs = as_specs(teacher)
        if any(spec is self.student for spec in self._teacher_specs):
            raise ValueError("expected a teacher other than the student itself; pass a copy that is trained already")
        self.teachers = Teachers()
        self._checked: set[str] = set()
        self._ledger = Ledger()
        self._epoch_rows: Tensor | None = None  # what `training_rows` said of this epoch
        self._begun = False  # whether this epoch is prepared

    def _set_hparams(self, hp: Any) -> None:
        """Of the hyperparameters, keep what a checkpoint and a logger can hold: no live modules, no functions.

        Lightning calls this before it copies them: a teacher is never copied.
        """
        super()._set_hparams(hp)
        cache = self.hparams.get("teacher_cache")
        if isinstance(cache, TeacherCache):
            self.hparams["teacher_cache"] = asdict(cache)
        keep_plain(self.hparams)

    @property
    def trains_on_meta(self) -> bool:
        """Whether the meta rows belong into the training stream too, after the training set's own rows."""
        return False

    # what a method is

    def distill(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> dict[str, Tensor]:
        """The loss terms of a batch: the one hook that a method overrides.

        Args:
            student: The student's outputs, logits ``(B, C)``, with gradients.
            teachers: Each teacher's outputs, without gradients.
            batch: Inputs, labels ``(B,)`` and, where the method needs them, sample indices.

        Returns:
            Terms by name, each already weighted, per sample ``(B,)`` or a scalar. Their means are summed.
        """
        raise NotImplementedError(f"{type(self).__name__} must override distill()")

    def prepare_epoch(self) -> None:
        """Form beliefs about samples at the start of each training epoch: a hook that a method may override.

        Every process must come to the same beliefs. The global random numbers differ between them: draw from a
        generator with the seed ``derive_seed(resolve_seed(None), f"... {self.current_epoch}")``.
        """

    def training_rows(self) -> Tensor | None:
        """Which rows an epoch draws, asked after `prepare_epoch`: a hook that a method may override.

        Only asked where the data are a data module of `lit_kd.data`. The rows are repeated, one permutation after
        another, to the stream's usual length: an epoch has as many steps with few of them as with all.

        Returns:
            Indices, int64, the same in every process; meta rows among them count only where they are trained on.
            ``None``: all.
        """
        return None

    # what a method may use

    @property
    def data(self) -> DataModule:
        """The data that are trained on: labels, parts, sizes.

        Raises:
            ValueError: If they do not come from a data module of `lit_kd.data`.
        """
        return data_of(self, self.needs_meta)

    def predict_rows(self, rows: Indexed, teachers: bool = True) -> RowOutputs:
        """Student and teachers over chosen rows, e.g. ``self.data.parts.meta_rows()``: no trace is left, no gradient.

        Every process computes all rows, and has the first one's outputs; see `lit_kd.distiller.rows_pass.rows_pass`.

        Args:
            rows: The rows, at least one.
            teachers: Whether the teachers are called; if not, the outputs hold none of theirs.

        Raises:
            ValueError: If there are no rows, or outputs of other classes or that are not finite.
        """
        return module_pass(self, self.teachers if teachers else Teachers(), rows)

    # teachers

    def setup(self, stage: str) -> None:
        """Load the teachers: required for training, used for evaluation where they are at hand."""
        if self._trainer is not None:
            distrust_files(self._trainer)
            without_profiler(self._trainer)
        self._channels_last = reads_channels_last(self.student, self.student_taps, self.speed)
        if self.speed.compile:
            compile_in_place(self.student, self.student_taps)
        self.tapped_student = Tapped(self.student, self.student_taps)
        self._ledger.clear()
        self._checked, self._begun = set(), False
        training = stage == "fit"
        if training:
            self.student.train()  # whatever mode it came in; Lightning keeps it
        if training and self.needs_teacher and not self._teacher_specs:
            raise ValueError(
                f"{type(self).__name__} needs a teacher, found none: pass teacher=..., a module or the path of a "
                "lit_kd checkpoint, or a list of these"
            )
        if stage == "predict" or len(self.teachers) == len(self._teacher_specs):
            return
        missing = missing_files(self._teacher_specs)
        if missing and not training:
            rank_zero_warn(f"teacher {missing} not found: evaluating without the agreement with the teacher")
            return
        models = load_teachers(self._teacher_specs, self.student, self.num_classes, self.input_shape)
        self.teachers = Teachers(models, self.teacher_taps, self.speed)
        dtype = cast(torch.dtype, self.dtype)
        self.teachers.apply(lambda t: t.to(self.device, dtype if t.is_floating_point() else None))

    def configure_callbacks(self) -> Any:
        """What fills the cache; a method that overrides this adds to it."""
        return [FillTeacherCache()] if self.teacher_cache else []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """Teachers follow the student to a device or dtype, though they are no submodules."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.teachers.apply(fn)
        return self

    # the steps

    def forward(self, x: Tensor | Mapping[str, Tensor]) -> Tensor:
        """The student's logits, ``(B, C)``."""
        return Tapped(self.student)(x).logits

    def outputs(self, batch: Batch) -> tuple[Outputs, list[Outputs]]:
        """The student's and the teachers' outputs for a batch."""
        training = self.trainer.training
        if training and not self._begun:  # resumed from a checkpoint that was written in an epoch
            self._begin_epoch()
        # first, while no activations of the student take memory
        teachers = self.teachers.trained_on(batch) if training else self.teachers(batch.x)
        student = self.tapped_student(self.laid_out(batch).x)
        # teachers first: where one gives no numbers, the student soon gives none either
        self._check(batch, {f"teacher {k}": teacher for k, teacher in enumerate(teachers)} | {"student": student})
        return student, teachers

    def laid_out(self, batch: Batch) -> Batch:
        """A batch as the student reads it: channels last, where its convolutions are faster so."""
        return batch._replace(x=channels_last(batch.x)) if self._channels_last else batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Sum the method's loss terms."""
        batch = as_batch(batch)
        student, teachers = self.outputs(batch)
        return self.total(self.distill(student, teachers, batch), batch)

    def total(self, terms: dict[str, Tensor], batch: Batch) -> Tensor:
        """The sum of the terms' means, a scalar; logs the epoch's means as ``train/<term>`` and ``train/loss``."""
        return self._ledger.add({f"train/{name}": term for name, term in terms.items()}, len(batch.y))

    def on_train_epoch_end(self) -> None:
        """Log the epoch's loss terms."""
        self._begun = False
        self.check_finite()
        for name, mean in self._ledger.means().items():
            self.log(name, mean, sync_dist=True, prog_bar=name == "train/loss")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure on a validation batch."""
        self._evaluate(as_batch(batch), "val")

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Measure on a test batch; callbacks are given ``logits``, ``y``, and each of the ``teachers``' logits."""
        return self._evaluate(as_batch(batch), "test")

    def _evaluate(self, batch: Batch, stage: str) -> dict[str, Any]:
        student, teachers = self.outputs(batch)
        metrics = cast(EvaluationMetrics, self.metrics[f"at_{stage}"])
        outputs: dict[str, Any] = {"logits": student.logits, "y": batch.y, "teachers": [t.logits for t in teachers]}
        logged = metrics.update(**outputs)
        for name, metric in logged.items():
            self.log(
                name, metric, on_step=False, on_epoch=True, prog_bar=name == "val/accuracy", batch_size=len(batch.y)
            )
        return outputs

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The most probable class and its probability, ``(B,)`` each."""
        x = batch if isinstance(batch, (Tensor, Mapping)) else as_batch(batch).x
        probability, index = self(x).float().softmax(-1).max(-1)
        return {"class": index, "probability": probability}

    def _check(self, batch: Batch, outputs: dict[str, Outputs]) -> None:
        """Refuse class counts, labels and logits that are wrong, before they do damage.

        On an accelerator only the first batch of a stage is read, reading more would stall every step; that all was
        finite is read at the end of a training epoch.
        """
        stage, training = str(self.trainer.state.stage), self.trainer.training
        self._ledger.reads = not stalls(batch.y.device) or stage not in self._checked
        if self._ledger.reads:
            self._checked.add(stage)
            check_batch(batch, outputs, self.num_classes, UNLABELED if training else 0)
            if training and not outputs["student"].logits.requires_grad:
                raise ValueError("expected a student whose logits have gradients, found them detached from its layers")
        for name, given in outputs.items():
            self.watch_finite(f"{name}'s logits", given.logits)

    def watch_finite(self, name: str, values: Tensor) -> None:
        """Refuse values that are not finite, at the latest when `check_finite` is called."""
        self._ledger.watch(name, values)

    def check_finite(self) -> None:
        """Refuse what was not finite in this epoch: logits, loss terms, watched values. Stalls an accelerator."""
        self._ledger.check()

    # optimisation

    def on_train_epoch_start(self) -> None:
        """Draw the epoch's randomness from (seed, epoch, rank).

        So a run that is resumed at an epoch's start repeats the dropout and augmentation of an uninterrupted one.
        """
        if self.teacher_cache and self.teachers.cache is None and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"expected a filled teacher_cache, found none: let {type(self).__name__}'s configure_callbacks "
                "return super().configure_callbacks() with its own callbacks, or leave teacher_cache unset"
            )
        self._ledger.clear()
        seed_epoch(self.current_epoch, self.global_rank)
        self.teachers.forget()
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._begun = True
        self.prepare_epoch()
        ours = isinstance(getattr(self.trainer, "datamodule", None), DataModule)
        self._epoch_rows = self.training_rows() if ours else None

    def rows_of_epoch(self) -> Tensor | None:
        """What `training_rows` said of this epoch: our data modules ask it when they draw the first batch."""
        if not self._begun:
            self._begin_epoch()
        return self._epoch_rows

    def configure_optimizers(self) -> Any:
        """The student's optimizer, over what requires gradients, and its scheduler."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("expected a student with trainable parameters, found all of them frozen: unfreeze some")
        optimizer = self.optimizer(trainable)
        if self.lr_scheduler is None:
            return optimizer
        if self.lr_scheduler == "cosine":
            scheduler: Any = cosine(optimizer, self._schedule_length())
        else:
            scheduler = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau) and self.automatic_optimization:
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _schedule_length(self) -> int | None:
        """How often the scheduler will step; ``None``: not known."""
        return self.planned_length()[self.lr_interval == "step"]

    def planned_length(self) -> tuple[int | None, int | None]:
        """How many epochs and how many updates the training has, the last epoch maybe cut; ``None``: not known."""
        return planned_length(self.trainer, self._batches_per_update())

    def _batches_per_update(self) -> int:
        return self.trainer.accumulate_grad_batches
