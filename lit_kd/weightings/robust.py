"""The default rule: believe a label or a teacher only as far as trusted data speaks for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.trust.channels import label_channel, label_log_odds, teacher_channel
from lit_kd.trust.positive_unlabeled import fit_clean_probability
from lit_kd.types import UNLABELED
from lit_kd.weightings.base import MetaStep, Rule

DECAY = 0.9
"""Of the running means of evidence about a label."""
TEACHER_DECAY = 0.7
"""Of the running mean of the belief in a teacher, which changes faster, as the student learns."""
LARGEST_SHARE = 0.9
"""Of the trust in a label, what a teacher of quality 1 would have at the training's start; later it has less."""
LASTING = 0.5
"""What part of that is left at the end where the student knows its rows by heart; none where it fits others as well."""
FEWER_OWN_ERRORS = 1 / 3
"""Than on validation rows, relative to these, that a student makes on rows that it knows by heart."""
FIRST_HEARD = 1.6
"""Warm-ups after which teachers are first heard beside labels; a student of wrong labels has begun to unlearn them."""
VALIDATIONS = 2
"""Over how many of the latest ones errors are compared."""
MORE_ERRORS = 5
"""That student and teachers are thought to make in each validation, so that one row decides less."""
FEWER_ERRORS = 1 / 8
"""Than the student's, relative to them, that a teacher of quality 1 makes."""
LEAST_QUALITY = 0.05
"""Of a teacher with no more errors than the student, so that the table tells it from worse ones."""
PROVEN = 0.8
"""Probability from which on a teacher is listened to against the label."""


class Robust(Rule):
    """Beliefs about labels and teachers from evidence on trusted rows [ours].

    Is the label right? Trusted meta rows are trained on like all others, and their evidence, each gathered against
    other meta rows, shows what clean labels look like, hard ones included. Training rows are a mixture of that and of
    noise, a positive-unlabeled problem: one fit gives p, the probability that a label is clean, the noise rate, and a
    test for "no noise at all". The evidence: a t-statistic over epochs of the label's alignment with the validation
    gradient at the current student (gathered in the training step, without a look-ahead, so that nothing depends on the
    learning rate), the student's log-probability of the label, the mean of the teachers', and the label's log-odds,
    which weigh its class against those that are mistaken for it, by the student's classes and the labels of all
    rows.

    Is the teacher right where it does not name the label's class? Then the label must be wrong, and the true class be
    the teacher's: ``(1 - p) r``, where r combines the student's probabilities with the teachers', and these first pass
    through the confusion of predicted and true classes on trusted rows. Below r = 0.8 the teacher is not listened to.

    How is the trust in a label shared out with teachers, who say more of a row than one class? Their errors on
    validation rows are compared with the student's, over the two latest validations, with five errors more for each and
    half a standard error more for a teacher: its quality is 1 for an eighth fewer than the student's, falls evenly to 0
    for as many, and is at least 0.05 if it makes no more before anything is added. Of the trust in a label a teacher
    has 0.9 times its quality, times ``1 - (1 - m / 2) e / n`` after e of n epochs, the last of which counts as the one
    before. m is how far the student has memorized its rows: 1 where the error rate on trusted rows, each read when the
    student last learned from it, is lower by a third or more than that on validation rows, 0 where it is no lower, as
    in a student that is too small to follow labels and teachers at once, and evenly between, with the same five errors
    added to both. So in ten epochs or more, with a warm-up of the default length, one of quality 1 begins with 0.72 or
    more, and ends with 0.9 / n to 0.45 (1 + 1 / n). Several have together what the best of them would have alone, in
    proportion to these; the label has the rest. Of what a teacher is trusted with against the label it has 0.3, and the
    other 0.7 times its quality. Until 1.6 warm-ups, to the nearest epoch, are over, and before any validation, the
    quality is 0. A row whose label and teachers are all wrong has no weight at all.

    Its limits: meta and training rows must be exchangeable but for the noise, augmentation included; evidence is read
    against features of up to 512 meta rows of the latest steps (with ``meta_gradient="exact"`` through all layers,
    against the meta rows of one step); the teachers must not have been trained on meta or validation rows; where
    validation labels are wrong, good and bad teachers look more alike; where the student makes few errors, few
    validation rows decide; where it overtakes all teachers, a finished run's table holds no weight of theirs beside
    labels that are right. Validations are of earlier epochs, the more so where they are rarer: teachers are compared
    with an earlier, worse student, and one that learns fast looks as if it had memorized more; with dropout,
    augmentation or batch statistics, less.

    Args:
        warmup_epochs: Epochs on labels alone before the first fit; ``None``: a tenth of the training. Where nobody
            knows how long the training is, it counts as a tenth of it. Teachers are first heard beside labels after
            1.6 times as many.
    """

    trains_on_meta = True
    meta_rows = 512
    wants_validation = True

    def __init__(self, warmup_epochs: int | None = None) -> None:
        if warmup_epochs is not None and warmup_epochs < 1:
            raise ValueError(f"expected warmup_epochs of at least 1, or None; found {warmup_epochs}")
        self.warmup_epochs = warmup_epochs

    def start(self, table: SampleTable, teachers: int, trusted: Tensor, labels: Tensor, epochs: int | None) -> None:
        """Add the weights, what one epoch shows, the running means of it, and beliefs shared by all rows."""
        if self.warmup_epochs is not None:
            self.warmup = self.warmup_epochs
        elif epochs is not None:
            self.warmup = max(1, round(epochs / 10))
        else:
            raise ValueError(
                "expected to know how long the training is, to warm up for a tenth of it: set the trainer's max_epochs "
                "or max_steps, or pass rule=lit_kd.weightings.Robust(warmup_epochs=...)"
            )
        self.trusted = trusted
        self.labels = labels
        self.length = epochs or 10 * self.warmup
        zero, each = torch.zeros(()), torch.zeros(teachers)
        table.add("weights", torch.tensor([1.0] + [0.0] * teachers))
        table.add("clean_probability", zero + 1)
        # what one epoch shows; nan: not seen in it
        table.add("alignment", zero * torch.nan)
        table.add("log_probability", zero)
        table.add("label_log_odds", zero)
        table.add("student_class", zero)
        table.add("teacher_class", each)
        table.add("teacher_log_probability", zero)
        table.add("teacher_right", each)
        # over epochs
        table.add("epochs", zero)
        table.add("evidence_mean", zero)
        table.add("evidence_square_mean", zero)
        table.add("log_probability_mean", zero)
        table.add("label_log_odds_mean", zero)
        table.add("teacher_right_mean", each)

    def active(self, epoch: int) -> bool:
        """From the last epoch of the warm-up on."""
        return epoch >= self.warmup - 1

    def observe(self, table: SampleTable, step: MetaStep) -> None:
        """Take down what this batch shows; nothing is decided before the epoch's end."""
        labelled = step.y != UNLABELED
        y = step.y.where(labelled, 0)
        student = step.logits.softmax(-1)
        outputs = torch.stack(step.teachers, dim=1)
        classes = outputs.argmax(-1)
        if "teacher_channel" not in table.shared:
            table.shared["teacher_channel"] = teacher_channel(classes[:0], y[:0], student.shape[1])
        if "label_channel" not in table.shared:
            table.shared["label_channel"] = label_channel(y[:0], y[:0], student.shape[1])
        calibrated = torch.einsum("bkd,kdc->bkc", outputs.softmax(-1), table.shared["teacher_channel"])
        belief = (student + 1e-4).log() + (calibrated + 1e-4).log().mean(1)
        is_label = F.one_hot(y, student.shape[1]).bool() & labelled.unsqueeze(1)
        otherwise = belief.masked_fill(is_label, -torch.inf).softmax(-1)  # the true class, if the label is wrong
        of_label = y.view(-1, 1, 1).expand(-1, len(step.teachers), 1)
        alignment = step.alignment(table["weights"][step.index], lr=0.0)[:, 0]
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
        """Keep the latest counts, of errors and of rows; of two validations, that of more rows has more to say."""
        counts = torch.cat([wrong, rows.view(1)]).to(table["weights"])
        kept = table.shared.get("validation_counts", counts[:0].view(0, len(counts)))
        table.shared["validation_counts"] = torch.cat([kept, counts.unsqueeze(0)])[-VALIDATIONS:]

    def renew(self, table: SampleTable, epoch: int) -> None:
        """From evidence to beliefs, from beliefs to weights."""
        if not self.active(epoch):
            return
        rows = _Rows(*(t.to(table["epochs"].device) for t in (self.labels, self.trusted)))
        seen = ~table["alignment"].isnan()
        if not (seen & rows.labelled).any():
            return
        self._gather(table, seen, rows.labelled)
        known = (table["epochs"] > 0) & rows.labelled
        classes = table["teacher_class"].long()
        clean = self._clean(table, rows, known)
        quality = teacher_quality(table)
        if epoch + 1 < round(FIRST_HEARD * self.warmup):
            quality = torch.zeros_like(quality)
        trusted = rows.trusted & known
        m = memorization(table, rows.labels, trusted)
        after = min(epoch + 1, self.length - 1)  # never all: the table is to tell good teachers from others to the end
        shares = LARGEST_SHARE * (1 - (1 - LASTING * m) * after / self.length) * quality
        voices = 0.3 + 0.7 * quality
        table["clean_probability"] = clean
        table["weights"] = trust_to_weights(clean, self._teacher_right(table), classes, rows.labels, shares, voices)
        table["alignment"] = torch.full_like(table["alignment"], torch.nan)
        student, num_classes = table["student_class"].long(), table.shared["teacher_channel"].shape[-1]
        table.shared["teacher_channel"] = teacher_channel(classes[trusted], rows.labels[trusted], num_classes)
        # of trusted rows too: else a hard row would speak against its label where it is not trusted, and there alone
        table.shared["label_channel"] = label_channel(student[known], rows.labels[known], num_classes)

    @staticmethod
    def _gather(table: SampleTable, seen: Tensor, labelled: Tensor) -> None:
        """Let the epoch's readings enter the running means of the rows that were seen."""
        alignment = table["alignment"]
        rms = alignment[seen & labelled].square().mean().sqrt().clamp(min=torch.finfo(alignment.dtype).tiny)
        evidence = (alignment / rms).clamp(-3, 3)
        table["epochs"] = table["epochs"] + seen
        for name, value, decay in [
            ("evidence_mean", evidence, DECAY),
            ("evidence_square_mean", evidence.square(), DECAY),
            ("log_probability_mean", table["log_probability"], DECAY),
            ("label_log_odds_mean", table["label_log_odds"], DECAY),
            ("teacher_right_mean", table["teacher_right"], TEACHER_DECAY),
        ]:
            old = table[name]
            mask = seen.view(-1, *[1] * (old.dim() - 1))
            table[name] = torch.where(mask, decay * old + (1 - decay) * value, old)

    @staticmethod
    def _clean(table: SampleTable, rows: _Rows, known: Tensor) -> Tensor:
        """The probability that a label is clean, ``(N,)``."""
        correction = 1 - DECAY ** table["epochs"].clamp(min=1)
        count = correction / (1 - DECAY)
        mean = table["evidence_mean"] / correction
        variance = table["evidence_square_mean"] / correction - mean.square()
        statistic = mean * count.sqrt() / (variance + 0.05).sqrt()
        student, odds = (table[name] / correction for name in ("log_probability_mean", "label_log_odds_mean"))
        evidence = torch.stack([statistic, student, table["teacher_log_probability"], odds], dim=1)[known]
        fit = fit_clean_probability(evidence.double().cpu().numpy(), rows.trusted[known].cpu().numpy())
        clean = torch.zeros_like(mean)
        clean[known] = torch.from_numpy(fit.clean).to(clean)
        others = known & ~rows.trusted
        rate = (1 - clean[others]).sum() / others.sum().clamp(min=1)
        clean[~known] = 1 - rate
        clean[rows.trusted] = 1
        clean[~rows.labelled] = 0
        table.shared["noise_rate"] = rate
        return clean

    @staticmethod
    def _teacher_right(table: SampleTable) -> Tensor:
        """The probability that a teacher is right given that the label is wrong, ``(N, K)``; 0 if it is not proven."""
        correction = 1 - TEACHER_DECAY ** table["epochs"].clamp(min=1)
        probability = table["teacher_right_mean"] / correction.unsqueeze(1)
        return ((probability - PROVEN) / (1 - PROVEN)).clamp(0, 1)


class _Rows(NamedTuple):
    """What is known of the rows from the start."""

    labels: Tensor
    trusted: Tensor

    @property
    def labelled(self) -> Tensor:
        return self.labels != UNLABELED


def teacher_quality(table: SampleTable) -> Tensor:
    """How much better than the student each teacher is on validation rows, in [0, 1], ``(K,)`` [ours].

    Each is thought to make five errors more in a validation, and a teacher half a standard error more, half of all
    errors being common to both. Then 1 is for an eighth fewer than the student's, and 0 for as many. A teacher that
    makes no more errors than the student, before anything is added, has at least 0.05. Before any validation it is 0.
    """
    counts = table.shared.get("validation_counts")
    if counts is None:
        return torch.zeros_like(table["teacher_class"][0])
    wrong = counts[:, :-1].mean(0) + MORE_ERRORS
    student, teachers = wrong[0], wrong[1:]
    standard_error = ((student + teachers) / 2).sqrt()
    quality = (1 - (teachers + 0.5 * standard_error) / student) / FEWER_ERRORS
    return quality.clamp(0, 1).maximum(LEAST_QUALITY * (teachers <= student).to(teachers))


def memorization(table: SampleTable, labels: Tensor, trusted: Tensor) -> Tensor:
    """How far the student knows its own rows better than others, in [0, 1], ``()`` [ours].

    Its error rate on trusted rows, as it learns from them, against that on rows of the latest validations, five errors
    of one validation's rows added to both rates: 1 where it is then lower by a third or more, falling evenly to 0 where
    it is no lower. Without any validation, or trusted rows that were seen, it is 0.

    Args:
        table: With the classes that the student predicted when it last saw a row, and the counts of validations.
        labels: ``(N,)``.
        trusted: Which rows are trusted and were seen, ``(N,)``.
    """
    counts = table.shared.get("validation_counts")
    if counts is None or not trusted.any():
        return torch.zeros_like(table["student_class"][0])
    more = MORE_ERRORS / counts[:, -1].mean()
    own = (table["student_class"][trusted].long() != labels[trusted]).to(counts).mean() + more
    others = counts[:, 0].sum() / counts[:, -1].sum() + more
    return ((1 - own / others) / FEWER_OWN_ERRORS).clamp(0, 1)


def trust_to_weights(
    clean: Tensor, right: Tensor, classes: Tensor, labels: Tensor, shares: Tensor, voices: Tensor
) -> Tensor:
    """Share out the trust in each label with the teachers, and that in other classes among those who name them [ours].

    Args:
        clean: p, the probability that the label is right, ``(N,)``.
        right: The probability that a teacher is right if the label is wrong, ``(N, K)``.
        classes: Classes that the teachers predict, ``(N, K)``.
        labels: ``(N,)``.
        shares: Of the trust in a label, what each teacher would have alone, ``(K,)``.
        voices: Of the trust in a teacher against the label, what it has, ``(K,)``.

    Returns:
        Weights of label and teachers, ``(N, K + 1)``; the trust behind them has mean 1.
    """
    beside = shares * shares.amax() / shares.sum().clamp(min=1e-6)
    namesakes = (classes.unsqueeze(2) == classes.unsqueeze(1)).sum(2)
    trust = (1 - clean).unsqueeze(1) * right * (classes != labels.unsqueeze(1)) / namesakes
    label = (1 - shares.amax()) * clean
    total = (clean + trust.sum(1)).mean().clamp(min=1e-6)
    return torch.cat([label.unsqueeze(1), clean.unsqueeze(1) * beside + voices * trust], dim=1) / total
