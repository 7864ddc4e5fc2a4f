"""Robust Active Distillation: ask a teacher that costs, and may be wrong, about a few rows only."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from lit_kd.data.rows import Indexed
from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.data.table import SampleTable
from lit_kd.distiller import Distiller
from lit_kd.distiller.base import Weights
from lit_kd.distiller.optimisation import updates_per_epoch
from lit_kd.models import Network
from lit_kd.teachers.rows import RowOutputs
from lit_kd.terms import Term
from lit_kd.trust.queries import OF_FEATURES, QueryRule, choose_rows
from lit_kd.types import PENULTIMATE, UNLABELED, Batch, Outputs
from lit_kd.weightings.manual import SHARDED


class RobustActiveDistillation(Distiller):
    """Robust Active Distillation (RAD, arXiv 2210.01213): which rows are worth a question to the teacher?

    Rows without a label are the pool. The training has ``rounds + 1`` stretches of equally many epochs, to within one;
    each but the first begins with ``budget`` questions about rows of the pool, and the student learns from labelled
    rows and all answers so far [the paper's loop]. Each stretch starts from the initial weights, with a new optimizer
    and schedule; answers are soft labels, taken once, without augmentation [ours].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher: a module or a checkpoint path.
        budget: Questions a round, at least 1.
        rounds: How often to ask, at least 1.
        rule: How rows are chosen, see `lit_kd.trust.queries.choose_rows`.
        mistakes: On how many rows of the pool the teacher may be wrong, for the rule ``"rad"``. ``None``: its error
            on the meta split times the size of the pool [text: estimated on a validation set; scaling ours].
        temperature: T > 0 of the answers' loss, dimensionless.
        **base: See `lit_kd.Distiller`.
    """

    needs_table = True

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        budget: int,
        rounds: int,
        rule: QueryRule = "rad",
        mistakes: float | None = None,
        temperature: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if rule not in get_args(QueryRule):
            raise ValueError(f"expected a rule of {list(get_args(QueryRule))}, found {rule!r}")
        if not (budget >= 1 and rounds >= 1 and temperature > 0 and (mistakes is None or mistakes >= 0)):
            raise ValueError(
                "expected budget and rounds of at least 1, a temperature above 0, and mistakes of at least 0 or None; "
                f"found {budget}, {rounds}, {temperature}, {mistakes}"
            )
        self.rule, self.budget, self.rounds = rule, budget, rounds
        self.mistakes, self.temperature = mistakes, temperature
        self.student_taps = (PENULTIMATE,) if rule in OF_FEATURES else ()

    def default_term(self) -> Term:
        """The KL divergence to the answers."""
        return self.task.teacher_term(self.temperature)

    def setup(self, stage: str) -> None:
        """Refuse data, teachers and strategies that do not fit, and forget an earlier training's queries."""
        super().setup(stage)
        if stage != "fit":
            return
        if self.teacher_cache or len(self.teachers) > 1:
            raise ValueError(
                "expected one teacher, and no teacher_cache, which asks about all rows; found "
                f"{len(self.teachers)} and {self.teacher_cache}"
            )
        if isinstance(self.trainer.strategy, SHARDED):
            name = type(self.trainer.strategy).__name__
            raise ValueError(f"each round sets the student back, which {name} shards: use the strategy ddp")
        labels = self.data.labels[: self.data.train_size]
        pool = int((labels == UNLABELED).sum())
        if pool == len(labels) or self.rounds * self.budget > pool:
            raise ValueError(
                f"expected training rows with a label, and at least {self.rounds} x {self.budget} without one to ask "
                f"about, found {len(labels) - pool} and {pool}: set the data's labeled, or lower rounds or budget"
            )
        if self.rule == "rad" and self.mistakes is None:
            self.data.require_meta("the rule rad without mistakes=..., to estimate how often the teacher is wrong")
        self.table = None

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """Column ``query``, as which question a row was asked about or -1; the answers; the weights to start from."""
        table.add("query", torch.tensor(-1))
        plan = torch.tensor([self.budget, *self.stretches()])
        if fresh:
            table.shared["plan"] = plan
            table.shared["soft_labels"] = torch.zeros(self.rounds * self.budget, self.num_classes)
            table.shared |= {f"initial_{name}": v.detach().clone() for name, v in self.student.state_dict().items()}
        elif not torch.equal(table.shared["plan"].cpu(), plan):
            raise ValueError(
                f"expected the checkpoint's budget and stretches, {table.shared['plan'].tolist()}, found "
                f"{plan.tolist()}: keep budget, rounds and max_epochs, or start without the checkpoint"
            )

    def on_fit_start(self) -> None:
        """Let a resumed training have the schedule of its stretch, which the table tells."""
        super().on_fit_start()
        if self._rounds_done():
            self.trainer.strategy.setup_optimizers(self.trainer)

    def stretches(self) -> list[int]:
        """The epochs at which the stretches begin, and the one after the last: ``rounds + 2`` of them."""
        epochs, parts = self.planned_length()[0], self.rounds + 1
        if epochs is None or epochs < parts:
            raise ValueError(f"expected max_epochs of at least {parts}, one for each stretch, found {epochs}")
        return [k * epochs // parts for k in range(parts + 1)]

    @property
    def schedule_length(self) -> int:
        """Of the stretch, which has a schedule of its own."""
        ends, done = self.stretches(), self._rounds_done()
        each, end = 1, ends[-1]
        if self.lr_interval == "step":
            each, end = updates_per_epoch(self), self.planned_length()[1] or 0
        return min(each * ends[done + 1], end) - each * ends[done]

    def prepare_epoch(self) -> None:
        """At the start of a stretch but the first, ask the teacher and start again."""
        assert self.table is not None
        done, shared = self._rounds_done(), self.table.shared
        if done < self.rounds and self.current_epoch >= self.stretches()[done + 1]:
            self._query(self.table, done)
            self.student.load_state_dict({name: shared[f"initial_{name}"] for name in self.student.state_dict()})
            self.trainer.strategy.setup_optimizers(self.trainer)

    def training_rows(self) -> Tensor:
        """Those with a label, and those that the teacher was asked about."""
        return self._known().nonzero().squeeze(1)

    def _asked(self, index: Tensor | slice = slice(None)) -> Tensor:
        """As which question rows were asked about, or -1."""
        assert self.table is not None
        return self.table["query"][index]

    def _known(self) -> Tensor:
        return (self._asked().cpu() >= 0) | (self.data.labels != UNLABELED)

    def _rounds_done(self) -> int:
        return 0 if self.table is None else min(int((self._asked() >= 0).sum()) // self.budget, self.rounds)

    def _outputs_of(self, index: Tensor, teachers: bool) -> RowOutputs:
        """The outputs for training rows, without augmentation."""
        parts = self.data.parts
        rows = Indexed(parts.plain, parts.positions["train"][index.numpy()], self.data.labels[index], index)
        return self.predict_rows(rows, teachers)
