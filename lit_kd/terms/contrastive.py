"""What is learned from a teacher's embedding of a sample against those of other samples."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.data.table import SampleTable, all_sum, process
from lit_kd.losses import contrastive_loss
from lit_kd.terms.base import Term
from lit_kd.types import PENULTIMATE, UNLABELED, Batch, Outputs


class Contrastive(Term):
    """Contrastive representation distillation (CRD, arXiv 1910.10699) [code].

    Student and teacher are embedded by linear layers that are trained along. A memory of both embeddings by sample
    gives the counterpart of each sample and its negatives, rows of other classes, drawn with replacement [ours]; a row
    without a label has any other rows for negatives. Where labels are wrong, some negatives are false.

    Args:
        student_tap: A layer of the student, see `lit_kd.models.taps.Tapped`.
        teacher_tap: A layer of the teacher.
        size: Of the embeddings.
        negatives: K, for each sample. 16384 in the authors' code; fewer cost less [ours].
        temperature: Of the scores.
        momentum: Of the memory.
        relax: Whether the positive is a random row of the sample's class, and not the sample itself.
        weight: A constant factor; 0.8 in the authors' code.
    """

    reads_features = True
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
        super().__init__(weight)
        if size < 1 or negatives < 1 or not temperature > 0 or not 0 <= momentum < 1:
            raise ValueError(
                "expected size and negatives of at least 1, a temperature above 0 and a momentum in [0, 1), found "
                f"{size}, {negatives}, {temperature}, {momentum}"
            )
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.size = size
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.relax = relax
        self.embed_student: nn.Module = nn.Identity()
        self.embed_teacher: nn.Module = nn.Identity()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the embeddings."""
        assert teacher is not None
        widths = student.features[self.student_taps[0]][0].numel(), teacher.features[self.teacher_taps[0]][0].numel()
        self.embed_student, self.embed_teacher = (nn.Linear(width, self.size) for width in widths)

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
            rows = memory[torch.cat([positive.unsqueeze(1), negative], dim=1)]
            scores = (torch.einsum("bd,bkd->bk", one, rows) / self.temperature).exp()
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
        assert batch.index is not None
        for one, whose in zip(self._embeddings(student, teacher), ("student", "teacher"), strict=True):
            name = f"{self.key}_{whose}"
            moved = self.momentum * self.table[name][batch.index] + (1 - self.momentum) * one
            self.table.exchange(batch.index, **{name: F.normalize(moved)})
        self.table.shared[f"{self.key}_steps"] += 1

    def _embeddings(self, student: Outputs, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        features = student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]
        layers = self.embed_student, self.embed_teacher
        one, other = (F.normalize(layer(f.flatten(1))) for layer, f in zip(layers, features, strict=True))
        return one, other

    def _partners(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The rows of the positive ``(B,)`` and the negatives ``(B, K)``: the same however many processes there are."""
        if batch.index is None:
            raise ValueError("expected batches with sample indices, (x, y, index), for a memory; found one without")
        index = batch.index.cpu()
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
        return positive.to(batch.index.device), negative.to(batch.index.device)
