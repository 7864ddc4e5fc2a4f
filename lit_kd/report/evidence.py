"""What a training of a comparison keeps for the report."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
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
from lit_kd.models.files import write_whole
from lit_kd.report.charts import noise_auc
from lit_kd.report.runs import POINTS, SAMPLES, Metrics, Result
from lit_kd.report.samples import Suspect, as_pictures, distrusted_by, label_weights, learned
from lit_kd.terms import Deferral

SHOWN = 16  # distrusted samples whose pictures are kept
MAPPED, SIDE = 500, 32  # samples of the trust map, and pixels of a side of their pictures
EDGES = np.linspace(0.0, 2.0, 41)
"""Of the histogram of label weights; heavier labels are in the last bin."""


class KeepEvidence(Callback):
    """Keeps the `evidence` of the latest test, and a histogram of the label weights after each epoch."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Tensor]] = []
        self.histograms: list[npt.NDArray[np.int64]] = []
        """How many right and how many wrong labels have a weight between two `EDGES`, ``(2, bins)`` each."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Count the weights of methods that learn them."""
        if learned(pl_module) is not None:
            weights, label, noisy = label_weights(pl_module)
            kinds = ((label != UNLABELED) & (noisy == wrong) for wrong in (False, True))
            counts = [np.histogram(weights[kind].clip(EDGES[0], EDGES[-1]), EDGES)[0] for kind in kinds]
            self.histograms.append(np.stack(counts))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last test."""
        self.parts = []

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Keep a batch, and the score of the term `Deferral`, the mean if there are several."""
        if pl_module.task.name != "classification":
            return
        whole = all(rows is None for rows in outputs["known"])  # else a mean would be of others from row to row
        found = evidence(outputs["logits"], outputs["y"], outputs["teachers"] if whole else [])
        terms = [term for term in pl_module.terms or () if isinstance(term, Deferral)]
        if terms:
            student = pl_module.tapped_student(pl_module.unpack(batch).x)
            found["deferral_score"] = torch.stack([term.score(student)[: len(outputs["y"])] for term in terms]).mean(0)
        self.parts.append({name: value.cpu() for name, value in found.items()})

    def save(self, path: Path) -> None:
        """Write all rows, arrays ``(n,)`` by name."""
        names = self.parts[0] if self.parts else ()
        kept: dict[str, Any] = {name: torch.cat([part[name] for part in self.parts]).numpy() for name in names}
        write_whole(path, partial(np.savez_compressed, **kept))


def evidence(logits: Tensor, y: Tensor, teachers: list[Tensor]) -> dict[str, Tensor]:
    """How sure student and teachers are of each row, ``(B,)`` each, from their logits ``(B, C)`` and the true labels.

    The ``true`` class; the student's ``confidence`` in its class, and whether that is ``correct``. If there are
    teachers: of the class that their mean names, whether it is right, ``teacher_correct``, and the
    ``teacher_log_odds`` and ``student_log_odds``.
    """
    student = logits.double().log_softmax(-1)
    confidence, said = student.exp().max(-1)
    found = {"true": y, "confidence": confidence.float(), "correct": said == y}
    if teachers:
        teacher = torch.stack([t.double().log_softmax(-1) for t in teachers]).logsumexp(0) - np.log(len(teachers))
        named = teacher.argmax(-1)
        found["teacher_correct"] = named == y
        for who, log_probabilities in (("teacher", teacher), ("student", student)):
            found[f"{who}_log_odds"] = _log_odds(log_probabilities, named).float()
    return found


def _log_odds(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """Log p / (1 - p) of a class in each row, ``(B,)``, exact even where p is almost 1."""
    classes = classes.unsqueeze(1)
    others = log_probabilities.scatter(1, classes, -torch.inf).logsumexp(1)
    return log_probabilities.gather(1, classes).squeeze(1) - others


def keep_samples(
    model: Distiller,
    data: DataModule,
    trainer: Trainer,
    folder: Path,
    histograms: Sequence[npt.NDArray[np.int64]] = (),
) -> Result:
    """Write each training sample's weights, labels and teachers' classes, and the most distrusted samples.

    Also the histograms of `KeepEvidence`, and small pictures of samples from all over the data, ``mapped``.

    Returns how well the weights find wrong labels and right teachers.
    """
    assert model.table is not None
    model.to(trainer.strategy.root_device)  # back from where a finished test leaves it
    rows = slice(data.train_size)  # without the trusted ones
    weights = model.table["weights"][rows].cpu().numpy()
    label, true, noisy = (column[rows].numpy() for column in (data.labels, data.clean_labels, data.noisy))
    batches = torch.split(torch.arange(data.train_size), data.batch_size)
    found = [model.predict_rows(data.parts.rows(index)).teachers for index in batches]
    classes = [
        torch.cat([t.logits.argmax(-1).where(t.speaks, UNLABELED) for t in each]) for each in zip(*found, strict=True)
    ]
    said = torch.stack(classes, dim=1).cpu().numpy() if classes else np.zeros((len(label), 0), dtype=np.int64)
    columns: dict[str, Any] = {"weights": weights, "label": label, "true": true, "noisy": noisy, "teachers": said}
    columns |= {"histograms": np.stack(histograms)} if histograms else {}
    columns["mapped"] = np.unique(np.linspace(0, data.train_size - 1, MAPPED).astype(np.int64))
    mapped = data.parts.rows(torch.from_numpy(columns["mapped"]))
    small = as_pictures(mapped.rows.fetch(mapped.positions.tolist()), SIDE)
    columns |= {} if small is None else {"mapped_pictures": small}
    names = known_names(data.class_names, data.num_classes)
    columns |= {"class_names": np.array(names)} if names else {}
    shown, pixels = distrusted_by(model, SHOWN)
    if shown:
        columns |= {f"shown_{f.name}": np.array([getattr(one, f.name) for one in shown]) for f in fields(Suspect)}
        columns |= {} if pixels is None else {"pictures": pixels}
    write_whole(folder / SAMPLES, partial(np.savez_compressed, **columns))
    estimate = model.table.shared.get("noise_rate")
    result = {
        "noise_auc": noise_auc(weights[:, 0], label, noisy),
        "noise_rate": float(noisy.sum() / max(1, (label != UNLABELED).sum())),
        "noise_rate_estimated": None if estimate is None else round(float(estimate), 6),
    }
    return result | ({"picks_right": picks_right(weights[:, 1:], said == true[:, None])} if len(said[0]) > 1 else {})


def picks_right(weights: npt.NDArray[np.float32], right: npt.NDArray[np.bool_]) -> float | None:
    """How often the teacher with the largest weight is right, among rows where some teachers are and some are not.

    Both are ``(N, K)``. Teachers that share the largest weight count equally; ``None`` if there is no such row.
    """
    some = right.any(1) & ~right.all(1)
    if not some.any():
        return None
    largest = weights[some] == weights[some].max(1, keepdims=True)
    return round(float(((largest & right[some]).sum(1) / largest.sum(1)).mean()), 6)


def keep_points(data: DataModule, folder: Path) -> None:
    """Write training samples that are points of the plane, for the chart of regions."""
    x = data.parts.plain.fetch(data.parts.positions["train"].tolist())
    label, noisy = (column[: data.train_size].numpy() for column in (data.labels, data.noisy))
    write_whole(folder / POINTS, partial(np.savez_compressed, x=np.asarray(x), label=label, noisy=noisy))


def accuracy_by_queries(metrics: Metrics) -> list[tuple[int, float]]:
    """Validation accuracy by the number of queries to the teacher, the last epoch of each; empty if none are logged."""
    both = [row for row in metrics.values() if {"rad/queries", "val/accuracy"} <= row.keys()]
    return sorted({int(row["rad/queries"]): row["val/accuracy"] for row in both}.items())
