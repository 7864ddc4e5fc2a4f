"""The default rule: believe a label or a teacher only as far as the student, early, and trusted rows speak for it."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from scipy.stats import chi2
from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.trust.belief import believe
from lit_kd.types import UNLABELED, Batch, index_of
from lit_kd.weightings.base import MetaStep, Rule

VALIDATIONS = 2  # how many of the latest ones are compared: an older student says little
UNLIKELY = 1e-3  # a chance, of a difference of trusted and other rows that is told


class Robust(Rule):
    """The posterior of each row's true class, from the student's early learning, labels and teachers [ours].

    Networks learn what most labels agree on before they learn single wrong ones by heart. So what the student said of a
    row, on average, is a witness to its true class. The label is another one, and so is a teacher that helps the
    student on validation rows. The student learns the most probable class, the more the surer it is. Trusted rows are
    trained on, and tell how much of the doubt about labels is false; without any, no doubt is taken for false. No
    look-ahead is taken. Equations, ablations, limits: docs/mathematics.md, "The rule robust".

    Args:
        early_epochs: Epochs until teachers are heard; ``None``: a tenth of the training, or of 100 epochs if it is
            longer and may stop early.
        decay: Of the running mean of what the student says, by epoch, in [0, 1).
    """

    looks_ahead = False
    trains_on_meta = True
    wants_validation = True
    needs_teacher = False
    tasks = ("classification",)

    def __init__(self, early_epochs: int | None = None, decay: float = 0.6) -> None:
        if early_epochs is not None and early_epochs < 1:
            raise ValueError(f"expected early_epochs of at least 1, or None; found {early_epochs}")
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), found {decay}")
        self.early_epochs, self.decay = early_epochs, decay

    def start(self, table: SampleTable, teachers: int, trusted: Tensor, labels: Tensor, epochs: int | None) -> None:
        """Add the weights, and what student and teachers say."""
        length = epochs or 10 * (self.early_epochs or 0)
        if not length:
            raise ValueError(
                "expected to know how long the training is, as teachers are heard after a tenth: set the trainer's "
                "max_epochs or max_steps, or pass rule=lit_kd.weightings.Robust(early_epochs=...)"
            )
        self.length, self.early = length, self.early_epochs or max(1, round(length / 10))
        if self.early >= length > 1:
            rank_zero_warn(f"teachers are never heard: {length} epochs end before early_epochs={self.early}. Lower it")
        if not trusted.any():
            rank_zero_warn(
                "no row is trusted, so that nothing tells which doubt about a label is false: labels of hard rows are "
                "doubted more than they should. Give the data a meta split, of checked labels, if there are some"
            )
        self.trusted, self.labels = trusted, labels
        table.add("weights", torch.tensor([1.0] + [0.0] * teachers))
        table.add("clean_probability", torch.ones(()))
        for name in ("revised_weight", "epochs"):
            table.add(name, torch.zeros(()))
        table.add("learned_class", torch.zeros((), dtype=torch.int64))
        table.add("teacher_class", torch.zeros(teachers, dtype=torch.int64))

    def active(self, epoch: int) -> bool:
        """From the start."""
        return True

    def revise(self, table: SampleTable, batch: Batch) -> Batch:
        """The most probable class in the place of a label that is less probable."""
        index = index_of(batch)
        revised = table["revised_weight"][index] > 0
        return batch.with_labels(torch.where(revised, table["learned_class"][index], batch.y))

    def weights(self, table: SampleTable, index: Tensor) -> Tensor:
        """Of that class, too."""
        weights = table["weights"][index]
        weights[:, 0] += table["revised_weight"][index]
        return weights

    def observe(self, table: SampleTable, step: MetaStep) -> None:
        """Remember what was said."""
        if "memory" not in table:
            table.add("memory", step.logits.new_zeros(step.logits.shape[1]))
        epochs, memory = table["epochs"][step.index] + 1, table["memory"][step.index]
        new = (1 - self.decay) / (1 - self.decay**epochs)  # all of it, the first time
        memory = memory + new.unsqueeze(1) * (step.logits.softmax(-1) - memory)
        said = [teacher.argmax(-1) for teacher in step.teachers]
        classes = torch.stack(said, dim=1) if said else table["teacher_class"][step.index]
        if step.known is not None:
            classes = classes.where(step.known, UNLABELED)
        table.write(step.index, epochs=epochs, memory=memory, teacher_class=classes)

    def validated(self, table: SampleTable, wrong: Tensor, rows: Tensor) -> None:
        """Keep the latest counts of errors."""
        counts = wrong.to(table["weights"]).unsqueeze(0)
        table.shared["errors"] = torch.cat([table.shared.get("errors", counts[:0]), counts])[-VALIDATIONS:]

    def renew(self, table: SampleTable, epoch: int) -> None:
        """From what was said to beliefs, from beliefs to weights."""
        seen = table["epochs"] > 0
        labels, trusted = (values.to(seen.device)[seen] for values in (self.labels, self.trusted))
        if not len(labels) or (self.trusted.any() and not trusted.any()):  # no trusted row has been seen yet
            return
        memory, said = table["memory"][seen], table["teacher_class"][seen]
        done = min(epoch + 1, self.length - 1) / self.length  # never all: the table is to tell good teachers to the end
        counts = table.shared.get("errors")
        errors = None if counts is None or epoch + 1 < self.early else counts.mean(0)
        found = believe(memory, labels, trusted, said, errors, 1 - done)
        total, labelled = found.weights.sum(1), labels != UNLABELED
        weights = found.weights / total.mean().clamp(min=0.05)
        revised = weights[:, 0] * (found.classes != labels)
        values = {
            "weights": torch.cat([(weights[:, 0] - revised).unsqueeze(1), weights[:, 1:]], dim=1),
            "revised_weight": revised,
            "learned_class": found.classes,
            "clean_probability": found.clean,
        }
        for name, value in values.items():
            column = table[name].clone()
            column[seen] = value.to(column.dtype)
            table[name] = column
        others = labelled & ~trusted
        table.shared["noise_rate"] = (1 - found.clean[others]).sum() / others.sum().clamp(min=1)
        if trusted.any() and epoch + 1 == max(1, round(self.length / 3)):  # by then wrong labels are known
            compare_classes(found.classes[~trusted], labels[trusted & labelled], memory.shape[1])


def compare_classes(others: Tensor, trusted: Tensor, classes: int) -> None:
    """Say so where the classes of trusted rows are not distributed like those of other rows; a chi-square test."""
    shares = (torch.bincount(others, minlength=classes) + 0.5) / (len(others) + 0.5 * classes)
    counts = torch.bincount(trusted, minlength=classes)
    expected = shares * counts.sum()
    statistic = float(((counts - expected).square() / expected).sum())
    if statistic > chi2.ppf(1 - UNLIKELY, classes - 1):
        rank_zero_warn(
            "the trusted rows have other shares of the classes than the training rows seem to have, such as "
            f"{counts[(c := int((counts - expected).abs().argmax()))]} of class {c} where {expected[c]:.0f} are "
            "expected: what they tell of false doubt may not hold for all classes. Draw them like the training rows"
        )
