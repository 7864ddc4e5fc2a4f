"""Rules: projections against brute force, whole meta-steps against double backward, the gate against known mixtures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import binom, chi2, iqr, kstest, norm
from sklearn.metrics import confusion_matrix, roc_auc_score
from test_meta import CLASSES, Problem, TwoProcesses, problem
from torch import Tensor, nn

from lit_kd.data.table import SampleTable
from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.trust.channels import label_channel, label_log_odds, teacher_channel
from lit_kd.trust.meta import Head, MetaRows, last_layer_derivative
from lit_kd.trust.positive_unlabeled import fit_clean_probability
from lit_kd.types import UNLABELED
from lit_kd.weightings import Amal, MetaStep, Paper, Robust, Rule
from lit_kd.weightings.published import project
from lit_kd.weightings.robust import memorization, teacher_quality, trust_to_weights

torch.set_num_threads(1)

Array = NDArray[np.float64]


def started(rule: Rule, rows: int, teachers: int, trusted: int = 0, epochs: int = 30) -> SampleTable:
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

    def test_one_teacher_is_a_clamp(self) -> None:
        shares = torch.linspace(-2, 3, 101).unsqueeze(1)
        torch.testing.assert_close(project(shares), shares.clamp(0, 1))

    @pytest.mark.parametrize("teachers", [1, 3])
    def test_inside_nothing_moves(self, teachers: int) -> None:
        shares = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(teachers + 1), 50)[:, 1:])
        torch.testing.assert_close(project(shares), shares, rtol=0, atol=1e-15)

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
    @pytest.mark.parametrize("repeats", [1, 5])
    @pytest.mark.parametrize("teachers", [1, 3])
    @pytest.mark.parametrize("rule_class", [Paper, Amal])
    def test_a_meta_step(self, rule_class: type[Paper] | type[Amal], teachers: int, repeats: int) -> None:
        """Five repeats by default; each through the true gradient, step 1500 at 128 samples, back into the range."""
        p = replace(problem(16, teachers, temperature=4.0), lr=0.05)
        rule = rule_class(start_weight=0.4) if repeats == 5 else rule_class(start_weight=0.4, repeats=repeats)
        table = started(rule, 20, teachers)
        table.apply(Tensor.double)
        before = table["weights"].clone()
        index = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:16]
        rule.observe(table, replace(p.step(), index=index))
        oracle = paper_oracle if rule_class is Paper else amal_oracle
        expected = oracle(p, before[index], 1500 * 16 / 128, repeats)
        expected[p.y == UNLABELED, 0] = 0
        torch.testing.assert_close(table["weights"][index], expected, rtol=1e-9, atol=1e-9)
        assert (expected - before[index]).abs().max() > 0.1
        others = torch.ones(20, dtype=torch.bool)
        others[index] = False
        torch.testing.assert_close(table["weights"][others], before[others], rtol=0, atol=0)

    @pytest.mark.parametrize("lr", [0.05, 50.0])
    @pytest.mark.parametrize("teachers", [1, 3])
    def test_ranges(self, teachers: int, lr: float) -> None:
        for rule, top in [(Paper(), 1.0), (Amal(), 2.0)]:
            table = started(rule, 64, teachers)
            p = replace(problem(64, teachers), lr=lr)
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
        for teachers in (1, 3):
            paper, amal = started(Paper(), 4, teachers)["weights"], started(Amal(), 4, teachers)["weights"]
            torch.testing.assert_close(paper, torch.tensor([[0.1] + [0.9 / teachers] * teachers]).expand(4, -1))
            torch.testing.assert_close(amal, torch.tensor([[0.1] + [0.9] * teachers]).expand(4, -1))

    @pytest.mark.parametrize("rule", [Paper(start_weight=0.5), Amal(start_weight=0.5)])
    def test_the_step_scales_with_the_batch(self, rule: Paper | Amal) -> None:
        """Every sample twice in the batch: the same look-ahead, half the meta-gradient, the same move."""
        p = replace(problem(16, 1), lr=0.02)
        once, twice = started(rule, 16, 1), started(rule, 32, 1)
        rule.observe(once, single(p))
        doubled = replace(
            p, features=p.features.repeat(2, 1), y=p.y.repeat(2), teachers=[t.repeat(2, 1) for t in p.teachers]
        )
        rule.observe(twice, single(doubled))
        assert (once["weights"] - 0.5).abs().max() > 0.05
        torch.testing.assert_close(twice["weights"], once["weights"].repeat(2, 1))

    @pytest.mark.parametrize("rule_class", [Paper, Amal])
    def test_two_processes(self, rule_class: type[Paper] | type[Amal]) -> None:
        p = replace(problem(16, 2, temperature=4.0), lr=0.05)
        rule = rule_class(start_weight=0.5)
        one = started(rule, 16, 2)
        one.apply(Tensor.double)
        rule.observe(one, p.step())

        def work(rank: int, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
            mine = slice(0, 5) if rank == 0 else slice(5, 16)
            some = slice(0, 4) if rank == 0 else slice(4, 12)
            table = started(rule, 16, 2)
            table.apply(Tensor.double)
            rule.observe(table, p.step(mine, some, all_sum))
            return table["weights"][mine]

        assert (one["weights"] - one["weights"].mean(0)).abs().max() > 0.1
        torch.testing.assert_close(torch.cat(TwoProcesses().run(work)), one["weights"], rtol=1e-9, atol=1e-9)

    def test_constants_of_the_first_version(self) -> None:
        """Random start weights, the same for the same seed; explicit constants win."""
        rule = Paper.first_version()
        assert (rule.step_size, rule.repeats, rule.train_share, rule.meta_rows) == (2000, 10, 0.25, 1000)
        weights = started(rule, 4000, 2)["weights"]
        torch.testing.assert_close(weights.sum(1), torch.ones(4000))
        assert kstest(weights[:, 0].numpy(), "uniform").pvalue > 1e-3
        assert (weights[:, 1] == weights[:, 2]).all()
        torch.testing.assert_close(started(Paper("first"), 4000, 2)["weights"], weights, rtol=0, atol=0)
        own = Paper("first", start_weight=0.5, repeats=1)
        assert (own.start_weight, own.repeats, own.step_size) == (0.5, 1, 2000)
        assert Paper().train_share == Amal().train_share == 0
        with pytest.raises(ValueError, match="expected a version 'amal' or 'first', found 'v1'"):
            Paper("v1")  # type: ignore[arg-type]

    @pytest.mark.parametrize("rule_class", [Paper, Amal])
    def test_schedule(self, rule_class: type[Paper] | type[Amal]) -> None:
        assert [e for e in range(45) if rule_class().active(e)] == [10, 20, 30, 40]
        often = rule_class(warmup_epochs=3, every=2)
        assert [e for e in range(10) if often.active(e)] == [3, 5, 7, 9]

    def test_a_restored_table_keeps_its_weights(self) -> None:
        rule = Paper()
        table = started(rule, 4, 1)
        table.write(torch.tensor([2]), weights=torch.tensor([[0.3, 0.7]]))
        rule.start(table, 1, torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool), epochs=30)
        torch.testing.assert_close(table["weights"][2], torch.tensor([0.3, 0.7]))


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
        return MetaStep(
            index=torch.arange(128),
            y=self.y,
            logits=self.head(self.features),
            teachers=[self.teacher],
            derivative=partial(last_layer_derivative, self.head, self.features, self.meta),
            lr=0.5,
            batch_size=128,
            temperature=1.0,
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


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("noisy_labels", [True, False])
@pytest.mark.parametrize("rule_class", [Paper, Amal])
def test_planted(rule_class: type[Paper] | type[Amal], noisy_labels: bool, seed: int) -> None:
    """Where one of label and teacher is wrong, its weight falls and the other's does not; the student is better off."""
    p, rule = Planted(seed, noisy_labels), rule_class(start_weight=0.5, step_size=50.0)
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


# The positive-unlabeled fit


def mixture(
    seed: int, others: int, trusted: int, rate: float, distance: float, features: int = 1
) -> tuple[Array, NDArray[np.bool_], NDArray[np.bool_], Array]:
    """Clean rows are N(0, 1) in every feature, noisy ones N(-distance, 1) in the first; and Bayes's posterior."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(others + trusted, features))
    noisy = np.arange(others + trusted) < others
    noisy &= rng.random(others + trusted) < rate
    x[noisy, 0] -= distance
    clean, dirty = (1 - rate) * norm.pdf(x[:, 0]), rate * norm.pdf(x[:, 0] + distance)
    return x, np.arange(others + trusted) >= others, noisy, clean / (clean + dirty)


class TestCleanProbability:
    @pytest.mark.parametrize("features", [1, 2])
    @pytest.mark.parametrize("distance", [2.5, 4.0])
    @pytest.mark.parametrize("rate", [0.1, 0.25, 0.4, 0.6])
    def test_noise_rate(self, rate: float, distance: float, features: int) -> None:
        x, trusted, noisy, _ = mixture(0, 20_000, 2_000, rate, distance, features)
        fit = fit_clean_probability(x, trusted)
        assert fit.noise_rate == pytest.approx(noisy[~trusted].mean(), abs=0.03)
        assert fit.noise_rate == pytest.approx(1 - fit.clean[~trusted].mean(), abs=1e-12)

    @pytest.mark.parametrize(("rate", "distance", "limit"), [(0.2, 3.0, 0.02), (0.4, 2.0, 0.04), (0.4, 4.0, 0.01)])
    def test_bayes_posterior(self, rate: float, distance: float, limit: float) -> None:
        """Not quite where clean and noisy overlap: the price of a fit that a few odd trusted rows do not sway."""
        x, trusted, noisy, posterior = mixture(1, 20_000, 2_000, rate, distance, features=2)
        clean = fit_clean_probability(x, trusted).clean
        others = ~trusted
        assert np.abs(clean - posterior)[others].mean() < limit
        assert np.corrcoef(clean[others], posterior[others])[0, 1] > 0.99
        best = roc_auc_score(~noisy[others], posterior[others])
        assert roc_auc_score(~noisy[others], clean[others]) > best - 0.003
        for low in np.arange(0, 1, 0.2):  # calibrated: of rows believed clean with 70%, 70% are
            inside = others & (clean >= low) & (clean < low + 0.2)
            error = 0.05 + 3 * 0.5 / np.sqrt(inside.sum())
            assert (~noisy[inside]).mean() == pytest.approx(clean[inside].mean(), abs=error)

    @pytest.mark.parametrize("features", [1, 2])
    def test_false_alarms_are_rare(self, features: int) -> None:
        """A likelihood ratio of 10 by chance: a chi-square's tail at most, with a degree of freedom a parameter."""
        alarms = 0
        for seed in range(100):
            x, trusted, _, _ = mixture(seed, 2_000, 200, 0.0, 0.0, features)
            fit = fit_clean_probability(x, trusted)
            alarms += fit.noise_rate > 0
            assert fit.noise_rate > 0 or (fit.clean == 1).all()
        tail = chi2.sf(10 / (1 + 200 / 2_000), features + 1)  # the 2000 are a sample too
        assert tail < 0.03
        assert alarms <= binom.ppf(0.999, 100, tail)

    @pytest.mark.parametrize(("rate", "distance"), [(0.3, 3.0), (0.05, 4.0), (0.5, 1.5)])
    def test_noise_is_found(self, rate: float, distance: float) -> None:
        for seed in range(10):
            x, trusted, _, _ = mixture(seed, 5_000, 500, rate, distance, features=2)
            assert fit_clean_probability(x, trusted).noise_rate > 0

    def test_trusted_rows_are_clean_whatever_their_evidence(self) -> None:
        x, trusted, _, _ = mixture(0, 2_000, 500, 0.4, 4.0)
        x[-1] = -50.0
        fit = fit_clean_probability(x, trusted)
        assert fit.noise_rate > 0
        assert (fit.clean[trusted] == 1).all()
        assert fit.clean[~trusted].max() < 1

    @pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-3, 7.0, 1e9, 1e30])
    @pytest.mark.parametrize("shift", [0.0, -3.0, 1e4])
    def test_scale_and_shift_do_not_matter(self, scale: float, shift: float) -> None:
        x, trusted, _, _ = mixture(0, 2_000, 300, 0.3, 3.0, features=2)
        expected = fit_clean_probability(x, trusted)
        found = fit_clean_probability((x + np.array([1.0, 0.5]) * shift) * np.array([1.0, 0.1]) * scale, trusted)
        assert found.noise_rate == pytest.approx(expected.noise_rate, abs=1e-5)
        np.testing.assert_allclose(found.clean, expected.clean, atol=1e-5)

    def test_order_of_rows_does_not_matter(self) -> None:
        x, trusted, _, _ = mixture(0, 2_000, 300, 0.3, 3.0)
        order = np.random.default_rng(0).permutation(len(x))
        found, expected = fit_clean_probability(x[order], trusted[order]), fit_clean_probability(x, trusted)
        np.testing.assert_allclose(found.clean, expected.clean[order], atol=1e-6)

    def test_more_evidence_never_means_less_clean(self) -> None:
        x, trusted, _, _ = mixture(0, 2_000, 300, 0.3, 3.0)
        clean = fit_clean_probability(x, trusted).clean[~trusted]
        assert (np.diff(clean[np.argsort(x[~trusted, 0])]) >= 0).all()
        reverse = fit_clean_probability(-x, trusted)  # noise has *more* of this evidence: it cannot be told
        assert reverse.noise_rate < 0.1

    @pytest.mark.parametrize(("rate", "distance"), [(0.3, 3.0), (0.1, 4.0), (0.5, 2.0)])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_is_the_best_in_the_box(self, rate: float, distance: float, seed: int) -> None:
        """No other (alpha, beta) has a larger bound: the one found is read off the probabilities."""
        x, trusted, _, _ = mixture(seed, 1_000, 300, rate, distance, features=2)
        x[:, 1] -= 0.3 * x[:, 0]
        u = (x - np.median(x[trusted], axis=0)) / (iqr(x[trusted], axis=0) / 1.35)
        u = np.clip(u, -12, 4)

        def bound(theta: Array) -> float:
            q = 0.1 + 0.9 / (1 + np.exp(-(theta[0] + u @ theta[1:])))
            return float(np.log(q[trusted]).mean() - np.log(q[~trusted].mean()))

        clean = fit_clean_probability(x, trusted).clean[~trusted]
        sharp = clean < 0.99  # above, 1 - p has lost digits
        logit = np.log(clean[sharp]) - np.log1p(-clean[sharp])
        design = np.concatenate([np.ones((sharp.sum(), 1)), u[~trusted][sharp]], axis=1)
        theta, residual, *_ = np.linalg.lstsq(design, logit)
        assert residual.sum() < 1e-12
        low, high = np.array([1.0, 0, 0]), np.array([12.0, 8, 8])
        assert (theta >= low - 1e-6).all()
        assert (theta <= high + 1e-6).all()
        for at in np.random.default_rng(seed).uniform(low, high, size=(8, 3)):
            other = minimize(lambda t: -bound(t), at, method="Nelder-Mead", bounds=list(zip(low, high, strict=True)))
            assert bound(theta) >= -other.fun - 1e-6

    @pytest.mark.parametrize("trusted", [0, 1, 2, 200])
    def test_few_or_only_trusted_rows(self, trusted: int) -> None:
        x = np.random.default_rng(0).normal(size=(200, 2))
        fit = fit_clean_probability(x, np.arange(200) >= 200 - trusted)
        assert np.isfinite(fit.clean).all()
        assert 0 <= fit.noise_rate <= 1
        if trusted in (0, 200):
            assert (fit.noise_rate, fit.clean.min()) == (0, 1)

    def test_evidence_that_says_nothing(self) -> None:
        x, trusted, _, _ = mixture(0, 1_000, 300, 0.3, 3.0, features=2)
        x[:, 1] = 7.0
        found, expected = fit_clean_probability(x, trusted), fit_clean_probability(x[:, :1], trusted)
        assert found.noise_rate == pytest.approx(expected.noise_rate, abs=1e-4)
        constant = fit_clean_probability(np.full((1_000, 2), 3.0), np.arange(1_000) >= 700)
        assert constant.noise_rate == 0


# The robust rule

TRAIN, META, NUM_CLASSES = 600, 300, 10
ROWS = TRAIN + META


class Epochs:
    """Hand-made readings: rows below 180 carry wrong labels; the student errs on 40% of the trusted rows."""

    def __init__(self, wrong_of_teachers: list[float], seed: int = 0, warmup: int = 5) -> None:
        self.rng, self.odds_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        self.teachers = len(wrong_of_teachers)
        self.noisy = np.arange(ROWS) < 180
        self.labels = torch.from_numpy(self.rng.integers(0, NUM_CLASSES, ROWS))
        self.rule = Robust(warmup_epochs=warmup)
        self.table = SampleTable(ROWS, "test")
        self.start()
        self.drawn: list[tuple[Tensor, dict[str, Tensor]]] = []
        trusted = np.arange(TRAIN, ROWS)
        self.classes = [self.labels.clone() for _ in range(self.teachers + 1)]
        for classes, rate in zip(self.classes, [0.4, *wrong_of_teachers], strict=True):
            classes[:TRAIN] = torch.from_numpy(self.rng.integers(0, NUM_CLASSES, TRAIN))
            wrong = trusted[: round(rate * META)]
            classes[wrong] = (classes[wrong] + 1) % NUM_CLASSES

    def start(self) -> None:
        self.rule.start(self.table, self.teachers, torch.arange(ROWS) >= TRAIN, self.labels, 30)
        even = torch.full((self.teachers, NUM_CLASSES, NUM_CLASSES), 1 / NUM_CLASSES)
        self.table.shared.setdefault("teacher_channel", even)

    def readings(self) -> dict[str, Tensor]:
        alignment = 1.0 + 0.7 * self.rng.standard_t(3, size=ROWS)  # with outliers, to be clipped
        alignment[self.noisy] -= 3.0
        readings = {
            "alignment": alignment,
            "log_probability": -self.rng.gamma(2.0, 0.5 + 1.5 * self.noisy),
            "teacher_log_probability": -self.rng.gamma(2.0, 1.0 + self.noisy),
            "label_log_odds": self.odds_rng.normal(3.0 - 6.0 * self.noisy, 2.0),
            "teacher_right": self.rng.uniform(0.5, 1.0, (ROWS, self.teachers)),
        }
        values = {name: torch.from_numpy(array).float() for name, array in readings.items()}
        values["student_class"] = self.classes[0].float()
        return values | {"teacher_class": torch.stack(self.classes[1:], dim=1).float()}

    def validate(self, *errors: float) -> None:
        """How often the student was wrong, then each teacher; of so many rows that what is added is nothing."""
        self.rule.validated(self.table, torch.tensor([round(e * 10**12) for e in errors]), torch.tensor(10**12))

    def run(self, epochs: int, scale: float = 1.0, seen: Tensor | None = None) -> SampleTable:
        """Some epochs after the warm-up, in which the rows ``seen`` are."""
        seen = torch.arange(ROWS) if seen is None else seen
        for _ in range(epochs):
            values = {name: rows[seen] for name, rows in self.readings().items()}
            values["alignment"] = scale * values["alignment"]
            self.table.write(seen, **values)
            self.table.sync()
            self.rule.renew(self.table, epoch=self.rule.warmup - 1 + len(self.drawn))
            self.drawn.append((seen, values))
        return self.table


@pytest.mark.parametrize("teachers", [1, 2, 3])
class TestRobust:
    def test_the_gate_opens_for_clean_labels(self, teachers: int) -> None:
        table = Epochs([0.4] * teachers).run(4)
        clean = table["clean_probability"]
        assert clean.shape == (ROWS,)
        assert clean[:180].mean() < 0.1
        assert clean[180:].mean() > 0.9
        assert (clean[TRAIN:] == 1).all()
        assert table["weights"][:180, 0].mean() < 0.15 * table["weights"][180:TRAIN, 0].mean()
        assert table["weights"].shape == (ROWS, teachers + 1)
        assert (table["weights"] >= 0).all()

    @pytest.mark.parametrize(("noisy", "error"), [(180, 0.04), (60, 0.06)])
    def test_the_noise_rate_is_too_large_rather_than_too_small(self, teachers: int, noisy: int, error: float) -> None:
        """300 vouching rows leave it open where clean ends, and each slope more that is fitted to them, more so."""
        rates = []
        for seed in range(8):
            e = Epochs([0.4] * teachers, seed)
            e.noisy[:] = np.arange(ROWS) < noisy
            rates.append(e.run(4).shared["noise_rate"].item())
        assert noisy / TRAIN - 0.01 < np.mean(rates) < noisy / TRAIN + error

    @pytest.mark.parametrize(("scale", "tolerance"), [(2.0**-20, 1e-6), (2.0**20, 1e-6), (1e-6, 1e-4), (1e6, 1e-4)])
    def test_the_size_of_the_alignment_does_not_matter(self, teachers: int, scale: float, tolerance: float) -> None:
        expected = Epochs([0.4] * teachers).run(3)["weights"]
        found = Epochs([0.4] * teachers).run(3, scale=scale)["weights"]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize(
        ("error", "quality"), [(0.4, 0.05), (0.41, 0), (0.5, 0), (0, 1), (0.35, 1), (0.36, 0.8), (0.375, 0.5)]
    )
    @pytest.mark.parametrize("noise", [True, False])
    def test_a_teachers_share_follows_from_its_error(
        self, teachers: int, error: float, quality: float, noise: bool
    ) -> None:
        """Whatever class the teachers name: next to none for those that err as often as the student, in 0.4."""
        e = Epochs([error] * teachers)
        e.noisy &= noise
        for classes in e.classes[1:]:
            classes[300:450] = e.labels[300:450]
            classes[450:TRAIN] = (e.labels[450:TRAIN] + 1) % NUM_CLASSES
        draw = e.readings
        e.readings = lambda: draw() | {"teacher_right": torch.zeros(ROWS, teachers)}  # type: ignore[method-assign]
        assert (e.run(1)["weights"][:, 1:] == 0).all()  # epoch 4, and nobody has validated
        e.validate(0.4, *[error] * teachers)
        # before 1.6 times five epochs are over, after them, at 18 epochs from the end, and at the end
        for epoch, share in (5, 0.0), (6, 0.0), (7, 0.66), (11, 0.54), (28, 0.03), (29, 0.03):
            e.run(epoch - (3 + len(e.drawn)))
            weights = e.table["weights"][300:].double()
            expected = share * quality
            found = weights[:, 1:].sum(1) / weights.sum(1)
            torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-4, rtol=0)
            torch.testing.assert_close(weights[:, 1:], weights[:, 1:2].expand(-1, teachers))

    @pytest.mark.parametrize(("warmup", "first"), [(1, 2), (2, 3), (3, 5), (10, 16)])
    def test_when_teachers_are_first_heard(self, teachers: int, warmup: int, first: int) -> None:
        """Beside labels at all, and against them with full voice, from 1.6 warm-ups on."""
        e = Epochs([0.4] * teachers, warmup=warmup)
        for classes in e.classes[1:]:
            classes[:180] = (e.labels[:180] + 1) % NUM_CLASSES
        draw = e.readings
        e.readings = lambda: draw() | {"teacher_right": torch.ones(ROWS, teachers)}  # type: ignore[method-assign]
        e.validate(0.4, *[0.0] * teachers)
        for epoch in range(warmup, first + 2):
            table = e.run(1)
            weights = table["weights"].double()
            trust = weights[TRAIN:].sum(1)
            share = weights[TRAIN:, 1:].sum(1) / trust
            assert (share > 0.3).all() if epoch >= first else (share == 0).all()
            clean = table["clean_probability"][:180].double()
            voice = (weights[:180, 1:].sum(1) / trust[0] - share[0] * clean) / (1 - clean)
            expected = 1.0 if epoch >= first else 0.3
            torch.testing.assert_close(voice, torch.full_like(voice, expected), atol=1e-3, rtol=0)

    @pytest.mark.parametrize(
        ("own", "lasting"), [(0.5, 0), (0.4, 0), (0.38, 0.075), (0.3, 0.375), (0.27, 0.4875), (0.25, 0.5), (0, 0.5)]
    )
    @pytest.mark.parametrize("noise", [True, False])
    def test_what_lasts_of_a_teachers_share(self, teachers: int, own: float, lasting: float, noise: bool) -> None:
        """A student that errs on 40% of validation rows; what it errs on of rows that are not trusted is no matter."""
        e = Epochs([0.4] * teachers)
        e.noisy &= noise
        draw = e.readings
        e.readings = lambda: draw() | {"teacher_right": torch.zeros(ROWS, teachers)}  # type: ignore[method-assign]
        e.validate(0.4, *[0.375] * teachers)  # a quality of a half
        wrong = slice(TRAIN, TRAIN + round(own * META))
        for epoch, part in (8, 9 / 30), (14, 15 / 30), (28, 29 / 30), (29, 29 / 30):
            e.classes[0][TRAIN:] = e.labels[TRAIN:]
            e.run(epoch - 1 - (3 + len(e.drawn)))  # by heart, and only the latest epoch counts
            e.classes[0][wrong] = (e.labels[wrong] + 1) % NUM_CLASSES
            e.run(1)
            weights = e.table["weights"][TRAIN:].double()
            found, expected = weights[:, 1:].sum(1) / weights.sum(1), 0.5 * 0.9 * (1 - (1 - lasting) * part)
            torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-5, rtol=0)

    def test_errors_of_the_two_latest_validations(self, teachers: int) -> None:
        """The newer of two has as much to say as the older, and one before them nothing; five rows more are wrong."""
        e = Epochs([0.4] * teachers)
        for wrong in [0, 90], [120, 104], [110, 98]:
            e.rule.validated(e.table, torch.tensor(wrong[:1] + wrong[1:] * teachers), torch.tensor(200))
        # 120 and 106 of 200, five more included; of 226 errors half are one's alone, with a standard error of its root
        ratio = (106 + 0.5 * 113**0.5) / 120
        expected = torch.full((teachers,), 8 * (1 - ratio))
        torch.testing.assert_close(teacher_quality(e.table), expected)

    @pytest.mark.parametrize(
        ("student", "teacher", "quality"), [(8, 8, 0.05), (9, 8, 0.05), (8, 9, 0.0), (0, 0, 0.05), (12, 4, 1.0)]
    )
    def test_few_validation_rows(self, teachers: int, student: int, teacher: int, quality: float) -> None:
        e = Epochs([0.4] * teachers)
        e.rule.validated(e.table, torch.tensor([student] + [teacher] * teachers), torch.tensor(12))
        assert teacher_quality(e.table).tolist() == pytest.approx([quality] * teachers, abs=1e-6)

    def test_rows_not_seen_keep_their_evidence(self, teachers: int) -> None:
        e = Epochs([0.4] * teachers)
        e.run(2)
        names = ["epochs", "evidence_mean", "evidence_square_mean", "log_probability_mean"]
        names += ["label_log_odds_mean", "teacher_right_mean"]
        before = {name: e.table[name].clone() for name in names}
        table = e.run(1, seen=torch.arange(1, ROWS, 2))
        for name in names:
            torch.testing.assert_close(table[name][::2], before[name][::2], rtol=0, atol=0)
            assert (table[name][1::2] != before[name][1::2]).all()
        assert table["alignment"].isnan().all()  # ready for the next epoch
        assert table["epochs"].tolist() == [2, 3] * (ROWS // 2)

    def test_clean_probabilities_from_explicit_means(self, teachers: int) -> None:
        """Recursions against weighted means written out in float64, some rows missing in some epochs."""
        e = Epochs([0.4] * teachers)
        rng = np.random.default_rng(5)
        for _ in range(5):
            e.run(1, seen=torch.from_numpy(rng.permutation(ROWS)[:500]))
        table = e.run(1)
        history: list[list[tuple[float, float, float]]] = [[] for _ in range(ROWS)]
        for seen, values in e.drawn:
            a = values["alignment"].double().numpy()
            evidence = np.clip(a / np.sqrt((a**2).mean()), -3, 3)
            means = (values[name].tolist() for name in ("log_probability", "label_log_odds"))
            for row, *reading in zip(seen.tolist(), evidence, *means, strict=True):
                history[row].append(tuple(reading))
        features = np.empty((ROWS, 4))
        for row, readings in enumerate(history):
            ages = 0.9 ** np.arange(len(readings))[::-1]
            x, log_p, odds = np.array(readings).T
            mean = np.average(x, weights=ages)
            variance = np.average((x - mean) ** 2, weights=ages)
            features[row, :2] = mean * np.sqrt(ages.sum()) / np.sqrt(variance + 0.05), np.average(log_p, weights=ages)
            features[row, 3] = np.average(odds, weights=ages)
        features[:, 2] = e.drawn[-1][1]["teacher_log_probability"]
        fit = fit_clean_probability(features, np.arange(ROWS) >= TRAIN)
        assert 0.2 < fit.noise_rate < 0.4
        np.testing.assert_allclose(table["clean_probability"][:TRAIN].numpy(), fit.clean[:TRAIN], atol=2e-3)

    def test_rows_never_seen(self, teachers: int) -> None:
        hidden = torch.tensor([0, 1, 300, TRAIN, ROWS - 1])
        seen = torch.tensor(sorted(set(range(ROWS)) - set(hidden.tolist())))
        table = Epochs([0.4] * teachers).run(3, seen=seen)
        assert all(column.isfinite().all() for name, column in table.columns.items() if name != "alignment")
        clean = table["clean_probability"]
        assert clean[0].item() == pytest.approx(1 - table.shared["noise_rate"].item(), abs=0.01)
        torch.testing.assert_close(clean[hidden], torch.tensor([clean[0]] * 3 + [1.0, 1.0]))

    def test_what_it_has_not_seen_it_has_not_memorized(self, teachers: int) -> None:
        """Rows never seen have class 0 in the table, which is the label of these."""
        e = Epochs([0.4] * teachers)
        e.noisy[:] = False
        e.labels[TRAIN + 200 :] = 0
        e.validate(0.6, *[0.2] * teachers)
        # of these 200 it errs on 120, as often as on validation rows; of all 300 as often as on two thirds of them
        weights = e.run(11, seen=torch.arange(TRAIN + 200))["weights"]
        torch.testing.assert_close(weights[:TRAIN, 1:].sum(1), torch.full((TRAIN,), 0.9 * 0.5))

    def test_an_epoch_without_trusted_rows(self, teachers: int) -> None:
        """A short epoch (``limit_train_batches``) may hold none: nothing is proven, nothing breaks."""
        e = Epochs([0.1] * teachers)
        table = e.run(1, seen=torch.arange(64))
        assert (table["clean_probability"] == 1).all()
        assert (table["weights"][:, 1:] == 0).all()
        e.validate(0.4, *[0.1] * teachers)
        e.run(9)
        weights = e.run(1, seen=torch.arange(64))["weights"]
        assert weights.isfinite().all()
        assert (weights[:, 1:] > 0).any()  # what was found before still counts

    def test_an_epoch_of_trusted_rows_alone(self, teachers: int) -> None:
        table = Epochs([0.1] * teachers).run(1, seen=torch.arange(TRAIN, ROWS))
        assert table.shared["noise_rate"].item() == 0
        assert table["weights"].isfinite().all()

    def test_goes_on_from_a_checkpoint(self, teachers: int) -> None:
        whole, half = Epochs([0.3] * teachers), Epochs([0.3] * teachers)
        for epochs in (whole, half):
            epochs.run(6)
            epochs.validate(0.5, *[0.2] * teachers)  # it errs on 0.4 of its own: a part lasts
        whole.run(3)
        half.run(1)
        half.rule = Robust(warmup_epochs=5)
        half.table = SampleTable.from_state_dict(half.table.state_dict())
        half.start()
        half.run(2)
        for name, column in whole.table.columns.items():
            torch.testing.assert_close(half.table[name], column, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(half.table.shared, whole.table.shared, rtol=0, atol=0)


class TestRobustTeachers:
    def test_without_noise_all_rows_count_alike(self) -> None:
        e = Epochs([0.9])
        e.noisy[:] = False
        table = e.run(12)
        assert table.shared["noise_rate"].item() == 0
        assert (table["clean_probability"] == 1).all()
        assert table["weights"].tolist() == [[1.0, 0.0]] * ROWS

    def test_against_a_wrong_label_the_right_teacher_is_heard(self) -> None:
        e = Epochs([0.6, 0.6])
        draw = e.readings

        def readings() -> dict[str, Tensor]:
            values = draw()
            values["teacher_right"][:] = torch.tensor([0.01, 0.97])
            values["teacher_class"][:180] = torch.stack([e.labels + 1, e.labels + 2], dim=1)[:180] % NUM_CLASSES
            return values

        e.readings = readings  # type: ignore[method-assign]
        weights = e.run(6)["weights"][:180]
        assert (weights[:, 1] == 0).all()
        assert weights[:, 2].mean() > 3 * weights[:, 0].mean()
        # without a validation a voice of 0.3, with a teacher much better than the student 1
        e.validate(0.4, 0.9, 0.1)
        wrong = e.table["clean_probability"][:180] < 0.01
        heard = e.run(1)["weights"]
        ratio = heard[:180][wrong, 2] / weights[wrong, 2]
        assert ratio.mean().item() == pytest.approx(1 / 0.3, rel=0.05)
        assert (heard[300:, 1] == 0).all()
        assert (heard[300:, 2] > 0.5 * heard[300:].sum(1)).all()

    def test_each_has_a_quality_of_its_own(self) -> None:
        e = Epochs([0.4] * 3)
        e.rule.validated(e.table, torch.tensor([50, 10, 60, 50]), torch.tensor(100))
        assert teacher_quality(e.table).tolist() == pytest.approx([1, 0, 0.05])

    def test_memorization_by_hand(self) -> None:
        e = Epochs([0.4])
        trusted = torch.arange(ROWS) >= ROWS - 10
        assert memorization(e.table, e.labels, trusted) == 0  # nobody has validated
        for wrong, rows in [90, 90], [3, 40], [16, 60]:
            e.rule.validated(e.table, torch.tensor([wrong, 0]), torch.tensor(rows))
        assert memorization(e.table, e.labels, torch.zeros(ROWS, dtype=torch.bool)) == 0
        # 19 of the latest 100, and five more of each 50 on both sides: 0.29, against 0.1 and the errors among ten
        for own, expected in (0, 1.0), (1, 3 * (1 - 0.2 / 0.29)), (2, 0.0), (10, 0.0):
            e.table["student_class"] = e.labels.float()
            e.table["student_class"][ROWS - own :] += 1
            e.table["student_class"][:300] += 1
            assert memorization(e.table, e.labels, trusted) == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("errors", [0, 1, 5, 40])
    def test_a_student_that_errs_alike_has_memorized_nothing(self, errors: int) -> None:
        e = Epochs([0.4])
        e.rule.validated(e.table, torch.tensor([errors, 0]), torch.tensor(META))
        e.table["student_class"] = e.labels.float()
        e.table["student_class"][ROWS - errors :] += 1
        assert memorization(e.table, e.labels, torch.arange(ROWS) >= TRAIN) == pytest.approx(0, abs=1e-6)

    def test_weights_by_hand(self) -> None:
        """Every row and class by itself, from the words of the docstring."""
        rng = np.random.default_rng(0)
        rows, teachers, num_classes = 300, 4, 3
        clean, right = rng.random(rows), rng.random((rows, teachers))
        labels, classes = rng.integers(0, num_classes, rows), rng.integers(0, num_classes, (rows, teachers))
        shares, voices = np.array([0.0, 0.2, 0.7, 0.5]), np.array([0.3, 0.6, 1.0, 0.0])
        expected, trust = np.zeros((rows, teachers + 1)), 0.0
        for i in range(rows):
            expected[i, 0] = (1 - max(shares)) * clean[i]
            trust += clean[i]
            for k in range(teachers):
                named = [j for j in range(teachers) if classes[i, j] == classes[i, k]]
                expected[i, 1 + k] = clean[i] * max(shares) * shares[k] / sum(shares)
                if classes[i, k] != labels[i]:
                    own = (1 - clean[i]) * right[i, k] / len(named)
                    expected[i, 1 + k] += voices[k] * own
                    trust += own
        found = trust_to_weights(*map(torch.from_numpy, (clean, right, classes, labels, shares, voices)))
        np.testing.assert_allclose(found.numpy(), expected / (trust / rows), rtol=1e-6, atol=1e-9)

    def test_channel_against_a_confusion_matrix(self) -> None:
        rng = np.random.default_rng(0)
        y, classes = rng.integers(0, 4, 50), rng.integers(0, 4, (50, 2))
        found = teacher_channel(torch.from_numpy(classes), torch.from_numpy(y), 4)
        for k in range(2):
            counts = confusion_matrix(y, classes[:, k]).T + 5 * np.eye(4) + 0.1
            np.testing.assert_allclose(found[k].numpy(), counts / counts.sum(1, keepdims=True), rtol=1e-6)

    def test_label_channel_against_a_confusion_matrix(self) -> None:
        rng = np.random.default_rng(0)
        y, classes = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
        counts = confusion_matrix(classes, y) + 5 * (0.7 * np.eye(4) + 0.3 / 4)
        found = label_channel(torch.from_numpy(classes), torch.from_numpy(y), 4)
        np.testing.assert_allclose(found.numpy(), counts / counts.sum(1, keepdims=True), rtol=1e-6)

    def test_label_log_odds_are_those_of_drawn_labels(self) -> None:
        """Classes drawn from the student's probabilities, labels from the channel: how often is the label the class?"""
        rng = np.random.default_rng(0)
        channel = np.array([[0.6, 0.4, 0.0], [0.1, 0.9, 0.0], [0.2, 0.3, 0.5]])
        for student in rng.dirichlet(np.ones(3), 4):
            true = rng.choice(3, 200_000, p=student)
            y = (rng.random(len(true))[:, None] > channel[true].cumsum(1)).sum(1)
            rows = torch.tensor(student).float().expand(3, -1)
            clean = label_log_odds(rows, torch.arange(3), torch.tensor(channel).float()).sigmoid()
            for label in range(3):
                given = true[y == label] == label
                deviation = np.sqrt(0.25 / len(given))
                assert clean[label].item() == pytest.approx(given.mean(), abs=5 * deviation + 1e-4)

    def test_a_label_that_cannot_be_given_has_finite_odds(self) -> None:
        student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
        odds = label_log_odds(student, torch.tensor([0, 0, 1]), torch.eye(2))
        assert odds.tolist() == pytest.approx([np.log(1 + 1e6), 0, 0], abs=1e-4)

    def test_log_odds_of_a_sure_student(self) -> None:
        """1 - p would have no digits left."""
        logits, y = (
            torch.tensor([[8.0, 0.0, 0.0], [12.0, 1.0, 0.0], [16.0, 0.0, 2.0]]),
            torch.zeros(3, dtype=torch.int64),
        )
        channel = torch.tensor([[0.8, 0.1, 0.1], [0.3, 0.7, 0.0], [0.2, 0.0, 0.8]])
        said = logits.double().softmax(1) * channel.double()[:, 0]
        expected = (said[:, 0] + 1e-6).log() - (said[:, 1:].sum(1) + 1e-6).log()
        found = label_log_odds(logits.softmax(1), y, channel)
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)

    def test_the_label_channel_is_that_of_all_rows_with_a_label(self) -> None:
        e = Epochs([0.9])
        e.labels[100:200] = UNLABELED
        e.start()
        seen = torch.arange(50, ROWS)
        channel = e.run(1, seen=seen).shared["label_channel"].numpy()
        counted = seen[e.labels[seen] != UNLABELED]
        counts = confusion_matrix(e.classes[0][counted], e.labels[counted]) + 5 * (0.7 * np.eye(NUM_CLASSES) + 0.03)
        np.testing.assert_allclose(channel, counts / counts.sum(1, keepdims=True), rtol=1e-5)

    def test_many_classes_without_noise(self) -> None:
        """45 rows a class, a student whose probabilities are right: no label is doubted."""
        rng = np.random.default_rng(0)
        classes, rows = 100, 5_000
        student = rng.normal(size=(rows, classes)) * 1.5
        student[np.arange(rows), rng.integers(0, classes, rows)] += 5
        student = np.exp(student) / np.exp(student).sum(1, keepdims=True)
        y = torch.from_numpy((rng.random(rows)[:, None] > student.cumsum(1)).sum(1).clip(max=classes - 1))
        p = torch.from_numpy(student).float()
        odds = label_log_odds(p, y, label_channel(p.argmax(1), y, classes)).double().numpy()
        log_p = np.log(student[np.arange(rows), y] + 1e-6)
        assert fit_clean_probability(np.stack([log_p, odds], 1), np.arange(rows) >= 4_500).noise_rate == 0


class TestRobustObserve:
    def test_readings(self) -> None:
        p = problem(16, 2)
        rule = Robust(warmup_epochs=1)
        table = started(rule, 20, 2, trusted=4)
        before = table["weights"].clone()
        channels = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(CLASSES), (3, CLASSES))).float()
        channel, of_labels = channels[:2], channels[2]
        table.shared |= {"teacher_channel": channel, "label_channel": of_labels}
        rule.observe(table, single(p))
        z = p.layer(p.features).detach()
        assert table["student_class"][:16].tolist() == z.argmax(1).tolist()
        assert table["teacher_class"][:16].tolist() == torch.stack([t.argmax(1) for t in p.teachers], 1).tolist()
        labelled = p.y != UNLABELED
        expected = (-cross_entropy(z, p.y)[labelled]).float()
        torch.testing.assert_close(table["log_probability"][:16][labelled], expected, rtol=1e-3, atol=1e-3)
        student = z.softmax(-1).double().numpy()
        for i in range(16):
            true = [np.zeros(CLASSES) for _ in p.teachers]
            for k, t in enumerate(p.teachers):
                named = t[i].softmax(-1).double().numpy()
                for c, d in itertools.product(range(CLASSES), range(CLASSES)):
                    true[k][c] += named[d] * float(channel[k, d, c])
            belief = (student[i] + 1e-4) * np.sqrt((true[0] + 1e-4) * (true[1] + 1e-4))
            if labelled[i]:
                belief[p.y[i]] = 0
                given = [student[i][c] * float(of_labels[c, p.y[i]]) for c in range(CLASSES)]
                own = given.pop(int(p.y[i]))
                odds = np.log((own + 1e-6) / (sum(given) + 1e-6))
                assert table["label_log_odds"][i].item() == pytest.approx(odds, rel=1e-3, abs=1e-4)
                log = np.mean([np.log(t[p.y[i]] + 1e-3) for t in true])
                assert table["teacher_log_probability"][i].item() == pytest.approx(log, rel=1e-4, abs=1e-4)
            belief /= belief.sum()
            right = [belief[t[i].argmax()] for t in p.teachers]
            np.testing.assert_allclose(table["teacher_right"][i].numpy(), right, rtol=1e-3, atol=1e-6)
        assert (table["alignment"][:16][~labelled] == 0).all()
        assert table["alignment"][16:].isnan().all()
        torch.testing.assert_close(table["weights"], before, rtol=0, atol=0)

    def test_a_batch_without_labels_is_seen(self) -> None:
        """No label says whether meta rows vouched, nor need they: what teachers say of such rows counts."""
        p = problem(16, 1)
        rule = Robust(warmup_epochs=1)
        table = started(rule, 20, 1, trusted=4)
        rule.observe(table, replace(single(p), y=torch.full((16,), UNLABELED)))
        assert (table["alignment"][:16] == 0).all()

    @pytest.mark.parametrize("epochs", [0, -2])
    def test_a_warmup_has_an_epoch(self, epochs: int) -> None:
        with pytest.raises(ValueError, match=f"expected warmup_epochs of at least 1, or None; found {epochs}"):
            Robust(warmup_epochs=epochs)

    def test_where_no_meta_row_is_left_to_vouch(self) -> None:
        """All are in the batch: its labels count as not seen, which is not the same as seen with no effect."""
        p = problem(16, 1)
        alone = single(replace(p, meta=p.meta._replace(keep=torch.zeros(len(p.meta.y), dtype=torch.bool))))
        rule = Robust(warmup_epochs=1)
        table = started(rule, 32, 1, trusted=4)
        rule.observe(table, replace(single(p), index=torch.arange(16, 32)))
        rule.observe(table, alone)
        rule.renew(table, 0)
        assert table["epochs"].tolist() == (p.y == UNLABELED).float().tolist() + [1.0] * 16
        assert (table["evidence_mean"][:16] == 0).all()
        assert table["weights"].isfinite().all()

    def test_evidence_is_the_fall_of_the_loss(self) -> None:
        """A student that learns one label alone, a little: so much does the validation loss fall."""
        planted = Planted(0, noisy_labels=True)
        table = started(Robust(warmup_epochs=1), 128, 1)
        Robust(warmup_epochs=1).observe(table, planted.step())
        evidence = table["alignment"].numpy()
        meta, y = planted.meta.features.double(), planted.meta.y
        before = F.cross_entropy(F.linear(meta, planted.head.weight.double()), y)
        falls = []
        for i in range(128):
            weight = planted.head.weight.double().requires_grad_()
            bias = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)
            F.cross_entropy(F.linear(planted.features[i].double(), weight, bias), planted.y[i]).backward()
            torch.optim.SGD([weight, bias], lr=1e-4).step()
            with torch.no_grad():
                falls.append(float(before - F.cross_entropy(F.linear(meta, weight, bias), y)) / 1e-4)
        np.testing.assert_allclose(evidence, falls, rtol=1e-2, atol=1e-3)
        assert roc_auc_score(~planted.wrong.numpy(), evidence) > 0.8

    def test_schedule(self) -> None:
        for epochs, first in [(30, 2), (60, 5), (6, 0), (1, 0)]:
            rule = Robust()
            started(rule, 4, 1, 2, epochs)
            assert [e for e in range(epochs) if rule.active(e)] == list(range(first, epochs))
        rule = Robust(warmup_epochs=4)
        rule.start(SampleTable(1, ""), 1, torch.tensor([False]), torch.tensor([0]), epochs=None)
        assert rule.length == 40
        rule = Robust(warmup_epochs=3)
        table = started(rule, ROWS, 1, META)
        before = table.state_dict()["columns"]
        rule.renew(table, epoch=1)
        for name, column in before.items():
            torch.testing.assert_close(table[name], column, equal_nan=True)
        assert not rule.active(1)
        assert rule.active(2)

    def test_start_hears_labels_alone(self) -> None:
        weights = started(Robust(), 8, 2, 4)["weights"]
        torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0, 0.0]]).repeat(8, 1))
