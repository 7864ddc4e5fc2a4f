"""One training of a comparison."""

import copy
import difflib
import json
import logging
import shutil
import sys
import time
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_kd.cli.lightning import Cli, make_cli
from lit_kd.cli.recipe import merge
from lit_kd.models.files import read_yaml, write_whole
from lit_kd.report.deviations import deviations
from lit_kd.report.evidence import KeepEvidence, accuracy_by_queries, keep_points, keep_samples
from lit_kd.report.runs import EVIDENCE, RESULT, Config, Job, Result, read_metrics, slug
from lit_kd.report.samples import learned
from lit_kd.version import __version__


class ParseOnly(Cli):
    """Parses a config."""

    def instantiate_classes(self) -> None:
        """Make nothing from it."""


def check(job: Job) -> None:
    """Raise a ValueError for a config that the parser refuses, before hours of other trainings."""
    _be_quiet()
    try:
        make_cli(copy.deepcopy(job.config), kind=ParseOnly, run=False, exit_on_error=False)
    except ArgumentError as error:
        raise ValueError(f"{job.method}: {error}") from error


def finished(job: Job) -> Result | None:
    """The result of a training; ``None`` if it is still to do, a ValueError if it was done with another config."""
    path = job.folder / RESULT
    if not path.is_file():
        return None
    found = read_yaml(job.folder / "config.yaml")
    options, expected = (config["model"].get("init_args", {}) for config in (found, job.config))
    if job.teachers and _below(options.get("teacher"), job) == _below(expected["teacher"], job):
        options["teacher"] = expected["teacher"]  # the comparison's folder may have been moved, or be spelled otherwise
    if found != job.config:
        now, before = (yaml.safe_dump(config).splitlines() for config in (job.config, found))
        lines = [line for line in difflib.ndiff(now, before) if line[0] in "+-"]
        raise ValueError(
            f"{job.folder} holds a result of another config. Give the comparison another --name, or remove the folder. "
            f"Expected (-), found (+):\n" + "\n".join(lines)
        )
    result: Result = json.loads(path.read_text())
    return result


def train(job: Job) -> Result:
    """Train, test at the best and the last epoch, and write the result; what an interrupted try left is removed."""
    try:
        return _train(job)
    except Exception as error:
        error.add_note(f"in the training of {job.method}, seed {job.seed}")
        raise
    finally:
        if "wandb" in sys.modules:  # the next run in this process is another one
            sys.modules["wandb"].finish()


def _train(job: Job) -> Result:
    _be_quiet()
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    write_whole(job.folder / "config.yaml", yaml.safe_dump(job.config, sort_keys=False))
    kept = KeepEvidence()
    config = merge(_surroundings(job.folder), job.config)
    cli = make_cli(config, run=False, save_config_callback=None, trainer_defaults={"callbacks": [kept]})
    trainer, model, data = cli.trainer, cli.model, cli.datamodule
    if job.project is not None:
        about: dict[str, Any] = {"group": job.folder.parents[1].name, "settings": {"silent": True}}
        shown = WandbLogger(f"{job.method}, seed {job.seed}", project=job.project, save_dir=job.folder, **about)
        shown.log_hyperparams({"method": job.method, "seed": job.seed, **job.config})
        trainer.loggers = [*trainer.loggers, shown]
    if model.task.score not in ("accuracy", "r2"):
        raise ValueError(f"expected a task that is judged by accuracy or R^2 to compare, found {model.task.name!r}")
    start = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - start
    result: Result = {"method": job.method, "seed": job.seed, "lit_kd": __version__}
    asked = accuracy_by_queries(read_metrics(job.folder))
    if asked:
        result["accuracy_by_queries"] = asked
    last = _test(trainer, model, data)
    if tuple(data.input_shape or ()) == (2,) and model.task.name == "classification":
        keep_points(data, job.folder)
    if learned(model) is not None:
        # of the last epoch, before the best one is loaded
        result |= keep_samples(model, data, trainer, job.folder, kept.histograms)
    # without validation data there is no best epoch
    best = _test(trainer, model, data, "best") if getattr(trainer.checkpoint_callback, "best_model_path", "") else last
    result |= {
        f"test_{model.task.score}": best[f"test/{model.task.score}"],
        f"test_{model.task.score}_last": last[f"test/{model.task.score}"],
        "ece": best.get("test/ece"),
        "nll": best["test/nll"],
        "teacher_agreement": best.get("test/teacher_agreement"),
        "seconds": round(seconds, 2),
    }
    kept.save(job.folder / EVIDENCE)
    result |= deviations(job.arrays(EVIDENCE))
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(result)
    write_whole(job.folder / RESULT, json.dumps(result, indent=1))
    return result


def _be_quiet() -> None:
    """Dozens of trainings would repeat the same messages."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*|torch\..*")


def _surroundings(folder: Path) -> Config:
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
        "checkpoint": {"dirpath": str(folder)},
        "show": {"every_n_epochs": None},
    }


def _test(trainer: Trainer, model: Any, data: Any, ckpt_path: str | None = None) -> dict[str, float]:
    (metrics,) = trainer.test(model, datamodule=data, ckpt_path=ckpt_path, verbose=False, weights_only=True)
    return {name: round(value, 6) for name, value in metrics.items()}


def _below(teacher: Any, job: Job) -> list[Any]:
    """Teachers as in a config; of those that the comparison trains, the path's parts below its folder."""
    folders = {slug(name) for name in job.teachers}
    parts = [(each, Path(str(each)).parts) for each in (teacher if isinstance(teacher, list) else [teacher])]
    return [path[-3:] if folders & {*path[-3:-2]} else each for each, path in parts]
