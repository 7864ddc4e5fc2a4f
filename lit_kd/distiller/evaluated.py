"""What of a method measures and predicts."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import MetricCollection

from lit_kd.data import DistillationDataModule
from lit_kd.data.sampler import own_rows
from lit_kd.models.checkpoint import about_data, compare_data, remember_data
from lit_kd.models.shim import Shim
from lit_kd.models.taps import Tapped
from lit_kd.terms import Task
from lit_kd.terms.task import EvaluationMetrics
from lit_kd.types import IGNORED, Batch, Inputs, Outputs, as_batch, label_name


class Evaluated(Shim):
    """A student, and peers that learn with it, measured on validation and test data."""

    task: Task
    num_classes: int
    student: nn.Module
    peers: nn.ModuleDict
    metrics: nn.ModuleDict
    _own_metrics: tuple[MetricCollection | None]  # in a tuple, they are no submodule
    known: dict[str, Any] | None = None  # what is known of the trainer's data, or of the student's
    _seen = 0  # rows of an evaluation so far

    def outputs(self, batch: Batch) -> tuple[Outputs, list[Outputs]]:
        """The student's and the teachers' outputs for a batch."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Compare the data with those that the student was trained on so far; a training makes them its own."""
        self.task.compare(self.num_classes, self.datamodule)
        known = {**about_data(self.datamodule, self.num_classes), "task": self.task.name}
        self.known = compare_data("the student", self.student, known)
        if stage == "fit":
            remember_data(self.student, self.known)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint's data with the trainer's, if there is one."""
        remember_data(self.student, checkpoint.get("data"))
        if self.known is not None:
            compare_data("the student", self.student, self.known, resumed=self.trainer.training)

    def unpack(self, batch: Any) -> Batch:
        """What a loader gave, as `as_batch` or the data module's wrapper reads it; override it for other batches."""
        data = self.datamodule
        read = data.unpack if isinstance(data, DistillationDataModule) else as_batch
        return read(batch, keep_shape=self.task.name != "classification")

    def forward(self, x: Inputs) -> Tensor:
        """The student's logits, ``(B, C)``."""
        return Tapped(self.student)(x).logits

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Measure on a validation batch."""
        return self.evaluate(self.unpack(batch), "val", batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Measure on a test batch; callbacks are given ``logits``, ``y``, the ``teachers``' logits, and ``known``.

        The last is for each teacher which rows it speaks of, bool ``(B,)``, or None for all.
        """
        return self.evaluate(self.unpack(batch), "test", batch_idx, dataloader_idx)

    def evaluate(self, batch: Batch, stage: str, batch_idx: int, loader: int) -> dict[str, Any]:
        """Measure on the rows of a batch that no other process has."""
        batch = self.with_own_index(batch, stage, loader)
        student, teachers = self.outputs(batch)
        name = f"at_{stage}_{loader}" if loader else f"at_{stage}"
        if name not in self.metrics:  # those of a further loader
            self.metrics[name] = self.make_metrics(stage).to(self.device)
        metrics = cast(EvaluationMetrics, self.metrics[name])
        if batch_idx == 0:
            self._seen = 0
            metrics.reset()
        rows = own_rows(getattr(self.trainer, f"{stage}_dataloaders"), loader, self._seen, len(batch.y))
        self._seen += rows
        y, heard = batch.y[:rows], [teacher.logits[:rows] for teacher in teachers]
        known = [teacher.known if teacher.known is None else teacher.known[:rows] for teacher in teachers]
        found: dict[str, Any] = {"logits": student.logits[:rows], "y": y, "teachers": heard, "known": known}
        speak = self.teachers.speak_of("" if batch.index is None else stage)
        measured = metrics.update(**(found if speak else found | {"teachers": [], "known": []}))
        logged: dict[str, Any] = dict(measured) if batch_idx == 0 else {}  # Lightning reads metrics at the end
        for name, peer in self.peers.items():  # also in a process without rows: all must log the same
            said = Tapped(peer)(batch.x).logits[:rows]
            if self.task.score == "accuracy":
                right = self.task.decide(self.task.probabilities(said)) == y
                logged[f"{stage}/{name}_accuracy"] = right.float().sum() / (y != IGNORED).sum().clamp(min=1)
            else:
                logged[f"{stage}/{name}_nll"] = self.task.label_loss(said.float(), y).sum() / max(rows, 1)
        self.log_means(logged, rows)
        return found

    def with_own_index(self, batch: Batch, stage: str, loader: int) -> Batch:
        """The batch, without an index if a loader of a wrapped module gave it, which numbers no rows of ours."""
        data = self.datamodule
        theirs = isinstance(data, DistillationDataModule) and (loader, stage) != (data.split_loader, "val")
        return batch._replace(index=None) if theirs else batch

    def make_metrics(self, stage: str) -> EvaluationMetrics:
        """Those of one loader: the task's, and the user's."""
        return EvaluationMetrics(stage, self.task, self.num_classes, self._own_metrics[0])

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """What the task says of each sample, such as the most probable class and its probability, ``(B,)`` each."""
        label, inputs = (getattr(self.datamodule, key, None) for key in ("label_key", "input_key"))
        if isinstance(batch, Mapping) and label_name(batch, label) not in batch:  # inputs alone
            x = batch.get(inputs, batch)
        else:
            x = batch if isinstance(batch, Tensor) else self.unpack(batch).x
        return self.task.predict(self.task.probabilities(self(x).float()))

    def log_means(self, values: Mapping[str, Any], rows: int) -> None:
        """Log the epoch's means over so many rows, or metrics."""
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": rows}
        for name, value in values.items():
            self.log(name, value, prog_bar=name in ("train/loss", "val/accuracy"), metric_attribute=name, **options)
