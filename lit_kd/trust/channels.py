"""How often teachers and labels take one class for another."""

import torch
import torch.nn.functional as F
from torch import Tensor


def teacher_channel(classes: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """The distribution of the true class for each class that a teacher predicts, from trusted rows [ours].

    Takes predicted classes ``(M, K)`` and true ones ``(M,)``; returns ``(K, C, C)``, each row a distribution: counts of
    (predicted, true), plus 5 rows on the diagonal and a tenth of a row everywhere.
    """
    joint = F.one_hot(classes, num_classes).transpose(0, 1).transpose(1, 2).float() @ F.one_hot(y, num_classes).float()
    counts = joint + 5 * torch.eye(num_classes, device=joint.device, dtype=joint.dtype) + 0.1
    return counts / counts.sum(-1, keepdim=True)


def label_channel(classes: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """The noise's transition matrix, with the student's classes taken for the true ones [ours].

    Takes the student's classes and the given labels, ``(N,)``; returns ``(C, C)``, each row a distribution: counts of
    (predicted, given), plus 5 rows a class, 70% of them right and the rest spread evenly over all classes.
    """
    joint = torch.bincount(classes * num_classes + y, minlength=num_classes**2).view(num_classes, num_classes).float()
    counts = joint + 5 * (0.7 * torch.eye(num_classes, device=joint.device, dtype=joint.dtype) + 0.3 / num_classes)
    return counts / counts.sum(1, keepdim=True)


def label_log_odds(student: Tensor, y: Tensor, channel: Tensor) -> Tensor:
    """The log-odds that a row of the label's own class got it, not one of another class [ours].

    Takes the student's probabilities ``(B, C)``, given labels ``(B,)`` and a `label_channel`; returns ``(B,)``, between
    -14 and 14.
    """
    given, own = student * channel.T[y], y.unsqueeze(1)
    right, wrong = given.gather(1, own).squeeze(1), given.scatter(1, own, 0).sum(1)  # 1 - right would cancel
    return (right + 1e-6).log() - (wrong + 1e-6).log()
