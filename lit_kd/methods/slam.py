"""Student-label mixing."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from lit_kd.distiller.base import Distiller
from lit_kd.distiller.checks import check_meta
from lit_kd.losses import cross_entropy, mean_teacher, slam_loss, slam_mix, teacher_labels
from lit_kd.models import Network
from lit_kd.trust.reliability import MixingRates, class_ranks, margin, mixing_rates
from lit_kd.types import UNLABELED, Batch, Outputs


class SLaM(Distiller):
    """Student-label mixing (SLaM, arXiv 2302.03806): the student learns what a teacher that errs would make of it.

    On rows without a label the student's output is mixed, as far as the teacher errs there, with the teacher's first k
    classes, and the mix predicts the teacher's label; on rows with one the output itself predicts it. At inference
    nothing is mixed. How often the teacher is right at a margin, alpha, and how many of its classes hold the true one,
    k, are estimated once, before the training, on the meta split, of trusted labels: see `lit_kd.trust.reliability.mixing_rates`.

    Needs a data module of `lit_kd.data` with a meta split that the teacher was not trained on.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list, whose mean probabilities count: modules or checkpoint paths.
        labels: The teacher's labels: its most probable class, or its probabilities, at temperature 1.
        normalise: Share the teacher's mistakes out among its other k - 1 classes. The paper gives each the whole
            [text].
        lower_bound: Least alpha, in [0, 1]: where alpha is 0.5 and k is 2, a hard label teaches nothing.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        labels: Literal["hard", "soft"] = "hard",
        normalise: bool = False,
        lower_bound: float = 0.5,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if labels not in ("hard", "soft"):
            raise ValueError(f"expected labels 'hard' or 'soft', found {labels!r}")
        if not 0 <= lower_bound <= 1:
            raise ValueError(f"expected a lower_bound in [0, 1], of a probability; found {lower_bound}")
        self.hard = labels == "hard"
        self.normalise = normalise
        self.lower_bound = lower_bound
        self.rates: MixingRates | None = None
        """What was estimated of the teacher. No checkpoint holds it: it follows from teacher and data."""

    def setup(self, stage: str) -> None:
        """Refuse data without trusted rows."""
        super().setup(stage)
        if stage == "fit":
            self.rates = None  # the teacher, or the data, may be another
            check_meta(self)

    def prepare_epoch(self) -> None:
        """Before the first one: where the teacher errs, on the meta rows."""
        if self.rates is None:
            meta = self.predict_rows(self.data.parts.meta_rows())
            self.rates = mixing_rates(mean_teacher([t.logits for t in meta.teachers]), meta.y, self.lower_bound)

    def distill(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> dict[str, Tensor]:
        """Two terms, ``label`` and ``teacher``."""
        assert self.rates is not None
        teacher = mean_teacher([t.logits for t in teachers]).float()
        at = margin(teacher)
        top = class_ranks(teacher) < self.rates.k(at).unsqueeze(-1)
        mix = slam_mix(student.logits.float().softmax(-1), top, self.rates.alpha(at), self.normalise)
        taught = slam_loss(mix, teacher_labels(teacher, self.hard))
        return {"label": cross_entropy(student.logits, batch.y), "teacher": (batch.y == UNLABELED) * taught}
