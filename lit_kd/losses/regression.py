"""Losses of numbers: outputs and targets ``(B, D)``; a target that is nan is missing and counts 0."""

import torch
from torch import Tensor


def squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    """The mean of ``(z - y)^2`` over the D numbers of a sample, in squared units of y, ``(B,)``."""
    return errors(outputs, y).square().mean(-1)


def errors(outputs: Tensor, y: Tensor) -> Tensor:
    """``z - y``, 0 where the target is missing, ``(B, D)``."""
    missing = y.isnan()
    return (outputs - y.masked_fill(missing, 0)).masked_fill(missing, 0)


def gaussian_error(outputs: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    """The negative log-density of y under a normal distribution around z, the mean over D, in nats, ``(B,)``.

    The logarithms of the standard deviations are ``(D,)``.

    Examples:
        >>> gaussian_error(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1))  # log(2 pi) / 2
        tensor([0.9189])
    """
    density = 0.5 * (errors(outputs, y) * (-log_scale).exp()).square() + log_scale + 0.9189385332046727
    return (density * ~y.isnan()).mean(-1)


def bounded_error(outputs: Tensor, teacher: Tensor, y: Tensor, margin: float) -> Tensor:
    """The student's squared error where it, with a margin on top, exceeds the teacher's, else 0, ``(B,)``.

    This is the teacher bounded regression loss of Chen et al. (2017) [text]: the teacher's error is a bound, no goal.
    Where the target is missing, the teacher's output takes its place [ours].
    """
    y = torch.where(y.isnan(), teacher, y)
    own, bound = squared_error(outputs, y), squared_error(teacher, y)
    return own * (own + margin > bound)
