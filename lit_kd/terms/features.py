"""What is learned from a teacher's inner layers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.data.table import SampleTable, all_sum, process
from lit_kd.losses import contrastive_loss, hint_loss
from lit_kd.losses.maps import pooled_alike
from lit_kd.terms.base import SAMPLES, Term
from lit_kd.types import PENULTIMATE, UNLABELED, Batch, Outputs, full, index_of

WHOLE = 16
"""At up to so many rows a negative, scores of the whole memory are cheaper than copies of some of its rows."""


class FeatureTerm(Term):
    """A function of one layer's features of the student and one's of the teacher.

    It does not know which tokens are padding, so it is not for them.
    """

    tasks = (*SAMPLES, "dense")

    def __init__(self, student_tap: str, teacher_tap: str, weight: float) -> None:
        super().__init__(weight)
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)

    def features(self, student: Outputs, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        """Those of student and teacher, ``(B, ...)``."""
        assert teacher is not None
        return student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]


class Hint(FeatureTerm):
    """The mean squared error between the student's features, through an adapter, and the teacher's (FitNet, 1412.6550).

    The adapter follows from the shapes [code]: for maps a convolution, of stride 2 where the student's map is twice as
    large, transposed where it is half as large, then BatchNorm and ReLU; for vectors and sequences of tokens a linear
    layer [ours], as a ReLU could not reach negative features.

    Args:
        student_tap: A layer of the student, see `lit_kd.models.taps.Tapped`.
        teacher_tap: A layer of the teacher.
        adapt: Whether there is an adapter. Without one, larger maps are pooled to the size of the smaller.
        weight: A constant factor.
    """

    def __init__(
        self, student_tap: str = PENULTIMATE, teacher_tap: str = PENULTIMATE, adapt: bool = True, weight: float = 1.0
    ) -> None:
        super().__init__(student_tap, teacher_tap, weight)
        self.adapter: nn.Module | None = None
        self.adapt = adapt

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the adapter."""
        if self.adapt:
            s, t = self.features(student, teacher)
            self.adapter = adapter(tuple(s.shape[1:]), tuple(t.shape[1:]))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The mean over all elements of a sample's features, ``(B,)``."""
        s, t = self.features(student, teacher)
        if self.adapter is not None:
            s = self.adapter(s)
        elif s.dim() == 4 and t.dim() == 4:
            s, t = pooled_alike(s, t)
        return hint_loss(s, t)


def adapter(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    """The layers from features of one shape to those of another, see `Hint`; a ValueError if there are none.

    Shapes are of one sample: ``(d,)``, ``(tokens, d)`` or ``(c, h, w)``.
    """
    if len(student) == len(teacher) == 3:
        (c, h, w), (channels, height, width) = student, teacher
        conv: nn.Module | None = None
        if (h, w) == (2 * height, 2 * width):
            conv = nn.Conv2d(c, channels, 3, stride=2, padding=1, bias=False)
        elif (2 * h, 2 * w) == (height, width):
            conv = nn.ConvTranspose2d(c, channels, 4, stride=2, padding=1, bias=False)
        elif h >= height and w >= width:
            conv = nn.Conv2d(c, channels, (1 + h - height, 1 + w - width), bias=False)
        if conv is not None:
            return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
    elif len(student) == len(teacher) and student[:-1] == teacher[:-1]:
        return nn.Linear(student[-1], teacher[-1])
    raise ValueError(
        "expected features that an adapter can bring together, both (d,), (tokens, d) or (c, h, w), found "
        f"{student} of the student and {teacher} of the teacher: tap other layers"
    )


def gives_logits(said: Tensor, logits: Tensor, bias: bool = True) -> bool:
    """Whether what a linear layer says of features is the logits ``(B, C)``; of maps, the mean over the image counts.

    It is ``(B, C)`` or ``(B, C, h, w)``. The tolerance is 2 % of how far logits differ between rows, so that what rows
    share hides nothing. Without `bias`, a difference that all rows share is that bias. A single row is taken to fit.
    """
    said = full(said).mean((2, 3)) if said.dim() == 4 else full(said)
    if said.shape != logits.shape or len(logits) == 1:
        return said.shape == logits.shape
    apart, rounding = full(logits) - said, 4 * torch.finfo(logits.dtype).eps * logits.abs().max()
    allowed = 0.02 * (logits - logits[0]).abs().max() + rounding
    return bool(((apart if bias else apart - apart[0]).abs() <= allowed).all())


class Contrastive(FeatureTerm):
    """Contrastive representation distillation (CRD, arXiv 1910.10699) [code].

    Student and teacher are embedded by linear layers that are trained along. A memory of both embeddings by sample
    gives the counterpart of each sample and its negatives, rows of other classes, drawn with replacement [ours]; a row
    without a label has any other rows for negatives. Where labels are wrong, some negatives are false.

    Args:
        student_tap: A layer of the student, see `lit_kd.models.taps.Tapped`.
        teacher_tap: A layer of the teacher.
        size: Of the embeddings.
        negatives: K, for each sample. 16384 in the authors' code; fewer cost less [ours], and bring a pair less close:
            at a cosine of about 0.07 log(2.2 K) half the pull is left, 0.73 for 16384 and 0.54 for 1024 [derived].
        temperature: Of the scores.
        momentum: Of the memory.
        relax: Whether the positive is a random row of the sample's class, and not the sample itself.
        weight: A constant factor; 0.8 in the authors' code.
    """

    keeps_rows = True
    tasks = ("classification",)

    def __init__(
        self,
        student_tap: str = PENULTIMATE,
        teacher_tap: str = PENULTIMATE,
        size: int = 128,
        negatives: int = 1024,
        temperature: float = 0.07,
        momentum: float = 0.5,
        relax: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_tap, teacher_tap, weight)
        if size < 1 or negatives < 1 or not temperature > 0 or not 0 <= momentum < 1:
            raise ValueError(
                "expected size and negatives of at least 1, a temperature above 0 and a momentum in [0, 1), found "
                f"{size}, {negatives}, {temperature}, {momentum}"
            )
        self.size, self.negatives, self.relax = size, negatives, relax
        self.temperature, self.momentum = temperature, momentum

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the embeddings."""
        s, t = self.features(student, teacher)
        self.embed_student, self.embed_teacher = (nn.Linear(f[0].numel(), self.size) for f in (s, t))

    def start(self, table: SampleTable, labels: Tensor) -> None:
        """Random memories; which rows have which class."""
        draw = torch.Generator().manual_seed(derive_seed(resolve_seed(None), self.key))
        bound = (self.size / 3) ** -0.5
        for whose in ("student", "teacher"):
            memory = bound * (2 * torch.rand(table.size, self.size, generator=draw) - 1)
            table.add(f"{self.key}_{whose}", memory, rows=True)
        table.shared.setdefault(f"{self.key}_steps", torch.tensor(0))
        self.table, self.rows = table, len(labels)
        # rows sorted by class: those of a class lie together, and a row without a label lies alone
        alone = torch.arange(len(labels)) + labels.max() + 1
        groups = labels.where(labels != UNLABELED, alone)
        self._order = groups.argsort(stable=True)
        self._place = self._order.argsort()
        found, counts = groups[self._order].unique_consecutive(return_inverse=True, return_counts=True)[1:]  # type: ignore[no-untyped-call]
        self._first, self._count = (counts.cumsum(0) - counts)[found], counts[found]  # of each place

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The student against the teacher's memory, and the teacher against the student's, ``(B,)``."""
        positive, negative = self._partners(batch)
        total = torch.zeros(len(batch.y), device=batch.y.device)
        for one, other in zip(self._embeddings(student, teacher), ("teacher", "student"), strict=True):
            memory = self.table[f"{self.key}_{other}"]
            partners = torch.cat([positive.unsqueeze(1), negative], dim=1)
            if len(memory) <= WHOLE * partners.shape[1]:
                cosines = (one @ memory.T.clone()).gather(1, partners)  # `update` comes before the backward pass
            else:
                cosines = torch.einsum("bd,bkd->bk", one, memory[partners])
            scores = (cosines / self.temperature).exp()
            name = f"{self.key}_{other}_scale"
            if name not in self.table.shared:  # N times the mean score of the first batch, from then on
                sums = torch.stack([scores.detach().sum(), scores.new_tensor(float(scores.numel()))])
                mean, count = all_sum(sums)
                self.table.shared[name] = self.rows * mean / count
            scores = scores / self.table.shared[name]
            total = total + contrastive_loss(scores[:, 0], scores[:, 1:], self.rows)
        return total

    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Move the memories of the batch's rows towards their embeddings."""
        index = index_of(batch)
        for one, whose in zip(self._embeddings(student, teacher), ("student", "teacher"), strict=True):
            name = f"{self.key}_{whose}"
            moved = self.momentum * self.table[name][index] + (1 - self.momentum) * one
            self.table.exchange(index, **{name: F.normalize(moved)})
        self.table.shared[f"{self.key}_steps"] += 1

    def _embeddings(self, student: Outputs, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        s, t = (f.flatten(1) for f in self.features(student, teacher))
        return F.normalize(self.embed_student(s)), F.normalize(self.embed_teacher(t))

    def _partners(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The rows of the positive ``(B,)`` and the negatives ``(B, K)``: the same however many processes there are."""
        index = index_of(batch).cpu()
        step, (rank, processes) = int(self.table.shared[f"{self.key}_steps"]), process()
        draw = torch.Generator().manual_seed(derive_seed(resolve_seed(None), f"{self.key} {step}"))
        u = torch.rand(len(index) * processes, 1 + self.negatives, generator=draw, dtype=torch.float64)[rank::processes]
        place = self._place[index]
        first, count = self._first[place].unsqueeze(1), self._count[place].unsqueeze(1)
        others = self.rows - count
        if (others < 1).any():
            raise ValueError("expected training rows of at least two classes, found one: there are no negatives")
        negative = (u[:, 1:] * others).long()
        negative = self._order[negative + count * (negative >= first)]
        positive = self._order[(first + (u[:, :1] * count).long()).squeeze(1)] if self.relax else index
        return positive.to(batch.y.device), negative.to(batch.y.device)
