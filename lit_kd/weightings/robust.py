"""The default rule: believe a label or a teacher only as far as trusted data speaks for it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.trust.evidence import fit_clean_probability, label_channel, label_log_odds, teacher_channel
from lit_kd.types import UNLABELED
from lit_kd.weightings.base import MetaStep, Rule


@dataclass(frozen=True)
class RobustSettings:
    """Constants of the rule `Robust`; the equations are those of docs/methods/almkd.md."""

    decay: float = 0.9  # of evidence about labels, eq. (1): ten epochs average the noise out
    teacher_decay: float = 0.7  # of the belief in a teacher, eq. (1): it changes faster, as the student learns
    proven: float = 0.8  # from which probability on a teacher is heard against the label, eq. (4): a doubtful one harms
    validations: int = 2  # how many of the latest ones are compared: an older student says little
    more_errors: float = 5  # added to the errors of each validation, eq. (5), (6): so that one row decides less
    fewer_errors: float = 1 / 8  # by what part a teacher of quality 1 errs less than the student, eq. (5)
    least_quality: float = 0.05  # of a teacher that errs no more than the student, eq. (5): to tell it from worse ones
    fewer_own_errors: float = 1 / 3  # by what part a student errs less on rows that it knows by heart, eq. (6)
    largest_share: float = 0.9  # of the trust in a label, a perfect teacher's at the start, eq. (7): the label has some
    lasting: float = 0.5  # what part of it is left at the end where the student knows its rows by heart, eq. (7)
    least_voice: float = 0.3  # of a teacher of quality 0 against the label, eq. (8)
    first_heard: float = 1.6  # warm-ups until teachers are heard: by then a student has begun to unlearn wrong labels


SETTINGS = RobustSettings()
MEANS = ("epochs", "evidence_mean", "evidence_square_mean", "log_probability_mean", "label_log_odds_mean")


class Robust(Rule):
    """Beliefs about labels and teachers from evidence on trusted rows [ours].

    Meta rows are trained on like all others, and show what the evidence of clean labels looks like. A
    positive-unlabeled fit gives the probability that a label is clean; a teacher is heard against a label that is
    probably wrong, and beside one that is right as far as it errs less on validation rows than the student. Equations
    and limits: docs/methods/almkd.md, "The rule robust".

    Args:
        warmup_epochs: Epochs on labels alone before the first fit; ``None``: a tenth of the training, or of 100 epochs
            if it is longer and may stop early. It counts as a tenth of a training whose length nobody knows.
    """

    trains_on_meta = True
    meta_rows = 512
    wants_validation = True
    late = True
    tasks = ("classification",)

    def __init__(self, warmup_epochs: int | None = None) -> None:
        if warmup_epochs is not None and warmup_epochs < 1:
            raise ValueError(f"expected warmup_epochs of at least 1, or None; found {warmup_epochs}")
        self.warmup_epochs = warmup_epochs

    def start(self, table: SampleTable, teachers: int, trusted: Tensor, labels: Tensor, epochs: int | None) -> None:
        """Add the weights, what one epoch shows, and its running means."""
        length = epochs or 10 * (self.warmup_epochs or 0)
        if not length:
            raise ValueError(
                "expected to know how long the training is, to warm up for a tenth of it: set the trainer's max_epochs "
                "or max_steps, or pass rule=lit_kd.weightings.Robust(warmup_epochs=...)"
            )
        self.length, self.warmup = length, self.warmup_epochs or max(1, round(length / 10))
        self.trusted, self.labels = trusted, labels
        table.add("weights", torch.tensor([1.0] + [0.0] * teachers))
        table.add("clean_probability", torch.ones(()))
        table.add("alignment", torch.tensor(torch.nan))  # nan: not seen in this epoch
        for name in ("log_probability", "label_log_odds", "student_class", "teacher_log_probability", *MEANS):
            table.add(name, torch.zeros(()))
        for name in ("teacher_class", "teacher_right", "teacher_right_mean"):
            table.add(name, torch.zeros(teachers))

    def active(self, epoch: int) -> bool:
        """From the last epoch of the warm-up on."""
        return epoch >= self.warmup - 1

    def observe(self, table: SampleTable, step: MetaStep) -> None:
        """Take down what the batch shows."""
        labelled = step.y != UNLABELED
        y = step.y.where(labelled, 0)
        student = step.logits.softmax(-1)
        outputs = torch.stack(step.teachers, dim=1)
        classes = outputs.argmax(-1)
        if "teacher_channel" not in table.shared:  # those of no rows
            table.shared["teacher_channel"] = teacher_channel(classes[:0], y[:0], student.shape[1])
            table.shared["label_channel"] = label_channel(y[:0], y[:0], student.shape[1])
        calibrated = torch.einsum("bkd,kdc->bkc", outputs.softmax(-1), table.shared["teacher_channel"])
        belief = (student + 1e-4).log() + (calibrated + 1e-4).log().mean(1)  # eq. (3)
        is_label = F.one_hot(y, student.shape[1]).bool() & labelled.unsqueeze(1)
        otherwise = belief.masked_fill(is_label, -torch.inf).softmax(-1)  # the true class, if the label is wrong
        of_label = y.view(-1, 1, 1).expand(-1, len(step.teachers), 1)
        alignment = step.alignment(table["weights"][step.index], 0.0)[:, 0]
        vouched = (alignment != 0).any()  # else all meta rows are in the batch, and nothing is shown
        table.write(
            step.index,
            alignment=alignment.where(vouched | ~labelled, torch.nan),
            log_probability=(student.gather(1, y.unsqueeze(1)).squeeze(1) + 1e-6).log(),
            label_log_odds=label_log_odds(student, y, table.shared["label_channel"]),
            student_class=student.argmax(-1).float(),
            teacher_class=classes.float(),
            teacher_log_probability=(calibrated.gather(2, of_label).squeeze(2) + 1e-3).log().mean(1),
            teacher_right=otherwise.gather(1, classes),
        )

    def validated(self, table: SampleTable, wrong: Tensor, rows: Tensor) -> None:
        """Keep the latest counts, of errors and of rows."""
        counts = torch.cat([wrong, rows.view(1)]).to(table["weights"])
        kept = table.shared.get("validation_counts", counts[:0].view(0, len(counts)))
        table.shared["validation_counts"] = torch.cat([kept, counts.unsqueeze(0)])[-SETTINGS.validations :]

    def renew(self, table: SampleTable, epoch: int) -> None:
        """From evidence to beliefs, from beliefs to weights."""
        labels, trusted = (values.to(table["epochs"].device) for values in (self.labels, self.trusted))
        labelled, seen = labels != UNLABELED, ~table["alignment"].isnan()
        if not self.active(epoch) or not (seen & labelled).any():
            return
        gather(table, seen, labelled)
        known = (table["epochs"] > 0) & labelled
        classes = table["teacher_class"].long()
        vouched = torch.isin(labels, labels[trusted])  # nothing speaks against labels of a class without trusted rows
        clean = clean_probability(table, labelled, trusted, known & vouched)
        table["clean_probability"] = clean = clean.where(vouched, labelled.to(clean))
        quality = teacher_quality(table) * (epoch + 1 >= round(SETTINGS.first_heard * self.warmup))
        trusted = trusted & known
        m = memorization(table, labels, trusted)
        # never all epochs: the table is to tell good teachers from others to the end
        part = min(epoch + 1, self.length - 1)
        shares = SETTINGS.largest_share * (1 - (1 - SETTINGS.lasting * m) * part / self.length) * quality  # eq. (7)
        voices = SETTINGS.least_voice + (1 - SETTINGS.least_voice) * quality  # eq. (8)
        table["weights"] = trust_to_weights(clean, teacher_right(table), classes, labels, shares, voices)
        table["alignment"] = torch.full_like(table["alignment"], torch.nan)
        student, num_classes = table["student_class"].long(), table.shared["teacher_channel"].shape[-1]
        table.shared["teacher_channel"] = teacher_channel(classes[trusted], labels[trusted], num_classes)
        # of trusted rows too: else hard rows would speak against their labels where they are not trusted alone
        table.shared["label_channel"] = label_channel(student[known], labels[known], num_classes)


def gather(table: SampleTable, seen: Tensor, labelled: Tensor) -> None:
    """Let the epoch's readings enter the running means of the rows that were seen, eq. (1)."""
    alignment = table["alignment"]
    rms = alignment[seen & labelled].square().mean().sqrt().clamp(min=torch.finfo(alignment.dtype).tiny)
    evidence = (alignment / rms).clamp(-3, 3)
    table["epochs"] = table["epochs"] + seen
    values = {name: table[name] for name in ("log_probability", "label_log_odds", "teacher_right")}
    for name, value in (values | {"evidence": evidence, "evidence_square": evidence.square()}).items():
        decay = SETTINGS.teacher_decay if name == "teacher_right" else SETTINGS.decay
        old = table[f"{name}_mean"]
        mask = seen.view(-1, *[1] * (old.dim() - 1))
        table[f"{name}_mean"] = torch.where(mask, decay * old + (1 - decay) * value, old)


def clean_probability(table: SampleTable, labelled: Tensor, trusted: Tensor, known: Tensor) -> Tensor:
    """The probability that a label is clean, ``(N,)``, from the evidence of eq. (2)."""
    correction = 1 - SETTINGS.decay ** table["epochs"].clamp(min=1)
    count = correction / (1 - SETTINGS.decay)
    mean = table["evidence_mean"] / correction
    variance = table["evidence_square_mean"] / correction - mean.square()
    statistic = mean * count.sqrt() / (variance + 0.05).sqrt()
    student, odds = (table[name] / correction for name in ("log_probability_mean", "label_log_odds_mean"))
    evidence = torch.stack([statistic, student, table["teacher_log_probability"], odds], dim=1)[known]
    fit = fit_clean_probability(evidence.double().cpu().numpy(), trusted[known].cpu().numpy())
    clean = torch.zeros_like(mean)
    clean[known] = torch.from_numpy(fit.clean).to(clean)
    others = known & ~trusted
    rate = (1 - clean[others]).sum() / others.sum().clamp(min=1)
    clean[~known] = 1 - rate
    clean[trusted] = 1
    clean[~labelled] = 0
    table.shared["noise_rate"] = rate
    return clean


def teacher_right(table: SampleTable) -> Tensor:
    """How far a teacher is believed where the label is wrong, eq. (4), ``(N, K)``."""
    correction = 1 - SETTINGS.teacher_decay ** table["epochs"].clamp(min=1)
    probability = table["teacher_right_mean"] / correction.unsqueeze(1)
    return ((probability - SETTINGS.proven) / (1 - SETTINGS.proven)).clamp(0, 1)


def teacher_quality(table: SampleTable) -> Tensor:
    """How much better than the student each teacher is on validation rows, eq. (5), in [0, 1], ``(K,)``."""
    counts = table.shared.get("validation_counts")
    if counts is None:
        return torch.zeros_like(table["teacher_class"][0])
    wrong = counts[:, :-1].mean(0) + SETTINGS.more_errors
    student, teachers = wrong[0], wrong[1:]
    standard_error = ((student + teachers) / 2).sqrt()
    quality = (1 - (teachers + 0.5 * standard_error) / student) / SETTINGS.fewer_errors
    return quality.clamp(0, 1).maximum(SETTINGS.least_quality * (teachers <= student).to(teachers))


def memorization(table: SampleTable, labels: Tensor, trusted: Tensor) -> Tensor:
    """How much better the student knows its own rows than others, eq. (6), in [0, 1]; trusted rows were seen."""
    counts = table.shared.get("validation_counts")
    if counts is None or not trusted.any():
        return torch.zeros_like(table["student_class"][0])
    more = SETTINGS.more_errors / counts[:, -1].mean()
    own = (table["student_class"][trusted].long() != labels[trusted]).to(counts).mean() + more
    others = counts[:, 0].sum() / counts[:, -1].sum() + more
    return ((1 - own / others) / SETTINGS.fewer_own_errors).clamp(0, 1)


def trust_to_weights(
    clean: Tensor, right: Tensor, classes: Tensor, labels: Tensor, shares: Tensor, voices: Tensor
) -> Tensor:
    """Weights ``(N, K + 1)`` by eq. (9), of p and labels ``(N,)``, r and classes ``(N, K)``, a and v ``(K,)``."""
    beside = shares * shares.amax() / shares.sum().clamp(min=1e-6)
    namesakes = (classes.unsqueeze(2) == classes.unsqueeze(1)).sum(2)
    trust = (1 - clean).unsqueeze(1) * right * (classes != labels.unsqueeze(1)) / namesakes
    label = (1 - shares.amax()) * clean
    total = (clean + trust.sum(1)).mean().clamp(min=1e-6)
    return torch.cat([label.unsqueeze(1), clean.unsqueeze(1) * beside + voices * trust], dim=1) / total
