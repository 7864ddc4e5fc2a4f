"""How far a student's distribution is from a teacher's."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_kd.losses.logits import cross_entropy, kl_divergence
from lit_kd.types import UNLABELED, check_choice

Kind = Literal["forward", "reverse", "jensen_shannon", "total_variation", "skewed", "skewed_reverse"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TINY = 1e-30  # the least square of a norm: the root of 0 has no gradient


def divergence(log_p: Tensor, log_q: Tensor, kind: Kind = "forward", beta: float = 0.5) -> Tensor:
    """A divergence of a teacher's p and a student's q over the last axis, from log-probabilities.

    - ``forward``: ``KL(p || q)``, which covers all that the teacher says.
    - ``reverse``: ``KL(q || p)``, which avoids what the teacher does not say.
    - ``jensen_shannon``: ``beta KL(p || m) + (1 - beta) KL(q || m)`` with ``m = beta p + (1 - beta) q`` (GKD, arXiv
      2306.13649, eq. 1); at beta = 0.5 symmetric and at most log 2. It vanishes as beta goes to 0 or 1; some code
      switches to KL there; this does not.
    - ``total_variation``: ``0.5 sum |p - q|``, in [0, 1].
    - ``skewed``: ``KL(p || beta p + (1 - beta) q)``, at most ``-log beta`` (DistiLLM, beta 0.1 [code]).
    - ``skewed_reverse``: ``KL(q || (1 - beta) p + beta q)``, likewise.

    Examples:
        >>> p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
        >>> [round(divergence(p, q, kind).item(), 4) for kind in KINDS]
        [0.3681, 0.5108, 0.1017, 0.4, 0.1163, 0.0872]
    """
    check_choice("divergence", kind, KINDS)
    if not 0 < beta < 1:
        raise ValueError(f"expected beta in (0, 1), found {beta}")
    if kind == "forward":
        return kl_divergence(log_p, log_q)
    if kind == "reverse":
        return kl_divergence(log_q, log_p)
    if kind == "total_variation":
        return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    own = beta if kind != "skewed_reverse" else 1 - beta  # the teacher's part in the mixture
    floor = torch.finfo(log_q.dtype).min  # two terms of -inf have no gradient
    mixture = torch.logaddexp(log_p + math.log(own), (log_q + math.log1p(-own)).clamp(min=floor))
    if kind == "jensen_shannon":
        return beta * kl_divergence(log_p, mixture) + (1 - beta) * kl_divergence(log_q, mixture)
    return kl_divergence(log_p if kind == "skewed" else log_q, mixture)


def standardised(logits: Tensor) -> Tensor:
    """Logits ``(B, C)`` of mean 0 and standard deviation 1 over the classes (arXiv 2403.01427) [code].

    So neither network's scale counts. It expects finite logits. Of two classes only their order is left: a ValueError.
    """
    if logits.shape[-1] < 3:
        found = f"found {logits.shape[-1]}: of two only their order is left"
        raise ValueError(f"expected at least 3 classes with standardised logits, {found}")
    return (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-7)


def normalised_kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, y: Tensor, gamma: float = 1.5, temperature: float = 1.0
) -> Tensor:
    """Normalised distillation of each sample (NKD, arXiv 2303.13005) [code]; a missing label adds 0.

    ``-p^T_y log p^S_y - gamma T^2 sum_{c != y} q^T_c log q^S_c``: the first part at temperature 1; q, the distribution
    over the other classes, at T. It is a cross-entropy, so it is not 0 where both networks say the same. Where the
    teacher rules all other classes out, the second part is 0 [ours].
    """
    at = y.where(y != UNLABELED, 0)
    target = teacher_logits.softmax(-1).gather(-1, at.unsqueeze(-1)).squeeze(-1) * cross_entropy(student_logits, at)
    z, t = (x.div(temperature).scatter(-1, at.unsqueeze(-1), -torch.inf) for x in (student_logits, teacher_logits))
    others = cross_entropy(z, t.softmax(-1).masked_fill(t.isneginf().all(-1, keepdim=True), 0))
    return (target + gamma * temperature**2 * others) * (y != UNLABELED)


def correlation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 minus Pearson's correlation over the last axis, in [0, 2] (DIST, arXiv 2205.10536) [code].

    Of probabilities ``(B, C)`` it is DIST's inter-class part, a number a sample; of their transpose the intra-class
    part, a number a class. Where either is constant it is 1, without a gradient.
    """
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (student, teacher))
    norms = student.square().sum(-1).clamp(min=TINY).sqrt() * teacher.square().sum(-1).clamp(min=TINY).sqrt()
    return 1 - (student * teacher).sum(-1) / (norms + 1e-8)
