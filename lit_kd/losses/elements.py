"""Losses of samples that have many elements, each of one class: tokens and pixels."""

from collections.abc import Callable

from torch import Tensor

from lit_kd.types import IGNORED, UNLABELED


def classes_last(logits: Tensor) -> Tensor:
    """Logits with the classes in the last axis, as they are but for pixels': ``(B, C, H, W)`` to ``(B, H, W, C)``."""
    return logits.movedim(1, -1) if logits.dim() > 3 else logits


def by_sample(loss: Callable[..., Tensor], y: Tensor, *logits: Tensor) -> Tensor:
    """A loss of rows for samples of many elements: the mean over those of a sample that are not `IGNORED`, ``(B,)``.

    A sample of ignored elements alone has the loss 0. Each sample counts the same, however many elements it has: so the
    mean over a batch does not depend on how it is split up [ours].

    Args:
        loss: Of logits ``(n, C)``, as many of them as given, and labels ``(n,)``, the losses ``(n,)``.
        y: Labels, ``(B, T)`` or ``(B, H, W)``; those of rows, ``(B,)`` or ``(B, C)``, go straight to the loss.
        *logits: ``(B, T, C)`` or ``(B, C, H, W)``; of rows, ``(B, C)``.

    Examples:
        >>> import torch
        >>> from lit_kd.losses import cross_entropy
        >>> y = torch.tensor([[0, IGNORED], [IGNORED, IGNORED]])
        >>> by_sample(lambda z, y: cross_entropy(z, y), y, torch.zeros(2, 2, 3))
        tensor([1.0986, 0.0000])
    """
    if logits[0].dim() < 3:
        return loss(*logits, y)
    kept = y != IGNORED
    rows = [classes_last(z).masked_fill(~kept.unsqueeze(-1), 0).flatten(0, -2) for z in logits]
    values = loss(*rows, y.masked_fill(~kept, UNLABELED).flatten()).view(y.shape) * kept
    return values.flatten(1).sum(1) / kept.flatten(1).sum(1).clamp(min=1)
