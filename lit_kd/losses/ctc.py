"""Connectionist temporal classification: a sequence of symbols, of which nobody knows when they are."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.types import IGNORED, full

BLANK = 0


def ctc_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Minus the log-probability of the target, summed over all its alignments, per symbol: ``(B,)``.

    Logits are ``(B, T, C)``, class 0 is the blank. Targets ``(B, T)`` are `lit_kd.types.IGNORED` behind their end.
    """
    lengths = (y != IGNORED).sum(1)
    frames = torch.full_like(lengths, logits.shape[1])
    log_p = full(logits).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_p, y.clamp(min=0), frames, lengths, BLANK, reduction="none") / lengths.clamp(min=1)


def greedy(logits: Tensor) -> list[list[int]]:
    """The symbols of the most probable alignment: the best class of each frame, without repeats, then blanks."""
    return [[c for c in row.unique_consecutive().tolist() if c != BLANK] for row in logits.argmax(-1)]
