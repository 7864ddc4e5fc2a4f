"""Each term against its equations, written out with loops in float64; and how terms combine."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from lightning import seed_everything
from methods import CLASSES, SHAPE, trained_teachers, trainer
from torch import Tensor, nn

from lit_kd import (
    DKD,
    KD,
    Batch,
    MixKD,
    MutualLearning,
    Outputs,
)
from lit_kd.data.table import SampleTable
from lit_kd.losses import contrastive_loss, cross_entropy, decoupled_kd_loss, hint_loss, kd_loss
from lit_kd.models.taps import Composite, Tapped
from lit_kd.terms import (
    BernoulliCrossEntropy,
    BernoulliKL,
    Contrastive,
    DecoupledKL,
    Hint,
)
from lit_kd.terms.features import adapter
from lit_kd.types import UNLABELED

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def draw(*shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64)


def close(found: Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=tolerance, atol=tolerance)


def softmax(z: Any) -> np.ndarray:
    e = np.exp(np.asarray(z))
    return np.asarray(e / e.sum())


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))


def decoupled(z: Tensor, t: Tensor, y: int, alpha: float, beta: float, temperature: float) -> float:
    """DKD's equations for one row."""
    if y == UNLABELED:
        return temperature**2 * kl(softmax(t / temperature), softmax(z / temperature))
    of = {}
    for name, logits in (("s", z), ("t", t)):
        p = softmax(logits / temperature)
        others = np.array([p[c] for c in range(len(p)) if c != y])
        of[name] = np.array([p[y], others.sum()]), others / others.sum()
    return temperature**2 * (alpha * kl(of["t"][0], of["s"][0]) + beta * kl(of["t"][1], of["s"][1]))


class TestDecoupledKL:
    def test_equations(self) -> None:
        z, t, y = draw(6, 5), draw(6, 5), torch.tensor([0, 4, 2, UNLABELED, 1, 3])
        found = DecoupledKL(1.5, 3.0, 2.0)(Outputs(z, {}), Outputs(t, {}), Batch(z, y))
        close(found, [decoupled(a, b, int(c), 1.5, 3.0, 2.0) for a, b, c in zip(z, t, y, strict=True)])

    def test_soft_labels_count_by_their_most_probable_class(self) -> None:
        z, t = draw(3, 4), draw(3, 4)
        soft = torch.tensor([[0.1, 0.6, 0.3, 0.0], [0.0] * 4, [0.3, 0.0, 0.0, 0.2]])
        term = DecoupledKL()
        hard = term(Outputs(z, {}), Outputs(t, {}), Batch(z, torch.tensor([1, UNLABELED, 0])))
        close(term(Outputs(z, {}), Outputs(t, {}), Batch(z, soft)), hard, 0)

    def test_identities(self) -> None:
        z, t, y = draw(8, 5), draw(8, 5), torch.arange(8) % 5
        own = (t / 4).softmax(-1).gather(1, y.unsqueeze(1)).squeeze(1)
        close(decoupled_kd_loss(z, t, y, 1.0, 1 - own, 4.0), kd_loss(z, t, 4.0), 1e-12)  # the paper's identity
        two, taught, label = z[:, :2], t[:, :2], y % 2
        close(decoupled_kd_loss(two, taught, label, 0.0, 8.0), torch.zeros(8))  # with two classes there is no other
        close(decoupled_kd_loss(t + 3, t, y), torch.zeros(8))
        leaf = z.clone().requires_grad_()
        decoupled_kd_loss(leaf, t, y, alpha=0.0).sum().backward()
        assert leaf.grad is not None
        close(leaf.grad.gather(1, y.unsqueeze(1)), torch.zeros(8, 1))  # NCKD does not see the label's class
        sure = torch.tensor([[800.0, 0.0, -800.0]], requires_grad=True)  # whose probability rounds to 1
        decoupled_kd_loss(sure, torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([0])).sum().backward()
        assert sure.grad is not None
        assert sure.grad.isfinite().all()

    def test_warm_up(self) -> None:
        model = DKD("mlp-8", trained_teachers()[0], warmup_epochs=4, **BASE)
        model.trainer = trainer()
        shares = []
        for epoch in range(6):
            model.trainer.fit_loop.epoch_progress.current.completed = epoch
            said = Outputs(draw(1, 3), {})
            shares.append(model.weigh(said, [said], Batch(draw(1), torch.zeros(1)))[1])
        assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


class TestHint:
    def test_pooled_maps(self) -> None:
        """The larger of both is averaged down to the smaller."""
        s, t = draw(2, 3, 4, 4), draw(2, 3, 2, 2)
        expected = []
        for b in range(2):
            errors = [
                (s[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() - t[b, c, i, j]) ** 2
                for c in range(3)
                for i in range(2)
                for j in range(2)
            ]
            expected.append(sum(errors) / len(errors))
        term = Hint("s", "t", adapt=False)
        batch = Batch(s, torch.zeros(2))
        close(term(Outputs(s, {"s": s}), Outputs(t, {"t": t}), batch), expected)
        close(term(Outputs(s, {"s": t}), Outputs(t, {"t": s}), batch), expected)
        close(term(Outputs(s, {"s": s}), Outputs(s, {"t": s}), batch), [0.0, 0.0])  # a copied student

    @pytest.mark.parametrize(
        ("student", "teacher", "layer"),
        [
            ((3, 8, 8), (5, 4, 4), nn.Conv2d),
            ((3, 4, 4), (5, 8, 8), nn.ConvTranspose2d),
            ((3, 6, 6), (5, 4, 4), nn.Conv2d),
            ((7, 6), (7, 4), nn.Linear),
            ((6,), (4,), nn.Linear),
        ],
    )
    def test_adapters_give_the_teachers_shape(self, student: Any, teacher: Any, layer: type[nn.Module]) -> None:
        made = adapter(student, teacher)
        assert isinstance(made[0] if isinstance(made, nn.Sequential) else made, layer)
        assert made(torch.zeros(2, *student)).shape == (2, *teacher)
        term = Hint("s", "t")
        s, t = torch.rand(4, *student), torch.rand(4, *teacher)
        term.build(Outputs(s, {"s": s}), Outputs(t, {"t": t}))
        found = term(Outputs(s, {"s": s}), Outputs(t, {"t": t}), Batch(s, torch.zeros(4)))
        assert term.adapter is not None
        close(found, hint_loss(term.adapter(s), t), 1e-6)

    @pytest.mark.parametrize(("student", "teacher"), [((3, 4, 4), (5, 16, 16)), ((7, 4), (5, 4)), ((4,), (3, 4, 4))])
    def test_features_that_no_adapter_joins(self, student: Any, teacher: Any) -> None:
        with pytest.raises(ValueError, match="features that an adapter can bring together"):
            adapter(student, teacher)


class TestContrastive:
    @pytest.mark.parametrize("whole", [0, 16])
    def test_whole_forward_with_a_given_memory(self, whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Scores, their normalisation by the first batch, and both directions; however the scores are computed."""
        monkeypatch.setattr("lit_kd.terms.features.WHOLE", whole)
        rows, size, k, batch = 7, 4, 3, 2
        labels = torch.tensor([0, 1, 0, UNLABELED, 1, 2, 2])
        term = Contrastive("s", "t", size, k, temperature=0.5).double()
        term.embed_student, term.embed_teacher = nn.Linear(5, size).double(), nn.Linear(6, size).double()
        table = SampleTable(rows, "")
        term.start(table, labels)
        for whose in ("student", "teacher"):
            table[f"contrastive_{whose}"] = draw(rows, size, scale=0.7)
        scales = []
        for index in (torch.tensor([3, 1]), torch.tensor([0, 5])):
            fs, ft = draw(batch, 5), draw(batch, 6)
            student, teacher = Outputs(fs, {"s": fs}), Outputs(ft, {"t": ft})
            positive, negative = term._partners(Batch(fs, labels[index], index))
            assert positive.tolist() == index.tolist()
            expected = [0.0] * batch
            sides = ((fs, term.embed_student, "teacher"), (ft, term.embed_teacher, "student"))
            for side, (f, layer, other) in enumerate(sides):
                scores = np.zeros((batch, k + 1))
                for b in range(batch):
                    v = layer.weight @ f[b] + layer.bias
                    v = v / v.square().sum().sqrt()
                    for j, row in enumerate([int(positive[b]), *negative[b].tolist()]):
                        memory = table[f"contrastive_{other}"][row]
                        scores[b, j] = math.exp(float((v * memory).sum()) / 0.5)
                if len(scales) < 2:  # N times the first batch's mean, from then on
                    scales.append(rows * scores.mean())
                p, noise = scores / scales[side], k / rows
                for b in range(batch):
                    expected[b] -= math.log(p[b, 0] / (p[b, 0] + noise + 1e-7))
                    expected[b] -= sum(math.log(noise / (p[b, j] + noise + 1e-7)) for j in range(1, k + 1))
            close(term(student, teacher, Batch(fs, labels[index], index)).detach(), expected)
            old = {whose: table[f"contrastive_{whose}"].clone() for whose in ("student", "teacher")}
            with torch.no_grad():
                term.update(student, teacher, Batch(fs, labels[index], index))
                for (f, layer, _), whose in zip(sides, old, strict=True):
                    moved = old[whose].clone()
                    for b, row in enumerate(index):
                        v = layer(f[b]) / layer(f[b]).norm()
                        moved[row] = (0.5 * moved[row] + 0.5 * v) / (0.5 * moved[row] + 0.5 * v).norm()
                    close(table[f"contrastive_{whose}"], moved)

    def test_equal_scores(self) -> None:
        k, n = 5, 20
        found = contrastive_loss(torch.full((1,), 1 / n).double(), torch.full((1, k), 1 / n).double(), n)
        close(found, [math.log(1 + k) + k * math.log((k + 1) / k)], 1e-5)  # but for the 1e-7 in it

    @pytest.mark.parametrize(("k", "cosine"), [(1024, 0.54), (16384, 0.73)])
    def test_where_half_the_pull_of_a_pair_is_left(self, k: int, cosine: float) -> None:
        """With Z of a random memory, at 0.07 log(2.2 K), however many rows there are."""
        for rows in (5000, 50000):
            memory = nn.functional.normalize(
                torch.randn(2000, 128, generator=torch.Generator().manual_seed(0)).double()
            )
            scale = rows * (memory[:99] @ memory[99:].T / 0.07).exp().mean()
            at = torch.tensor([-1.0, cosine], dtype=torch.float64, requires_grad=True)
            loss = contrastive_loss((at / 0.07).exp() / scale, torch.full((2, k), 1e-300).double(), rows)
            [pull] = torch.autograd.grad(loss.sum(), at)
            assert float(pull[1] / pull[0]) == pytest.approx(0.5, abs=0.05)

    @pytest.mark.parametrize("relax", [False, True])
    def test_partners(self, relax: bool) -> None:
        labels = torch.tensor([0, 0, 1, 1, 1, 2, UNLABELED, UNLABELED])
        term = Contrastive(negatives=400, relax=relax)
        term.start(SampleTable(8, ""), labels)
        index = torch.arange(8)
        positive, negative = term._partners(Batch(index, labels, index))
        for i in range(8):
            own = {i} if labels[i] == UNLABELED else set((labels == labels[i]).nonzero().flatten().tolist())
            assert set(negative[i].tolist()) == set(range(8)) - own  # each of them was drawn
            assert int(positive[i]) in (own if relax else {i})
        assert torch.equal(term._partners(Batch(index, labels, index))[1], negative)  # the same in the same step
        term.table.shared[f"{term.key}_steps"] += 1
        assert not torch.equal(term._partners(Batch(index, labels, index))[1], negative)

    def test_what_it_needs(self) -> None:
        term = Contrastive()
        term.start(SampleTable(3, ""), torch.zeros(3, dtype=torch.int64))
        for index, match in ((None, "sample indices"), (torch.arange(3), "at least two classes")):
            with pytest.raises(ValueError, match=match):
                term._partners(Batch(torch.zeros(3), torch.zeros(3), index))


def test_bernoulli_terms() -> None:
    z, t, y = draw(4, 3), draw(4, 3), torch.tensor([[0, 1, 1], [UNLABELED, 0, 1], [UNLABELED] * 3, [1, 1, 0]])
    label, taught = [], []
    for b in range(4):
        ps, pt = (1 / (1 + np.exp(-v[b].numpy() / 3.0)) for v in (z, t))
        each = [kl(np.array([q, 1 - q]), np.array([p, 1 - p])) for p, q in zip(ps, pt, strict=True)]
        taught.append(9 * np.mean(each))
        p = 1 / (1 + np.exp(-z[b].numpy()))
        terms = [0.0 if y[b, c] == UNLABELED else -math.log(p[c] if y[b, c] else 1 - p[c]) for c in range(3)]
        label.append(np.mean(terms))
    close(BernoulliCrossEntropy()(Outputs(z, {}), None, Batch(z, y)), label)
    close(BernoulliKL(3.0)(Outputs(z, {}), Outputs(t, {}), Batch(z, y)), taught)
    close(BernoulliKL(3.0)(Outputs(t, {}), Outputs(t, {}), Batch(z, y)), torch.zeros(4))


class Logits(nn.Module):
    """A network of one layer, whose logits are known."""

    def __init__(self, seed: int, inputs: int = 4) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.fc = nn.Linear(inputs, CLASSES, dtype=torch.float64)
        self.fc.weight.data = torch.randn(CLASSES, inputs, generator=draws, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x)
        return logits


def step(model: Any, batch: Batch) -> Tensor:
    """The loss of one training step, of a method that a trainer has not set up."""
    model.trainer = trainer()
    model.trainer.training = True
    model.log = lambda *args, **kwargs: None
    model.terms = model.make_terms()
    model._epoch = (0, None)
    model.tapped_student = Tapped(model.student)
    model.teachers = model.teachers if len(model.teachers) else type(model.teachers)(list(model._teacher_specs))
    loss: Tensor = model.training_step(batch, 0)
    return loss


def test_mutual_learning_of_three() -> None:
    nets, x, y = [Logits(k) for k in range(3)], draw(5, 4), torch.tensor([0, 2, 1, UNLABELED, 1])
    found = step(MutualLearning(nets[0], nets[1:], num_classes=CLASSES), Batch(x, y))
    expected = 0.0
    for k, net in enumerate(nets):
        for b in range(5):
            p = softmax(net(x[b]).detach())
            others = [kl(softmax(other(x[b]).detach()), p) for j, other in enumerate(nets) if j != k]
            expected += ((0 if y[b] == UNLABELED else -math.log(p[y[b]])) + sum(others) / 2) / 5
    close(found.detach(), expected)
    found.backward()  # what the others say has no gradient: each learns what it would beside frozen ones
    for k, net in enumerate(nets):
        logits = net(x)
        alone = cross_entropy(logits, y) + sum(kd_loss(logits, o(x).detach()) for o in nets if o is not net) / 2
        [gradient] = torch.autograd.grad(alone.mean(), net.fc.weight)
        close(nets[k].fc.weight.grad, gradient)  # type: ignore[arg-type]
    same = [Logits(0), Logits(0)]
    for shift, net in enumerate(same):  # other weights, the same probabilities
        net.fc.bias.data = torch.full((CLASSES,), shift).double()
    alone = cross_entropy(same[0](x), y).mean()
    close(step(MutualLearning(same[0], same[1:], num_classes=CLASSES), Batch(x, y)), 2 * alone.detach())  # KL is 0


def test_mixture() -> None:
    """KD of the batch and of a mixture with known shares and partners, and KD itself where shares are 1."""
    x, y = draw(4, 4), torch.tensor([0, UNLABELED, 2, 1])
    student, teacher = Logits(0), Logits(1)
    for alpha in (0.7, 1e-4):  # with the smaller, shares are 0 or 1 but for rounding
        seed_everything(3, verbose=False)
        share = torch.distributions.Beta(alpha, alpha).sample((4,)).double()
        partner = torch.randperm(4)
        expected = 0.0
        for i in range(4):
            mixed = share[i] * x[i] + (1 - share[i]) * x[partner[i]]
            target = np.zeros(CLASSES)
            for row, part in ((i, share[i]), (int(partner[i]), 1 - share[i])):
                if y[row] != UNLABELED:
                    target[y[row]] += part
            for inputs, label in ((x[i], np.eye(CLASSES)[y[i]] * float(y[i] != UNLABELED)), (mixed, target)):
                p, taught = (softmax(net(inputs).detach() / 4.0) for net in (student, teacher))
                ce = -(label * np.log(softmax(student(inputs).detach()))).sum()
                expected += (0.5 * ce + 0.5 * 16 * kl(taught, p)) / 8
        seed_everything(3, verbose=False)
        model = MixKD(student, teacher, alpha=alpha, weight=0.5, num_classes=CLASSES)
        close(step(model, Batch(x, y)).detach(), expected)
    model = MixKD(student, teacher, num_classes=CLASSES)
    batch = model.prepare_batch(Batch(x, y))
    plain = batch._replace(x=torch.cat([x, x]), y=torch.cat([batch.y[:4], batch.y[:4]]))
    model.prepare_batch = lambda _: plain  # type: ignore[method-assign]
    close(step(model, Batch(x, y)), step(KD(student, teacher, num_classes=CLASSES), Batch(x, y)).detach())
    without = MixKD(student, teacher, mixed_labels=False, num_classes=CLASSES).prepare_batch(Batch(x, y))
    assert not without.y[4:].any()
    for options in ({"revise": 0.8}, {"select": 0.5}, {"task": "multilabel"}):
        with pytest.raises(ValueError, match="labels are mixed"):
            MixKD(student, teacher, num_classes=CLASSES, **options)  # type: ignore[arg-type]
    model = MixKD(student, teacher, num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"inputs to mix, a floating-point tensor, or tokens .*, found \['x'\]"):
        model.prepare_batch(Batch({"x": x}, y))


def test_projector() -> None:
    """SimKD's loss: the mean squared error of projected vectors, with the head of the teacher on them."""
    body, head = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(), nn.Linear(5, 3).double()
    student, x, t = Composite(body, "1"), draw(3, 4), draw(3, 5)
    student.build((6,), (5,), head)
    student.double()
    found = Tapped(student, ("projector",))(x)
    loss = Hint("projector", "t", adapt=False)(found, Outputs(t, {"t": t}), Batch(x, torch.zeros(3)))
    first, last = student.projector[0], student.projector[2]
    for b in range(3):
        f = (body[0].weight @ x[b] + body[0].bias).clamp(min=0)
        projected = last.weight @ (first.weight @ f + first.bias).clamp(min=0) + last.bias
        close(loss[b].detach(), sum((projected[d] - t[b, d]) ** 2 for d in range(5)).detach() / 5)
        close(found.logits[b].detach(), (head.weight @ projected + head.bias).detach())
