"""The tasks: what labels are, and what follows from it.

| task | labels ``y`` | logits | ``num_classes`` |
|---|---|---|---|
| ``classification`` | int64 ``(B,)``, or probabilities ``(B, C)`` | ``(B, C)`` | C |
| ``multilabel`` | 0 or 1, int64 ``(B, C)`` | ``(B, C)`` | C |
| ``dense`` | a class a pixel, int64 ``(B, H, W)`` | ``(B, C, H, W)`` | C |
| ``tokens`` | a class a token, int64 ``(B, T)`` | ``(B, T, C)`` | C |
| ``regression`` | numbers ``(B, D)`` | ``(B, D)`` | D |

A label that is missing is `lit_kd.types.UNLABELED`, or nan in a regression; a pixel or token that counts for nothing is
`lit_kd.types.IGNORED`.
"""

from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, R2Score
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
)

from lit_kd.data.labels import TaskName
from lit_kd.losses import bernoulli_cross_entropy, by_sample, classes_last, cross_entropy, squared_error
from lit_kd.terms.labels import BernoulliCrossEntropy, CrossEntropy
from lit_kd.terms.logits import KL, BernoulliKL
from lit_kd.terms.regression import SquaredError, TeacherError
from lit_kd.terms.task import Task
from lit_kd.types import IGNORED, UNLABELED


def _check_classes(y: Tensor, num_classes: int, missing: bool) -> None:
    """Class numbers ``(B,)``, or in training probabilities ``(B, C)``."""
    if y.is_floating_point() and y.shape[1:] == (num_classes,) and missing:
        if y.min() < 0 or (y.sum(1) > 1 + 1e-3).any():
            raise ValueError("expected soft labels that are probabilities, found negative ones or a sum above 1")
        return
    if y.dim() != 1 or y.is_floating_point():
        raise ValueError(
            f"expected labels of shape (batch,) and an integer type, found {tuple(y.shape)} and {y.dtype}: "
            "give class numbers, or set task='multilabel' for several labels a sample"
        )
    low, high = (int(label) for label in y.aminmax())
    if high >= num_classes or low < (UNLABELED if missing else 0):
        raise ValueError(
            f"expected labels in [0, {num_classes}), found {low} to {high}: correct the labels or num_classes"
        )


def _predict_class(probabilities: Tensor) -> dict[str, Tensor]:
    probability, index = probabilities.max(-1)
    return {"class": index, "probability": probability}


def _class_metrics(num_classes: int) -> dict[str, Metric]:
    """Fractions; top-5 accuracy with more than 5 classes; ECE with 15 bins, a mean absolute gap."""
    accuracy = partial(MulticlassAccuracy, num_classes, average="micro", validate_args=False)
    found: dict[str, Metric] = {"accuracy": accuracy(), "agreement": accuracy()}
    found["ece"] = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1", validate_args=False)
    return found | ({"accuracy_top5": accuracy(top_k=5)} if num_classes > 5 else {})


def _check_several(y: Tensor, num_classes: int, missing: bool) -> None:
    """Zeros and ones ``(B, C)``, or -1 where a label is missing."""
    if y.dim() != 2 or y.shape[1] != num_classes:
        raise ValueError(
            f"expected labels of shape (batch, {num_classes}), one 0 or 1 for each label, found {tuple(y.shape)}: "
            "set task='classification' for one class a sample"
        )
    wrong = (y != 0) & (y != 1) & ((y != UNLABELED) | (not missing))
    if wrong.any():
        raise ValueError(f"expected labels 0 or 1, found {y[wrong][0].item()}")


def _likely(probabilities: Tensor) -> Tensor:
    return (probabilities > 0.5).long()


def _predict_several(probabilities: Tensor) -> dict[str, Tensor]:
    return {"labels": _likely(probabilities), "probability": probabilities}


def _several_metrics(num_classes: int) -> dict[str, Metric]:
    """The share of labels that are right, mean average precision (``map``), and each label's F1 score."""
    return {
        "accuracy": MultilabelAccuracy(num_classes, average="micro", validate_args=False),
        "agreement": MultilabelAccuracy(num_classes, average="micro", validate_args=False),
        "map": MultilabelAveragePrecision(num_classes, average="macro", validate_args=False),
        **{f"f1_{label}": OfLabel(label) for label in range(num_classes)},
    }


class OfLabel(BinaryF1Score):
    """The F1 score of one of several labels, at a threshold of 0.5."""

    def __init__(self, label: int) -> None:
        super().__init__(validate_args=False)
        self.label = label

    def update(self, preds: Tensor, target: Tensor) -> None:
        """From probabilities and labels of all labels, ``(B, C)``."""
        super().update(preds[:, self.label], target[:, self.label])


def _check_elements(y: Tensor, num_classes: int, missing: bool, *, axes: int, each: str) -> None:
    """A class for each of many elements of a sample."""
    if y.dim() != axes or y.is_floating_point():
        found = f"{tuple(y.shape)} and {y.dtype}"
        raise ValueError(f"expected labels of an integer type, one {each}, in {axes} axes, found {found}")
    y = y[y != IGNORED]
    if len(y) and y.max() == 255 >= num_classes:
        raise ValueError(
            f"expected {IGNORED} for what counts for nothing, found 255: set ignore_index=255 of "
            "DistillationDataModule, or let the data set write it"
        )
    if len(y) and (y.max() >= num_classes or y.min() < (UNLABELED if missing else 0)):
        raise ValueError(
            f"expected labels in [0, {num_classes}) or {IGNORED} for what counts for nothing, found {int(y.min())} to "
            f"{int(y.max())}: correct the labels or num_classes"
        )


def _element_loss(logits: Tensor, y: Tensor) -> Tensor:
    return by_sample(cross_entropy, y, logits)


def _element_probabilities(logits: Tensor) -> Tensor:
    return classes_last(logits).softmax(-1)


def _element_metrics(num_classes: int) -> dict[str, Metric]:
    """Those of classes, but for the calibration error, which keeps numbers of each element."""
    return {name: metric for name, metric in _class_metrics(num_classes).items() if name != "ece"}


def _pixel_metrics(num_classes: int) -> dict[str, Metric]:
    """Those of classes, of all pixels together, and the mean over classes of intersection over union (``iou``)."""
    return _element_metrics(num_classes) | {"iou": MulticlassJaccardIndex(num_classes, validate_args=False)}


def _token_metrics(num_classes: int) -> dict[str, Metric]:
    """Those of classes, of all tokens together, and the mean over classes of the F1 score."""
    return _element_metrics(num_classes) | {"f1": MulticlassF1Score(num_classes, average="macro", validate_args=False)}


def _check_numbers(y: Tensor, outputs: int, missing: bool) -> None:
    """Numbers ``(B, D)``, or nan where a target is missing."""
    if y.shape[1:] != (outputs,) or not y.is_floating_point():
        found = f"{tuple(y.shape)} and {y.dtype}"
        raise ValueError(f"expected targets of shape (batch, {outputs}) and a floating-point type, found {found}")
    if y.isinf().any() or (y.isnan().any() and not missing):
        raise ValueError("expected finite targets, found nan or infinity: only training targets may be missing, as nan")


def _predict_numbers(outputs: Tensor) -> dict[str, Tensor]:
    return {"value": outputs}


def _number_metrics(outputs: int) -> dict[str, Metric]:
    """R^2, averaged over the outputs, of target and teachers' mean, and the mean squared error, in squared units."""
    return {"r2": R2Score(), "agreement": R2Score(), "mse": MeanSquaredError()}


def _teacher_error(temperature: float) -> TeacherError:
    return TeacherError()  # numbers have no temperature


def _same(values: Tensor) -> Tensor:
    return values


_CLASSES = Task(
    name="classification",
    least_classes=2,
    label_term=CrossEntropy,
    teacher_term=KL,
    label_loss=cross_entropy,
    check_labels=_check_classes,
    probabilities=partial(torch.softmax, dim=-1),
    decide=partial(torch.argmax, dim=-1),
    predict=_predict_class,
    metrics=_class_metrics,
)
_TOKENS = replace(
    _CLASSES,
    name="tokens",
    label_loss=_element_loss,
    check_labels=partial(_check_elements, axes=2, each="a token, (batch, tokens)"),
    probabilities=_element_probabilities,
    metrics=_token_metrics,
    elements=True,
)
TASKS: dict[str, Task] = {
    "classification": _CLASSES,
    "multilabel": Task(
        name="multilabel",
        least_classes=1,
        label_term=BernoulliCrossEntropy,
        teacher_term=BernoulliKL,
        label_loss=bernoulli_cross_entropy,
        check_labels=_check_several,
        probabilities=torch.sigmoid,
        decide=_likely,
        predict=_predict_several,
        metrics=_several_metrics,
    ),
    "dense": replace(
        _TOKENS,
        name="dense",
        check_labels=partial(_check_elements, axes=3, each="a pixel, (batch, height, width)"),
        metrics=_pixel_metrics,
    ),
    "tokens": _TOKENS,
    "regression": Task(
        name="regression",
        least_classes=1,
        label_term=SquaredError,
        teacher_term=_teacher_error,
        label_loss=squared_error,
        check_labels=_check_numbers,
        probabilities=_same,
        decide=_same,
        predict=_predict_numbers,
        metrics=_number_metrics,
        score="r2",
    ),
}
assert set(TASKS) == set(get_args(TaskName))
