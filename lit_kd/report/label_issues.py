"""Which labels are wrong, and what they should be: the ranked rows of a training set, and the tables of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_kd.data import UNLABELED, DataModule
from lit_kd.data.table import SampleTable
from lit_kd.models.checkpoint import known_names
from lit_kd.models.files import write_columns
from lit_kd.report.samples import distrust
from lit_kd.trust.labels import doubt
from lit_kd.trust.teachers import wilson
from lit_kd.weightings.sample_file import weight_columns

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
THRESHOLD = 0.5  # a label that is less probable to be right is taken for wrong


class LabelIssues(NamedTuple):
    """All labelled training rows, the least believed label first: n rows, K teachers."""

    ids: list[str]  # the rows' names
    index: Whole  # type: ignore[assignment]  # positions in the training set, (n,); tuple.index is of no use here
    given: Whole  # the class that the label says, (n,)
    suggested: Whole  # the most probable class, (n,); where the label is taken for wrong, the most probable other one
    score: Floats  # the probability that the label is right, (n,), ascending
    is_issue: npt.NDArray[np.bool_]  # whether the label is taken for wrong, (n,)
    weights: Floats | None  # what was learned: how much the label, then each teacher counts, (n, K + 1)
    true: Whole | None  # the right class, where the truth is known, (n,)
    probable: bool = True  # whether scores are probabilities; else they only rank, and no label is taken for wrong
    note: str | None = None  # why not to believe any of this, if the student has learned nothing

    @property
    def expected(self) -> float:
        """How many of the labels that are taken for wrong are expected to be wrong."""
        return float((1 - self.score[self.is_issue]).sum())


def check_audit(data: DataModule) -> None:
    """Refuse data, set up, that cannot be audited; a ValueError."""
    given = data.labels
    if data.task != "classification":
        raise ValueError("expected data of one class a sample, which is right or wrong, found several labels a sample")
    if not (given[: data.train_size] != UNLABELED).any():
        raise ValueError("expected training rows with a label, found none: there is nothing to audit")
    missing = int((given[data.trusted] == UNLABELED).sum())
    if missing:
        raise ValueError(f"expected a label for each trusted row, found {missing} without one: give them labels")


def find_issues(table: SampleTable, data: DataModule, said: Tensor) -> LabelIssues:
    """What a training has learned about the labels of its data.

    Tables of ALM-KD's default rule tell how probable it is that a label is right, see `lit_kd.trust.labels.doubt`. Of
    other methods ``1 - distrust`` is as far as a label is believed, which is no probability.

    Args:
        table: The table of a method that weighs samples.
        data: The data that it was trained on, set up.
        said: What the student says of each training row, probabilities ``(N, C)``; read where the table does not tell.
    """
    check_audit(data)
    n = data.train_size
    index = (data.labels[:n] != UNLABELED).nonzero().squeeze(1)
    given = data.labels[index]
    columns = {name: table[name].cpu()[index] for name in ("memory", "learned_class", "clean_probability", "weights")
               if name in table}  # fmt: skip
    note = learned_nothing(table["memory"].cpu() if "memory" in table else said, data)
    said = columns.get("memory", said[index] if len(said) else said).float()
    estimated = "memory" in columns and "clean_probability" in columns
    wrong = doubt(columns["clean_probability"], said, given) if estimated else distrust(table, n).cpu()[index]
    likeliest = columns["learned_class"] if estimated else said.argmax(1)
    other = said.scatter(1, given.unsqueeze(1), -1.0).argmax(1)
    score = (1 - wrong.double().clamp(0, 1)).numpy()
    weights = columns["weights"].double().numpy()
    order = np.lexsort((weights[:, 0], score))  # the lighter label breaks ties
    probable = "clean_probability" in columns
    issue = torch.from_numpy((score < THRESHOLD) & probable)
    suggested = torch.where(issue & (likeliest == given), other, likeliest)
    return LabelIssues(
        ids=[data.parts.ids[row] for row in index[order].tolist()],
        index=index.numpy()[order],
        given=given.numpy()[order],
        suggested=suggested.numpy()[order],
        score=score[order],
        is_issue=issue.numpy()[order],
        weights=weights[order],
        true=data.clean_labels[index].numpy()[order] if data.knows_truth else None,
        probable=probable,
        note=note,
    )


def learned_nothing(said: Tensor, data: DataModule) -> str | None:
    """A sentence for a student that is hardly right more often than who names one class for all rows [ours].

    That class's share is not below the 95% interval of the student's. Trusted rows count if the student was asked about
    them, else training rows by their labels.

    Args:
        said: What the student says of training rows, and of trusted ones if there are more, ``(N, C)`` or
            ``(N + M, C)``; 0 for rows that it never saw.
        data: The data, set up.
    """
    labels = data.labels[: len(said)]
    asked = (labels != UNLABELED) & (said != 0).any(1)
    trusted = asked & data.trusted[: len(said)]
    rows, kind = (trusted, "trusted") if trusted.any() else (asked, "training")
    y, names = labels[rows], said[rows].argmax(1)
    right, most = int((names == y).sum()), int(torch.bincount(y, minlength=1).max())
    if wilson(right, len(y)).low * len(y) > most:
        return None
    return (
        f"the student seems to have learned nothing, so do not believe what it says of labels: of {len(y)} {kind} rows "
        f"it names the label of {right}, and the most frequent class is that of {most}. Train longer, or change the "
        "student, its learning rate or the inputs"
    )


def write_issues(path: Path, issues: LabelIssues, names: Sequence[str] | None, overwrite: bool = False) -> None:
    """Write all rows, ranked; columns that cleanlab has too are named as there, and class names have their own."""
    columns: dict[str, Sequence[Any]] = {"id": issues.ids, "index": issues.index.tolist()}
    classes = {"given_label": issues.given, "predicted_label": issues.suggested}
    columns |= {name: values.tolist() for name, values in classes.items()}
    if names:
        columns |= {f"{name}_name": [names[c] for c in values] for name, values in classes.items()}
    columns |= {"label_score": issues.score.tolist(), "is_label_issue": issues.is_issue.tolist()}
    if issues.weights is not None:
        columns |= dict(zip(weight_columns(issues.weights.shape[1] - 1), issues.weights.T.tolist(), strict=True))
    if issues.true is not None:
        columns |= {"clean_label": issues.true.tolist(), "is_noisy": (issues.true != issues.given).tolist()}
    write_columns(path, columns, overwrite)


def write_labels(
    path: Path, ids: Sequence[str], labels: Whole, names: Sequence[str] | None, overwrite: bool = False
) -> None:
    """Write corrected labels, which a data module reads back as ``labels``: an id and a class a row.

    `UNLABELED` becomes an empty cell: the row loses its label.
    """
    cells = ["" if c == UNLABELED else names[c] if names else str(c) for c in labels.tolist()]
    write_columns(path, {"id": list(ids), "label": cells}, overwrite)


def write_audit(folder: Path, issues: LabelIssues, data: DataModule, overwrite: bool = False) -> list[Path]:
    """Write ``label_issues.csv``, and ``labels.csv``: the suggested classes of labels that are taken for wrong."""
    names = known_names(data.class_names, data.num_classes)
    paths = [folder / "label_issues.csv", folder / "labels.csv"]
    write_issues(paths[0], issues, names, overwrite)
    wrong = issues.is_issue
    ids = [name for name, changed in zip(issues.ids, wrong, strict=True) if changed]
    write_labels(paths[1], ids, issues.suggested[wrong], names, overwrite)
    return paths
