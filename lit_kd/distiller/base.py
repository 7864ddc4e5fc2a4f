"""The base of every method: it owns the teachers' inference and the student's optimisation."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lit_kd.data import DataModule, SampleTable, data_of
from lit_kd.data.mixing import as_mix, mixed
from lit_kd.data.rows import Indexed
from lit_kd.data.seeds import seed_epoch, seeded
from lit_kd.distiller.evaluated import Evaluated
from lit_kd.distiller.optimisation import callbacks_of, check_start, configure, planned_length, sgd
from lit_kd.models import Network, resolve_model
from lit_kd.models.checkpoint import about_data, drop_unknown, keep_plain
from lit_kd.models.given import remembered
from lit_kd.teachers.cache import TeacherCache
from lit_kd.teachers.modules import Teachers, as_specs, find_heads, ready_teachers
from lit_kd.teachers.rows import RowOutputs, first_outputs, predict_rows
from lit_kd.teachers.speed import Speed, prepare_student
from lit_kd.terms import TASKS, TaskName, Term, TermSet
from lit_kd.terms.base import Weighed, Weights, check_templates, heard, weighted_means
from lit_kd.terms.task import check_outputs
from lit_kd.types import Batch, Outputs, check_choice, reads_head, wake


class Distiller(Evaluated):
    """Trains a student with the help of frozen teachers.

    The loss is the mean of ``w_0 label + sum_k w_k term_k``, plus extra terms: what is learned from each source is a
    `lit_kd.terms.Term`, and how much of it `weigh` says. Checkpoints hold the student and never a teacher.

    Args:
        student: A module that gives logits ``(B, C)``, a name, as ``"resnet20"``, or a path, see `lit_kd.models.given`.
        teacher: One or a list: modules, paths of lit_kd checkpoints or of a `FileTeacher`'s files, or class paths.
        num_classes: C.
        input_shape: Shape of one sample, which models built by name may need.
        pretrained: Whether a student of timm or Hugging Face, by name, starts from their weights, which are downloaded.
        task: What labels are, one of `lit_kd.terms.tasks`.
        term: What is learned from each teacher; by default as the method says.
        label_term: What is learned from the label; by default the task's cross-entropy.
        extra: Further terms on all samples, each with its own constant weight.
        optimizer: Maps parameters to an optimizer.
        lr_scheduler: Maps an optimizer to a scheduler; ``"cosine"`` anneals to 0; ``None``: a constant learning rate.
        lr_interval: Whether the scheduler steps once an epoch or once an update.
        lr_monitor: The metric that a ReduceLROnPlateau follows, such as ``"val/nll"``.
        metrics: Further metrics, of probabilities and labels, logged by their names as ``val/NAME`` and ``test/NAME``.
        mix: Mix the images of training batches, see `lit_kd.data.mixing`: ``"mixup"``, ``"cutmix"``, or a transform.
        teacher_cache: ``"memory"`` or a directory: ask teachers once a row, see `lit_kd.teachers.cache.TeacherCache`.
        channels_last: The layout of convolutions; ``None``: where it is safe and faster.
        compile: Compile student and teachers (`torch.compile`), which takes minutes.
        teacher_precision: ``"bf16"`` runs teachers in bfloat16; ``None``: as the trainer says.
    """

    needs_teacher: bool = True  # whether training is impossible without a teacher
    needs_meta: bool = False  # whether a training batch is {"train": ..., "meta": ...}, see lit_kd.data
    changes_batches: bool = False  # whether inputs are no rows of the data's: nothing is kept of them
    tasks: ClassVar[tuple[str, ...]] = tuple(TASKS)  # those that the method can do
    by_sample: bool = False  # whether `weigh` gives a number a sample: what is weighed may not couple the batch
    settled: ClassVar[tuple[str, ...]] = ()  # which of term, label_term and extra it does not take
    rises: ClassVar[str] = ""  # the option that says in how many epochs the method comes to its full strength
    lr: float | None = None  # in place of the optimizer's: what Lightning's LearningRateFinder found
    trains_on_meta: bool = False  # whether the meta rows join the training rows
    student_taps: tuple[str, ...] = ()  # layers whose features the method itself reads; terms have their own
    teachers: Teachers
    table: SampleTable | None = None
    """State by sample index. A column ``weights``, ``(N, S + 1)``, tells how much label and teachers count."""

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        num_classes: int,
        input_shape: list[int] | None = None,
        pretrained: bool = False,
        task: TaskName = "classification",
        term: Term | None = None,
        label_term: Term | None = None,
        extra: list[Term] | None = None,
        optimizer: OptimizerCallable = sgd,
        lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        lr_monitor: str | None = None,
        metrics: MetricCollection | None = None,
        mix: Literal["mixup", "cutmix"] | nn.Module | None = None,
        teacher_cache: str | TeacherCache | None = None,
        channels_last: bool | None = None,
        compile: bool = False,
        teacher_precision: Literal["bf16"] | None = None,
    ) -> None:
        super().__init__()
        check_choice(f"task of {type(self).__name__}", task, self.tasks)
        self.task = TASKS[task]
        self.task.check_number(num_classes)
        self.save_hyperparameters()
        self.student = resolve_model(student, num_classes, input_shape, pretrained=pretrained)
        self.hparams.update(remembered(student, input_shape))
        keep_plain(self.hparams)
        self.num_classes, self.input_shape = num_classes, input_shape
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.lr_interval, self.lr_monitor, self._own_metrics = lr_interval, lr_monitor, (metrics,)
        self.mix, self.changes_batches = as_mix(mix), self.changes_batches or mix is not None
        self.teacher_cache = TeacherCache.of(teacher_cache)
        self.speed = Speed(channels_last, compile, teacher_precision)
        self.metrics = nn.ModuleDict({f"at_{stage}": self.make_metrics(stage) for stage in ("val", "test")})
        self.peers = nn.ModuleDict()  # further networks that learn, by name
        self.terms: TermSet | None = None  # made of the templates in `setup`
        self.teachers = Teachers()
        self._teacher_specs = as_specs(teacher)  # in a tuple, modules are no submodules
        self._templates = check_templates(type(self).__name__, self.settled, term, label_term, extra)
        self._restored: dict[str, Any] | None = None  # the table of a checkpoint
        self._epoch: tuple[int, Tensor | None] | None = None  # which is prepared, and what `training_rows` said of it

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """How much the label, then each source counts: ``S + 1`` numbers, or ``(B, S + 1)``. Methods override it."""
        raise NotImplementedError(f"{type(self).__name__} must override weigh()")

    def default_term(self) -> Term:
        """What is learned from each source where the user does not say."""
        return self.task.teacher_term(4.0)

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """What the student is compared with, `num_sources` of them: the teachers, or what is made of them."""
        return teachers

    @property
    def num_sources(self) -> int:
        """S."""
        return len(self._teacher_specs)

    def prepare_batch(self, batch: Batch) -> Batch:
        """Change a training batch before teachers and student see it: mix it, if wanted."""
        return batch if self.mix is None else mixed(batch, self.mix)

    def prepare_epoch(self) -> None:
        """Form beliefs about samples before each epoch, the same in every process: draw by `data.seeds.derive_seed`."""

    def training_rows(self) -> Tensor | None:
        """Indices of the rows that an epoch draws, the same in every process, repeated to the usual length; or all."""
        return None

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """Add columns; those of a table that is not fresh but restored keep their values. Overridden, there is one."""

    @property
    def data(self) -> DataModule:
        """The data module of `lit_kd.data` that is trained on; a ValueError if there is none."""
        return data_of(self)

    def predict_rows(self, rows: Indexed, teachers: bool = True) -> RowOutputs:
        """Student and, unless ``teachers`` is false, teachers over chosen rows: see `lit_kd.teachers.rows`."""
        return predict_rows(self, self.teachers if teachers else Teachers(), rows)

    @property
    def schedule_length(self) -> int | None:
        """How often the scheduler will step; ``None``: not known."""
        return planned_length(self)[self.lr_interval == "step"]

    def setup(self, stage: str) -> None:
        """Make the terms, and load the teachers: required for training, used for evaluation where they are at hand."""
        super().setup(stage)
        training = stage == "fit"
        if training and self.needs_teacher and not self._teacher_specs:
            raise ValueError(f"{type(self).__name__} needs a teacher, found none: pass teacher=..., a module or a path")
        self._epoch, new = None, training and self.terms is None
        self.terms = self.make_terms() if new else self.terms
        self.teachers = ready_teachers(self, self._teacher_specs, stage, new)
        if training:
            wake(self.student, *self.peers.values())
            with seeded("parts of the student"):
                self.complete_student()
        taps = tuple(dict.fromkeys([*self.student_taps, *(self.terms.taps("student") if self.terms else ())]))
        if training and reads_head(taps):
            find_heads(self, [self.student])
        self.tapped_student = prepare_student(self.student, taps, self.speed)
        if new and self.terms is not None and self.terms.has_parts:
            student, teachers = first_outputs(self)
            sources = [*teachers, *[student] * self.num_sources]  # peers are like the student
            with seeded("parts of terms"):
                self.terms.build(student, sources[: self.num_sources])

    def complete_student(self) -> None:
        """Build what of the student depends on data and teachers, which are there; called before the training."""

    def make_terms(self) -> TermSet:
        """Copies of the user's terms, or the default ones."""
        term, label, extra = self._templates
        own = label or self.task.label_term(), term or self.default_term(), extra
        made = TermSet(*own, self.num_sources, self.task.name, len(self._teacher_specs))
        made.check(type(self).__name__, self.by_sample, self.changes_batches, self.num_classes)
        if self.changes_batches and self.teacher_cache:
            raise ValueError("expected no teacher_cache where rows are mixed, as every mixture is new: leave one out")
        return made

    def configure_callbacks(self) -> Any:
        """What fills the cache; an override adds to it."""
        return callbacks_of(self)

    def configure_optimizers(self) -> Any:
        """The optimizer, with its scheduler."""
        return configure(self)

    @property
    def keeps_rows(self) -> bool:
        """Whether there is state by sample, the method's own or a term's."""
        return type(self).start_table is not Distiller.start_table or any(term.keeps_rows for term in self.terms or ())

    def on_fit_start(self) -> None:
        """Make the table of state by sample, or go on with a restored one."""
        check_start(self)
        if not self.keeps_rows:
            return
        labels, joined = self.data.labels, self.trains_on_meta or self.data.train_on_meta
        old = self.table if self._restored is None else SampleTable.from_state_dict(self._restored)
        table = old or SampleTable(len(labels), self.data.fingerprint)
        table.check(len(labels), self.data.fingerprint)
        self.start_table(table, fresh=old is None)
        for term in (term for term in self.terms or () if term.keeps_rows):
            term.start(table, labels if joined else labels[: self.data.train_size])
        table.apply(lambda column: column.to(self.device))
        self.table, self._restored = table, None

    def ask(self, batch: Batch) -> list[Outputs]:
        """The teachers' outputs for a batch, from the cache where there is one."""
        return self.teachers.trained_on(batch) if self.trainer.training else self.teachers(batch)

    def outputs(self, batch: Batch, student: Outputs | None = None) -> tuple[Outputs, list[Outputs]]:
        """The student's, unless known, and the teachers' for a batch; refuses labels and logits that misfit."""
        training = self.trainer.training
        if training:
            self.rows_of_epoch()  # the epoch may have begun before a checkpoint from which this run is resumed
        teachers = self.ask(batch)  # first, while no activations of the student take memory
        student = (student or self.tapped_student(batch.x)).of(batch)
        named = {f"teacher {k}": teacher for k, teacher in enumerate(teachers)} | {"student": student}
        first = training and self.trainer.fit_loop.total_batch_idx == 0
        check_outputs(self.task, batch.y, named, self.num_classes, missing=training, first=first)
        return student, teachers

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Weigh the terms and sum them."""
        batch = self.prepare_batch(self.unpack(batch))
        return self.total(*self.weighed(*self.outputs(batch), batch), len(batch.y))

    def weighed(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Weighed:
        """The terms of a training batch and their weights; terms renew what they keep of its rows."""
        assert self.terms is not None
        sources = self.sources(student, teachers, batch)
        losses, extra = self.terms(student, sources, batch)
        weights = heard(self.weigh(student, sources, batch), sources)
        self.terms.update(student, sources, batch)
        return losses, weights, extra

    def total(
        self, losses: list[Tensor], weights: Weights, extra: Mapping[str, Tensor], rows: int, learner: str = ""
    ) -> Tensor:
        """The sum of the weighted terms' means; logs the epoch's means as ``train/TERM`` and ``train/loss``."""
        terms = weighted_means(losses, weights, extra)
        reads = self.device.type == "cpu" or self.trainer.is_last_batch  # to read a value stalls an accelerator
        if reads and not terms["loss"].isfinite():
            raise ValueError(f"expected a finite loss, found {terms}: lower the learning rate, or check the inputs")
        self.log_means({f"train/{learner}{name}": value for name, value in terms.items()}, rows)
        return terms["loss"]

    def on_train_epoch_start(self) -> None:
        """Draw the epoch's randomness from (seed, epoch, rank): a run resumed at an epoch's start repeats it."""
        seed_epoch(self.current_epoch, self.global_rank)
        self.teachers.forget()
        self.rows_of_epoch()

    def rows_of_epoch(self) -> Tensor | None:
        """What `training_rows` says of this epoch: our data modules ask it when they draw the first batch."""
        if self._epoch is None or self._epoch[0] != self.current_epoch:
            self._epoch = self.current_epoch, None  # done, if this is asked for meanwhile
            self.prepare_epoch()
            self._epoch = self.current_epoch, self.training_rows() if isinstance(self.datamodule, DataModule) else None
        return self._epoch[1]

    def on_train_epoch_end(self) -> None:
        """Share state by sample between processes, and log what is believed on average."""
        if self.table is not None:
            self.table.sync()
            self.log_dict({f"samples/{name}": mean for name, mean in self.table.means(self.data.train_size).items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What who uses the student must know of the data, and the table; an override calls ``super()``."""
        checkpoint["data"] = about_data(self.datamodule, self.num_classes)
        if self.table is not None:
            self.table.sync()
            checkpoint["sample_table"] = self.table.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the table up again; outside of training, leave out what was trained beside the student."""
        super().on_load_checkpoint(checkpoint)
        self._restored = checkpoint.get("sample_table")
        if self.terms is None:
            drop_unknown(checkpoint["state_dict"], self.state_dict(), ("terms.", "peers."))
