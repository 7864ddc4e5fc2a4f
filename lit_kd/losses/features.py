"""Losses on features and on scores of pairs."""

from torch import Tensor


def check_alike(student: Tensor, teacher: Tensor) -> None:
    """Refuse features of two shapes, which would be broadcast; a ValueError."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"expected features of the student of the teacher's shape, {tuple(teacher.shape)}, found "
            f"{tuple(student.shape)}: put an adapter between them"
        )


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of each sample's features, ``(B, ...)`` (FitNet, arXiv 1412.6550) [code]."""
    check_alike(student, teacher)
    return (student - teacher).square().flatten(1).mean(-1)


def contrastive_loss(positive: Tensor, negatives: Tensor, rows: int) -> Tensor:
    """Noise-contrastive loss of each sample (CRD, arXiv 1910.10699) [code].

    ``-[log P+ / (P+ + K / N + eps) + sum over negatives of log (K / N) / (P- + K / N + eps)]`` with ``eps = 1e-7``.

    Takes normalised scores above 0: P+ of each sample and its counterpart, ``(B,)``, and P- of K others, ``(B, K)``,
    which are drawn from N rows.
    """
    noise = negatives.shape[-1] / rows
    found = (positive / (positive + noise + 1e-7)).log()
    refused = (noise / (negatives + noise + 1e-7)).log().sum(-1)
    return -(found + refused)
