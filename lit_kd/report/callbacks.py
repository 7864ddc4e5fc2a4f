"""What a run leaves behind besides checkpoints and logs, and how it is taken up again."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_kd.models.files import write_whole

REDRAWS = 4
"""Of the progress bar, a second: Lightning's 100 took a fifth of a small network's step."""


class Bar(RichProgressBar):
    """Lightning's progress bar, brought up to date some times a second and not after each batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**({"refresh_rate": REDRAWS} | options))
        self._next = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Not this often."""
        now = time.monotonic()
        if now >= self._next or trainer.is_last_batch:
            self._next = now + 1 / self.refresh_rate
            super().on_train_batch_end(trainer, pl_module, *args)


class WritePredictions(BasePredictionWriter):
    """Writes ``predictions.csv`` with the columns row, class, probability, into the trainer's default_root_dir.

    With several processes each writes its own rows, into ``predictions-RANK.csv``. An existing file is kept, and the
    new one numbered.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write what the epoch predicted."""
        stem = "predictions" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}"
        path = unused(Path(trainer.default_root_dir) / f"{stem}.csv")
        rows = [row for loader in batch_indices for batch in loader for row in batch]
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["row", "class", "probability"])
        values = [
            (c, p) for b in predictions for c, p in zip(b["class"].tolist(), b["probability"].tolist(), strict=True)
        ]
        writer.writerows((row, c, f"{p:.6f}") for row, (c, p) in zip(rows, values, strict=True))
        write_whole(path, text.getvalue())
        rank_zero_info(f"predictions written to {path}")


def unused(path: Path) -> Path:
    """The path itself, or a numbered one beside it where it is taken."""
    number = 0
    found = path
    while found.exists():
        number += 1
        found = path.with_stem(f"{path.stem}-{number}")
    return found


def run_directory(trainer: Trainer) -> Path:
    """Where a run's checkpoints lie unless they are sent elsewhere; to be asked by the first process.

    It is not the trainer's ``log_dir``, which is one for all runs where the logger is W&B's or another one.
    """
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    first = trainer.loggers[0]
    if isinstance(first, (CSVLogger, TensorBoardLogger)):
        return Path(first.log_dir)
    version = first.version if isinstance(first.version, str) else f"version_{first.version}"
    return Path(first.save_dir or trainer.default_root_dir) / str(first.name) / version


class SaveConfig(SaveConfigCallback):
    """Saves the resolved config as config.yaml in the run's directory, and shows it in W&B and TensorBoard.

    Lightning's own knows no run's directory with W&B: the config of each run would replace that of the last one.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning save it where it knows the run's directory; only a fit is a run."""
        if stage != TrainerFn.FITTING:
            return  # what is read again, as by lit-kd inspect, are trainings
        self.save_to_log_dir = not trainer.loggers or isinstance(trainer.loggers[0], (CSVLogger, TensorBoardLogger))
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save it where Lightning does not, and show it."""
        text = self.parser.dump(self.config, skip_none=False)
        if not self.save_to_log_dir:
            folder = run_directory(trainer)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / self.config_filename, text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(yaml.safe_load(text))
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("config", "```\n" + text + "\n```")


class WholeCheckpoints(TorchCheckpointIO):
    """Replaces a local checkpoint at once: whatever happens, either the old or the new one is there.

    Lightning's own writes into the system's folder for temporary files and moves the file from there: between two file
    systems, such as a ``/tmp`` in memory and a disk, that is a copy onto the old checkpoint, which a kill or a full
    disk leaves half done.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            OSError: If it cannot be written; see `lit_kd.models.files.write_whole`.
        """
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # in memory first: what torch.save says of a full disk helps nobody
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getbuffer())


class BestAndLast(ModelCheckpoint):
    """Keeps the best epoch and the last.

    Lightning's own, since 2.6, writes ``last.ckpt`` only after an epoch that it keeps for being the best so far: a
    training would resume there, and lose all epochs since.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let checkpoints be replaced at once, unless the trainer was given a way of its own to write them."""
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        self._last_global_step_saved = trainer.global_step  # what the last checkpoint waits for


class ResumeAsBefore(Callback):
    """Refuses to resume with another optimizer or scheduler than the checkpoint's.

    They come back with their state, learning rate included: what was asked for would be lost silently.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the options.

        Raises:
            ValueError: If they differ.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        before = checkpoint.get("hyper_parameters", {})
        for name in ("optimizer", "lr_scheduler", "lr_interval"):
            now = pl_module.hparams.get(name)
            if name in before and _options(before[name], now) != _options(now, before[name]):
                raise ValueError(
                    f"expected the {name} that the checkpoint was trained with, {before[name]}; found {now}. Resumed, "
                    "it has the checkpoint's state, learning rate included: leave the option as it was. To train on "
                    "from the weights alone, pass the checkpoint as --model.student in place of --ckpt_path"
                )


def _options(config: Any, other: Any) -> Any:
    """A config without the arguments that another version of the same class does not know."""
    if not isinstance(config, Mapping) or not isinstance(other, Mapping):
        return config
    return {key: _options(value, other[key]) for key, value in config.items() if key in other}
