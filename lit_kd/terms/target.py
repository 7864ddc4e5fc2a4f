"""What is learned from a distribution that a method keeps for each sample."""

from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.losses import cross_entropy
from lit_kd.terms.base import Term
from lit_kd.types import Batch, Outputs


class SoftTarget(Term):
    """Cross-entropy with a column of the table, ``(N, C)``, in the place of the label.

    Args:
        column: Its name.
        weight: A constant factor.
    """

    reads_teacher = False
    keeps_rows = True
    tasks = ("classification",)

    def __init__(self, column: str = "target", weight: float = 1.0) -> None:
        super().__init__(weight)
        self.column = column

    def start(self, table: SampleTable, labels: Tensor) -> None:
        """Know the table."""
        self.table = table

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(student.logits, self.table[self.column][batch.index])
