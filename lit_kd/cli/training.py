"""One training of a comparison."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import time
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_kd.cli.lightning import make_cli
from lit_kd.cli.recipe import Job, merge
from lit_kd.data import UNLABELED, DataModule
from lit_kd.distiller.tabled import TableDistiller
from lit_kd.models.files import write_whole
from lit_kd.models.plain import known_names
from lit_kd.report.distrust import as_pictures, most_distrusted, noise_auc, rows_of, suspects
from lit_kd.report.evidence import EVIDENCE, KeepEvidence
from lit_kd.teachers.modules import Teachers
from lit_kd.version import __version__

RESULT = "result.json"
SAMPLES = "samples.npz"
POINTS = "points.npz"
SHOWN = 16
"""Distrusted samples whose pictures are kept."""
Result = dict[str, Any]


def finished(job: Job) -> Result | None:
    """The result of a training that is done already, ``None`` where it is still to do.

    Raises:
        ValueError: If the folder holds the result of another config.
    """
    path = job.folder / RESULT
    if not path.is_file():
        return None
    found = yaml.safe_load((job.folder / "config.yaml").read_text())
    # the comparison's folder may have been moved, or be spelled otherwise
    options, expected = (config["model"].get("init_args", {}) for config in (found, job.config))
    if _end(options.get("teacher")) == _end(expected.get("teacher")) and "teacher" in expected:
        options["teacher"] = expected["teacher"]
    if found != job.config:
        raise ValueError(
            f"{job.folder} holds a result of another config: expected {_difference(job.config, found)}. "
            "Give the comparison another --name, or remove the folder"
        )
    result: Result = json.loads(path.read_text())
    return result


def train(job: Job) -> Result:
    """Train, test at the best and the last epoch, and write the result; what an interrupted try left is removed."""
    _be_quiet()
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    (job.folder / "config.yaml").write_text(yaml.safe_dump(job.config, sort_keys=False))
    kept = KeepEvidence()
    cli = make_cli(
        merge(_surroundings(job.folder), job.config),
        run=False,
        save_config_callback=None,
        trainer_defaults={"callbacks": [kept]},
    )
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    if job.project is not None:
        trainer.loggers = [*trainer.loggers, wandb_logger(job)]
    try:
        return _train(job, trainer, model, data, kept)
    finally:  # the next run in this process is another one
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()


def _train(job: Job, trainer: Trainer, model: Any, data: Any, kept: KeepEvidence) -> Result:
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    result: Result = {"method": job.method, "seed": job.seed, "lit_kd": __version__}
    asked = accuracy_by_queries(Path(trainer.log_dir or "") / "metrics.csv")
    if asked:
        result["accuracy_by_queries"] = asked
    last = _test(trainer, model, data)
    if tuple(data.input_shape or ()) == (2,):
        _keep_points(data, job.folder)
    if isinstance(model, TableDistiller):
        result |= _keep_samples(model, data, trainer, job.folder)  # of the last epoch, before the best one is loaded
    # without validation data there is no best epoch
    best = _test(trainer, model, data, "best") if getattr(trainer.checkpoint_callback, "best_model_path", "") else last
    result |= {
        "test_accuracy": best["test/accuracy"],
        "test_accuracy_last": last["test/accuracy"],
        "ece": best["test/ece"],
        "nll": best["test/nll"],
        "teacher_agreement": best.get("test/teacher_agreement"),
        "seconds": round(seconds, 2),
    }
    np.savez_compressed(job.folder / EVIDENCE, **kept.kept)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(result)
    write_whole(job.folder / RESULT, json.dumps(result, indent=1))
    return result


def wandb_logger(job: Job) -> WandbLogger:
    """A run of W&B: its group is the comparison, its job type the method."""
    logger = WandbLogger(
        name=f"{job.method}, seed {job.seed}",
        project=job.project,
        save_dir=job.folder,
        group=job.folder.parents[1].name,
        job_type=job.method,
        settings={"silent": True},
    )
    logger.log_hyperparams({"method": job.method, "seed": job.seed, **job.config})
    return logger


def _surroundings(folder: Path) -> dict[str, Any]:
    """Where a training logs and saves, which is the same for all."""
    return {
        "trainer": {
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}},
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "default_root_dir": str(folder),
        },
        "checkpoint": {"dirpath": str(folder), "filename": "best"},
        "show": {"every_n_epochs": None},
    }


def accuracy_by_queries(metrics: Path) -> list[tuple[int, float]]:
    """How good a student was that could ask so often: its validation accuracy before more rows were queried.

    Args:
        metrics: What a training logged, the CSVLogger's file.

    Returns:
        Pairs of queries and accuracy, queries ascending; none where the method does not log ``rad/queries``.
    """
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    asked = {row["epoch"]: int(float(row["rad/queries"])) for row in rows if row.get("rad/queries")}
    accuracy = {row["epoch"]: float(row["val/accuracy"]) for row in rows if row.get("val/accuracy")}
    # of the epochs with as many queries the last one counts
    return sorted({queries: accuracy[epoch] for epoch, queries in asked.items() if epoch in accuracy}.items())


def _test(trainer: Trainer, model: Any, data: Any, ckpt_path: str | None = None) -> dict[str, float]:
    (metrics,) = trainer.test(model, datamodule=data, ckpt_path=ckpt_path, verbose=False)
    return {name: round(value, 6) for name, value in metrics.items()}


def _keep_samples(model: TableDistiller, data: DataModule, trainer: Trainer, folder: Path) -> Result:
    """Write each training sample's weights beside labels and teachers' predictions; measure how well they fit."""
    assert model.table is not None
    rows = slice(0, data.train_size)  # without the trusted ones
    weights = model.table["weights"][rows].cpu().numpy()
    label, true, noisy = (column[rows].numpy() for column in (data.labels, data.clean_labels, data.noisy))
    known = label != UNLABELED
    said = _predictions(model.teachers, data, trainer)
    columns: dict[str, Any] = {"weights": weights, "label": label, "true": true, "noisy": noisy, "teachers": said}
    np.savez_compressed(folder / SAMPLES, **(columns | _keep_shown(model, data)))
    estimate = model.table.shared.get("noise_rate")
    result = {
        "noise_auc": noise_auc(weights[:, 0], label, noisy),
        "noise_rate": float(noisy.sum() / max(1, known.sum())),
        "noise_rate_estimated": None if estimate is None else round(float(estimate), 6),
    }
    return result | ({"picks_right": picks_right(weights[:, 1:], said == true[:, None])} if len(said[0]) > 1 else {})


def _keep_shown(model: TableDistiller, data: DataModule) -> dict[str, npt.NDArray[Any]]:
    """The most distrusted samples, what the student says of them, and their pictures where they are pictures."""
    assert model.table is not None
    index = most_distrusted(model.table, data, SHOWN)
    if not len(index):
        return {}
    rows = rows_of(data, index)
    x = rows.rows.fetch(rows.positions.tolist())
    model.eval()
    with torch.no_grad():
        found = suspects(model.table, data, index, model(move_data_to_device(x, model.device)).cpu())
    kept = {f"shown_{f.name}": np.array([getattr(one, f.name) for one in found]) for f in fields(found[0])}
    pixels, names = as_pictures(x), known_names(data.class_names, data.num_classes)
    return kept | ({} if pixels is None else {"pictures": pixels}) | ({"class_names": np.array(names)} if names else {})


def _predictions(teachers: Teachers, data: DataModule, trainer: Trainer) -> npt.NDArray[np.int64]:
    """What each teacher takes the training rows for, not augmented, ``(N, K)``."""
    device = trainer.strategy.root_device
    teachers.apply(lambda t: t.to(device))  # back from where a finished test leaves them
    positions, said = data.parts.positions["train"], []
    for part in np.array_split(positions, -(-len(positions) // data.batch_size)):
        x = trainer.precision_plugin.convert_input(move_data_to_device(data.parts.plain.fetch(part.tolist()), device))
        said.append(torch.stack([out.logits.argmax(-1) for out in teachers(x)], dim=1).cpu())
    return torch.cat(said).numpy()


def picks_right(weights: npt.NDArray[np.float32], right: npt.NDArray[np.bool_]) -> float | None:
    """How often the teacher with the largest weight is right, among rows where some teachers are and some are not.

    Args:
        weights: Of the teachers, ``(N, K)``; if several share the largest, each is picked equally often.
        right: Whether each teacher is right, ``(N, K)``.

    Returns:
        A fraction; ``None`` where there is no such row.

    Examples:
        >>> picks_right(np.array([[0.9, 0.1], [0.5, 0.5], [0.0, 1.0]]), np.array([[1, 0], [0, 1], [1, 1]], dtype=bool))
        0.75
    """
    some = right.any(1) & ~right.all(1)
    if not some.any():
        return None
    largest = weights[some] == weights[some].max(1, keepdims=True)
    return round(float(((largest & right[some]).sum(1) / largest.sum(1)).mean()), 6)


def _keep_points(data: DataModule, folder: Path) -> None:
    """Write the training samples' places in the plane, to be drawn."""
    rows = slice(0, data.train_size)
    x = data.parts.plain.fetch(data.parts.positions["train"].tolist())
    label, noisy = data.labels[rows].numpy(), data.noisy[rows].numpy()
    np.savez_compressed(folder / POINTS, x=np.asarray(x), label=label, noisy=noisy)


def _be_quiet() -> None:
    """Dozens of trainings would each repeat what one has said."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*|torch\..*")


def _end(teacher: Any) -> Any:
    """What of a teacher's path, or of several, lies in the comparison's folder."""
    if isinstance(teacher, list):
        return [_end(one) for one in teacher]
    return Path(teacher).parts[-3:] if isinstance(teacher, str) else teacher


def _difference(expected: Any, found: Any, where: str = "") -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in {**expected, **found}:
            if expected.get(key) != found.get(key):
                return _difference(expected.get(key), found.get(key), f"{where}.{key}".lstrip("."))
    return f"{where}={expected!r}, found {found!r}"
