"""The trainings of a comparison, and the files that each one leaves."""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Config = dict[str, Any]
Result = dict[str, Any]
Arrays = Mapping[str, npt.NDArray[Any]]
Metrics = dict[int, dict[str, float]]
"""What was logged in each epoch."""
TEACHER = "teacher"
RESULT, EVIDENCE, SAMPLES, POINTS = "result.json", "evidence.npz", "samples.npz", "points.npz"
"""What a finished training has: its numbers; and for pictures its test, its sample weights, its points in the plane."""


def score_of(result: Result) -> tuple[str, float]:
    """What a training is judged by, ``"accuracy"`` or ``"R²"``, and how well it did on test rows at its best epoch."""
    return ("R²", result["test_r2"]) if "test_r2" in result else ("accuracy", result["test_accuracy"])


@dataclass(frozen=True)
class Job:
    """One training: a method at a seed."""

    method: str  # name in the recipe; "teacher" for the teacher, "teacher NAME" for one of several
    seed: int
    folder: Path
    config: Config  # for lit-kd fit
    is_teacher: bool = False
    teachers: tuple[str, ...] = ()  # the `method` of each teacher that it learns from; of files their names
    wave: int = 0  # jobs of smaller waves must finish before this one starts
    project: str | None = None  # the W&B project that shows it, if any

    def arrays(self, name: str) -> Arrays:
        """What a file of arrays holds; nothing if the training left none."""
        file = self.folder / name
        return dict(np.load(file)) if file.is_file() else {}


def slug(name: str) -> str:
    """The folder name of a method, such as ``kd-0.5-meta`` of "KD 0.5 + meta"."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def read_metrics(folder: Path) -> Metrics:
    """The CSVLogger's files; of what was logged several times in an epoch, the last value."""
    epochs: Metrics = {}
    for path in sorted(folder.glob("lightning_logs/version_*/metrics.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            if row["epoch"]:  # some callbacks, such as LearningRateMonitor, log without
                values = {k: float(v) for k, v in row.items() if v and k not in ("epoch", "step")}
                epochs.setdefault(int(row["epoch"]), {}).update(values)
    return epochs
