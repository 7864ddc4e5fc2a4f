"""Predictions, and labels, by networks that never saw the row."""

from collections.abc import Callable

import torch
from lightning import Trainer
from torch import Tensor

from lit_kd.data import DataModule
from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.distiller import Distiller
from lit_kd.weightings.base import has_label


def cross_predict(
    make: Callable[[], Distiller], data: DataModule, trainer: Callable[[], Trainer], folds: int = 5
) -> Tensor:
    """What students say of training rows that they were not trained on, probabilities ``(N, C)``.

    The rows are drawn into folds, and for each fold a student is trained without it. So no student is asked about a
    label that it may have learned by heart: with `lit_kd.trust.labels.label_issues` this is confident learning (arXiv
    1911.00068). Rows without a label are predicted, too.

    Args:
        make: Makes a method to train, such as ``lambda: Supervised("cnn-16")``.
        data: One of our data modules. Meta rows that are trained on are in all trainings.
        trainer: Makes the trainer of a fold.
        folds: How many parts, at least 2.
    """
    data.setup()
    n = data.train_size
    if not 2 <= folds <= n or data.task != "classification":
        given = "several labels a sample" if data.task != "classification" else f"folds={folds} and {n} rows"
        raise ValueError(f"expected one class a sample, and from 2 folds to one a row, found {given}")
    draw = torch.Generator().manual_seed(derive_seed(resolve_seed(None), "folds"))
    said = torch.zeros(n, data.num_classes)
    for fold in torch.randperm(n, generator=draw).tensor_split(folds):
        model = make()
        _leave_out(model, fold, len(data.labels) if model.trains_on_meta or data.train_on_meta else n)
        trainer().fit(model, data)
        found = model.predict_rows(data.parts.rows(fold), teachers=False)
        said[fold] = found.student.logits.float().softmax(-1).cpu()
    return said


def cross_relabel(
    make: Callable[[], Distiller], data: DataModule, trainer: Callable[[], Trainer], start: Tensor, stages: int = 2
) -> Tensor:
    """Labels of the training rows, renewed by students that never saw the row (MCKD, arXiv 2311.08640) [text].

    The rows are halved. In each stage a new student of each half relabels the other half by its most probable class
    [ours]; labels that the data have are kept. Afterwards the data have the last labels. As students of later stages
    learn labels that others gave, what a student has learned may come back to its rows indirectly. A ValueError if
    all rows have a label, as after an earlier call.

    Args:
        make: Makes a method to train.
        data: One of our data modules, of which some rows may have no label.
        trainer: Makes the trainer of a student.
        start: Labels to begin with, ``(N,)``, such as a teacher's most probable classes.
        stages: How often rows are relabelled.

    Returns:
        The labels before the first stage and after each, ``(stages + 1, N)``.
    """
    data.setup()
    given = data.parts.given[: data.train_size]
    before, kept = given.clone(), has_label(given)
    if (
        start.shape != given.shape
        or start.is_floating_point()
        or not 0 <= start.min() <= start.max() < data.num_classes
    ):
        found = f"{start.dtype} {tuple(start.shape)} from {start.min()} to {start.max()}"
        raise ValueError(f"expected as start {len(given)} classes in [0, {data.num_classes}), found {found}")
    if kept.all():
        raise ValueError(
            "expected rows without a label, found none; an earlier call may have labelled all: make new data"
        )
    labels = [torch.where(kept, given, start.to(given))]
    try:
        for _ in range(stages):
            given.copy_(labels[-1])
            labels.append(torch.where(kept, given, cross_predict(make, data, trainer, folds=2).argmax(1)))
    except BaseException:
        given.copy_(before)
        raise
    given.copy_(labels[-1])
    return torch.stack(labels)


def _leave_out(model: Distiller, fold: Tensor, rows: int) -> None:
    """Of the rows that it would train on, the model takes those outside the fold."""
    own = model.training_rows

    def others() -> Tensor:
        chosen = own()
        chosen = torch.arange(rows) if chosen is None else chosen
        return chosen[~torch.isin(chosen, fold)]

    model.training_rows = others  # type: ignore[method-assign]  # as any method that chooses its rows does
