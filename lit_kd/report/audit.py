"""One training that tells which labels are wrong, and cleanlab's answer for comparison."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from sklearn.metrics import average_precision_score

from lit_kd.data import DataModule
from lit_kd.distiller import Distiller
from lit_kd.methods import ALMKD, cross_predict
from lit_kd.models import Network
from lit_kd.models.files import optional
from lit_kd.report.label_issues import Floats, LabelIssues, check_audit, find_issues


def audit(
    data: DataModule,
    student: Network = "mlp-128",
    teacher: Network | list[Network] | None = None,
    *,
    trusted: int | float | None = None,
    epochs: int = 30,
    trainer: Callable[[], Trainer] | None = None,
    **method: Any,
) -> LabelIssues:
    """Train once, and tell of each training label how probable it is that it is right, and which class is.

    Trusted, validation and test rows are not audited. docs/audit.md tells how it works and how well.

    Args:
        data: A data module of `lit_kd.data`.
        student: The network that learns, as for any method; its best size is that which suits the data.
        teacher: Teachers, if there are any: heard as far as they help the student on validation rows.
        trusted: The size of the split whose labels are right for certain, a fraction or a count: the data's ``meta``.
            0: nobody has checked any label. Default: as the data say.
        epochs: How long to train.
        trainer: Makes another trainer, with ``max_epochs`` of its own.
        **method: Options of `lit_kd.ALMKD`. Default: a learning rate that falls as a cosine.

    Examples:
        >>> from lit_kd.data import DigitsDataModule
        >>> data = DigitsDataModule(noise="symmetric", noise_rate=0.4, seed=0)
        >>> issues = audit(data, "mlp-32", trusted=0.05, epochs=3)
        >>> len(issues.ids), bool(issues.score[0] < issues.score[-1])
        (1168, True)
    """
    if trusted is not None:
        data.meta = trusted
    data.setup("fit")
    if (trusted and not data.meta_size) or (trusted == 0 and data.meta_size):
        raise ValueError(f"expected data that are not split yet, found {data.meta_size} meta rows: make new data")
    check_audit(data)
    sizes: dict[str, Any] = {"num_classes": data.num_classes}
    sizes |= {} if data.input_shape is None else {"input_shape": list(data.input_shape)}
    model = ALMKD(student, [] if teacher is None else teacher, **(sizes | {"lr_scheduler": "cosine"} | method))
    # without a teacher nothing is learned from validation rows
    (trainer or (lambda: quiet_trainer(epochs, limit_val_batches=0 if teacher is None else 1.0)))().fit(model, data)
    model.table.sync()
    found = find_issues(model.table, data, torch.empty(0))
    if found.note:
        rank_zero_warn(found.note)
    return found


def quiet_trainer(epochs: int, **options: Any) -> Trainer:
    """A trainer that leaves no files."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(max_epochs=epochs, **(off | options))


class Found(NamedTuple):
    """What cleanlab says of the labels of the same rows, in the same order: n rows."""

    scores: dict[str, Floats]  # by cleanlab's name of the score, (n,); the smaller, the more suspect
    is_issue: npt.NDArray[np.bool_]  # (n,)
    seconds: float


def by_cleanlab(
    issues: LabelIssues, data: DataModule, make: Callable[[], Distiller], trainer: Callable[[], Trainer]
) -> Found:
    """Ask cleanlab about the same labels, given what students say of rows that they did not see, of 5 folds.

    Args:
        issues: What the audit found.
        data: The same data; students train on trusted rows, too.
        make: Makes a student, the same as the audit's.
        trainer: Makes the trainer of a fold, as long as the audit's.
    """
    ranks = optional("cleanlab.rank", "cleanlab", "--against cleanlab")
    filters = optional("cleanlab.filter", "cleanlab", "--against cleanlab")
    start, before = time.perf_counter(), data.train_on_meta
    data.train_on_meta = data.meta_size > 0
    try:
        said = cross_predict(make, data, trainer).double().numpy()[issues.index]
    finally:
        data.train_on_meta = before
    said /= said.sum(1, keepdims=True)
    ways = ("self_confidence", "normalized_margin")
    scores = {way: ranks.get_label_quality_scores(issues.given, said, method=way) for way in ways}
    wrong = filters.find_label_issues(issues.given, said, n_jobs=1)
    return Found(scores, wrong, time.perf_counter() - start)


def precision(wrong: npt.NDArray[np.bool_], score: Floats) -> tuple[float, float]:
    """Precision at k, where k labels are wrong, and average precision, of a score that is small where they are."""
    first = np.argsort(score, kind="stable")[: wrong.sum()]
    return float(wrong[first].mean()), float(average_precision_score(wrong, -score))


def compared(issues: LabelIssues, found: Found, seconds: float | None) -> str:
    """A table of both for the terminal: precision where the truth is known, the labels that both take for wrong."""
    scores = {"lit_kd": issues.score} | {f"cleanlab, {way}": score for way, score in found.scores.items()}
    flags = [issues.is_issue, *[found.is_issue] * len(found.scores)]
    times = [seconds, *[found.seconds] * len(found.scores)]
    lines = ["by                           taken for wrong   precision at k   average precision   seconds"]
    for (name, score), flag, took in zip(scores.items(), flags, times, strict=True):
        figures = ("-", "-")
        if issues.true is not None and (issues.true != issues.given).any():
            at_k, average = precision(issues.true != issues.given, score)
            figures = f"{at_k:.3f}", f"{average:.3f}"
        time_taken = "-" if took is None else f"{took:.1f}"
        lines.append(f"{name:<29}{flag.sum():>15}{figures[0]:>17}{figures[1]:>20}{time_taken:>10}")
    both = int((issues.is_issue & found.is_issue).sum())
    return "\n".join([*lines, f"both take {both} labels for wrong, k is the number of wrong labels"])
