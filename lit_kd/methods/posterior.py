"""Posterior distillation: label and teacher are two witnesses of the true class; learn from what both say together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.distiller.schedule import warn_of_warmup
from lit_kd.distiller.tabled import TableDistiller
from lit_kd.losses import cross_entropy, mean_teacher
from lit_kd.models import Network
from lit_kd.trust.posterior import Opinion, calibrate, habits, label_posterior, posterior_targets, stack
from lit_kd.types import UNLABELED, Batch, Outputs

DECAY = 0.7
"""Of the running mean of the student's and the teachers' probabilities."""


class PosteriorDistillation(TableDistiller):
    """Trains on the posterior of the true class, given label and teacher, both of which may be wrong [ours].

    After a warm-up with the labels trusted meta rows calibrate the teacher, and before each epoch the student's
    probabilities alone and together with the teacher's; then an EM over the training rows finds how labels are mistaken
    for each other, what the teacher has memorised of them, and from these the posterior of each row; see
    `lit_kd.trust.posterior`. Where fewer than 2% of the labels are wrong, they are the targets. Else in the first half of the
    training each label weighs as much as it is probable, and in the second half the posterior is the target. Rows
    without a label have the posterior of student and teacher for a target once the warm-up is over. Needs a data module
    with sample indices and a meta split, any of `lit_kd.data`, or `lit_kd.data.DistillationDataModule` around your own.

    In the table, the label's weight is what of the row's weighted posterior lies on its class, the teacher's what lies
    on the class that it names against the label.

    Its limits: the mistakes of labels may depend on the true class alone; on noise that depends on the instance,
    `ALMKD` is better. Meta rows must be like training rows, and unseen by the teacher. If they are trained on
    (the data's ``train_on_meta``), the student looks surer on them than it is elsewhere. The table, and so each
    checkpoint, holds three numbers a row and class. Several teachers are one witness, their probabilities averaged.

    Args:
        student: The network to train, a module or a name.
        teacher: One teacher or a list: modules or checkpoint paths.
        warmup_epochs: Epochs with the labels as they are; ``None``: a sixth of the training, at least one.
        **base: See `lit_kd.Distiller`.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network | list[Network] | None = None,
        *,
        warmup_epochs: int | None = None,
        **base: Any,
    ) -> None:
        super().__init__(student=student, teacher=teacher, **base)
        if warmup_epochs is not None and warmup_epochs < 1:
            raise ValueError(f"expected warmup_epochs of at least 1, found {warmup_epochs}")
        self.warmup_epochs = warmup_epochs

    def setup(self, stage: str) -> None:
        """Refuse data without indices or a meta split."""
        super().setup(stage)
        if stage == "fit":
            self.data.require_meta("PosteriorDistillation, by which the teacher is calibrated")

    def start_table(self, table: SampleTable, fresh: bool) -> None:
        """What is trained on, and what student and teachers have said so far."""
        epochs = self.planned_length()[0]
        if epochs is None:
            raise ValueError(
                "expected to know how long the training is, half of which has other targets: set the trainer's "
                "max_epochs or max_steps"
            )
        self._half = epochs / 2
        self._warmup = max(1, round(epochs / 6)) if self.warmup_epochs is None else self.warmup_epochs
        warn_of_warmup(self._warmup, epochs)
        flat = torch.full((self.num_classes,), 1 / self.num_classes)
        table.add("weights", torch.tensor([1.0] + [0.0] * len(self.teachers)))
        table.add("clean_probability", torch.ones(()))
        table.add("epochs", torch.zeros(()))
        table.add("student_probabilities", flat)
        table.add("teacher_probabilities", flat)
        table.add("target", torch.zeros(self.num_classes))
        table.add("target_weight", torch.ones(()))
        if fresh:
            y = self.data.labels
            labelled = y != UNLABELED
            table["target"] = F.one_hot(y.where(labelled, 0), self.num_classes).float() * labelled.unsqueeze(1)
            for name in ("weights", "clean_probability"):
                table[name][~labelled] = 0

    def distill(self, student: Outputs, teachers: list[Outputs], batch: Batch) -> dict[str, Tensor]:
        """One term, ``posterior``; takes down what student and teachers say."""
        table = self.table
        if batch.index is None or table is None:
            raise ValueError(
                "expected batches with sample indices, (x, y, index), found one without: a hook or callback that "
                "changes batches must keep the index"
            )
        self._take_down(batch.index, student.logits, [t.logits for t in teachers])
        loss = cross_entropy(student.logits, table["target"][batch.index])
        return {"posterior": table["target_weight"][batch.index] * loss}

    @torch.no_grad()
    def _take_down(self, index: Tensor, student: Tensor, teachers: list[Tensor]) -> None:
        """Let outputs enter the running means of their rows."""
        table = self.table
        assert table is not None
        epochs = table["epochs"][index] + 1
        new = ((1 - DECAY) / (1 - DECAY**epochs)).unsqueeze(1)  # all, the first time
        said = {"student": student, "teacher": mean_teacher([t.float() for t in teachers])}
        values = {"epochs": epochs}
        for name, logits in said.items():
            old = table[f"{name}_probabilities"][index]
            values[f"{name}_probabilities"] = old + new * (logits.float().softmax(-1) - old)
        table.write(index, **values)

    def prepare_epoch(self) -> None:
        """From what was said to the posterior, from the posterior to targets."""
        if self.current_epoch == 0:
            return  # the student knows nothing
        table, data = self.table, self.data
        assert table is not None
        n = data.train_size
        meta = self.predict_rows(data.parts.meta_rows())
        trusted = torch.arange(n, len(data.labels), device=self.device)
        self._take_down(trusted, meta.student.logits, [t.logits for t in meta.teachers])
        table.sync()  # now, as a process that trains on a meta row will write it again
        if self.current_epoch < self._warmup:
            return
        student, teacher = (_log(table[f"{name}_probabilities"].cpu().double()) for name in ("student", "teacher"))
        y = data.labels
        said = teacher.argmax(1)
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
        shares = [clean, *[taught / len(self.teachers)] * len(self.teachers)]
        table["weights"][:n] = (weight.unsqueeze(1) * torch.cat(shares, dim=1)).to(table["weights"])
        table["clean_probability"][:n] = clean.squeeze(1).to(table["clean_probability"])
        table["target"][:n] = target.to(table["target"])
        table["target_weight"][:n] = weight.to(table["target_weight"])
        table.shared["noise_rate"] = torch.tensor(found.noise_rate, dtype=torch.float32, device=self.device)


def _log(probabilities: Tensor) -> Tensor:
    return (probabilities + 1e-8).log()
