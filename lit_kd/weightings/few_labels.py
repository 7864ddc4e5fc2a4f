"""The label where there is one, and elsewhere a teacher that trusted rows judge."""

from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_kd.distiller import Distiller
from lit_kd.types import UNLABELED, Batch, Outputs, check_choice, class_labels
from lit_kd.weightings.checks import warn_of_absent_classes
from lit_kd.weightings.mean_teacher import as_one


class FewLabels(Distiller):
    """Learns from the label, and from the mean of the teachers' probabilities where there is none.

    Args:
        labels: The teacher's labels: its most probable class, or its probabilities, at temperature 1.
        **base: See `lit_kd.Distiller`.
    """

    num_sources = 1
    tasks = ("classification",)
    by_sample = True

    def __init__(self, *, labels: Literal["hard", "soft"] = "hard", **base: Any) -> None:
        super().__init__(**base)
        check_choice("labels", labels, ("hard", "soft"))
        self.hard = labels == "hard"

    def on_fit_start(self) -> None:
        """Refuse data without meta rows; warn where every row has a label, so that the teacher is never heard."""
        super().on_fit_start()
        method = type(self).__name__
        self.data.require_meta(method)
        warn_of_absent_classes(self.data)
        if (self.data.labels != UNLABELED).all():
            rank_zero_warn(
                f"all training rows have a label: {method} hears its teacher only on those without. Set the data's "
                "argument labeled, e.g. labeled=100"
            )

    def on_meta_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The student's logits, the mean teacher's, and the labels of the meta rows that it speaks of."""
        said = self.predict_rows(self.data.parts.meta_rows())
        teacher = as_one(said.teachers)
        if not teacher.speaks.any():
            raise ValueError(f"expected a teacher that speaks of meta rows, by which {type(self).__name__} judges it")
        return said.student.logits[teacher.speaks], teacher.logits[teacher.speaks], said.y[teacher.speaks]

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """The mean of the teachers' probabilities."""
        return [as_one(teachers)]

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Tensor:
        """1 for labels, and for the teacher where there is none."""
        missing = ((class_labels(batch.y) == UNLABELED) & sources[0].speaks).float()
        return torch.stack([torch.ones_like(missing), missing], dim=1)
