"""Losses on logits ``(B, C)``, and the targets that they compare with."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.losses.ensemble import median_teacher
from lit_kd.types import UNLABELED

Average = Literal["probabilities", "logits", "median"]


def cross_entropy(
    logits: Tensor, y: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each sample; 0 where the label is missing.

    Labels are ``(B,)``, in ``[0, C)`` or `UNLABELED`; or floating soft labels ``(B, C)``, a missing one all zeros.
    Smoothing shares this part of a label out among all C classes; class weights are ``(C,)``.

    Examples:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, UNLABELED]))
        tensor([1.3863, 0.0000])
    """
    if y.is_floating_point():
        y = torch.lerp(y, y.mean(-1, keepdim=True).expand_as(y), label_smoothing)
        y = y if class_weights is None else y * class_weights
        return -(y * logits.log_softmax(-1).masked_fill(y == 0, 0)).sum(-1)
    options: dict[str, Any] = {"ignore_index": UNLABELED, "label_smoothing": label_smoothing}
    return F.cross_entropy(logits, y, class_weights, reduction="none", **options)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``KL(p || q) = sum_c p_c (log p_c - log q_c)`` over the last axis, from log-probabilities; ``0 log 0 = 0``."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float | Tensor = 1.0,
    weight: float | Tensor = 1.0,
) -> Tensor:
    """Distillation loss of each sample (Hinton et al., 2015, the paper's own): ``T^2 KL(p^T || p^S)``.

    Both distributions are softened, ``softmax(logits / T)``; the factor ``T^2`` makes the size of the gradient
    independent of T. A teacher's logit of -inf rules the class out. The weight is a number or ``(B,)``.

    Examples:
        >>> kd_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log())
        tensor([0.1308])
    """
    student, teacher = (F.log_softmax(logits / temperature, dim=-1) for logits in (student_logits, teacher_logits))
    return weight * temperature**2 * kl_divergence(teacher, student)


def bernoulli_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy of each sample, the mean over its C labels, which are 0, 1 or `UNLABELED`, ``(B, C)``.

    A missing label adds 0.

    Examples:
        >>> bernoulli_cross_entropy(torch.zeros(1, 4), torch.tensor([[1, 0, UNLABELED, UNLABELED]]))
        tensor([0.3466])
    """
    loss = -F.logsigmoid(torch.where(y == 1, logits, -logits))
    return loss.masked_fill(y == UNLABELED, 0).mean(-1)


def bernoulli_kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """For several labels a sample: ``T^2`` times the mean over classes of ``KL(sigmoid(t / T) || sigmoid(z / T))``."""
    teacher, student = (
        F.logsigmoid(torch.stack([logits, -logits], dim=-1) / temperature)
        for logits in (teacher_logits, student_logits)
    )
    return temperature**2 * kl_divergence(teacher, student).mean(-1)


def decoupled_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    y: Tensor,
    alpha: float = 1.0,
    beta: float | Tensor = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled distillation of each sample (DKD, arXiv 2203.08679): ``T^2 (alpha TCKD + beta NCKD)`` [code].

    With softened probabilities p, TCKD is the divergence of ``(p_y, 1 - p_y)``, the label's class against the others;
    NCKD that of the distribution over the others, 0 where the teacher rules all of them out [ours]. ``alpha = 1,
    beta = 1 - p^T_y`` gives `kd_loss` [derived], and so does a missing label [ours]. Labels are ``(B,)``, beta is a
    number or ``(B,)``.

    Examples:
        >>> decoupled_kd_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), torch.tensor([1]), temperature=1.0)
        tensor([0.1308])
    """
    labelled = y != UNLABELED
    is_label = F.one_hot(y.where(labelled, 0), student_logits.shape[-1]).bool()
    certain = teacher_logits.masked_fill(is_label, -torch.inf).isneginf().all(-1, keepdim=True)
    whole, binary, others = [], [], []
    for logits in (teacher_logits / temperature, student_logits / temperature):
        log_p = logits.log_softmax(-1)
        rest = log_p.masked_fill(is_label, -torch.inf).logsumexp(-1)  # log(1 - p_y) has no digits where p_y is near 1
        whole.append(log_p)
        binary.append(torch.stack([log_p.masked_fill(~is_label, 0).sum(-1), rest], dim=-1))
        # nothing is left to compare where the teacher is certain: any equal logits do
        others.append(logits.masked_fill(certain, 0).masked_fill(is_label, -torch.inf).log_softmax(-1))
    decoupled = alpha * kl_divergence(*binary) + beta * kl_divergence(*others)
    return temperature**2 * decoupled.where(labelled, kl_divergence(*whole))


def mean_teacher(teachers: Sequence[Tensor], temperature: float = 1.0, of: Average = "probabilities") -> Tensor:
    """The logits of one teacher in place of several, for `kd_loss` at this temperature.

    With ``of="probabilities"`` its softened distribution is the mean of theirs, ``mean_k softmax(t_k / T)``: the loss
    has the gradient of the mean of the K losses [derived]. With ``of="logits"`` its logits are the mean of theirs, so a
    teacher that is very sure outvotes the others. ``of="median"``: see `lit_kd.losses.median_teacher`. A single teacher
    stays as it is.
    """
    if len(teachers) == 1:
        return teachers[0]
    if of == "median":
        return median_teacher(teachers, temperature)
    logits = torch.stack(list(teachers))
    if of == "logits":
        return logits.mean(0)
    # the logarithm of the mean but for a constant, which no softmax sees
    return temperature * F.log_softmax(logits / temperature, dim=-1).logsumexp(0)


def teacher_labels(logits: Tensor, hard: bool) -> Tensor:
    """What a teacher says of each row, as a distribution ``(B, C)``: its most probable class, or its probabilities."""
    probabilities = logits.softmax(-1)
    return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(probabilities) if hard else probabilities


def slam_mix(probabilities: Tensor, top_mask: Tensor, alpha: Tensor, normalise: bool = False) -> Tensor:
    """The student's output as a teacher that errs would repeat it: student-label mixing (SLaM, arXiv 2302.03806).

    ``mix = alpha f + (1 - alpha) (1 - f) * top`` [text]: with probability alpha the teacher is right, else it says one
    of the other classes among its first k. Takes the student's f, a mask of these classes, bool, ``(B, C)``, and alpha
    ``(B,)``. To ``normalise`` is to divide the second part by k - 1, which is right if the teacher errs uniformly: a
    student sure of one of the k classes has a mix of mass 1 [derived]. The paper does not [text]; mass can exceed 1.

    Examples:
        >>> f, top = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[True, True, True, False]])
        >>> slam_mix(f, top, torch.tensor([0.6]), normalise=True)
        tensor([[0.6000, 0.2000, 0.2000, 0.0000]])
    """
    alpha = alpha.unsqueeze(-1)
    others = (1 - alpha) * (1 - probabilities) * top_mask
    if normalise:
        others = others / (top_mask.sum(-1, keepdim=True) - 1).clamp(min=1)
    return alpha * probabilities + others


def slam_loss(mix: Tensor, teacher: Tensor, eps: float = 1e-7) -> Tensor:
    """Cross-entropy of the teacher's labels, distributions ``(B, C)``, with the output of `slam_mix`, at least eps.

    It is below 0 where the mass of the mix exceeds 1, which is no error.
    """
    return -(teacher * mix.clamp(min=eps).log()).sum(-1)


def contradicts(teacher: Tensor, y: Tensor) -> Tensor:
    """Where a teacher's logits or probabilities name another class than the label, if there is one, bool ``(B,)``."""
    return (teacher.argmax(-1) != y) & (y != UNLABELED)


def revise_labels(teacher_probabilities: Tensor, y: Tensor, eta: float = 0.8) -> Tensor:
    """Label Revision (arXiv 2404.03693): a teacher's probabilities, mixed with the label where they contradict it.

    There ``p = beta p^T + (1 - beta) e(y)`` with ``beta = eta / (p^T_max - p^T_y + 1)`` [text]: the label's class comes
    out on top by ``1 - eta`` [derived]. Elsewhere, and where the label is missing, they stay as they are; ``(B, C)``.

    Examples:
        >>> revise_labels(torch.tensor([[0.2, 0.7, 0.1]]), torch.tensor([0]))
        tensor([[0.5733, 0.3733, 0.0533]])
    """
    if not 0 <= eta < 1:
        raise ValueError(f"expected eta in [0, 1), below which the label's class comes out on top; found {eta}")
    of_label = y.where(y != UNLABELED, 0).unsqueeze(-1)
    lead = teacher_probabilities.amax(-1, keepdim=True) - teacher_probabilities.gather(-1, of_label)
    beta = eta / (lead + 1)
    label = torch.zeros_like(teacher_probabilities).scatter(-1, of_label, 1.0)
    revised = beta * teacher_probabilities + (1 - beta) * label
    return torch.where(contradicts(teacher_probabilities, y).unsqueeze(-1), revised, teacher_probabilities)


def revised_teacher(teacher_logits: Tensor, y: Tensor, eta: float, temperature: float = 1.0) -> Tensor:
    """The logits ``(B, C)`` whose probabilities, softened at this temperature, are those of `revise_labels` [ours].

    The teacher's own where it does not contradict the label.
    """
    revised = revise_labels(F.softmax(teacher_logits / temperature, -1), y, eta)
    # where a probability is 0 in float32, any logit that is low enough will do
    logits = temperature * revised.clamp(min=torch.finfo(revised.dtype).tiny).log()
    return torch.where(contradicts(teacher_logits, y).unsqueeze(-1), logits, teacher_logits)
