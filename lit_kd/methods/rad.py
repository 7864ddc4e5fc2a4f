"""Robust Active Distillation: ask a teacher that costs, and may be wrong, about a few rows only."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lit_kd.data.rows import Indexed
from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.data.table import SampleTable
from lit_kd.distiller.base import Distiller
from lit_kd.distiller.schedule import updates_per_epoch
from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.models import Network
from lit_kd.models.taps import Tapped
from lit_kd.trust import (
    badge,
    cluster_margin,
    coreset,
    dep_round,
    entropy,
    margin,
    margin_gain,
    rad_marginals,
    uniform,
)
from lit_kd.trust.arrays import Floats, Indices
from lit_kd.types import PENULTIMATE, UNLABELED, Batch, Outputs, as_batch
from lit_kd.weightings.manual import SHARDED

RadRule = Literal["rad", "uniform", "margin", "entropy", "coreset", "badge", "cluster_margin"]
OF_FEATURES = ("coreset", "badge", "cluster_margin")
"""Rules that look at what the student's last linear layer reads."""


class RobustActiveDistillation(Distiller):
    """Robust Active Distillation (RAD, arXiv 2210.01213): which rows are worth a question to the teacher?

    Needs data of `lit_kd.data` with rows without a label, the pool: ``labeled=0.1``. The training is divided into
    ``rounds + 1`` stretches of as many epochs, to within one. In the first the student learns from the labeled rows. At
    the start of each further one it scores the pool, the rule picks ``budget`` rows that were not picked before, the
    teacher is asked about these alone, and the student is trained on labeled rows (cross-entropy) and all queried rows
    (the teacher's soft labels) [the paper's loop]. [ours]: the student is trained from scratch, from the same initial
    weights in each stretch; optimizer and schedule begin anew (``"cosine"`` anneals to 0 over the stretch), and all
    rules take the same steps; the soft label of a row is asked for once, without augmentation; the loss of queried rows
    is `lit_kd.losses.kd_loss`, whose gradient at T = 1 is that of cross-entropy with soft labels.

    No training step calls the teacher. The logged ``rad/queries`` is the number of queried rows, ``rad/teacher_calls``
    of how many rows of the pool the teacher was asked (by each process, of its own copy). Not counted are validation
    and test rows, where every method logs the agreement with the teacher, and the meta rows, once, if ``mistakes`` is
    ``None``. The best epoch by validation may lie in an early stretch: ``val/accuracy`` at the end of each tells what
    its queries were good for.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher: a module or a checkpoint path.
        rule: ``"rad"``, the game against a teacher that is wrong where it hurts most, or what it is compared with:
            ``"uniform"``, ``"margin"``, ``"entropy"``, ``"coreset"``, ``"badge"`` or ``"cluster_margin"``, see
            `lit_kd.trust`. The last three need a student whose last linear layer gives its logits.
        budget: b, queries a round, at least 1.
        rounds: How often to query, at least 1.
        mistakes: m, on how many rows of the pool the teacher may be wrong, for the rule ``"rad"``. ``None``: its error
            on the meta split times the size of the pool [text: estimated on a validation set; scaling ours].
        temperature: T > 0 of the queried rows' loss, dimensionless.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        budget: int,
        rounds: int,
        rule: RadRule = "rad",
        mistakes: float | None = None,
        temperature: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if len(self._teacher_specs) > 1:
            raise ValueError(f"expected one teacher to ask, found {len(self._teacher_specs)}: pass one of them")
        if rule not in get_args(RadRule):
            raise ValueError(f"expected a rule of {list(get_args(RadRule))}, found {rule!r}")
        if budget < 1 or rounds < 1:
            raise ValueError(f"expected budget and rounds of at least 1, found {budget} and {rounds}")
        if mistakes is not None and not mistakes >= 0:
            raise ValueError(f"expected mistakes of at least 0, a number of rows, or None; found {mistakes}")
        if not temperature > 0:
            raise ValueError(f"expected a temperature above 0, found {temperature}")
        self.rule = rule
        self.budget = budget
        self.rounds = rounds
        self.mistakes = mistakes
        self.temperature = temperature
        self.table: SampleTable | None = None
        """Column ``query`` ``(N + M,)``: as which question a row was asked about, -1 if it was not."""
        self._initial: dict[str, Tensor] | None = None  # the student's weights that each stretch starts from

    # before the training

    def setup(self, stage: str) -> None:
        """Refuse data, rounds and strategies that do not fit; forget an earlier training's queries."""
        super().setup(stage)
        if stage != "fit":
            return
        if self.teacher_cache:
            raise ValueError(
                f"expected no teacher_cache, which asks about all rows, found {self.teacher_cache.where!r}: "
                f"{type(self).__name__} asks about a few rows, once each, and keeps the answers. Leave it unset"
            )
        if isinstance(self.trainer.strategy, SHARDED):
            raise ValueError(
                f"{type(self).__name__} sets student and optimizer back in each round, which "
                f"{type(self.trainer.strategy).__name__} shards: use the strategy ddp"
            )
        if self.rule in OF_FEATURES:
            self.tapped_student = Tapped(self.student, (PENULTIMATE,))
        unlabeled = self.data.labels[: self.data.train_size] == UNLABELED
        pool = int(unlabeled.sum())
        if not 0 < pool < len(unlabeled):
            found = "none" if not pool else "no other ones"
            raise ValueError(
                "expected training rows with a label to begin with, and rows without one to ask the teacher about, "
                f"found {found} without a label: set the data's labeled, e.g. labeled=0.1"
            )
        if self.rounds * self.budget > pool:
            raise ValueError(
                f"expected at most as many queries as there are rows without a label, {pool}, found "
                f"{self.rounds} rounds of {self.budget}: lower rounds or budget"
            )
        if self.rule == "rad" and self.mistakes is None:
            self.data.require_meta("the rule rad without mistakes=..., to estimate how often the teacher is wrong")
        self.table = self._initial = None  # a checkpoint's come after this hook

    def on_fit_start(self) -> None:
        """Keep the student's initial weights, or go on with a restored training."""
        data = self.data
        size = len(data.labels)
        table = self.table or SampleTable(size, data.fingerprint)
        table.check(size, data.fingerprint)
        table.add("query", torch.tensor(-1))
        plan = torch.tensor([self.budget, *self.stretches()])
        if not torch.equal(table.shared.setdefault("plan", plan).cpu(), plan):
            raise ValueError(
                "expected the checkpoint's budget, and epochs at which its stretches begin and the last one ends, "
                f"{table.shared['plan'].tolist()}, found {plan.tolist()}: go on with the same budget, rounds and "
                "max_epochs, or start without the checkpoint"
            )
        table.shared.setdefault("soft_labels", torch.zeros(self.rounds * self.budget, self.num_classes))
        table.shared.setdefault("teacher_calls", torch.tensor(0))
        table.apply(lambda values: values.to(self.device))
        self.table = table
        if self._initial is None:
            self._initial = {name: value.detach().clone() for name, value in self.student.state_dict().items()}

    def stretches(self) -> list[int]:
        """The epochs at which the stretches begin, ascending from 0, and the one after the last: ``rounds + 2``.

        Raises:
            ValueError: If there are fewer epochs than stretches, or their number is not known.
        """
        epochs, parts = self.planned_length()[0], self.rounds + 1
        if epochs is None or epochs < parts:
            raise ValueError(
                f"expected at least {parts} epochs, one for each stretch of {self.rounds} rounds and the one before "
                f"them, found {'an unknown number' if epochs is None else epochs}: set the trainer's max_epochs to "
                f"{parts} or more, a multiple of it such as {10 * parts} for equal stretches, or lower rounds"
            )
        return [k * epochs // parts for k in range(parts + 1)]

    def _schedule_length(self) -> int:
        """Of the stretch, which starts with a schedule of its own."""
        ends, done = self.stretches(), self._rounds_done()
        if self.lr_interval == "epoch":
            return ends[done + 1] - ends[done]
        each = updates_per_epoch(self.trainer, self._batches_per_update())
        updates = self.planned_length()[1]
        assert updates is not None  # as the number of epochs is known
        return min(each * ends[done + 1], updates) - each * ends[done]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What was asked and answered, and the weights to start from again, go with the student."""
        super().on_save_checkpoint(checkpoint)
        if self.table is not None:
            checkpoint["sample_table"] = self.table.state_dict()
            checkpoint["initial_student"] = self._initial

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take both up again; the data's fingerprint is checked before training."""
        if "sample_table" in checkpoint:
            self.table = SampleTable.from_state_dict(checkpoint["sample_table"])
            self._initial = checkpoint["initial_student"]

    # the rounds

    def prepare_epoch(self) -> None:
        """At the start of a stretch but the first, ask the teacher and start again."""
        if self.current_epoch == 0 and self.rule == "rad":
            self._mistakes(0)  # a teacher that gives nonsense is refused before the first update
        done = self._rounds_done()
        if done == self.rounds or self.current_epoch < self.stretches()[done + 1]:
            return
        self._query()
        assert self._initial is not None
        self.student.load_state_dict(self._initial)
        self.trainer.strategy.setup_optimizers(self.trainer)

    def training_rows(self) -> Tensor:
        """Those with a label, and those that the teacher was asked about."""
        return (self._known() | (self.data.labels != UNLABELED)).nonzero().squeeze(1)

    def _known(self) -> Tensor:
        assert self.table is not None
        return self.table["query"].cpu() >= 0

    def _rounds_done(self) -> int:
        if self.table is None:
            return 0
        return min(int(self._known().sum()) // self.budget, self.rounds)

    def _inputs(self, index: Tensor) -> Indexed:
        parts = self.data.parts
        return Indexed(parts.plain, parts.positions["train"][index.numpy()], self.data.labels[index], index)

    def _query(self) -> None:
        """Pick rows of the pool, and ask the teacher about them."""
        assert self.table is not None
        size = self.data.train_size
        known = (self._known() | (self.data.labels != UNLABELED))[:size]
        pool = (~known).nonzero().squeeze(1)
        chosen = self._choose(pool, known.nonzero().squeeze(1))
        index = pool[torch.from_numpy(chosen)]
        answers = self.predict_rows(self._inputs(index)).teachers[0].logits
        self.table.shared["teacher_calls"] += len(answers)
        places = torch.arange(self.budget, device=self.device) + self._rounds_done() * self.budget
        self.table.shared["soft_labels"][places] = answers.float()
        self.table["query"][index.to(self.device)] = places

    def _choose(self, pool: Tensor, known: Tensor) -> Indices:
        """Which of the pool's rows to ask about, as the student, not the teacher, sees them."""
        student = self.predict_rows(self._inputs(pool), teachers=False).student
        p = student.logits.double().softmax(-1).cpu().numpy()
        round_seed = derive_seed(resolve_seed(None), f"queries of round {self._rounds_done()}")
        draw = np.random.default_rng(round_seed)
        if self.rule == "rad":
            return dep_round(rad_marginals(margin_gain(p), self._mistakes(len(pool)), self.budget), draw)
        if self.rule == "uniform":
            return uniform(len(pool), self.budget, draw)
        if self.rule == "margin":
            return margin(p, self.budget)
        if self.rule == "entropy":
            return entropy(p, self.budget)
        h = _features(student)
        if self.rule == "badge":
            return badge(p, h, self.budget, draw)
        if self.rule == "cluster_margin":
            return cluster_margin(p, h, self.budget)
        return coreset(h, _features(self.predict_rows(self._inputs(known), teachers=False).student), self.budget)

    def _mistakes(self, pool: int) -> float:
        """On how many rows of the pool the teacher may be wrong."""
        if self.mistakes is not None:
            return self.mistakes
        assert self.table is not None
        if "teacher_error" not in self.table.shared:  # asked once, the teacher is frozen
            said = self.predict_rows(self.data.parts.meta_rows())
            wrong = said.teachers[0].logits.argmax(-1) != said.y
            self.table.shared["teacher_error"] = wrong.double().mean()
        return float(self.table.shared["teacher_error"]) * pool

    # the steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As in the base, but for the teacher, which has been asked before."""
        batch = as_batch(batch)
        student = self.tapped_student(self.laid_out(batch).x)
        self._check(batch, {"student": student})
        return self.total(self.distill(student, [], batch), batch)

    def distill(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> dict[str, Tensor]:
        """Two terms, ``label`` of the labeled rows and ``teacher`` of the queried ones, from what it answered."""
        assert self.table is not None
        query = self.table["query"][batch.index]
        answers = self.table.shared["soft_labels"][query.clamp(min=0)]
        return {
            "label": cross_entropy(student.logits, batch.y),
            "teacher": (query >= 0) * kd_loss(student.logits, answers, self.temperature),
        }

    def on_train_epoch_end(self) -> None:
        """Log also how much was asked."""
        super().on_train_epoch_end()
        assert self.table is not None
        self.log("rad/queries", float(self._known().sum()))
        self.log("rad/teacher_calls", self.table.shared["teacher_calls"].float())


def _features(outputs: Outputs) -> Floats:
    """What the last linear layer reads, ``(n, D)``."""
    features: Floats = outputs.features[PENULTIMATE].flatten(1).double().cpu().numpy()
    return features
