"""The default rule: a gate that believes a label or a teacher only as far as trusted data speaks for it."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_kd.rules.base import MetaStep, Rule
from lit_kd.rules.pu import fit_clean_probability
from lit_kd.samples import SampleTable

DECAY = 0.9


class Robust(Rule):
    """A positive-unlabeled gate on the evidence of the meta-gradient [ours].

    Trusted meta rows are trained on like all others, and their evidence, each gathered against other meta rows, shows
    what clean labels look like, hard ones included. Training rows are a mixture of that and of noise, so one fit gives
    the probability that a label is clean, the noise rate, and a test for "no noise at all".

    In each epoch every row's gradients are aligned with the validation gradient at the current student, in the training
    step itself and without a look-ahead, so nothing depends on the learning rate. After the epoch the alignments,
    divided by their own root mean square and clipped, enter running means. What a t-statistic of these and the
    student's log-probability of the label say decides the weights of the next epoch: ``a = (1 - share) p`` for the
    label, ``b = share q`` for a teacher, where p and q are the probabilities that label and teacher help, and the share
    is positive only as far as the teacher's smaller error on trusted rows is proven. Meta rows keep ``p = 1``. The
    teacher's weight carries a factor that makes its gradients as large as the label's.

    Its limits: meta and training rows must be exchangeable but for the noise, augmentation included; evidence is read
    from the last layer, against features of up to 512 meta rows of the latest steps (with ``meta_gradient="exact"``
    from all layers, against the meta rows of one step); a student that is still far from fitting the clean rows takes
    some hard ones for noise.

    Args:
        warmup_epochs: Epochs at the weights (0.9, 0.1) before the first fit; ``None``: a sixth of the training.
    """

    trains_on_meta = True
    meta_rows = 512

    def __init__(self, warmup_epochs: int | None = None) -> None:
        self.warmup_epochs = warmup_epochs

    def start(self, table: SampleTable, teachers: int, trusted: Tensor, labelled: Tensor, epochs: int | None) -> None:
        """Add the weights, what one epoch shows, the running means of it, and beliefs shared by all rows."""
        self.trusted = trusted
        self.labelled = labelled
        if self.warmup_epochs is not None:
            self.warmup = self.warmup_epochs
        elif epochs is not None:
            self.warmup = max(1, round(epochs / 6))
        else:
            raise ValueError(
                "expected to know how long the training is, to warm up for a sixth of it: set the trainer's max_epochs "
                "or max_steps, or pass rule=lit_kd.rules.Robust(warmup_epochs=...)"
            )
        zero, terms = torch.zeros(()), torch.zeros(teachers + 1)
        table.add("weights", torch.tensor([0.9] + [0.1 / teachers] * teachers))
        table.add("clean_probability", zero + 1)
        # what one epoch shows; nan: not seen in it
        table.add("alignment", terms * torch.nan)
        table.add("gradient_norm", terms)
        table.add("wrong", terms)
        table.add("log_probability", zero)
        # over epochs
        table.add("epochs", zero)
        table.add("evidence_mean", terms)
        table.add("evidence_square_mean", terms)
        table.add("log_probability_mean", zero)
        table.shared.setdefault("teacher_prior_logit", torch.full((teachers,), 3.0))

    def active(self, epoch: int) -> bool:
        """From the last epoch of the warm-up on."""
        return epoch >= self.warmup - 1

    def observe(self, table: SampleTable, step: MetaStep) -> None:
        """Take down what this batch shows; nothing is decided before the epoch's end."""
        predictions = torch.stack([step.logits, *step.teachers], dim=1).argmax(-1)
        of_label = step.logits.softmax(-1).gather(1, step.y.clamp(min=0).unsqueeze(1)).squeeze(1)
        table.write(
            step.index,
            alignment=step.alignment(table["weights"][step.index], lr=0.0),
            gradient_norm=step.gradients.norm(dim=-1),
            wrong=(predictions != step.y.unsqueeze(1)).float(),
            log_probability=(of_label + 1e-6).log(),
        )

    def renew(self, table: SampleTable, epoch: int) -> None:
        """From evidence to beliefs, from beliefs to weights."""
        if not self.active(epoch):
            return
        seen = ~table["alignment"].isnan().any(1)
        labelled = self.labelled.to(seen.device)
        if not (seen & labelled).any():
            return
        self._gather(table, seen, labelled)
        known = (table["epochs"] > 0) & labelled
        statistic = self._t_statistic(table)
        correction = 1 - DECAY ** table["epochs"].clamp(min=1)
        features = torch.stack([statistic[:, 0], table["log_probability_mean"] / correction], dim=1)

        trusted = self.trusted.to(known.device)
        fit = fit_clean_probability(features[known].double().cpu().numpy(), trusted[known].cpu().numpy())
        clean = torch.full_like(table["log_probability"], 1 - fit.noise_rate)
        clean[known] = torch.from_numpy(fit.clean).to(clean)
        clean[trusted] = 1
        clean[~labelled] = 0
        table["clean_probability"] = clean
        table.shared["noise_rate"] = torch.tensor(fit.noise_rate)

        share = self._teacher_share(table, trusted & known)
        label = (1 - share.max()) * clean
        # several teachers divide the share of the best of them, each in proportion to its own
        teachers = share * share / share.sum().clamp(min=1e-6) * self._teacher_helps(table, statistic[:, 1:])
        total = (label + teachers.sum(1)).mean()
        norms = table["gradient_norm"][seen].mean(0)
        norms[0] = table["gradient_norm"][seen & labelled, 0].mean()
        equal_size = (norms[:1] / norms[1:].clamp(min=1e-12)).clamp(0.05, 20)
        table["weights"] = torch.cat([label.unsqueeze(1), equal_size * teachers], dim=1) / total
        table["alignment"] = torch.full_like(table["alignment"], torch.nan)

    @staticmethod
    def _gather(table: SampleTable, seen: Tensor, labelled: Tensor) -> None:
        """Let the epoch's readings enter the running means of the rows that were seen."""
        alignment = table["alignment"]
        square = alignment[seen].square().mean(0)
        square[0] = alignment[seen & labelled, 0].square().mean()
        rms = square.sqrt().clamp(min=torch.finfo(alignment.dtype).tiny)
        evidence = (alignment / rms).clamp(-3, 3)
        table["epochs"] = table["epochs"] + seen
        for name, value in [
            ("evidence_mean", evidence),
            ("evidence_square_mean", evidence.square()),
            ("log_probability_mean", table["log_probability"]),
        ]:
            old = table[name]
            mask = seen.view(-1, *[1] * (old.dim() - 1))
            table[name] = torch.where(mask, DECAY * old + (1 - DECAY) * value, old)

    @staticmethod
    def _t_statistic(table: SampleTable) -> Tensor:
        """How surely a term helps a sample, ``(N, K + 1)``: the mean evidence over its standard error."""
        correction = (1 - DECAY ** table["epochs"].clamp(min=1)).unsqueeze(1)
        count = correction / (1 - DECAY)
        mean = table["evidence_mean"] / correction
        variance = table["evidence_square_mean"] / correction - mean.square()
        return mean * count.sqrt() / (variance + 0.05).sqrt()

    @staticmethod
    def _teacher_share(table: SampleTable, trusted: Tensor) -> Tensor:
        """Each teacher's share of the loss, ``(K,)`` in [0, 0.5]: as far as fewer errors on trusted rows are proven."""
        if not trusted.any():
            return torch.zeros_like(table["wrong"][0, 1:])
        wrong = table["wrong"][trusted].mean(0)
        student = table.shared.get("student_error", wrong[0])
        student = DECAY * student + (1 - DECAY) * wrong[0]
        table.shared["student_error"] = student
        proven = student - wrong[1:] - ((student + wrong[1:]) / trusted.sum()).sqrt()
        return 0.5 * (proven / (student + 1e-6)).clamp(0, 1)

    @staticmethod
    def _teacher_helps(table: SampleTable, statistic: Tensor) -> Tensor:
        """The probability that a teacher helps a sample, ``(N, K)``: a sigmoid whose offset fits its own mean."""
        score = 3 * (statistic + 1).clamp(-4, 4)
        prior = table.shared["teacher_prior_logit"].to(score)
        for _ in range(3):
            prior = torch.sigmoid(score + prior).mean(0).clamp(0.02, 0.9999).logit().clamp(-2, 6)
        table.shared["teacher_prior_logit"] = prior
        return torch.sigmoid(score + prior)
