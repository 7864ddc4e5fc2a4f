"""A teacher that is trained along."""

from torch import Tensor, nn

from lit_kd.losses import by_sample, cross_entropy, divergence
from lit_kd.terms.base import Term
from lit_kd.types import PENULTIMATE, Batch, Outputs, full


class OnlineTeacher(Term):
    """KL to a teacher with a trained adapter, and what trains the adapter (online distillation, arXiv 2409.12512).

    The adapter reads the frozen teacher's last features and adds to its logits; at first it adds 0. The student learns
    ``T^2 KL(p^T || p^S)``, the adapter ``CE(p^T) + T^2 KL(p^S || p^T)``; no gradient flows from one into the other
    [ours]. A missing label trains no adapter by CE.

    Args:
        width: Of the adapter's hidden layer; ``None``: the teacher itself has an adapter, and its logits a gradient.
        temperature: T > 0 of both KL, dimensionless.
        weight: A constant factor.
    """

    tasks = ("classification", "tokens")
    teacher_taps: tuple[str, ...] = (PENULTIMATE,)

    def __init__(self, width: int | None = 16, temperature: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(weight)
        if (width is not None and width < 1) or not temperature > 0:
            raise ValueError(f"expected a width from 1 and a temperature above 0, found {width} and {temperature}")
        self.width, self.temperature = width, temperature
        self.adapter: nn.Module | None = None
        if width is None:
            self.teacher_taps = ()

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the adapter, whose last layer is 0."""
        if self.width is None:
            return
        assert teacher is not None
        features, logits = teacher.features[PENULTIMATE], teacher.logits
        last = nn.Linear(self.width, logits.shape[-1])
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.adapter = nn.Sequential(nn.Linear(features.shape[-1], self.width), nn.ReLU(), last).to(logits.device)

    def adapted(self, teacher: Outputs) -> Tensor:
        """The teacher's logits with what the adapter adds."""
        if self.width is None:
            return full(teacher.logits)
        assert self.adapter is not None
        return full(teacher.logits) + full(self.adapter(full(teacher.features[PENULTIMATE])))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The sum of the three."""
        assert teacher is not None
        return by_sample(self.loss, batch.y, full(student.logits), self.adapted(teacher))

    def loss(self, student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
        """Of rows, ``(B,)``, from logits ``(B, C)``."""
        q, p = ((logits / self.temperature).log_softmax(-1) for logits in (student, teacher))
        divergences = divergence(p.detach(), q) + divergence(q.detach(), p)
        return self.temperature**2 * divergences + cross_entropy(teacher, y)
