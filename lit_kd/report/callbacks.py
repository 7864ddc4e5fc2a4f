"""Callbacks of the command line: files that a run leaves, and checks when it is resumed."""

import io
import signal
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_kd.data.resume import in_mid_epoch
from lit_kd.models.files import write_columns, write_whole


class WritePredictions(BasePredictionWriter):
    """Writes rows and what the task predicts of them into ``predictions.csv`` in the trainer's default_root_dir.

    Of one class a sample: ``class`` and ``probability``; of several labels: ``labels_0``, ..., ``probability_0``, ...;
    of numbers: ``value_0``, ... Of tokens or pixels, a cell holds all of a row, in their order, with spaces between.
    Each of several processes has a file, ``predictions-RANK.csv``. Where a file exists, the new one gets a number.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write what the epoch predicted."""
        stem = "predictions" if trainer.world_size == 1 else f"predictions-{trainer.global_rank}"
        path = unused(Path(trainer.default_root_dir) / f"{stem}.csv")
        columns = {"row": [row for loader in batch_indices for batch in loader for row in batch]}
        elements = getattr(getattr(pl_module, "task", None), "elements", False)
        for name in predictions[0] if predictions else ():
            if elements:
                each = (row.flatten() for batch in predictions for row in batch[name])
                columns[name] = [
                    " ".join(f"{n:.6f}" if row.is_floating_point() else f"{n}" for n in row) for row in each
                ]
                continue
            values = torch.cat([batch[name] for batch in predictions])
            parts = {name: values} if values.dim() == 1 else {f"{name}_{c}": part for c, part in enumerate(values.T)}
            for key, part in parts.items():
                columns[key] = [f"{value:.6f}" if part.is_floating_point() else value for value in part.tolist()]
        write_columns(path, columns)
        rank_zero_info(f"predictions written to {path}")


def unused(path: Path) -> Path:
    """The path itself, or the first free one with a number: ``name-1``, ``name-2``, ..."""
    numbered = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(each for each in chain([path], numbered) if not each.exists())


def run_directory(trainer: Trainer) -> Path:
    """A run's directory, for the first process; `Trainer.log_dir` is the same for all runs of W&B's logger."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    first = trainer.loggers[0]
    if isinstance(first, (CSVLogger, TensorBoardLogger)):
        return Path(first.log_dir)
    version = first.version if isinstance(first.version, str) else f"version_{first.version}"
    return Path(first.save_dir or trainer.default_root_dir) / str(first.name) / version


def keeps_files(logger: Logger) -> bool:
    """Whether `send_file` can give the logger files."""
    return isinstance(logger, (WandbLogger, MLFlowLogger))


def send_file(logger: Logger, path: Path, folder: str | None = None) -> None:
    """Give W&B or MLflow a file, as an artifact of the run, in MLflow in a folder; other loggers keep none."""
    if isinstance(logger, WandbLogger):
        logger.experiment.log_artifact(str(path), type=path.stem)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(path), folder)


class SaveConfig(SaveConfigCallback):
    """Saves a training's resolved config as config.yaml in `run_directory`, and gives it to W&B and MLflow."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the config of a training alone."""
        if stage == TrainerFn.FITTING:
            super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, and give it away."""
        text = self.parser.dump(self.config, skip_none=False)
        folder = run_directory(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / self.config_filename, text)
        for logger in trainer.loggers:
            send_file(logger, folder / self.config_filename)
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(yaml.safe_load(text))


class Last(ModelCheckpoint):
    """Keeps the last epoch; and where SIGTERM ends a training within an epoch, what it has come to.

    A signal of SLURM, at which Lightning saves and queues the job again, waits for the end of the batch, too: in the
    middle of a step half of the network may have moved.
    """

    _theirs: Any = None  # Lightning's handler of the signal
    _noted = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signal."""
        super().on_train_start(trainer, pl_module)
        self._theirs = signal.getsignal(signal.SIGUSR1) if SLURMEnvironment.detect() else None
        if callable(self._theirs):
            signal.signal(signal.SIGUSR1, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._noted = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **options: Any) -> None:
        """Give the signal to Lightning; not at an epoch's end, as a run resumed there would not validate."""
        super().on_train_batch_end(trainer, pl_module, *args, **options)
        asked = callable(self._theirs) and trainer.strategy.reduce_boolean_decision(self._noted, all=False)
        if asked and not trainer.is_last_batch:
            self._noted = False
            self._theirs(signal.SIGUSR1, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save, unless the epoch was just saved; tell the shell that this was no success."""
        super().on_exception(trainer, pl_module, exception)
        if not isinstance(exception, SIGTERMException):
            return
        exception.code = 128 + signal.SIGTERM
        after_last_batch = trainer.state.fn == TrainerFn.FITTING and trainer.validating and trainer.is_last_batch
        if after_last_batch:  # as if within a batch of it: else a resumed run would not validate this epoch
            validation = trainer.fit_loop.epoch_loop.val_loop.batch_progress
            validation.reset()
            validation.increment_ready()
            validation.increment_started()
        if in_mid_epoch(trainer) or after_last_batch:
            self.best_model_path = self.format_checkpoint_name({})  # so that the next epoch replaces it
            trainer.save_checkpoint(self.best_model_path)
            rank_zero_info(f"stopped by SIGTERM: go on with --ckpt_path {self.best_model_path}")


class WholeCheckpoints(TorchCheckpointIO):
    """Replaces a local checkpoint at once, where Lightning's copy between file systems may be left half done."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; see `lit_kd.models.files.write_whole`."""
        if storage_options is not None or "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # on a full disk torch.save's own message helps nobody
        torch.save(checkpoint, buffer)
        write_whole(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> Any:
        """Read a checkpoint; a ValueError where the file holds something else."""
        found = super().load_checkpoint(path, *args, **options)
        if "pytorch-lightning_version" not in found:
            raise ValueError(f"{path}: expected a training's checkpoint, found another file: load weights in Python")
        return found


class ResumeAsBefore(Callback):
    """Refuses to resume with another optimizer or scheduler, whose options the checkpoint's would replace silently."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compare the options."""
        before = checkpoint.get("hyper_parameters", {}) if trainer.state.fn == TrainerFn.FITTING else {}
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
