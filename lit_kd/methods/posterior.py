"""Posterior distillation: label and teacher are two witnesses of the true class; learn from what both say together."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.distiller import Distiller
from lit_kd.distiller.optimisation import likely_length
from lit_kd.losses import mean_teacher
from lit_kd.models import Network
from lit_kd.terms import SoftTarget, Weights
from lit_kd.trust.posterior import Opinion, calibrate, habits, label_posterior, posterior_targets, stack
from lit_kd.types import UNLABELED, Batch, Outputs, index_of
from lit_kd.weightings.base import has_label
from lit_kd.weightings.checks import warn_of_absent_classes, warn_of_warmup

DECAY = 0.7  # of the running means of the student's and the teachers' probabilities


class PosteriorDistillation(Distiller):
    """Trains on the posterior of the true class, given label and teacher, both of which may be wrong [ours].

    The student first warms up on the labels. Then, before each epoch, trusted meta rows calibrate teacher and student,
    and an EM over the training rows finds how labels are mistaken for each other and what the teacher has memorised of
    them; see `lit_kd.trust.posterior`. Where fewer than 2% of the labels are wrong, they are the targets. Else in the
    first half of the training each label weighs as much as it is probable, and in the second half the posterior is the
    target. Rows without a label have the posterior for a target after the warm-up. The table's weights tell how much of
    the row's weighted posterior lies on the label's class, and on the class that the teacher names against it. Several
    teachers are one witness, their mean. For limits see docs/methods/posterior.md.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        warmup_epochs: Epochs with the labels as they are; ``None``: a sixth of the training, at least one
            epoch; of a training that may stop early, of 100 epochs at most.
        **base: See `lit_kd.Distiller`.
    """

    table: SampleTable  # there in training
    num_sources = 0
    tasks = ("classification",)
    settled = ("term", "label_term")

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        warmup_epochs: int | None = None,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        self._templates = (None, SoftTarget("target"), self._templates[2])
        if warmup_epochs is not None and warmup_epochs < 1:
            raise ValueError(f"expected warmup_epochs of at least 1, found {warmup_epochs}")
        self.warmup_epochs = warmup_epochs

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """What is trained on, and what student and teachers have said so far."""
        self.data.require_meta("PosteriorDistillation, by which the teacher is calibrated")
        warn_of_absent_classes(self.data)
        epochs = likely_length(self)
        if epochs is None:
            raise ValueError("expected to know how long the training is, found no end: set max_epochs or max_steps")
        self._half = epochs / 2
        self._warmup = max(1, round(epochs / 6)) if self.warmup_epochs is None else self.warmup_epochs
        warn_of_warmup(self._warmup, epochs)
        table.add("weights", torch.tensor([1.0] + [0.0] * len(self.teachers)))
        table.add("epochs", torch.zeros(()))
        for name in ("clean_probability", "target_weight"):
            table.add(name, torch.ones(()))
        for name in ("student_probabilities", "teacher_probabilities", "target"):
            table.add(name, torch.full((self.num_classes,), 1 / self.num_classes))
        if fresh:
            y, labelled = self.data.labels, has_label(self.data.labels)
            table["target"] = F.one_hot(y.where(labelled, 0), self.num_classes).float() * labelled.unsqueeze(1)
            for name in ("weights", "clean_probability"):
                table[name][~labelled] = 0

    def on_train_end(self) -> None:
        """Say so where the training stopped within its warm-up."""
        warn_of_warmup(self._warmup, self.current_epoch)

    def sources(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> list[Outputs]:
        """None: the target holds what teachers say; it is taken down, with what the student says."""
        one = slice(None) if batch.pairs is None else batch.pairs.main  # of each row
        self._take_down(index_of(batch)[one], student.logits[one], [t.logits[one] for t in teachers])
        return []

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        """The target's, from the table."""
        return self.table["target_weight"][batch.index].unsqueeze(1)

    @torch.no_grad()
    def _take_down(self, index: Tensor, student: Tensor, teachers: list[Tensor]) -> None:
        """Let outputs enter the running means of their rows."""
        table = self.table
        epochs = table["epochs"][index] + 1
        new = ((1 - DECAY) / (1 - DECAY**epochs)).unsqueeze(1)  # all, the first time
        values = {"epochs": epochs}
        for name, logits in {"student": student, "teacher": mean_teacher([t.float() for t in teachers])}.items():
            old = table[f"{name}_probabilities"][index]
            values[f"{name}_probabilities"] = old + new * (logits.float().softmax(-1) - old)
        table.write(index, **values)

    def prepare_epoch(self) -> None:
        """From what was said to the posterior, from the posterior to targets."""
        if self.current_epoch == 0:
            return  # the student knows nothing
        table, data, n = self.table, self.data, self.data.train_size
        meta = self.predict_rows(data.parts.meta_rows())
        trusted = torch.arange(n, len(data.labels), device=self.device)
        self._take_down(trusted, meta.student.logits, [t.logits for t in meta.teachers])
        table.sync()  # now, as a process that trains on a meta row will write it again
        if self.current_epoch < self._warmup:
            return
        student, teacher = (_log(table[f"{name}_probabilities"].cpu().double()) for name in ("student", "teacher"))
        y, said = data.labels, teacher.argmax(1)
        if "teacher_channel" not in table.shared:  # in the table, so that a resumed run goes on with the same
            fitted = calibrate(teacher[n:], y[n:])
            table.shared |= {"teacher_exponents": fitted.exponents, "teacher_channel": fitted.channel}
        opinion = Opinion(table.shared["teacher_exponents"].cpu(), table.shared["teacher_channel"].cpu())
        calibrated = opinion(teacher.unsqueeze(0))
        alone = stack(student[n:].unsqueeze(0), y[n:])
        together = stack(torch.stack([student[n:], _log(calibrated[n:])]), y[n:])
        found = label_posterior(
            alone(student[:n].unsqueeze(0)),
            calibrated[:n],
            lambda q: together(torch.stack([student[:n], _log(q)])),
            habits(said[n:], calibrated[n:], y[n:]),
            said[:n],
            y[:n],
        )
        target, weight = posterior_targets(found.classes, y[:n], found.noise_rate, self.current_epoch >= self._half)
        labelled = y[:n] != UNLABELED
        clean = found.classes.gather(1, y[:n].where(labelled, 0).unsqueeze(1)) * labelled.unsqueeze(1)
        taught = found.classes.gather(1, said[:n].unsqueeze(1)) * (said[:n] != y[:n]).unsqueeze(1)
        shares = torch.cat([clean, *[taught / len(self.teachers)] * len(self.teachers)], dim=1)
        values = {"weights": weight.unsqueeze(1) * shares, "clean_probability": clean.squeeze(1)}
        for name, value in (values | {"target": target, "target_weight": weight}).items():
            table[name][:n] = value.to(table[name])
        table.shared["noise_rate"] = torch.tensor(found.noise_rate, dtype=torch.float32, device=self.device)


def _log(probabilities: Tensor) -> Tensor:
    return (probabilities + 1e-8).log()
