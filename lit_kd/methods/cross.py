"""Predictions by networks that never saw the row."""

from collections.abc import Callable

import torch
from lightning import Trainer
from torch import Tensor

from lit_kd.data import DataModule
from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.distiller import Distiller


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
    if not 2 <= folds <= n or data.multilabel:
        given = "several labels a sample" if data.multilabel else f"folds={folds} and {n} rows"
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


def _leave_out(model: Distiller, fold: Tensor, rows: int) -> None:
    """Of the rows that it would train on, the model takes those outside the fold."""
    own = model.training_rows

    def others() -> Tensor:
        chosen = own()
        chosen = torch.arange(rows) if chosen is None else chosen
        return chosen[~torch.isin(chosen, fold)]

    model.training_rows = others  # type: ignore[method-assign]  # as any method that chooses its rows does
