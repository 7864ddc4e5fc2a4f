"""What is learned from labels that may be wrong by terms that keep something: a channel, or state by sample."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_kd.data.labels import check_matrix
from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.data.table import SampleTable, process
from lit_kd.losses import corrected_cross_entropy, cross_entropy, early_learning, overparameterized_loss
from lit_kd.terms.base import Term
from lit_kd.terms.labels import LabelTerm
from lit_kd.types import UNLABELED, Batch, Outputs, full, index_of


class ForwardCorrection(LabelTerm):
    """Forward correction (arXiv 1609.03683): the student's output, as the label noise would change it [text].

    The loss is ``-log sum_i T[i, y] p_i``. T can be estimated without trusted rows, see
    `lit_kd.trust.transition.anchor_transition`.

    Args:
        matrix: T, rows of C probabilities: entry ``[i][j]`` is P(given label = j | true label = i).
        weight: A constant factor.
    """

    matrix: Tensor

    def __init__(self, matrix: Sequence[Sequence[float]] | Tensor, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.register_buffer("matrix", torch.from_numpy(check_matrix(matrix, len(matrix))).float(), persistent=False)

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """`lit_kd.losses.corrected_cross_entropy`; 0 where the label is missing."""
        if y.is_floating_point() or logits.shape[-1] != len(self.matrix):
            expected = f"{len(self.matrix)} logits, one a row of the matrix, and labels of int64"
            raise ValueError(f"expected {expected}, found {logits.shape[-1]} logits and labels of {y.dtype}")
        labelled = y != UNLABELED
        return corrected_cross_entropy(logits, self.matrix.T[y.where(labelled, 0)]) * labelled


class RowTerm(Term):
    """A term of the label with columns of its own."""

    reads_teacher = False
    keeps_rows = True
    tasks = ("classification",)
    table: SampleTable

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Learn the number of classes."""
        self.classes = student.logits.shape[-1]

    def start(self, table: SampleTable, labels: Tensor) -> None:
        """Know the table; overrides add columns."""
        self.table = table


class ELR(RowTerm):
    """Early-learning regularisation (arXiv 2007.00151) [code]: ``CE + strength log(1 - <q, p>)``.

    q is a running mean of what the student said of the sample. It holds this step's p before the loss is taken, without
    gradient, as in the authors' code. A row without a label has the second part alone [ours]. The authors train 120
    epochs or more.

    Args:
        decay: Of the running mean, in [0, 1); 0.7 on CIFAR-10 and 0.9 on CIFAR-100.
        strength: 3 on CIFAR-10 and 7 on CIFAR-100.
        weight: A constant factor.
    """

    def __init__(self, decay: float = 0.7, strength: float = 3.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if not 0 <= decay < 1 or strength < 0:
            raise ValueError(f"expected a decay in [0, 1) and a strength of at least 0, found {decay} and {strength}")
        self.decay, self.strength = decay, strength

    def start(self, table: SampleTable, labels: Tensor) -> None:
        """The running means, from 0."""
        super().start(table, labels)
        table.add(self.key, torch.zeros(self.classes))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """Cross-entropy, and the pull towards q."""
        pull = early_learning(student.logits, self._mean(student, batch))
        return cross_entropy(full(student.logits), batch.y) + self.strength * pull

    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Keep q."""
        self.table.write(index_of(batch), **{self.key: self._mean(student, batch)})

    def _mean(self, student: Outputs, batch: Batch) -> Tensor:
        """The running mean with what the student says now, ``(B, C)``."""
        p = full(student.logits.detach()).softmax(-1).clamp(1e-4, 1 - 1e-4)
        new = p / p.sum(-1, keepdim=True)
        return self.decay * self.table[self.key][index_of(batch)] + (1 - self.decay) * new


class SOP(RowTerm):
    """Sparse over-parameterisation (arXiv 2202.14026) [code]: each row has an error of its label, learned along.

    The loss is `lit_kd.losses.overparameterized_loss`. After each step u and v take one of plain SGD on its mean over
    the batch, both from random numbers of size 1e-8. They follow the loss without the weights that a method gives to
    rows [ours]. SOP+ with its consistency between views and its balance of classes is not here.

    Args:
        lr_u: Learning rate of u; 10 on CIFAR-10 [memory], 1 on CIFAR-100, 0.1 for asymmetric noise.
        lr_v: Of v; 10, 10 and 100.
        weight: A constant factor.
    """

    def __init__(self, lr_u: float = 10.0, lr_v: float = 10.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if lr_u < 0 or lr_v < 0:
            raise ValueError(f"expected lr_u and lr_v of at least 0, found {lr_u} and {lr_v}")
        self.rates = {"u": lr_u, "v": lr_v}

    def start(self, table: SampleTable, labels: Tensor) -> None:
        """Random u and v: from 0 they would never move."""
        super().start(table, labels)
        draw = torch.Generator().manual_seed(derive_seed(resolve_seed(None), self.key))
        for name, shape in (("u", ()), ("v", (self.classes,))):
            table.add(f"{self.key}_{name}", 1e-8 * torch.randn(table.size, *shape, generator=draw), rows=True)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The loss."""
        return overparameterized_loss(student.logits, batch.y, *self._parts(batch).values())

    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """A step of u and v."""
        parts = {name: part.requires_grad_() for name, part in self._parts(batch).items()}
        with torch.enable_grad():
            total = overparameterized_loss(student.logits.detach(), batch.y, *parts.values()).sum()
        rows = len(batch.y) * process()[1]
        for (name, part), gradient in zip(parts.items(), torch.autograd.grad(total, list(parts.values())), strict=True):
            moved = part.detach() - self.rates[name] / rows * gradient
            self.table.write(index_of(batch), **{f"{self.key}_{name}": moved})

    def _parts(self, batch: Batch) -> dict[str, Tensor]:
        """u, ``(B,)``, and v, ``(B, C)``."""
        return {name: self.table[f"{self.key}_{name}"][index_of(batch)] for name in self.rates}
