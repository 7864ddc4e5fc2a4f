"""Robust Active Distillation: ask a teacher that costs, and may be wrong, about a few rows only."""

from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.data.table import SampleTable
from lit_kd.models import Network
from lit_kd.terms import Term, Weights
from lit_kd.trust.game import Floats
from lit_kd.trust.queries import OF_FEATURES, QueryRule, choose_rows
from lit_kd.types import PENULTIMATE, UNLABELED, Batch, Outputs, check_choice
from lit_kd.weightings.stretches import Stretched


class RobustActiveDistillation(Stretched):
    """Robust Active Distillation (RAD, arXiv 2210.01213): which rows are worth a question to the teacher?

    Each of ``rounds + 1`` stretches of the training but the first begins with ``budget`` questions about rows without a
    label; the student learns from labels and answers [text], each time from the initial weights [ours].

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher: a module or a checkpoint path. Its answers are soft labels, without augmentation.
        budget: Questions a round, at least 1.
        rounds: How often to ask, at least 1.
        rule: How rows are chosen, see `lit_kd.trust.queries.choose_rows`.
        mistakes: On how many of these rows the teacher may be wrong, for ``"rad"``; ``None``: as on meta rows [text].
        temperature: T > 0 of the answers' loss.
        **base: See `lit_kd.Distiller`.
    """

    tasks, settled = ("classification",), ("extra",)
    by_sample = True

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
        if budget < 1 or rounds < 1 or (mistakes or 0) < 0:
            raise ValueError(f"expected budget, rounds >= 1 and mistakes >= 0, found {budget}, {rounds}, {mistakes}")
        check_choice("rule", rule, get_args(QueryRule))
        self.rule, self.budget, self.mistakes, self.temperature = rule, budget, mistakes, temperature
        self.questions, self.num_stretches, self.plan = rounds * budget, rounds + 1, (budget,)
        self.student_taps = (PENULTIMATE,) if rule in OF_FEATURES else ()

    def default_term(self) -> Term:
        """The KL divergence to the answers."""
        return self.task.teacher_term(self.temperature)

    def setup(self, stage: str) -> None:
        """Refuse data and teachers that do not fit."""
        super().setup(stage)
        if stage != "fit":
            return
        if self.teacher_cache or len(self.teachers) > 1:
            found = f"found {len(self.teachers)} and {self.teacher_cache}"
            raise ValueError(f"expected one teacher, and no teacher_cache, which asks about all rows; {found}")
        labels = self.data.labels[: self.data.train_size]
        pool = int((labels == UNLABELED).sum())
        if pool == len(labels) or self.questions > pool:
            raise ValueError(
                f"expected training rows with a label, and at least {self.questions} without one to ask about, found "
                f"{len(labels) - pool} and {pool}: set the data's labeled, or lower rounds or budget"
            )
        if self.rule == "rad" and self.mistakes is None:
            self.data.require_meta("the rule rad without mistakes=..., to estimate how often the teacher is wrong")

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """Column ``query``, as which question a row was asked about or -1, and the answers."""
        super().start_table(table, fresh)
        table.add("query", torch.tensor(-1))
        table.shared.setdefault("soft_labels", torch.zeros(self.questions, self.num_classes))

    @property
    def query(self) -> Tensor:
        """As which question each row was asked about, ``(N,)``; -1: not at all."""
        assert self.table is not None
        return self.table["query"]

    def training_rows(self) -> Tensor:
        """Those with a label or an answer."""
        return ((self.query.cpu() >= 0) | (self.data.labels != UNLABELED)).nonzero().squeeze(1)

    def begin_stretch(self, stretch: int) -> None:
        """First choose rows of the pool as the student sees them, and ask the teacher about them."""
        assert self.table is not None
        parts, known = self.data.parts, self.training_rows()
        pool = torch.from_numpy(np.setdiff1d(np.arange(self.data.train_size), known))
        student = self.predict_rows(parts.rows(pool), teachers=False).student
        heard = self.predict_rows(parts.rows(known), teachers=False).student if self.rule == "coreset" else None
        chosen = choose_rows(
            self.rule,
            student.logits.double().softmax(-1).numpy(force=True),
            self.budget,
            np.random.default_rng(derive_seed(resolve_seed(None), f"queries of round {stretch - 1}")),
            mistakes=self.expected_mistakes(len(pool)),
            features=_features(student),
            known_features=_features(heard),
        )
        index = pool[torch.from_numpy(chosen)]
        places = torch.arange(self.budget, device=self.device) + (stretch - 1) * self.budget
        [answer] = self.predict_rows(parts.rows(index)).teachers
        self.table.shared["soft_labels"][places] = answer.logits.float()
        self.query[index.to(self.device)[answer.speaks]] = places[answer.speaks]
        super().begin_stretch(stretch)

    def expected_mistakes(self, pool: int) -> float:
        """On how many rows of the pool the teacher may be wrong, for the rule rad."""
        if self.rule != "rad" or self.mistakes is not None:
            return self.mistakes or 0.0
        said = self.predict_rows(self.data.parts.meta_rows())
        teacher = said.teachers[0]
        return float((teacher.logits.argmax(-1) != said.y)[teacher.speaks].double().mean().nan_to_num()) * pool

    def ask(self, batch: Batch) -> list[Outputs]:
        """In training nobody: the teacher has been asked before."""
        return [] if self.trainer.training else super().ask(batch)

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """What the teacher answered."""
        assert self.table is not None
        return [Outputs(self.table.shared["soft_labels"][self.query[batch.index].clamp(min=0)], {})]

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """1 for labels, and for answers where there is one."""
        asked = (self.query[batch.index] >= 0).float()
        return torch.stack([torch.ones_like(asked), asked], dim=1)

    def on_train_epoch_end(self) -> None:
        """Log also how much was asked, ``rad/queries``."""
        super().on_train_epoch_end()
        self.log("rad/queries", (self.query >= 0).sum().float())


def _features(said: Outputs | None) -> Floats | None:
    """What the last linear layer reads, ``(n, D)``."""
    return said.features[PENULTIMATE].flatten(1).double().numpy(force=True) if said and said.features else None
