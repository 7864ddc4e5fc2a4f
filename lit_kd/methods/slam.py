"""Student-label mixing."""

from typing import Any, Literal

import torch

from lit_kd.distiller import Distiller
from lit_kd.losses import mean_teacher
from lit_kd.models import Network
from lit_kd.terms import Mixed, Term, Weights
from lit_kd.trust.reliability import MixingRates, mixing_rates
from lit_kd.types import UNLABELED, Batch, Outputs, check_choice
from lit_kd.weightings.checks import require_trusted
from lit_kd.weightings.mean_teacher import as_one


class SLaM(Distiller):
    """Student-label mixing (SLaM, arXiv 2302.03806): the student learns what a teacher that errs would make of it.

    On rows without a label the student's output is mixed, as far as the teacher errs there, with the teacher's first k
    classes, and the mix predicts the teacher's label; on rows with one the output itself predicts it. The trained
    student predicts without mixing. How often the teacher is right at a margin, alpha, and how many of its classes hold
    the true one, k, are estimated once, on the meta split, see `lit_kd.trust.reliability.mixing_rates`. Needs a data
    module of `lit_kd.data` with a meta split that the teacher was not trained on.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list, whose mean probabilities count: modules or checkpoint paths.
        labels: The teacher's labels: its most probable class, or its probabilities, at temperature 1.
        normalise: Share the teacher's mistakes out among its other k - 1 classes. The paper gives each the whole
            [text].
        lower_bound: Least alpha, in [0, 1]: where alpha is 0.5 and k is 2, a hard label teaches nothing.
        **base: See `lit_kd.Distiller`.
    """

    num_sources = 1
    tasks = ("classification",)

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
        if not 0 <= lower_bound <= 1:
            raise ValueError(f"expected a lower_bound in [0, 1], of a probability; found {lower_bound}")
        check_choice("labels", labels, ("hard", "soft"))
        self.hard = labels == "hard"
        self.normalise = normalise
        self.lower_bound = lower_bound
        self.rates: MixingRates | None = None

    def default_term(self) -> Term:
        """The mixed output with the teacher's label."""
        return Mixed(self.hard, self.normalise)

    def on_fit_start(self) -> None:
        """Refuse data without trusted rows."""
        super().on_fit_start()
        require_trusted(self)
        self.rates = None  # the teacher, or the data, may be another

    def prepare_epoch(self) -> None:
        """Before the first one: where the teacher errs, on the meta rows."""
        if self.rates is None:
            meta = self.predict_rows(self.data.parts.meta_rows())
            self.rates = mixing_rates(mean_teacher([t.logits for t in meta.teachers]), meta.y, self.lower_bound)
            for term in self.terms or ():
                if isinstance(term, Mixed):
                    term.rates = self.rates

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """The mean of the teachers' probabilities."""
        return [as_one(teachers)]

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The label, or where there is none the teacher."""
        missing = (batch.y == UNLABELED).float()
        return torch.stack([torch.ones_like(missing), missing], dim=1)
