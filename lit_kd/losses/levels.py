"""Losses that compare how rows relate to each other."""

from torch import Tensor


def relation_loss(student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """The squared error between ``S S^T`` and ``T T^T``, summed over each row and averaged over rows; ``()``.

    Of probabilities ``(B, C)`` this is the batch level of MLKD (CVPR 2023), of their transposes the class
    level. ``kept``, ``(rows,)`` or a number, is a factor of each row.
    """
    error = student @ student.mT - teacher @ teacher.mT
    return (error.square().sum(-1) * kept).mean()
