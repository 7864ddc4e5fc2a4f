"""Rules: projections against brute force, whole meta-steps against double backward, the gate against known mixtures."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import kstest
from test_meta import CLASSES, Problem, last_layer_align, problem, term_gradients
from torch import Tensor, nn

from lit_kd.data.table import SampleTable
from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.trust.meta import Head, MetaRows
from lit_kd.types import UNLABELED
from lit_kd.weightings import Amal, MetaStep, Paper, Rule
from lit_kd.weightings.published import project

torch.set_num_threads(1)

Array = NDArray[np.float64]


def started(rule: Rule, rows: int, teachers: int, trusted: int = 0, epochs: int | None = 30) -> SampleTable:
    """A table whose last rows are trusted."""
    table = SampleTable(rows, "test")
    rule.start(table, teachers, torch.arange(rows) >= rows - trusted, torch.zeros(rows, dtype=torch.int64), epochs)
    return table


# The convex rule's projection


def nearest(shares: Array) -> Array:
    """The nearest point with shares >= 0 and sum <= 1: tries every set of constraints that may hold with equality."""
    best, least = None, np.inf
    for zero in itertools.product([False, True], repeat=len(shares)):
        free = ~np.array(zero)
        for full in (False, True):
            point = np.where(free, shares, 0.0)
            if full and free.any():
                point = np.where(free, point + (1 - point.sum()) / free.sum(), 0.0)
            elif full:
                continue
            distance = ((point - shares) ** 2).sum()
            if (point >= -1e-12).all() and point.sum() <= 1 + 1e-12 and distance < least:
                best, least = point, distance
    assert best is not None
    return best


class TestProject:
    @pytest.mark.parametrize("teachers", [1, 2, 5])
    def test_equals_brute_force(self, teachers: int) -> None:
        rows = np.random.default_rng(teachers).normal(scale=1.5, size=(100, teachers))
        expected = np.stack([nearest(row) for row in rows])
        np.testing.assert_allclose(project(torch.from_numpy(rows)).numpy(), expected, atol=1e-12)

    @pytest.mark.parametrize("size", [1e4, 1e30])
    def test_huge_steps_in_float32(self, size: float) -> None:
        shares = torch.tensor([[size, 1.0, -size], [-size, -size, -size], [size, size, 0.0], [size, size, size]])
        expected = torch.tensor([[1, 0, 0], [0, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]])
        torch.testing.assert_close(project(shares), expected)
        torch.testing.assert_close(project(torch.tensor([[size], [-size]])), torch.tensor([[1.0], [0.0]]))


# The published rules


def single(p: Problem) -> MetaStep:
    """A problem's meta-step in float32, as a training's."""
    layer = nn.Linear(p.layer.in_features, CLASSES, bias=p.layer.bias is not None)
    layer.load_state_dict(p.layer.state_dict())
    meta = p.meta._replace(features=p.meta.features.float())
    teachers = [t.float() for t in p.teachers]
    return replace(p, layer=layer, features=p.features.float(), teachers=teachers, meta=meta).step()


def convex(shares: Tensor) -> Tensor:
    return torch.cat([1 - shares.sum(1, keepdim=True), shares], dim=1)


def by_double_backward(p: Problem, weights: Tensor) -> Tensor:
    return replace(p, weights=weights).double_backward()


def amal_oracle(p: Problem, weights: Tensor, rate: float, repeats: int) -> Tensor:
    for _ in range(repeats):
        weights = (weights - rate * by_double_backward(p, weights)).clip(0, 2)
    return weights


def paper_oracle(p: Problem, weights: Tensor, rate: float, repeats: int) -> Tensor:
    shares = weights[:, 1:]
    for _ in range(repeats):
        leaf = shares.clone().requires_grad_()
        mixed = convex(leaf)
        (gradient,) = torch.autograd.grad(mixed, leaf, by_double_backward(p, mixed.detach()))
        moved = (shares - rate * gradient).numpy()
        shares = torch.from_numpy(np.stack([nearest(row) for row in moved]))
    return convex(shares)


class TestPublished:
    @pytest.mark.parametrize("teachers", [1, 3])
    @pytest.mark.parametrize("rule_class", [Paper, Amal])
    def test_a_meta_step(self, rule_class: type[Paper] | type[Amal], teachers: int) -> None:
        """Five repeats by default; each through the true gradient, step 1500 at 128 samples, back into the range."""
        p = replace(problem(16, teachers, temperature=4.0), lr=0.05)
        rule = rule_class(start_weight=0.4)
        table = started(rule, 20, teachers)
        table.apply(Tensor.double)
        before = table["weights"].clone()
        index = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:16]
        rule.observe(table, replace(p.step(), index=index))
        oracle = paper_oracle if rule_class is Paper else amal_oracle
        expected = oracle(p, before[index], 1500 * 16 / 128, 5)
        expected[p.y == UNLABELED, 0] = 0
        torch.testing.assert_close(table["weights"][index], expected, rtol=1e-9, atol=1e-9)
        assert (expected - before[index]).abs().max() > 0.1
        others = torch.ones(20, dtype=torch.bool)
        others[index] = False
        torch.testing.assert_close(table["weights"][others], before[others], rtol=0, atol=0)

    def test_ranges(self) -> None:
        for rule, top in [(Paper(), 1.0), (Amal(), 2.0)]:
            table = started(rule, 64, teachers=3)
            p = replace(problem(64, 3), lr=50.0)
            for _ in range(3):
                rule.observe(table, single(p))
            weights = table["weights"]
            assert weights.dtype == torch.float32
            assert weights.min() >= -1e-6
            assert weights.max() <= top + 1e-6
            if isinstance(rule, Paper):
                labelled = p.y != UNLABELED
                torch.testing.assert_close(weights.sum(1)[labelled], torch.ones(64)[labelled])
            else:
                assert weights.max() > 1.5  # more than a convex weight may
                assert (weights.sum(1) < 0.5).any()  # and a sample may be dropped

    def test_starts(self) -> None:
        paper, amal = started(Paper(), 4, teachers=3)["weights"], started(Amal(), 4, teachers=3)["weights"]
        torch.testing.assert_close(paper, torch.tensor([[0.1, 0.3, 0.3, 0.3]]).expand(4, -1))
        torch.testing.assert_close(amal, torch.tensor([[0.1, 0.9, 0.9, 0.9]]).expand(4, -1))

    def test_the_step_scales_with_the_batch(self) -> None:
        """Every sample twice in the batch: the same look-ahead, half the meta-gradient, the same move."""
        rule = Amal(start_weight=0.5)
        p = replace(problem(16, 1), lr=0.02)
        once, twice = started(rule, 16, 1), started(rule, 32, 1)
        rule.observe(once, single(p))
        doubled = replace(
            p, features=p.features.repeat(2, 1), y=p.y.repeat(2), teachers=[t.repeat(2, 1) for t in p.teachers]
        )
        rule.observe(twice, single(doubled))
        assert (once["weights"] - 0.5).abs().max() > 0.05
        torch.testing.assert_close(twice["weights"], once["weights"].repeat(2, 1))

    def test_constants_of_the_first_version(self) -> None:
        """Random start weights, the same for the same seed; explicit constants win."""
        rule = Paper("first")
        assert (rule.step_size, rule.repeats, rule.train_share, rule.meta_rows) == (2000, 10, 0.25, 1000)
        weights = started(rule, 4000, 2)["weights"]
        torch.testing.assert_close(weights.sum(1), torch.ones(4000))
        assert kstest(weights[:, 0].numpy(), "uniform").pvalue > 1e-3
        assert (weights[:, 1] == weights[:, 2]).all()
        torch.testing.assert_close(started(Paper("first"), 4000, 2)["weights"], weights, rtol=0, atol=0)
        own = Paper("first", start_weight=0.5, repeats=1)
        assert (own.start_weight, own.repeats, own.step_size) == (0.5, 1, 2000)
        assert Paper().train_share == Amal().train_share == 0
        with pytest.raises(ValueError, match=r"expected as version one of \['amal', 'first'\], found 'v1'"):
            Paper("v1")  # type: ignore[arg-type]

    def test_schedule(self) -> None:
        assert [e for e in range(45) if Paper().active(e)] == [10, 20, 30, 40]
        for epochs, expected in {
            200: range(10, 200, 10),
            30: range(2, 30, 2),
            5: range(1, 5),
            None: range(10, 50, 10),
        }.items():
            started(rule := Paper(), 4, 1, epochs=epochs)
            assert [e for e in range(epochs or 50) if rule.active(e)] == [*expected]
        often = Amal(warmup_epochs=3, every=2)
        assert [e for e in range(10) if often.active(e)] == [3, 5, 7, 9]


class Planted:
    """A linear student half way, with noisy labels and a right teacher, or right labels and a misled teacher."""

    def __init__(self, seed: int, noisy_labels: bool) -> None:
        g = torch.Generator().manual_seed(seed)
        truth = torch.randn(CLASSES, 8, generator=g)
        self.head = Head(0.3 * truth + 0.1 * torch.randn(CLASSES, 8, generator=g), torch.zeros(CLASSES))
        self.features, meta = torch.randn(128, 8, generator=g), torch.randn(200, 8, generator=g)
        clean = (self.features @ truth.T).argmax(1)
        self.wrong = torch.rand(128, generator=g) < 0.4
        shifted = (clean + torch.randint(1, CLASSES, (128,), generator=g)) % CLASSES
        misled = torch.where(self.wrong, shifted, clean)
        self.y = misled if noisy_labels else clean
        self.teacher = 4.0 * F.one_hot(clean if noisy_labels else misled, CLASSES).float()
        self.meta = MetaRows(meta, (meta @ truth.T).argmax(1), torch.ones(200, dtype=torch.bool))

    def step(self) -> MetaStep:
        logits = self.head(self.features)
        gradients = term_gradients(logits, self.y, [self.teacher], 1.0)
        return MetaStep(
            index=torch.arange(128),
            y=self.y,
            logits=logits,
            teachers=[self.teacher],
            alignment=last_layer_align(self.head, self.features, gradients, self.meta),
            lr=0.5,
            batch_size=128,
        )

    def learn(self, weights: Tensor, steps: int) -> float:
        """Validation loss after real SGD with these weights."""
        weight, bias = self.head.weight.clone().requires_grad_(), torch.zeros(CLASSES, requires_grad=True)
        optimizer = torch.optim.SGD([weight, bias], lr=0.5)
        for _ in range(steps):
            z = F.linear(self.features, weight, bias)
            loss = weights[:, 0] * cross_entropy(z, self.y) + weights[:, 1] * kd_loss(z, self.teacher)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        with torch.no_grad():
            return float(F.cross_entropy(F.linear(self.meta.features, weight, bias), self.meta.y))


@pytest.mark.parametrize("noisy_labels", [True, False])
@pytest.mark.parametrize("rule_class", [Paper, Amal])
def test_planted(rule_class: type[Paper] | type[Amal], noisy_labels: bool) -> None:
    """Where one of label and teacher is wrong, its weight falls and the other's does not; the student is better off."""
    p, rule = Planted(0, noisy_labels), rule_class(start_weight=0.5, step_size=50.0)
    table = started(rule, 128, 1)
    start = table["weights"].clone()
    losses = [p.learn(start, steps=1)]
    for _ in range(30):
        rule.observe(table, p.step())
        losses.append(p.learn(table["weights"], steps=1))
    assert losses[10] < losses[0] - 0.01
    assert losses[-1] < losses[0] - 0.02
    weights = table["weights"]
    liar, other = weights[p.wrong, 0 if noisy_labels else 1], weights[p.wrong, 1 if noisy_labels else 0]
    assert liar.mean() < 0.5 < other.mean()
    assert liar.mean() < other.mean() / 3
    assert weights[~p.wrong].sum(1).mean() > 0.9
    assert p.learn(weights, steps=10) < p.learn(start, steps=10) - 0.05
