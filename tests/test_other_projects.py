"""Projects with a command line of their own: Hydra's, and Lightning's; metrics and monitors of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from methods import CLASSES, Blobs, build, trainer
from omegaconf import OmegaConf
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassF1Score

from lit_kd import ALMKD, KD, Supervised

HYDRA = """
model:
  _target_: lit_kd.ALMKD
  student: mlp-8
  teacher: {teacher}
  num_classes: 3
  input_shape: [1, 4, 4]
  optimizer: {{_target_: torch.optim.SGD, _partial_: true, lr: 0.05, momentum: 0.9}}
  lr_scheduler: {{_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 2}}
data:
  _target_: methods.Blobs
  noise: symmetric
  noise_rate: 0.4
trainer:
  _target_: lightning.Trainer
  accelerator: cpu
  max_epochs: 6
  logger: false
  enable_progress_bar: false
"""


def teacher_file(folder: Path) -> Path:
    fitted = trainer(max_epochs=3)
    fitted.fit(Supervised("mlp-16", num_classes=CLASSES, input_shape=[1, 4, 4]), Blobs())
    fitted.save_checkpoint(folder / "teacher.ckpt")
    return folder / "teacher.ckpt"


def test_hydra(tmp_path: Path) -> None:
    config = OmegaConf.create(HYDRA.format(teacher=teacher_file(tmp_path)))
    fitted = instantiate(config.trainer, default_root_dir=str(tmp_path))
    model = instantiate(config.model)
    fitted.fit(model, instantiate(config.data))
    assert fitted.callback_metrics["val/accuracy"] > 0.9
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**3)
    fitted.save_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    loaded = ALMKD.load_from_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    assert loaded.input_shape == [1, 4, 4]


def test_a_lightning_cli_of_their_own(tmp_path: Path) -> None:
    given = [f"--model.teacher={teacher_file(tmp_path)}", "--model.student=mlp-8", "--model.num_classes=3"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    rest = ["--model.input_shape=[1,4,4]", "--trainer.max_epochs=4", f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(
        KD,
        Blobs,
        args=["fit", *given, *quiet, *rest],
        save_config_callback=None,
        auto_configure_optimizers=False,
    )
    assert cli.trainer.callback_metrics["val/accuracy"] > 0.9


class TestMetrics:
    def test_beside_ours(self) -> None:
        own = MetricCollection({"f1": MulticlassF1Score(CLASSES, average="macro")})
        model, data = build("kd", metrics=own), Blobs()
        fitted = trainer(max_epochs=2)
        fitted.fit(model, data)
        assert {"val/f1", "val/accuracy"} <= set(fitted.callback_metrics)
        [tested] = fitted.test(model, data, verbose=False)
        batches = data.test_dataloader()
        logits, y = (torch.cat(parts) for parts in zip(*((model(b.x), b.y) for b in batches), strict=True))
        hits = nn.functional.one_hot(logits.argmax(1), CLASSES), nn.functional.one_hot(y, CLASSES)
        expected = (2 * (hits[0] * hits[1]).sum(0) / (hits[0] + hits[1]).sum(0)).mean()
        assert tested["test/f1"] == pytest.approx(expected.item(), abs=1e-6)

    def test_names_that_are_ours(self) -> None:
        with pytest.raises(ValueError, match="expected metrics with names of their own, found 'accuracy'"):
            build("kd", metrics=MetricCollection({"accuracy": MulticlassConfusionMatrix(CLASSES)}))

    @pytest.mark.parametrize("method", ["kd", "almkd-paper"])
    def test_callbacks_follow_them(self, method: str, tmp_path: Path) -> None:
        own = MetricCollection({"f1": MulticlassF1Score(CLASSES)})
        best = ModelCheckpoint(tmp_path, monitor="val/f1", mode="max")
        model = build(method, metrics=own)
        callbacks: list[Any] = [best, EarlyStopping("val/f1", mode="max")]
        trainer(max_epochs=2, callbacks=callbacks, enable_checkpointing=True).fit(model, Blobs())
        assert best.best_model_score is not None


class TestMonitor:
    @pytest.mark.parametrize("method", ["kd", "almkd-paper"])
    def test_torchs_plateau(self, method: str) -> None:
        def plateau(optimizer: Any) -> Any:
            return torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer, mode="max", patience=0, factor=0.1, threshold=1
            )

        fitted = trainer(max_epochs=4)
        fitted.fit(build(method, lr_scheduler=plateau, lr_monitor="val/accuracy"), Blobs())
        assert fitted.optimizers[0].param_groups[0]["lr"] < 0.01

    def test_nobody_said_what_to_follow(self) -> None:
        model = build("kd", lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
        with pytest.raises(ValueError, match="set lr_monitor='val/nll'"):
            trainer().fit(model, Blobs())
