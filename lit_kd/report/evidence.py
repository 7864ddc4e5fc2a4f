"""What a training of a comparison keeps of its test, for the report."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

EVIDENCE = "evidence.npz"


class KeepEvidence(Callback):
    """Keeps of each row of the latest test how sure student and teachers were, and whether the student was right.

    Attributes:
        kept: ``confidence``, the probability of the student's class, ``(n,)``; whether that is ``correct``; and, where
            there are teachers, the log-odds that they (their mean probabilities), ``teacher_log_odds``, and that the
            student, ``student_log_odds``, gives to the teachers' class.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self._parts: list[dict[str, Tensor]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last test."""
        self._parts = []

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Take down a batch."""
        self._parts.append({name: value.cpu() for name, value in evidence(**outputs).items()})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the batches."""
        names = self._parts[0] if self._parts else ()
        self.kept = {name: torch.cat([part[name] for part in self._parts]).numpy() for name in names}


def evidence(logits: Tensor, y: Tensor, teachers: list[Tensor]) -> dict[str, Tensor]:
    """See `KeepEvidence`.

    Args:
        logits: The student's, ``(B, C)``.
        y: True labels, ``(B,)``.
        teachers: Each teacher's logits, ``(B, C)``.
    """
    student = logits.double().log_softmax(-1)
    confidence, said = student.exp().max(-1)
    found = {"confidence": confidence.float(), "correct": said == y}
    if teachers:
        teacher = torch.stack([t.double().log_softmax(-1) for t in teachers]).logsumexp(0) - np.log(len(teachers))
        named = teacher.argmax(-1)
        found |= {
            "teacher_log_odds": log_odds(teacher, named).float(),
            "student_log_odds": log_odds(student, named).float(),
        }
    return found


def log_odds(log_probabilities: Tensor, classes: Tensor) -> Tensor:
    """Log p / (1 - p) of a class in each row, ``(B,)``, exact also where p is nearly 1.

    Examples:
        >>> log_odds(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log(), torch.tensor([0, 2])).exp().round()
        tensor([1., 4.])
    """
    classes = classes.unsqueeze(1)
    others = log_probabilities.scatter(1, classes, -torch.inf).logsumexp(1)
    return log_probabilities.gather(1, classes).squeeze(1) - others
