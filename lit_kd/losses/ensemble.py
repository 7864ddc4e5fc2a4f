"""What several teachers say between them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def median_teacher(teachers: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """T times the median of each class's ``log softmax(t_k / T)``, ``(B, C)``: logits, of logits (arXiv 2112.01405).

    The paper has the median of logits [text]; log-probabilities do not depend on a constant that a teacher adds to its
    logits [ours]. Of an even number of teachers it is the mean of both middles. No minority of teachers moves it beyond
    what the others say.

    Examples:
        >>> sure = [torch.tensor([[p, 1 - p]]).log() for p in (0.6, 0.7, 0.001)]
        >>> median_teacher(sure).exp()
        tensor([[0.6000, 0.4000]])
    """
    said = _log_probabilities(teachers, temperature)
    lower, upper = _middles(said)
    return temperature * (lower + upper) / 2


def median_shares(teachers: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """How often each teacher supplies the median, over all samples and classes: a score of trust, ``(K,)``, sum 1.

    The paper weighs clients by it [text]. Equal teachers, and both middles of an even number, share equally [ours].
    """
    said = _log_probabilities(teachers, temperature)
    supplied = torch.stack([(said == middle).float() for middle in _middles(said)])
    return (supplied / supplied.sum(1, keepdim=True)).mean((0, 2, 3))


def _log_probabilities(teachers: Sequence[Tensor], temperature: float) -> Tensor:
    return (torch.stack(list(teachers)) / temperature).log_softmax(-1)  # (K, B, C)


def _middles(values: Tensor) -> tuple[Tensor, Tensor]:
    ranked, last = values.sort(0).values, len(values) - 1
    return ranked[last // 2], ranked[(last + 1) // 2]
