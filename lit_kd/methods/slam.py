"""Student-label mixing."""

from typing import Any

from lit_kd.models import Network
from lit_kd.terms import Mixed, Term
from lit_kd.trust.reliability import mixing_rates
from lit_kd.weightings.few_labels import FewLabels


class SLaM(FewLabels):
    """Student-label mixing (SLaM, arXiv 2302.03806): the student learns what a teacher that errs would make of it.

    On rows without a label the student's output is mixed, as far as the teacher errs there, with the teacher's first k
    classes, and the mix predicts the teacher's label; on rows with one the output itself predicts it. The trained
    student predicts without mixing. How often the teacher is right at a margin, alpha, and how many of its classes hold
    the true one, k, are estimated once, on the meta split, see `lit_kd.trust.reliability.mixing_rates`. Needs a data
    module of `lit_kd.data` with a meta split that the teacher was not trained on.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list, whose mean probabilities count: modules or checkpoint paths.
        normalise: Share the teacher's mistakes out among its other k - 1 classes. The paper gives each the whole
            [text].
        lower_bound: Least alpha, in [0, 1]: where alpha is 0.5 and k is 2, a hard label teaches nothing.
        **base: See `lit_kd.weightings.few_labels.FewLabels` and `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        normalise: bool = False,
        lower_bound: float = 0.5,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if not 0 <= lower_bound <= 1:
            raise ValueError(f"expected a lower_bound in [0, 1], of a probability; found {lower_bound}")
        self.normalise, self.lower_bound = normalise, lower_bound

    def default_term(self) -> Term:
        """The mixed output with the teacher's label."""
        return Mixed(self.hard, self.normalise)

    def on_fit_start(self) -> None:
        """Estimate where the teacher errs, on the meta rows."""
        super().on_fit_start()
        _, teacher, y = self.on_meta_rows()
        for term in self.terms or ():
            if isinstance(term, Mixed):
                term.rates = mixing_rates(teacher, y, self.lower_bound)
