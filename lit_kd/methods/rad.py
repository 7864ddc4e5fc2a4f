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
from lit_kd.terms import Term
from lit_kd.trust.game import Floats
from lit_kd.trust.queries import OF_FEATURES, QueryRule, choose_rows
from lit_kd.types import PENULTIMATE, UNLABELED, Batch, Outputs
from lit_kd.weightings.manual import SHARDED


class RobustActiveDistillation(Distiller):
    """Robust Active Distillation (RAD, arXiv 2210.01213): which rows are worth a question to the teacher?

    Needs data with rows without a label, the pool: ``labeled=0.1``. The training has ``rounds + 1`` stretches of as
    many epochs, to within one. Each but the first begins with ``budget`` questions about rows of the pool; the student
    learns from labelled rows and from all answers so far [the paper's loop]. [ours]: each stretch starts from the
    initial weights, with a new optimizer and schedule; the answers are soft labels, taken once, without augmentation.
    ``rad/queries`` is the number of rows asked about.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher: a module or a checkpoint path.
        rule: How rows are chosen, see `lit_kd.trust.queries.choose_rows`.
        budget: b, queries a round, at least 1.
        rounds: How often to query, at least 1.
        mistakes: m, on how many rows of the pool the teacher may be wrong, for the rule ``"rad"``. ``None``: its error
            on the meta split times the size of the pool [text: estimated on a validation set; scaling ours].
        temperature: T > 0 of the queried rows' loss, dimensionless.
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
        self._initial: dict[str, Tensor] = {}  # the student's weights that each stretch starts from

    def default_term(self) -> Term:
        """KL divergence to the answers."""
        return self.task.teacher_term(self.temperature)

    def setup(self, stage: str) -> None:
        """Refuse data, rounds and options that do not fit; forget an earlier training's queries."""
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
        self.table, self._initial = None, {}  # a checkpoint's come after this hook

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """Column ``query``, as which question a row was asked about or -1; and the weights to start again from."""
        table.add("query", torch.tensor(-1))
        plan = torch.tensor([self.budget, *self.stretches()])
        if not torch.equal(table.shared.setdefault("plan", plan).cpu(), plan):
            raise ValueError(
                f"expected the checkpoint's budget and stretches, {table.shared['plan'].tolist()}, found "
                f"{plan.tolist()}: keep budget, rounds and max_epochs, or start without the checkpoint"
            )
        table.shared.setdefault("soft_labels", torch.zeros(self.rounds * self.budget, self.num_classes))
        self._initial = self._initial or {name: v.detach().clone() for name, v in self.student.state_dict().items()}

    def stretches(self) -> list[int]:
        """The epochs at which the stretches begin, from 0, and the one after the last: ``rounds + 2`` of them."""
        epochs, parts = self.planned_length()[0], self.rounds + 1
        if epochs is None or epochs < parts:
            raise ValueError(f"expected max_epochs of at least {parts}, one for each stretch, found {epochs}")
        return [k * epochs // parts for k in range(parts + 1)]

    @property
    def schedule_length(self) -> int:
        """Of the stretch, which starts with a schedule of its own."""
        ends, done = self.stretches(), self._rounds_done()
        each, end = 1, ends[-1]
        if self.lr_interval == "step":
            each, end = updates_per_epoch(self), self.planned_length()[1] or 0
        return min(each * ends[done + 1], end) - each * ends[done]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The weights to start from again go with the student."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["initial_student"] = self._initial

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up again."""
        super().on_load_checkpoint(checkpoint)
        self._initial = checkpoint.get("initial_student", {})

    def prepare_epoch(self) -> None:
        """At the start of a stretch but the first, ask the teacher and start again."""
        done = self._rounds_done()
        if done < self.rounds and self.current_epoch >= self.stretches()[done + 1]:
            self._query(done)
            self.student.load_state_dict(self._initial)
            self.trainer.strategy.setup_optimizers(self.trainer)

    def training_rows(self) -> Tensor:
        """Those with a label, and those that the teacher was asked about."""
        return self._known().nonzero().squeeze(1)

    def _known(self) -> Tensor:
        assert self.table is not None
        return (self.table["query"].cpu() >= 0) | (self.data.labels != UNLABELED)

    def _rounds_done(self) -> int:
        return 0 if self.table is None else min(int((self.table["query"] >= 0).sum()) // self.budget, self.rounds)

    def _inputs(self, index: Tensor) -> Indexed:
        parts = self.data.parts
        return Indexed(parts.plain, parts.positions["train"][index.numpy()], self.data.labels[index], index)

    def _student_view(self, index: Tensor) -> tuple[Floats, Floats | None]:
        """The student's probabilities of rows, ``(n, C)``, and what its last linear layer reads, ``(n, D)``."""
        said = self.predict_rows(self._inputs(index), teachers=False).student
        features = said.features[PENULTIMATE].flatten(1).double().cpu().numpy() if said.features else None
        return said.logits.double().softmax(-1).cpu().numpy(), features

    def _query(self, done: int) -> None:
        """Choose rows of the pool as the student sees them, and ask the teacher about them."""
        assert self.table is not None
        known = self._known()[: self.data.train_size]
        pool = (~known).nonzero().squeeze(1)
        probabilities, features = self._student_view(pool)
        chosen = choose_rows(
            self.rule,
            probabilities,
            self.budget,
            np.random.default_rng(derive_seed(resolve_seed(None), f"queries of round {done}")),
            mistakes=self._mistakes(len(pool)) if self.rule == "rad" else 0,
            features=features,
            known_features=self._student_view(known.nonzero().squeeze(1))[1] if self.rule == "coreset" else None,
        )
        index = pool[torch.from_numpy(chosen)]
        places = torch.arange(self.budget, device=self.device) + done * self.budget
        self.table.shared["soft_labels"][places] = self.predict_rows(self._inputs(index)).teachers[0].logits.float()
        self.table["query"][index.to(self.device)] = places

    def _mistakes(self, pool: int) -> float:
        """On how many rows of the pool the teacher may be wrong."""
        if self.mistakes is not None:
            return self.mistakes
        said = self.predict_rows(self.data.parts.meta_rows())
        return float((said.teachers[0].logits.argmax(-1) != said.y).double().mean()) * pool

    def ask(self, batch: Batch) -> list[Outputs]:
        """In training nobody: the teacher has been asked before."""
        return [] if self.trainer.training else super().ask(batch)

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """What the teacher answered."""
        assert self.table is not None
        return [Outputs(self.table.shared["soft_labels"][self.table["query"][batch.index].clamp(min=0)], {})]

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """1 for labels, and for answers where there is one."""
        assert self.table is not None
        asked = (self.table["query"][batch.index] >= 0).float()
        return torch.stack([torch.ones_like(asked), asked], dim=1)

    def on_train_epoch_end(self) -> None:
        """Log also how much was asked."""
        super().on_train_epoch_end()
        assert self.table is not None
        self.log("rad/queries", (self.table["query"] >= 0).sum().float())
