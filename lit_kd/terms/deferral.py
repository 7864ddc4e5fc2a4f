"""Whether the student may answer by itself."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.models.checkpoint import read_checkpoint
from lit_kd.terms.base import Term
from lit_kd.types import PENULTIMATE, Batch, Outputs

LAYER = r"\bterms\.extra\.\d+\.\d+\.agrees\.(weight|bias)$"


class Deferral(Term):
    """Trains a score of each sample: will the student name the same class as the teacher? [ours, after 2308.11807]

    A cascade lets the student answer where the score is high, and asks the teacher elsewhere, see
    `lit_kd.trust.deferral.deferral_curve`. A linear layer on the student's penultimate features, which are detached:
    the student learns nothing from it. As an extra term, beside any method. It is in the training's checkpoint.

    Args:
        weight: A constant factor: of the layer's learning rate, with plain SGD.
    """

    tasks = ("classification",)
    student_taps = (PENULTIMATE,)

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the layer."""
        self.agrees = nn.Linear(student.features[PENULTIMATE][0].numel(), 1)

    def _logits(self, student: Outputs) -> Tensor:
        found: Tensor = self.agrees(student.features[PENULTIMATE].detach().flatten(1))
        return found.squeeze(1).float()

    def score(self, student: Outputs) -> Tensor:
        """How probable it is that student and teacher name the same class, ``(B,)``."""
        return self._logits(student).sigmoid()

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """Binary cross-entropy with whether they do."""
        assert teacher is not None
        same = (student.logits.argmax(-1) == teacher.logits.argmax(-1)).float()
        return F.binary_cross_entropy_with_logits(self._logits(student), same, reduction="none")

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str]) -> Deferral:
        """The term of a training's checkpoint, with the trained layer, for `score`; a ValueError without one."""
        state = read_checkpoint(Path(path)).get("state_dict", {})
        found = {name: value for name, value in state.items() if re.search(LAYER, name)}
        if len(found) != 2:
            expected = "expected a checkpoint of a training with the extra term Deferral and one teacher"
            raise ValueError(f"{path}: {expected}, found {len(found) // 2 or 'none'}")
        term, parts = cls(), {name.rpartition(".")[2]: value for name, value in found.items()}
        term.agrees = nn.Linear(parts["weight"].shape[1], 1)
        term.agrees.load_state_dict(parts)
        return term.requires_grad_(False)
