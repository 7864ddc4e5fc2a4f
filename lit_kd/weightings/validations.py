"""Validations, as rules hear of them."""

from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lit_kd.data.table import all_sum


class TellRule(Callback):
    """Counts for how many rows of a validation student and teachers are wrong, and tells ALM-KD's rule."""

    def on_validation_epoch_start(self, trainer: Trainer, module: Any) -> None:
        """Count anew."""
        self.counts = torch.zeros(2 + len(module.teachers), dtype=torch.int64, device=module.device)

    def on_validation_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *args: Any) -> None:
        """Count the rows that no other process has."""
        wrong = torch.stack([outputs["logits"], *outputs["teachers"]]).argmax(-1) != outputs["y"]
        self.counts += torch.cat([wrong.sum(1), self.counts.new_tensor([wrong.shape[1]])])

    def on_validation_epoch_end(self, trainer: Trainer, module: Any) -> None:
        """Tell the rule, before a checkpoint is written."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and module.table is not None:
            *wrong, rows = all_sum(self.counts)
            if rows > 0:
                module.rule.validated(module.table, torch.stack(wrong), rows)
