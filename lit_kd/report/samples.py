"""What a method has learned about each training sample: tables, and the ranking of distrusted labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lit_kd.data import UNLABELED, DataModule
from lit_kd.data.rows import Indexed
from lit_kd.data.table import SampleTable
from lit_kd.models.files import write_columns
from lit_kd.weightings.sample_file import weight_columns


def write_samples(path: str | Path, table: SampleTable, data: DataModule, overwrite: bool = False) -> None:
    """Write `sample_columns` to a .csv or .parquet file, one row a sample; floats read back exactly."""
    columns = {name: column.tolist() for name, column in sample_columns(table, data).items()}
    write_columns(Path(path), columns, overwrite)


def sample_columns(table: SampleTable, data: DataModule) -> dict[str, Tensor]:
    """What was learned about the training samples, columns ``(N,)``; a ValueError if the table belongs to other data.

    They are index, label (-1 where missing), label_weight, teacher_weight (teacher_weight_0, ... for several teachers),
    clean_probability if the method estimates it, and clean_label and is_noisy if the data module knows the truth.
    """
    table.check(len(data.labels), data.fingerprint)
    rows = slice(data.train_size)
    weights = table["weights"][rows]
    found = {"index": torch.arange(data.train_size), "label": data.labels[rows]}
    found |= dict(zip(weight_columns(weights.shape[1] - 1), weights.T, strict=True))
    if "clean_probability" in table:
        found["clean_probability"] = table["clean_probability"][rows]
    if data.knows_truth:
        found |= {"clean_label": data.clean_labels[rows], "is_noisy": data.noisy[rows]}
    return found


def learned(model: object) -> SampleTable | None:
    """The table of a method that learns weights for samples of one class each; ``None`` for others."""
    table = getattr(model, "table", None)
    return table if isinstance(table, SampleTable) and "weights" in table and not model.data.multilabel else None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Suspect:
    """A training sample, and what is believed about it."""

    index: int
    label: int
    believed: int  # the student's most probable class
    probability: float  # of that class
    weight: float  # the learned weight of the label
    distrust: float  # from 0 (the label is believed) to 1
    true: int  # the true class if it is known, else `UNLABELED`


def distrust(table: SampleTable, size: int) -> Tensor:
    """How little the label of each of the first ``size`` rows is believed, in [0, 1], ``(size,)``.

    This is 1 - ``clean_probability`` if the method estimates it. Otherwise the label's weight decides: 0 for the
    largest weight, 1 for weight 0.
    """
    if "clean_probability" in table:
        return (1 - table["clean_probability"][:size]).clamp(0, 1)
    weights = table["weights"][:size, 0]
    return 1 - weights / weights.max().clamp(min=torch.finfo(weights.dtype).tiny)


def most_distrusted(table: SampleTable, data: DataModule, count: int | None = None) -> Tensor:
    """Indices of the labeled training samples, the most distrusted first; the lighter label breaks ties."""
    size = data.train_size
    value, weight = distrust(table, size).cpu().numpy(), table["weights"][:size, 0].cpu().numpy()
    order = torch.from_numpy(np.lexsort((weight, -value)))
    return order[data.labels[order] != UNLABELED][:count]


def rows_of(data: DataModule, index: Tensor) -> Indexed:
    """Training samples, not augmented."""
    return Indexed(data.parts.plain, data.parts.positions["train"][index.numpy()], data.labels[index], index)


def suspects(table: SampleTable, data: DataModule, index: Tensor, logits: Tensor) -> list[Suspect]:
    """What is believed about the samples of an index, ``(n,)``, given the student's logits for them, ``(n, C)``."""
    probability, believed = logits.float().softmax(-1).max(-1)
    true = data.clean_labels[index] if data.knows_truth else torch.full_like(index, UNLABELED)
    weight, doubt = table["weights"][:, 0].cpu()[index], distrust(table, data.train_size).cpu()[index]
    columns = (index, data.labels[index], believed, probability, weight, doubt, true)
    return [Suspect(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def any_distrusted(found: Sequence[Suspect]) -> bool:
    """Whether any of the samples is distrusted; early in a training none is."""
    return any(one.distrust > 1e-6 for one in found)


def noise_auc(
    weights: npt.NDArray[np.float32], label: npt.NDArray[np.int64], noisy: npt.NDArray[np.bool_]
) -> float | None:
    """How well a low weight of the label tells wrong (noisy) labels from right ones; missing labels do not count.

    This is the area under the ROC curve; ``None`` unless there are both right and wrong labels.
    """
    known = label != UNLABELED
    if not noisy.any() or noisy[known].all():
        return None
    return round(float(roc_auc_score(noisy[known], -weights[known])), 6)


def file_names(data: DataModule) -> list[str] | None:
    """The file of each training sample; ``None`` if the samples are not files."""
    dataset = getattr(data.parts.source.plain, "dataset", None)
    files: Sequence[tuple[str | Path, int]] | None = getattr(dataset, "samples", None)
    return None if files is None else [str(files[position][0]) for position in data.parts.positions["train"]]


def class_name(names: Sequence[str] | None, label: int) -> str:
    """The name of a class, or its number."""
    return names[label] if names else str(label)
