"""What a training of a comparison keeps for the report."""

import csv
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_kd.data import UNLABELED, DataModule
from lit_kd.distiller import Distiller
from lit_kd.models.checkpoint import known_names
from lit_kd.report.pictures import as_pictures
from lit_kd.report.runs import POINTS, SAMPLES, Result
from lit_kd.report.samples import Suspect, most_distrusted, noise_auc, rows_of, suspects

SHOWN = 16
"""Distrusted samples whose pictures are kept."""


class KeepEvidence(Callback):
    """Keeps the `evidence` of the latest test: ``kept``, arrays ``(n,)`` by name."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self._parts: list[dict[str, Tensor]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last test."""
        self._parts = []

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Keep a batch."""
        self._parts.append({name: value.cpu() for name, value in evidence(**outputs).items()})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the batches."""
        names = self._parts[0] if self._parts else ()
        self.kept = {name: torch.cat([part[name] for part in self._parts]).numpy() for name in names}


def evidence(logits: Tensor, y: Tensor, teachers: list[Tensor]) -> dict[str, Tensor]:
    """How sure student and teachers are of each row, from their logits ``(B, C)`` and the true labels.

    Returns ``confidence``, the probability of the student's class; whether that is ``correct``; and, where there are
    teachers, the log-odds that they (their mean probabilities), ``teacher_log_odds``, and that the student,
    ``student_log_odds``, give to the teachers' class; ``(B,)`` each.
    """
    student = logits.double().log_softmax(-1)
    confidence, said = student.exp().max(-1)
    found = {"confidence": confidence.float(), "correct": said == y}
    if teachers:
        teacher = torch.stack([t.double().log_softmax(-1) for t in teachers]).logsumexp(0) - np.log(len(teachers))
        named = teacher.argmax(-1)
        for who, log_probabilities in (("teacher", teacher), ("student", student)):
            found[f"{who}_log_odds"] = log_odds(log_probabilities, named).float()
    return found


def log_odds(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """Log p / (1 - p) of a class in each row, ``(B,)``, exact even where p is almost 1.

    Examples:
        >>> log_odds(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log(), torch.tensor([0, 2])).exp().round()
        tensor([1., 4.])
    """
    classes = classes.unsqueeze(1)
    others = log_probabilities.scatter(1, classes, -torch.inf).logsumexp(1)
    return log_probabilities.gather(1, classes).squeeze(1) - others


def keep_samples(model: Distiller, data: DataModule, trainer: Trainer, folder: Path) -> Result:
    """Write each training sample's weights, labels and teachers' classes, and the most distrusted samples.

    Returns how well the weights find wrong labels and right teachers.
    """
    assert model.table is not None
    model.to(trainer.strategy.root_device)  # back from where a finished test leaves it
    rows = slice(data.train_size)  # without the trusted ones
    weights = model.table["weights"][rows].cpu().numpy()
    label, true, noisy = (column[rows].numpy() for column in (data.labels, data.clean_labels, data.noisy))
    batches = torch.split(torch.arange(data.train_size), data.batch_size)
    said = np.concatenate([_teachers_classes(model, index) for index in batches])
    columns: dict[str, Any] = {"weights": weights, "label": label, "true": true, "noisy": noisy, "teachers": said}
    index = most_distrusted(model.table, data, SHOWN)
    if len(index):
        shown = rows_of(data, index)
        found = suspects(model.table, data, index, model.predict_rows(shown, teachers=False).student.logits.cpu())
        columns |= {f"shown_{f.name}": np.array([getattr(one, f.name) for one in found]) for f in fields(Suspect)}
        pixels = as_pictures(shown.rows.fetch(shown.positions.tolist()))
        names = known_names(data.class_names, data.num_classes)
        columns |= {} if pixels is None else {"pictures": pixels}
        columns |= {"class_names": np.array(names)} if names else {}
    np.savez_compressed(folder / SAMPLES, **columns)
    estimate = model.table.shared.get("noise_rate")
    result = {
        "noise_auc": noise_auc(weights[:, 0], label, noisy),
        "noise_rate": float(noisy.sum() / max(1, (label != UNLABELED).sum())),
        "noise_rate_estimated": None if estimate is None else round(float(estimate), 6),
    }
    return result | ({"picks_right": picks_right(weights[:, 1:], said == true[:, None])} if len(said[0]) > 1 else {})


def _teachers_classes(model: Distiller, index: Tensor) -> npt.NDArray[np.int64]:
    """The class that each teacher gives to training samples, not augmented, ``(n, K)``."""
    found = model.predict_rows(rows_of(model.data, index))
    return torch.stack([teacher.logits.argmax(-1) for teacher in found.teachers], dim=1).cpu().numpy()


def picks_right(weights: npt.NDArray[np.float32], right: npt.NDArray[np.bool_]) -> float | None:
    """How often the teacher with the largest weight is right, among rows where some teachers are and some are not.

    Both are ``(N, K)``. Teachers that share the largest weight count equally; ``None`` if there is no such row.

    Examples:
        >>> picks_right(np.array([[0.9, 0.1], [0.5, 0.5], [0.0, 1.0]]), np.array([[1, 0], [0, 1], [1, 1]], dtype=bool))
        0.75
    """
    some = right.any(1) & ~right.all(1)
    if not some.any():
        return None
    largest = weights[some] == weights[some].max(1, keepdims=True)
    return round(float(((largest & right[some]).sum(1) / largest.sum(1)).mean()), 6)


def keep_points(data: DataModule, folder: Path) -> None:
    """Write training samples that are points of the plane, for `lit_kd.report.regions`."""
    x = data.parts.plain.fetch(data.parts.positions["train"].tolist())
    label, noisy = (column[: data.train_size].numpy() for column in (data.labels, data.noisy))
    np.savez_compressed(folder / POINTS, x=np.asarray(x), label=label, noisy=noisy)


def accuracy_by_queries(metrics: Path) -> list[tuple[int, float]]:
    """Validation accuracy by the number of queries to the teacher, from the CSVLogger's file; the last epoch of each.

    Empty if the method does not log ``rad/queries``.
    """
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    asked = {row["epoch"]: int(float(row["rad/queries"])) for row in rows if row.get("rad/queries")}
    accuracy = {row["epoch"]: float(row["val/accuracy"]) for row in rows if row.get("val/accuracy")}
    return sorted({queries: accuracy[epoch] for epoch, queries in asked.items() if epoch in accuracy}.items())
