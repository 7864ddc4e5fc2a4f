"""DivideMix's divider: labels count as far as their loss looks like that of a right one."""

from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.distiller import Distiller
from lit_kd.distiller.optimisation import planned_length
from lit_kd.models import Network
from lit_kd.terms import Weights
from lit_kd.trust.labels import clean_by_loss
from lit_kd.types import Batch, Outputs
from lit_kd.weightings.base import has_label


class LossDivider(Distiller):
    """Weighs labels by the probability that they are right, by a mixture fitted to the losses of all training rows.

    The mixture is DivideMix's (arXiv 2002.07394), fitted before each epoch after a warm-up on the labels [code]. What
    DivideMix builds on it, two networks and mixtures of rows, is not here: a label counts as its probability p to be
    right, and the teachers, if there are any, share 1 - p [ours]. Meta rows that are trained on have a p of 1.

    Args:
        student: The network to train, a module or a name.
        teacher: None, one teacher or a list: modules or checkpoint paths.
        warmup_epochs: Epochs on the labels as they are: 10 of 300, and 30 on CIFAR-100 [code].
        **base: See `lit_kd.Distiller`.
    """

    table: SampleTable  # there in training
    needs_teacher = False
    by_sample = True

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        warmup_epochs: int = 10,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if warmup_epochs < 1:
            raise ValueError(f"expected warmup_epochs of at least 1, found {warmup_epochs}: losses must tell something")
        self.warmup_epochs = warmup_epochs

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """All labels are right at first."""
        epochs = planned_length(self)[0]
        if epochs is not None and self.warmup_epochs >= epochs:
            rank_zero_warn(
                f"all {epochs} epochs are warm-up ({self.warmup_epochs} epochs): no label is ever doubted. Train "
                "longer, or pass a smaller warmup_epochs"
            )
        table.add("weights", torch.tensor([1.0] + [0.0] * self.num_sources))
        if fresh:
            table["weights"] = self.shared_out(has_label(self.data.labels).float())

    def shared_out(self, clean: Tensor) -> Tensor:
        """Weights ``(N, K + 1)`` of labels that are right with these probabilities, ``(N,)``."""
        rest = (1 - clean).unsqueeze(1).expand(-1, self.num_sources) / max(self.num_sources, 1)
        return torch.cat([clean.unsqueeze(1), rest], dim=1)

    def prepare_epoch(self) -> None:
        """Fit the mixture."""
        if self.current_epoch < self.warmup_epochs or self.trainer.fit_loop.restarted_mid_epoch:
            return  # resumed, the table has what was fitted when the epoch began
        said = self.predict_rows(self.data.parts.rows(torch.arange(self.data.train_size)), teachers=False)
        known, clean = has_label(said.y), self.table["weights"][:, 0].clone()
        losses = self.task.label_loss(said.student.logits.float(), said.y)
        clean[: len(known)][known] = clean_by_loss(losses[known])
        self.table["weights"] = self.shared_out(clean)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The table's."""
        return self.table["weights"][batch.index]
