"""Trainings that begin anew several times."""

import torch

from lit_kd.data.table import SampleTable
from lit_kd.distiller.base import Distiller
from lit_kd.distiller.optimisation import planned_length, updates_per_epoch
from lit_kd.weightings.manual import refuse_sharded


class Stretched(Distiller):
    """Trains in `num_stretches` parts of equally many epochs, to within one, each from the initial weights."""

    num_stretches: int
    plan: tuple[int, ...] = ()
    """What a resumed training must share, beside the stretches."""

    @property
    def stretch(self) -> int:
        """The number of the present one, from 0."""
        return 0 if self.table is None else int(self.table.shared["stretch"])

    def stretches(self) -> list[int]:
        """The epochs at which stretches begin, and the one after the last."""
        epochs, parts = planned_length(self)[0], self.num_stretches
        if epochs is None or epochs < parts:
            raise ValueError(f"expected max_epochs of at least {parts}, one for each stretch, found {epochs}")
        return [k * epochs // parts for k in range(parts + 1)]

    @property
    def schedule_length(self) -> int:
        """Of the stretch."""
        start, end = self.stretches()[self.stretch : self.stretch + 2]
        if self.lr_interval == "epoch":
            return end - start
        each = updates_per_epoch(self)
        return min(each * end, planned_length(self)[1] or 0) - each * start

    def setup(self, stage: str) -> None:
        """Refuse strategies that shard the student; what an earlier training kept does not count."""
        super().setup(stage)
        if stage == "fit":
            refuse_sharded(self)
            self.table = None

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """Keep the plan and the initial weights; refuse a checkpoint of another plan."""
        plan = torch.tensor([*self.plan, *self.stretches()])
        if fresh:
            table.shared = {f"initial_{name}": v.detach().clone() for name, v in self.student.state_dict().items()}
            table.shared |= {"stretch": torch.tensor(0), "plan": plan}
        elif not torch.equal(table.shared["plan"].cpu(), plan):
            raise ValueError(
                f"expected the checkpoint's budget and stretches, {table.shared['plan'].tolist()}, found "
                f"{plan.tolist()}: keep budget, rounds and max_epochs, or start without the checkpoint"
            )

    def on_fit_start(self) -> None:
        """Give a resumed training the schedule of its stretch, which the table tells."""
        super().on_fit_start()
        if self.stretch:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def prepare_epoch(self) -> None:
        """Begin the next stretch when its epoch has come."""
        after = self.stretch + 1
        if after < self.num_stretches and self.current_epoch >= self.stretches()[after]:
            self.begin_stretch(after)

    def begin_stretch(self, stretch: int) -> None:
        """Set the student back, with a new optimizer; an override first does what the trained student is needed for."""
        assert self.table is not None
        shared = self.table.shared
        shared["stretch"].fill_(stretch)
        self.student.load_state_dict({name: shared[f"initial_{name}"] for name in self.student.state_dict()})
        self.trainer.strategy.setup_optimizers(self.trainer)
