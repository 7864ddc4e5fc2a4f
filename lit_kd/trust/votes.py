"""What several annotators say together: majority vote, and Dawid and Skene's estimate of who confuses what.

N rows, K annotators, C classes; a vote is a class, or `UNLABELED` where there is none, int64 ``(N, K)``.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.types import UNLABELED

How = Literal["dawid_skene", "majority"]


class Crowd(NamedTuple):
    """What `dawid_skene` finds, float64."""

    classes: Tensor  # how probable each class is of each row, (N, C)
    confusion: Tensor  # how often annotator k names class d where c is true, [k, c, d], (K, C, C)
    prior: Tensor  # how frequent the classes are, (C,)
    log_likelihood: Tensor  # of the votes, before each step and after the last, (S + 1,)


def vote_shares(votes: Tensor, classes: int) -> Tensor:
    """The share of each class in a row's votes, float64 ``(N, C)``; 0 for a row without votes."""
    counts = _one_hot(votes, classes).sum(1)
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


def majority_vote(votes: Tensor, classes: int, truth: Tensor | None = None) -> Tensor:
    """The class with most votes, of several the first; `UNLABELED` for a row without votes, int64 ``(N,)``.

    Where the truth is known, ``(N,)``, it is that.

    Examples:
        >>> majority_vote(torch.tensor([[2, 2, 0], [1, -1, 0], [-1, -1, -1]]), 3)
        tensor([ 2,  0, -1])
    """
    shares = vote_shares(votes, classes)
    found = shares.argmax(1).where(shares.any(1), UNLABELED)
    return found if truth is None else found.where(truth == UNLABELED, truth)


def likeliest(votes: Tensor, classes: int, truth: Tensor | None = None) -> Tensor:
    """The most probable class by `dawid_skene`; `UNLABELED` for a row without votes, int64 ``(N,)``."""
    found = dawid_skene(votes, classes, truth).classes.argmax(1)
    return found.where(majority_vote(votes, classes, truth) != UNLABELED, UNLABELED)


def dawid_skene(
    votes: Tensor,
    classes: int,
    truth: Tensor | None = None,
    smoothing: float = 0.01,
    steps: int = 200,
    tolerance: float = 1e-8,
) -> Crowd:
    """The classes of rows and the confusions of annotators by EM (Dawid and Skene, 1979) [text].

    It starts from `vote_shares` and stops when no probability changes by more than the tolerance. A row without votes
    has the classes' frequencies.

    Args:
        votes: The votes.
        classes: C.
        truth: Classes of rows that are known, int64 ``(N,)``, else `UNLABELED` [ours].
        smoothing: Votes that are added to each cell of each confusion, and rows to each class [ours]: no mistake is
            ruled out because it was not seen.
        steps: At most.
        tolerance: See above.
    """
    said = _one_hot(votes, classes)  # (N, K, C)
    known = torch.zeros(len(votes), dtype=torch.bool, device=votes.device) if truth is None else truth != UNLABELED
    fixed = _one_hot(votes.new_full((len(votes),), UNLABELED) if truth is None else truth, classes)
    shares = vote_shares(votes, classes)
    voted = shares.any(1, keepdim=True)
    found = torch.where(known.unsqueeze(1), fixed, shares.where(voted, 1 / classes))
    likelihoods = []
    for _ in range(steps):
        confusion, prior = _estimates(found, said, smoothing)
        joint = _joint(confusion, prior, said)
        likelihoods.append(_log_likelihood(joint, fixed, known))
        new = torch.where(known.unsqueeze(1), fixed, joint.softmax(1))
        moved, found = (new - found).abs().max(), new
        if moved <= tolerance:
            break
    confusion, prior = _estimates(found, said, smoothing)
    likelihoods.append(_log_likelihood(_joint(confusion, prior, said), fixed, known))
    return Crowd(found, confusion, prior, torch.stack(likelihoods))


def _one_hot(classes: Tensor, count: int) -> Tensor:
    """Float64, zeros where there is no class."""
    return F.one_hot(classes.clamp(min=0), count).double() * (classes != UNLABELED).unsqueeze(-1)


def _estimates(found: Tensor, said: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Confusions and prior that fit best, of classes ``(N, C)``."""
    counts = torch.einsum("nc,nkd->kcd", found, said) + smoothing
    rows = found.sum(0) + smoothing
    tiny = torch.finfo(counts.dtype).tiny  # without smoothing a class may have no votes
    return counts / counts.sum(2, keepdim=True).clamp(min=tiny), rows / rows.sum()


def _joint(confusion: Tensor, prior: Tensor, said: Tensor) -> Tensor:
    """Log-probabilities of a row's votes and each class, ``(N, C)``."""
    tiny = torch.finfo(confusion.dtype).tiny
    return prior.clamp(min=tiny).log() + torch.einsum("kcd,nkd->nc", confusion.clamp(min=tiny).log(), said)


def _log_likelihood(joint: Tensor, fixed: Tensor, known: Tensor) -> Tensor:
    return torch.where(known, (joint * fixed).sum(1), joint.logsumexp(1)).sum()


VOTES: dict[str, Callable[[Tensor, int, Tensor | None], Tensor]] = {
    "dawid_skene": likeliest,
    "majority": majority_vote,
}
"""From votes, C and the known classes to the class of each row."""
