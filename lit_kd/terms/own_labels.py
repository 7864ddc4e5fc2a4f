"""What a student learns from soft labels that it makes for itself."""

from torch import Tensor, nn

from lit_kd.losses.own_labels import uskd_loss
from lit_kd.terms.labels import LabelTerm
from lit_kd.types import Batch, Outputs, full


class USKD(LabelTerm):
    """The label, and soft labels of the student's own (USKD, arXiv 2303.13005), see `lit_kd.losses.own_labels`.

    A linear layer that reads an inner layer, averaged over the image, has a say in them, and is trained along.

    Args:
        student_tap: The inner layer: of convolutional networks the last stage but one [code].
        alpha: Weight of the label's class, at least 0; 1 on ImageNet, 0.1 on CIFAR-100 [code].
        beta: Weight of the other classes, at least 0; 0.1 [code].
        mu: Weight of the linear layer's own loss, at least 0; 0.005 and 0.1 [code].
        weight: A constant factor.
    """

    tasks = ("classification",)

    def __init__(
        self, student_tap: str = "layer2", alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005, weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        if min(alpha, beta, mu) < 0:
            raise ValueError(f"expected alpha, beta and mu of at least 0, found {alpha}, {beta} and {mu}")
        self.student_taps, self.alpha, self.beta, self.mu = (student_tap,), alpha, beta, mu

    def features(self, student: Outputs) -> Tensor:
        """Those of the inner layer, ``(B, d)``."""
        found = student.features[self.student_taps[0]]
        return found.mean((2, 3)) if found.dim() == 4 else found

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the linear layer."""
        found = self.features(student)
        if found.dim() != 2:
            layer = f"layer {self.student_taps[0]!r}"
            raise ValueError(f"expected vectors or maps of {layer}, found {tuple(found.shape[1:])}: tap another layer")
        self.auxiliary = nn.Linear(found.shape[1], student.logits.shape[1])

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """All parts, ``(B,)``."""
        said = full(self.auxiliary(self.features(student)))
        return uskd_loss(full(student.logits), said, batch.y, self.alpha, self.beta, self.mu)
