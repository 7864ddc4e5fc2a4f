"""Shows what a run learns about its samples, in any logger."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from PIL import Image

from lit_kd.data import UNLABELED
from lit_kd.distiller import Distiller
from lit_kd.models.checkpoint import known_names
from lit_kd.models.files import write_whole
from lit_kd.report import charts
from lit_kd.report.callbacks import keeps_files, run_directory, send_file, unused
from lit_kd.report.samples import any_distrusted, contact_sheet, distrusted_by, label_weights, learned, write_samples

HISTOGRAM = "samples/label_weights"


class ShowRun(Callback):
    """Shows which labels a method with learned weights believes; does nothing for other methods.

    Every epoch it logs, where labels are known to be wrong, the mean weights of right and of wrong ones, and how well
    weights tell them apart (``samples/right_label_weight``, ``samples/wrong_label_weight``, ``samples/noise_auc``); in
    W&B and TensorBoard a histogram of the label weights. Every few epochs and at the end it draws the weights and the
    most distrusted samples: PNG files in ``pictures`` in the run's directory, images in W&B and TensorBoard, and
    artifacts in MLflow. In the end W&B and MLflow get the table of ``lit-kd samples`` as an artifact, ``samples.csv``.

    Args:
        every_n_epochs: How often to draw pictures; ``None``: at the end only; 0: show nothing at all.
        samples: How many of the most distrusted samples to show.
    """

    def __init__(self, every_n_epochs: int | None = 10, samples: int = 24) -> None:
        self.every_n_epochs = every_n_epochs
        self.samples = samples
        self.course: list[dict[str, float]] = []
        """For each epoch ``epoch``, and the mean weight of labels that are ``right`` and ``wrong``, or of ``all``."""
        self._drawn = -1  # the last epoch whose pictures are drawn
        self._folder: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """What went before, for the pictures of a run that is resumed."""
        return {"course": self.course}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `state_dict`."""
        self.course = list(state_dict["course"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run has pictures of its own."""
        self._drawn, self._folder = -1, None
        if trainer.current_epoch == 0:
            self.course = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log figures and histogram, and draw the pictures if it is time."""
        off = self.every_n_epochs == 0 or getattr(trainer, "fast_dev_run", False)
        if off or not isinstance(pl_module, Distiller) or learned(pl_module) is None:
            return
        weights, label, noisy = label_weights(pl_module)
        known = label != UNLABELED
        parts = {"right": known & ~noisy, "wrong": noisy} if noisy.any() else {"all": known}
        means = {kind: float(weights[mask].mean()) for kind, mask in parts.items() if mask.any()}
        self.course.append({"epoch": trainer.current_epoch, **means})
        if noisy.any():
            figures = {f"samples/{kind}_label_weight": value for kind, value in means.items()}
            area = charts.noise_auc(weights, label, noisy)
            pl_module.log_dict(figures | ({} if area is None else {"samples/noise_auc": area}))
        if trainer.is_global_zero and known.any():
            for logger in trainer.loggers:
                _log_histogram(logger, weights[known], trainer.global_step)
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last pictures, and give away the table."""
        if not self.course or not isinstance(pl_module, Distiller):
            return
        if self.course[-1]["epoch"] > self._drawn:
            self._draw(trainer, pl_module, int(self.course[-1]["epoch"]))
        table, keepers = learned(pl_module), [logger for logger in trainer.loggers if keeps_files(logger)]
        if table is not None and keepers and trainer.is_global_zero:
            with TemporaryDirectory() as folder:  # in the run's directory it would be in the way of lit-kd samples
                path = Path(folder) / "samples.csv"
                write_samples(path, table, pl_module.data)
                for logger in keepers:
                    send_file(logger, path)

    def _draw(self, trainer: Trainer, model: Distiller, epoch: int) -> None:
        """Draw and send all pictures; each process must call it, as all of them predict."""
        self._drawn = epoch
        weights, label, noisy = label_weights(model)
        found, pixels = distrusted_by(model, self.samples)
        if not found or not trainer.is_global_zero:
            return
        known, area = label != UNLABELED, charts.noise_auc(weights, label, noisy)
        names = known_names(model.data.class_names, model.data.num_classes)
        title = f"epoch {epoch}" + ("" if area is None else f": low weights find wrong labels with AUC {area:.3f}")
        images = {"weights": self._weights_chart(title, weights[known], noisy[known])}
        if pixels is not None:
            told = f"the {len(found)} most distrusted labels" if any_distrusted(found) else "no label is distrusted"
            images["most_distrusted"] = contact_sheet(pixels, found, names, f"epoch {epoch}: {told}")
        if self._folder is None:
            self._folder = unused(run_directory(trainer) / "pictures")
            self._folder.mkdir(parents=True)
            rank_zero_info(f"pictures are written to {self._folder}")
        for name, image in images.items():
            path = self._folder / f"{name}.png"
            write_whole(path, image)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image(f"samples/{name}", [str(path)], trainer.global_step)
                elif isinstance(logger, TensorBoardLogger):
                    array = np.asarray(Image.open(path).convert("RGB"))
                    logger.experiment.add_image(f"samples/{name}", array, trainer.global_step, dataformats="HWC")
                else:
                    send_file(logger, path, "pictures")

    def _weights_chart(self, title: str, weights: npt.NDArray[np.float32], wrong: npt.NDArray[np.bool_]) -> bytes:
        """A PNG of the weights now and of their means since the start."""
        kinds = [kind for kind in self.course[-1] if kind != "epoch"]
        course = [row for row in self.course if all(kind in row for kind in kinds)]
        with mpl.rc_context(charts.STYLE):
            figure = Figure(figsize=(9.0, 3.2), layout="constrained")
            left, right = figure.subplots(1, 2)
            charts.draw_histogram(left, weights, wrong)
            means = {kind: [[row[kind] for row in course]] for kind in kinds}
            charts.draw_course(right, [int(row["epoch"]) for row in course], means)
            figure.suptitle(title, fontsize=10)
            return charts.to_png(figure)


def _log_histogram(logger: Logger, weights: npt.NDArray[np.float32], step: int) -> None:
    if isinstance(logger, WandbLogger):
        import wandb

        histogram: Any = wandb.Histogram(weights.tolist(), num_bins=40)
        logger.log_metrics({HISTOGRAM: histogram}, step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_histogram(HISTOGRAM, torch.from_numpy(weights), step)
