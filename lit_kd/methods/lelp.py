"""Learning embedding linear projections: subclasses for distillation of few classes."""

from typing import Any

import torch

from lit_kd.data.seeds import seeded
from lit_kd.distiller import Distiller
from lit_kd.models import Network, last_linear
from lit_kd.models.subclasses import Subclassed
from lit_kd.terms import Subclasses, Term, Weights
from lit_kd.types import PENULTIMATE, Batch, Outputs


class LELP(Distiller):
    """LELP (arXiv 2409.20449): the student learns subclasses that the teacher's features have within each class.

    Where there are few classes, a teacher's probabilities tell little. Before the first epoch, each class is divided by
    linear projections of the teacher's penultimate features, see `lit_kd.terms.Subclasses`. Labels are not used. The
    student's last layer gets S outputs for each class; what is exported, and predicts, sums their probabilities.

    Needs a data module of `lit_kd.data`, whose training rows are asked of the teacher once.

    Args:
        student: The network to train, a module, whose last layer is replaced, or a name.
        teacher: One teacher: a module or a checkpoint path.
        subclasses: S, the outputs of each class, at least 1; 1 is KD at temperature 1; 4 to 10 [ours].
        **base: See `lit_kd.Distiller`.
    """

    num_sources = 1
    settled = ("term", "label_term")
    tasks = ("classification",)
    student: Subclassed

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        subclasses: int = 4,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if len(self._teacher_specs) > 1:
            raise ValueError(f"expected one teacher, whose classes are divided, found {len(self._teacher_specs)}")
        if subclasses < 1:
            raise ValueError(f"expected at least 1 subclass of each class, found {subclasses}")
        self.check_head("student", self.student)
        self.subclasses = subclasses
        self.student = Subclassed(self.student, subclasses)

    def check_head(self, who: str, network: torch.nn.Module) -> torch.nn.Linear:
        """The network's last linear layer; a ValueError unless it has one output for each class."""
        path, head = last_linear(network)
        if head.out_features != self.num_classes:
            raise ValueError(
                f"expected that {path!r}, the {who}'s last linear layer, has {self.num_classes} outputs, one for each "
                f"class, found {head.out_features}: pass another network, or lit_kd.models.adapt(net, head=...)"
            )
        return head

    def default_term(self) -> Term:
        """The divergence over subclasses."""
        return Subclasses(last_linear(self.student)[0], self.subclasses)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The teacher alone."""
        return [0.0, 1.0]

    def prepare_epoch(self) -> None:
        """Divide the classes, unless a checkpoint had done so."""
        assert self.terms is not None
        [term] = self.terms.each
        assert isinstance(term, Subclasses)
        if term.fitted:
            return
        head = self.check_head("teacher", self.teachers.models[0]).weight
        teacher = self.predict_rows(self.data.parts.rows(torch.arange(self.data.train_size))).teachers[0]
        with seeded("rotation of subclasses"):
            term.fit(teacher.features[PENULTIMATE], teacher.logits, head)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Who rebuilds the student from its name must know S."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["composite"] = self.student.spec
