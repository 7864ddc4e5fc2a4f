"""ALM-KD: for every sample, learn how much to listen to the teacher and to the label."""

from typing import Any, Literal

import torch

from lit_kd.data.table import SampleTable
from lit_kd.distiller.optimisation import likely_length
from lit_kd.models import Network
from lit_kd.terms import Term, TermSet, Weighed, Weights
from lit_kd.types import Batch, Outputs, check_choice, index_of
from lit_kd.weightings import Amal, Paper, Robust, Rule
from lit_kd.weightings.base import TellRule, has_label, without_silent
from lit_kd.weightings.checks import SayIfUnheard, check_maker, check_training, own_rule, warn_of_rule
from lit_kd.weightings.lookahead import KeepMetaRows, LastLayer, LookAhead, Seen, Unneeded
from lit_kd.weightings.manual import ManualOptimisation
from lit_kd.weightings.mean_teacher import check_eta, revised
from lit_kd.weightings.sample_file import starting_weights
from lit_kd.weightings.selection import Selective
from lit_kd.weightings.whole_network import Central, Exact

RULES: dict[str, type[Rule]] = {"robust": Robust, "paper": Paper, "amal": Amal}
LOOK_AHEADS: dict[str, type[LookAhead]] = {"last_layer": LastLayer, "exact": Exact, "central": Central}


class ALMKD(ManualOptimisation, Selective):
    """Adaptive loss mixing (arXiv 2202.03250): weights of label and teachers by sample, learned on a meta split.

    The loss of sample i is ``lam_i0 label_i + sum_k lam_ik term_ik``. A rule finds the weights: ours from what student,
    label and teachers say of a row; the published ones ask in each step how the loss on trusted meta rows would change
    with them. Needs a data module of `lit_kd.data`, or yours in `DistillationDataModule`. See docs/methods/almkd.md.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths. An empty list: none, with the rule ``"robust"``.
        rule: ``"robust"`` (ours), ``"paper"`` or ``"amal"`` (published), or a `lit_kd.weightings.Rule` of your own.
        meta_gradient: Of published rules, at the ``"last_layer"`` [code], which must be linear, or through all layers:
            ``"exact"`` [derived], or ``"central"``, for operators without forward-mode differentiation.
        temperature: T > 0 of the default term, dimensionless.
        start_weights: The first weights: the teachers' share in [0, 1], or a file, see `weightings.sample_file`.
        revise: Eta of Label Revision, in [0, 1): see `lit_kd.losses.revised_teacher`.
        **base: See `lit_kd.weightings.manual`, `lit_kd.weightings.selection` and `lit_kd.Distiller`.
    """

    by_sample = True
    look_ahead: LookAhead  # there in training, as are table and terms
    table: SampleTable
    terms: TermSet

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        rule: Literal["robust", "paper", "amal"] | Rule = "robust",
        meta_gradient: Literal["last_layer", "exact", "central"] = "last_layer",
        temperature: float = 4.0,
        start_weights: float | str | None = None,
        revise: float | None = None,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        check_eta(revise, self.task)
        check_choice("meta_gradient", meta_gradient, LOOK_AHEADS)
        self.rule = own_rule(rule, RULES)
        self.meta_gradient, self.temperature, self.start_weights = meta_gradient, temperature, start_weights
        self.trains_on_meta, self.needs_meta, self.revise = self.rule.trains_on_meta, self.rule.looks_ahead, revise
        self.needs_teacher = self.needs_teacher and (teacher != [] or self.rule.needs_teacher)
        self._ahead = LOOK_AHEADS[meta_gradient] if self.needs_meta else Unneeded
        self.student_taps = self._ahead.taps

    def default_term(self) -> Term:
        """KL divergence."""
        return self.task.teacher_term(self.temperature)

    def configure_callbacks(self) -> Any:
        """What tells the rule of validations, too, keeps meta rows, and tells of a rule whose time never came."""
        own = [SayIfUnheard(), KeepMetaRows(), *([TellRule()] if self.rule.wants_validation else [])]
        return [*super().configure_callbacks(), *own]

    def setup(self, stage: str) -> None:
        """Refuse data, rules and terms that would be wrong."""
        super().setup(stage)
        if stage == "fit":
            check_training(self)
            self.look_ahead, self._checked = self._ahead(self), False

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """The rule's columns."""
        data, epochs, teachers = self.data, likely_length(self), len(self.teachers)
        check_maker(self.rule, table, fresh)
        self.rule.start(table, teachers, data.trusted, data.labels, epochs)
        if fresh and self.start_weights is not None:
            table["weights"][: data.train_size] = starting_weights(self.start_weights, teachers, data)
        table["weights"] = without_silent(table["weights"], self.teachers.known)
        table["weights"][~has_label(data.labels), 0] = 0  # nothing to listen to
        warn_of_rule(self, epochs)

    def on_train_epoch_start(self) -> None:
        """As in the base; the look-ahead starts anew, as it does for a run that is resumed here."""
        super().on_train_epoch_start()
        self.look_ahead = self._ahead(self)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The meta-step, then the student's step with the table's weights."""
        if self.needs_meta:
            self.meta_batch, batch = self.unpack(batch["meta"]), batch["train"]
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return self.update(loss, batch_idx)

    def prepare_batch(self, batch: Batch) -> Batch:
        """As in the base; then the look-ahead keeps what the student's pass depends on, random numbers too."""
        batch = super().prepare_batch(batch)
        self.look_ahead.before()
        return batch

    def weighed(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> Weighed:
        """As in the base, after the meta-step; with an epoch's last batch the rule renews the table."""
        batch = self.rule.revise(self.table, batch)
        sources = self.sources(student, teachers, batch)
        losses, extra = self.terms(student, sources, batch)
        losses = self.of_distilled(losses, batch)
        self.meta_step(Seen(batch, student, sources, losses), teachers)
        weights = self.weigh(student, sources, batch)
        self.terms.update(student, sources, batch)
        if self.trainer.is_last_batch:  # now, so that all checkpoints hold the renewed weights
            self.table.sync()
            with torch.autocast(self.device.type, enabled=False):  # counts are no matter for bfloat16
                self.rule.renew(self.table, self.current_epoch)
        return losses, weights, extra

    @torch.no_grad()
    def meta_step(self, seen: Seen, teachers: list[Outputs]) -> None:
        """Let the rule see the batch and, if it looks ahead, how the terms agree with the validation gradient."""
        if not self._checked:
            self.look_ahead.check(seen)
            self._checked = True
        if self.rule.active(self.current_epoch):
            # float32: a look-ahead is a small change of the weights, which bfloat16 cannot hold
            with torch.autocast(self.device.type, enabled=False):
                self.rule.observe(self.table, self.look_ahead.step(seen, teachers))

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """The teachers, revised by the label."""
        return revised(teachers, batch.y, self.revise, self.terms.temperature)

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The table's."""
        return self.rule.weights(self.table, index_of(batch))
