"""Weighted distillation with unlabeled examples."""

from typing import Any

import torch
from torch import Tensor

from lit_kd.distiller.optimisation import planned_length
from lit_kd.losses import teacher_labels
from lit_kd.models import Network
from lit_kd.terms import HardLabel, TeacherLabel, Term
from lit_kd.trust.reliability import Neighbours, distillation_weights, distortions, margin
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.base import has_label
from lit_kd.weightings.checks import warn_of_warmup
from lit_kd.weightings.few_labels import FewLabels


class WeightedDistillation(FewLabels):
    """Distils rows without a label, weighing each by how far the teacher can be trusted there (arXiv 2210.06711).

    A row with a label costs the cross-entropy with it; one without costs w times the cross-entropy with the teacher's
    label, so that in the mean the loss is that with the true labels [text]. The weights follow from the nearest
    neighbours among the trusted meta rows, in the plane of the teacher's and the student's margin; each epoch estimates
    them anew, see `lit_kd.trust.reliability` [ours in detail]; they are made for cross-entropy, also with another
    ``term``. A soft label costs more than the true one also where the teacher is right, so that soft labels count less.
    Needs a data module of `lit_kd.data` with a meta split that neither network was trained on.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list, whose mean probabilities count: modules or checkpoint paths.
        warmup_epochs: First epochs, on rows with a label only [ours]: before, the student's margins tell nothing.
        **base: See `lit_kd.weightings.few_labels.FewLabels` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        warmup_epochs: int = 1,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        self.warmup_epochs = warmup_epochs
        self._votes = torch.zeros(2)  # the weights of the epoch's rows without a label, and how many there were

    def default_term(self) -> Term:
        """Cross-entropy with the teacher's label."""
        return HardLabel() if self.hard else TeacherLabel()

    def on_fit_start(self) -> None:
        """Refuse meta rows that the student sees; warn of a training that is all warm-up."""
        super().on_fit_start()
        if self.data.train_on_meta:
            raise ValueError(
                "expected meta rows that the student is not trained on, as the teacher's errors are weighed by the "
                "student's loss there; found train_on_meta. Remove it from the data's arguments"
            )
        warn_of_warmup(self.warmup_epochs, planned_length(self)[0])

    def on_train_end(self) -> None:
        """Say so where the training stopped within its warm-up."""
        warn_of_warmup(self.warmup_epochs, self.current_epoch)

    def training_rows(self) -> Tensor | None:
        """Rows with a label, while the student warms up, if there are any."""
        labeled = has_label(self.data.labels[: self.data.train_size]).nonzero().squeeze(1)
        return labeled if self.current_epoch < self.warmup_epochs and len(labeled) else None

    def prepare_epoch(self) -> None:
        """Estimate where the teacher errs, and what that costs the student, on the meta rows."""
        student, teacher, y = self.on_meta_rows()
        self._neighbours = Neighbours(torch.stack([margin(teacher), margin(student)], dim=1))
        self._distortions = distortions(student, teacher_labels(teacher, self.hard), y)
        self._votes = torch.zeros(2, device=self.device)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Tensor:
        """1 for labels; for the teacher of rows without one, how far it can be trusted."""
        label, missing = super().weigh(student, sources, batch).unbind(1)
        margins = torch.stack([margin(sources[0].logits), margin(student.logits)], dim=1)
        weights = missing * distillation_weights(margins, self._neighbours, self._distortions)
        self._votes = self._votes + torch.stack([weights.sum(), missing.sum()])
        return torch.stack([label, weights], dim=1)

    def on_train_epoch_end(self) -> None:
        """Log the mean weight of the epoch's rows without a label, too."""
        super().on_train_epoch_end()
        weight, rows = self.trainer.strategy.reduce(self._votes.to(self.device), reduce_op="sum")
        if rows:
            self.log("samples/teacher_weight", weight / rows, sync_dist=True)
