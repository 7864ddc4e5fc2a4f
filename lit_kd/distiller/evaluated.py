"""What of a method measures and predicts."""

from collections.abc import Mapping
from typing import Any, cast

from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lit_kd.data.sampler import own_rows
from lit_kd.models.taps import Tapped
from lit_kd.terms import Task
from lit_kd.terms.task import EvaluationMetrics
from lit_kd.types import Batch, Inputs, Outputs, as_batch


class Evaluated(LightningModule):
    """A student, and peers that learn with it, measured on validation and test data."""

    task: Task
    student: nn.Module
    peers: nn.ModuleDict
    metrics: nn.ModuleDict
    _seen = 0  # rows of an evaluation so far

    def outputs(self, batch: Batch) -> tuple[Outputs, list[Outputs]]:
        """The student's and the teachers' outputs for a batch."""
        raise NotImplementedError

    def forward(self, x: Inputs) -> Tensor:
        """The student's logits, ``(B, C)``."""
        return Tapped(self.student)(x).logits

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics: `Trainer.validate` leaves tensors of inference mode, on which a fit cannot go on."""
        for metric in self.metrics["at_val"].modules():
            if isinstance(metric, Metric):
                metric.reset()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Measure on a validation batch."""
        return self.evaluate(as_batch(batch), "val", batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Measure on a test batch; callbacks are given ``logits``, ``y``, and each of the ``teachers``' logits."""
        return self.evaluate(as_batch(batch), "test", batch_idx, dataloader_idx)

    def evaluate(self, batch: Batch, stage: str, batch_idx: int, loader: int) -> dict[str, Any]:
        """Measure on the rows of a batch that no other process has."""
        student, teachers = self.outputs(batch)
        self._seen = self._seen if batch_idx else 0
        rows = own_rows(getattr(self.trainer, f"{stage}_dataloaders"), loader, self._seen, len(batch.y))
        self._seen += rows
        y = batch.y[:rows]
        heard = [teacher.logits[:rows] for teacher in teachers]
        found: dict[str, Any] = {"logits": student.logits[:rows], "y": y, "teachers": heard}
        logged: dict[str, Any] = dict(cast(EvaluationMetrics, self.metrics[f"at_{stage}"]).update(**found))
        for name, peer in self.peers.items():  # also in a process without rows: all must log the same
            said = self.task.decide(self.task.probabilities(Tapped(peer)(batch.x).logits[:rows]))
            logged[f"{stage}/{name}_accuracy"] = (said == y).float().sum() / max(y.numel(), 1)
        for name, metric in logged.items():
            self._log_mean(name, metric, rows)
        return found

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """What the task says of each sample, such as the most probable class and its probability, ``(B,)`` each."""
        x = batch if isinstance(batch, (Tensor, Mapping)) else as_batch(batch).x
        return self.task.predict(self.task.probabilities(self(x).float()))

    def _log_mean(self, name: str, value: Any, rows: int) -> None:
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "sync_dist": True, "add_dataloader_idx": False}
        self.log(name, value, prog_bar=name in ("train/loss", "val/accuracy"), batch_size=rows, **options)
