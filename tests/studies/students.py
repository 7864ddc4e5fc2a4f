"""Students trained side by side, and what each method makes of labels, teachers and trusted rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from mlps import BATCH, Mlps, cosine
from scenarios import Data, Experiment
from torch import Tensor

from lit_kd import Batch
from lit_kd.data import SampleTable
from lit_kd.data.sampler import EpochSampler
from lit_kd.data.seeds import derive_seed
from lit_kd.trust import belief
from lit_kd.trust.transition import gold_transition
from lit_kd.weightings import Amal, MetaWeightNet, Paper, Robust, robust
from lit_kd.weightings.base import MetaStep, count_errors
from lit_kd.weightings.reweighting import net_weights

EPOCHS, HIDDEN, TEMPERATURE = 30, 32, 4.0


class Runs:
    """Experiments on one data set side by side, padded with rows that nobody sees, the last one always."""

    def __init__(self, data: Data, experiments: list[Experiment]) -> None:
        self.data, self.experiments, self.classes = data, experiments, data.classes
        self.each = torch.arange(len(experiments)).unsqueeze(1)
        self.x = self.stack([e.x for e in experiments])
        self.onehot = self.stack([F.one_hot(e.y, data.classes).float() for e in experiments])

    def stack(self, parts: list[Tensor]) -> Tensor:
        """Values of each experiment's rows, ``(E, N, ...)``."""
        size = max(len(e.y) for e in self.experiments) + 1
        return torch.stack([torch.cat([p, p.new_zeros(size - len(p), *p.shape[1:])]) for p in parts])

    def train(self, method: Method, meta: bool = True) -> Mlps:
        """The nets after the last epoch."""
        self.nets = nets = Mlps([e.seed for e in self.experiments], self.x.shape[-1], HIDDEN, self.classes)
        sizes = [len(e.y) if meta else e.rows for e in self.experiments]
        samplers = [
            EpochSampler(size, seed=derive_seed(e.seed, "order"))
            for size, e in zip(sizes, self.experiments, strict=True)
        ]
        for epoch in range(EPOCHS):
            order = torch.full((len(sizes), max(sizes)), -1)
            for row, sampler in zip(order, samplers, strict=True):
                sampler.set_epoch(epoch)
                row[: len(sampler)] = torch.from_numpy(sampler.order())
            logits = torch.zeros_like(self.onehot)  # as they were when the row was trained on
            for index in torch.split(order, BATCH, dim=1):
                x, rows = self.x[self.each, index], (index >= 0).sum(1)
                hidden, z = nets.forward(x)
                logits[self.each, index] = z
                share = (index >= 0) / rows.clamp(min=1).unsqueeze(1)
                dz = method.gradient(z, z.softmax(-1), index) * share.unsqueeze(-1)
                nets.step(x, hidden, dz, cosine(epoch, EPOCHS), rows > 0)
            method.renew(epoch, logits, nets)
        return nets


class Method:
    """Cross-entropy with the labels, and the base of the others."""

    def begin(self, runs: Runs) -> None:
        """Start anew."""
        self.runs = runs

    def of(self, values: Tensor, index: Tensor) -> Tensor:
        """Values of the rows of a batch, ``(E, B, ...)``."""
        return values[self.runs.each, index]

    def gradient(self, z: Tensor, p: Tensor, index: Tensor) -> Tensor:
        """Of the loss of each row, by its logits z of probabilities p, ``(E, B, C)``."""
        return p - self.of(self.runs.onehot, index)

    def renew(self, epoch: int, logits: Tensor, nets: Mlps) -> None:
        """After an epoch."""

    def doubt(self, i: int) -> Tensor | None:
        """How probable it is that each label of experiment i is wrong."""
        return None


class KD(Method):
    """Knowledge distillation with a fixed weight."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def begin(self, runs: Runs) -> None:
        super().begin(runs)
        self.soft = runs.stack([(e.teacher / TEMPERATURE).softmax(-1) for e in runs.experiments])

    def taught(self, z: Tensor, index: Tensor) -> Tensor:
        """The gradient of the teacher's part."""
        return TEMPERATURE * ((z / TEMPERATURE).softmax(-1) - self.of(self.soft, index))

    def gradient(self, z: Tensor, p: Tensor, index: Tensor) -> Tensor:
        return (1 - self.weight) * super().gradient(z, p, index) + self.weight * self.taught(z, index)


class GCE(Method):
    """Generalised cross-entropy (arXiv 1805.07836), q = 0.7."""

    def gradient(self, z: Tensor, p: Tensor, index: Tensor) -> Tensor:
        onehot = self.of(self.runs.onehot, index)
        return (p * onehot).sum(-1, keepdim=True) ** 0.7 * (p - onehot)


def pull(p: Tensor, target: Tensor) -> Tensor:
    """The gradient of `lit_kd.losses.early_learning`."""
    inside = p.clamp(1e-4, 1 - 1e-4)
    of_p = -target * (inside == p) / (1 - (target * inside).sum(-1, keepdim=True))
    return p * (of_p - (p * of_p).sum(-1, keepdim=True))


class ELR(Method):
    """Early-learning regularisation (arXiv 2007.00151)."""

    def begin(self, runs: Runs) -> None:
        super().begin(runs)
        self.memory = torch.zeros_like(runs.onehot)

    def gradient(self, z: Tensor, p: Tensor, index: Tensor) -> Tensor:
        inside = p.clamp(1e-4, 1 - 1e-4)
        target = 0.7 * self.of(self.memory, index) + 0.3 * inside / inside.sum(-1, keepdim=True)
        self.memory[self.runs.each, index] = target
        return super().gradient(z, p, index) + 3 * pull(p, target)


class GLC(Method):
    """Gold loss correction (arXiv 1802.05300); the student's own first training tells how labels are mistaken."""

    def begin(self, runs: Runs) -> None:
        super().begin(runs)
        plain = Method()
        plain.begin(runs)
        said = runs.train(plain, meta=False).forward(runs.x)[1].softmax(-1)
        self.likelihood = runs.onehot.clone()
        for i, e in enumerate(runs.experiments):
            transition = gold_transition(said[i, e.rows : len(e.y)], e.y[e.rows :])
            self.likelihood[i, : e.rows] @= transition.T

    def gradient(self, z: Tensor, p: Tensor, index: Tensor) -> Tensor:
        found = p * self.of(self.likelihood, index)
        return p - found / found.sum(-1, keepdim=True).clamp(min=1e-12)


class CoTeaching(Method):
    """Co-teaching (arXiv 1804.06872), told the true share of wrong labels."""

    def begin(self, runs: Runs) -> None:
        super().begin(runs)
        seeds = [derive_seed(e.seed, "peer") for e in runs.experiments]
        self.peers, self.epoch = Mlps(seeds, runs.x.shape[-1], HIDDEN, runs.classes), 0
        self.noise = torch.tensor([float((e.y != e.true).float().mean()) for e in runs.experiments])

    def gradient(self, z: Tensor, p: Tensor, index: Tensor) -> Tensor:
        x, onehot, shown = self.of(self.runs.x, index), self.of(self.runs.onehot, index), index >= 0
        hidden, other = self.peers.forward(x)
        kept = ((1 - self.noise * min(self.epoch / 10, 1)) * shown.sum(1)).round().clamp(min=1).unsqueeze(1)
        mine, theirs = p - onehot, other.softmax(-1) - onehot
        small = []
        for logits in z, other:
            losses = -(logits.log_softmax(-1) * onehot).sum(-1)
            order = losses.masked_fill(~shown, torch.inf).argsort(dim=1, stable=True).argsort(1)
            small.append((order < kept).float() / kept * shown)
        self.peers.step(x, hidden, theirs * small[0].unsqueeze(-1), cosine(self.epoch, EPOCHS), shown.any(1))
        return mine * small[1].unsqueeze(-1) * shown.sum(1).view(-1, 1, 1)

    def renew(self, epoch: int, logits: Tensor, nets: Mlps) -> None:
        self.epoch = epoch + 1


class LooksAhead(KD):
    """The base of what learns weights by a look-ahead step of the last layer.

    It sees all trusted rows at once, the library those of the latest batches.
    """

    def begin(self, runs: Runs) -> None:
        super().begin(runs)
        self.trusted, self.epoch = runs.stack([e.trusted for e in runs.experiments]).float(), 0

    def slopes(self, terms: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """``dL_val / d weights``, ``(E, B, S)``, from the terms' gradients ``(E, B, S, C)``."""
        nets, lr = self.runs.nets, cosine(self.epoch, EPOCHS)
        hidden, all_hidden = (nets.forward(x)[0] for x in (self.of(self.runs.x, index), self.runs.x))
        shares = (index >= 0).unsqueeze(-1) / (index >= 0).sum(1).view(-1, 1, 1).clamp(min=1)
        vouching = self.trusted.clone()
        vouching[self.runs.each, index] = 0  # no row vouches for itself
        vouching /= vouching.sum(1, keepdim=True).clamp(min=1)
        ahead = lr * (weights.unsqueeze(-1) * terms).sum(2) * shares
        w, b = nets.parameters[2] - hidden.mT @ ahead, nets.parameters[3] - ahead.sum(1, keepdim=True)
        error = ((all_hidden @ w + b).softmax(-1) - self.runs.onehot) * vouching.unsqueeze(-1)
        moved = hidden @ (all_hidden.mT @ error) + error.sum(1, keepdim=True)
        return -lr * shares * (terms * moved.unsqueeze(2)).sum(-1)

    def renew(self, epoch: int, logits: Tensor, nets: Mlps) -> None:
        self.epoch = epoch + 1


class Published(LooksAhead):
    """ALM-KD with a published rule."""

    def __init__(self, rule: Amal) -> None:
        super().__init__(0)
        self.rule = rule

    def begin(self, runs: Runs) -> None:
        super().begin(runs)
        self.rule.start(SampleTable(1, ""), 1, torch.ones(1, dtype=torch.bool), torch.zeros(1), EPOCHS)
        self.weights = self.rule.first_weights(torch.full((1, 1), self.rule.start_weight or 0.5)).repeat(
            *runs.x.shape[:2], 1
        )

    def gradient(self, z: Tensor, p: Tensor, index: Tensor) -> Tensor:
        terms = torch.stack([Method.gradient(self, z, p, index), self.taught(z, index)], dim=2)
        if self.rule.active(self.epoch):
            self.weights[self.runs.each, index] = self.moved(terms, index)
        return (self.of(self.weights, index).unsqueeze(-1) * terms).sum(2)

    def moved(self, terms: Tensor, index: Tensor) -> Tensor:
        """Weights after the steps of a batch, ``(E, B, 2)``, from the gradients of label and teacher."""
        weights, size = self.of(self.weights, index), (index >= 0).sum(1).view(-1, 1, 1) / 128
        for _ in range(self.rule.repeats):
            gradient = self.slopes(terms, weights, index) * self.rule.step_size * size
            weights = self.rule.move(weights.flatten(0, 1), gradient.flatten(0, 1), 1.0).view_as(weights)
        return weights


class MetaWeights(LooksAhead):
    """Meta-Weight-Net (arXiv 1902.07379): the library's networks, one for each experiment, and its Adam."""

    def __init__(self) -> None:
        super().__init__(0)

    def begin(self, runs: Runs) -> None:
        super().begin(runs)
        self.rule, table = MetaWeightNet(), SampleTable(1, "")
        count = len(runs.experiments)
        self.rule.start(table, count - 1, torch.ones(1), torch.zeros(1), EPOCHS)
        self.state = table.shared  # all start alike, and each counts its own steps
        self.state["weight_net"] = self.state["weight_net"][:1].repeat(count, 1)
        self.state["weight_net_steps"] = torch.zeros(count, 1)

    @torch.no_grad()
    def gradient(self, z: Tensor, p: Tensor, index: Tensor) -> Tensor:
        term, net = Method.gradient(self, z, p, index), self.state["weight_net"].detach().requires_grad_()
        losses = -(z.log_softmax(-1) * self.of(self.runs.onehot, index)).sum(-1).T
        with torch.enable_grad():
            weights = net_weights(net, losses).T.unsqueeze(-1)
        slopes = self.slopes(term.unsqueeze(2), weights.detach(), index)
        before, shown = dict(self.state), (index >= 0).any(1, keepdim=True)
        self.rule.update(self.state, torch.autograd.grad(weights, net, slopes)[0])
        for name, value in before.items():  # nothing moves without a row
            self.state[name] = self.state[name].where(shown, value)
        return net_weights(self.state["weight_net"], losses).T.unsqueeze(-1) * term


class Trusting(KD):
    """ALM-KD with the rule robust: the rule itself, asked after each epoch.

    Args:
        early: The share of the training until teachers are heard.
        teachers: Whether anybody knows how good they are.
        revision: Whether another class may take the label's place.
        parts: What takes the place of parts of `lit_kd.trust.belief`.
        **options: Of the rule.
    """

    def __init__(
        self, early: float = 0.1, teachers: bool = True, revision: bool = True, parts: Any = None, **options: Any
    ) -> None:
        self.early, self.teachers, self.revision = max(1, round(early * EPOCHS)), teachers, revision
        self.parts, self.options = parts or {}, options

    def begin(self, runs: Runs) -> None:
        super().begin(runs)
        self.rules, self.tables = [], []
        for e in runs.experiments:
            rule, table = Robust(early_epochs=self.early, **self.options), SampleTable(len(e.y), "")
            rule.start(table, 1, e.trusted, e.y, EPOCHS)
            self.rules.append(rule)
            self.tables.append(table)
        self.read()

    def read(self) -> None:
        """What the student is to learn now."""
        found: list[list[Tensor]] = []
        for e, rule, table in zip(self.runs.experiments, self.rules, self.tables, strict=True):
            index = torch.arange(len(e.y))
            target = F.one_hot(rule.revise(table, Batch(e.x, e.y, index)).y, self.runs.classes).float()
            found.append([rule.weights(table, index), target])
        self.weights, self.target = (self.runs.stack(list(parts)) for parts in zip(*found, strict=True))

    def gradient(self, z: Tensor, p: Tensor, index: Tensor) -> Tensor:
        weights = self.of(self.weights, index)
        label, taught = p - self.of(self.target, index), self.taught(z, index)
        return weights[..., :1] * label + weights[..., 1:] * taught

    def renew(self, epoch: int, logits: Tensor, nets: Mlps) -> None:
        val = nets.forward(torch.stack([e.val[0] for e in self.runs.experiments]))[1]
        believing = {} if self.revision else {"believe": unrevised}
        with patch.dict(vars(belief), self.parts), patch.dict(vars(robust), believing):
            for i, (e, rule, table) in enumerate(zip(self.runs.experiments, self.rules, self.tables, strict=True)):
                index = torch.arange(len(e.y))
                said = logits[i, : len(e.y)], [e.teacher]
                rule.observe(table, MetaStep(index, e.y, *said, lambda weights, lr: weights, 0.0, len(e.y)))
                with self.witness(i, table):
                    rule.renew(table, epoch)
                if self.teachers:
                    wrong = count_errors(val[i], e.val[1], [e.teacher_val], [None])
                    rule.validated(table, wrong, torch.tensor(len(e.val[1])))
        self.read()

    def witness(self, i: int, table: SampleTable) -> AbstractContextManager[None]:
        """Nobody else."""
        return nullcontext()

    def doubt(self, i: int) -> Tensor | None:
        return 1 - self.tables[i]["clean_probability"]


class WithMetaGradient(Trusting):
    """The meta-gradient of a label's weight, at the last layer, is a witness, too: it scales the odds of the label.

    Args:
        gain: Of the odds' logarithm, for each root mean square of the alignment.
    """

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def begin(self, runs: Runs) -> None:
        super().begin(runs)
        self.trusted = runs.stack([e.trusted for e in runs.experiments]).unsqueeze(-1)
        self.alignment = torch.zeros(runs.x.shape[:2])

    def renew(self, epoch: int, logits: Tensor, nets: Mlps) -> None:
        hidden, z = nets.forward(self.runs.x)
        error = z.softmax(-1) - self.runs.onehot
        validation = error * self.trusted / self.trusted.sum(1, keepdim=True)
        moved = hidden @ (validation.mT @ hidden).mT + validation.sum(1, keepdim=True)
        found = (error * moved).sum(-1)
        scale = found.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
        self.alignment.lerp_((found / scale).clamp(-3, 3), 0.2)
        super().renew(epoch, logits, nets)

    @contextmanager
    def witness(self, i: int, table: SampleTable) -> Iterator[None]:
        memory, rows = table["memory"], table.size
        odds = torch.exp(self.gain * self.alignment[i, :rows]).unsqueeze(1)
        table["memory"] = belief.normalised(memory * torch.where(self.runs.onehot[i, :rows] > 0, odds, 1.0))
        yield
        table["memory"] = memory


def unrevised(student: Tensor, labels: Tensor, *others: Any) -> belief.Belief:
    """A row in whose label nobody believes is not learned."""
    found = belief.believe(student, labels, *others)
    return found._replace(weights=found.weights * (found.classes == labels).unsqueeze(1))


def no_witness(student: Tensor, y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of the labels' channel one in which labels say nothing."""
    return torch.full((student.shape[1],) * 2, 1 / student.shape[1]), belief.normalised(student)


OURS = "robust"
Maker = Callable[[], Method]
RIVALS: dict[str, Maker] = {
    "CE": Method,
    **{f"KD {weight}": partial(KD, weight) for weight in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)},
    "ELR": ELR,
    "GLC": GLC,
    "GCE": GCE,
    "Co-teaching": CoTeaching,
    "Meta-Weight-Net": MetaWeights,
    "paper": lambda: Published(Paper()),
    "amal": lambda: Published(Amal()),
}
ABLATIONS: dict[str, Maker] = {
    "no label channel": partial(Trusting, parts={"label_channel": no_witness}),
    "no sharpening": partial(Trusting, parts={"SHARPER": 1.0}),
    "no echoes": partial(Trusting, parts={"echoes": lambda said, *_: torch.zeros(said.shape[1])}),
    "all learned alike": partial(Trusting, parts={"SURE": 0.0}),
    "no false doubt": partial(Trusting, parts={"false_doubt": lambda doubt, *_: torch.zeros_like(doubt)}),
    "no frequency": partial(Trusting, parts={"frequency": lambda y, labelled, classes: torch.ones(classes)}),
    "lost classes doubted": partial(
        Trusting, parts={"mostly_right": lambda posterior, *_: torch.ones(posterior.shape[1]).bool()}
    ),
    "no teachers": partial(Trusting, teachers=False),
    "no revision": partial(Trusting, revision=False),
    "meta-gradient, too": WithMetaGradient,
    "half the meta-gradient, too": partial(WithMetaGradient, gain=0.5),
}
METHODS = {**RIVALS, OURS: Trusting, **ABLATIONS}


def changed(setting: str) -> Maker:
    """The rule with another constant, such as ``"decay=0.5"``."""
    name, value = setting.split("=")
    if name.isupper():
        return partial(Trusting, parts={name: type(getattr(belief, name))(value)})
    return partial(Trusting, **{name: float(value)})
