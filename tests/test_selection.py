"""Which rows to ask about, against a solver of linear programs, scikit-learn, and counts of many draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog
from scipy.stats import chi2, chisquare, entropy
from sklearn.cluster import kmeans_plusplus
from sklearn.metrics import pairwise_distances

from lit_kd.trust.game import dep_round, rad_distribution, rad_marginals
from lit_kd.trust.queries import QueryRule, badge, choose_rows, cluster_margin, coreset, margin_gain

Floats = NDArray[np.float64]


def guaranteed_gain(marginals: ArrayLike, gain: ArrayLike, mistakes: float, penalty: Floats | None = None) -> float:
    """What a mix of queries gains if the teacher's mistakes fall where they hurt most: the inner linear program.

    Sorted by hurt, with a fraction of a mistake hitting a row by that fraction.
    """
    q, g = np.asarray(marginals), np.asarray(gain)
    hurt = np.sort(q * (g if penalty is None else g + penalty))[::-1]
    return float(q @ g - hurt @ (mistakes - np.arange(len(g))).clip(0, 1))


def solved(gain: Floats, mistakes: float, penalty: Floats, budget: float, most: float | None) -> float:
    """The game's value by linear programming: over q and the dual of who is hit, t and u."""
    n = len(gain)
    cost = np.concatenate([-gain, [mistakes], np.ones(n)])
    hit = np.hstack([np.diag(gain + penalty), -np.ones((n, 1)), -np.eye(n)])
    total = np.concatenate([np.ones(n), np.zeros(n + 1)])
    bounds = [(0, most)] * n + [(0, None)] * (n + 1)
    found = linprog(cost, A_ub=hit, b_ub=np.zeros(n), A_eq=total[None], b_eq=[budget], bounds=bounds)
    assert found.status == 0
    return float(-found.fun)


def instances(count: int) -> Iterator[tuple[Floats, float, Floats | None]]:
    """Games with and without ties, zero gains, penalties and mistakes, these up to more than there are rows."""
    draw = np.random.default_rng(0)
    for i in range(count):
        n = int(draw.integers(1, 13))
        gain = draw.random(n) * draw.integers(0, 2, n) if i % 4 == 0 else draw.random(n)
        if i % 4 == 1:
            gain = draw.choice([0.0, 0.5, 1.0], n)
        penalty = [None, draw.random(n), None, draw.choice([0.0, 0.5, 1.0], n)][i // 4 % 4]
        yield gain, float(draw.choice([0, draw.random() * n, draw.integers(0, n + 3)])), penalty


class TestGame:
    def test_value_is_the_linear_programs(self) -> None:
        positive = 0
        for gain, mistakes, penalty in instances(200):
            p = rad_distribution(gain, mistakes, penalty)
            assert p.min() >= 0
            assert p.sum() == pytest.approx(1, abs=1e-12)
            expected = solved(gain, mistakes, np.zeros(len(gain)) if penalty is None else penalty, 1, None)
            assert guaranteed_gain(p, gain, mistakes, penalty) == pytest.approx(expected, abs=1e-8)
            positive += expected > 0.01
        assert positive > 60

    def test_marginals_reach_the_linear_programs_value(self) -> None:
        draw, capped = np.random.default_rng(1), 0
        for gain, mistakes, penalty in instances(200):
            n = len(gain)
            budget = int(draw.integers(0, n + 1))
            q = rad_marginals(gain, mistakes, budget, penalty)
            assert q.min() >= 0
            assert q.max() <= 1 + 1e-12
            assert q.sum() == pytest.approx(budget, abs=1e-9)
            expected = solved(gain, mistakes, np.zeros(n) if penalty is None else penalty, budget, 1.0)
            assert guaranteed_gain(q, gain, mistakes, penalty) == pytest.approx(expected, abs=1e-8)
            capped += bool(budget) and (budget * rad_distribution(gain, mistakes, penalty)).max() > 1
        assert capped > 40

    def test_the_oracles_worst_case(self) -> None:
        q, gain, penalty = np.random.default_rng(2).random((3, 5))
        for mistakes in (0, 1.5, 4, 9):
            hit = linprog(-q * (gain + penalty), A_ub=np.ones((1, 5)), b_ub=[mistakes], bounds=[(0, 1)] * 5)
            assert guaranteed_gain(q, gain, mistakes, penalty) == pytest.approx(q @ gain + hit.fun, abs=1e-9)

    @pytest.mark.parametrize("gain", [0.3, 0.0])
    def test_rows_of_equal_gain_are_treated_alike(self, gain: float) -> None:
        for mistakes in (0, 2.0, 4, 7):
            np.testing.assert_allclose(rad_distribution(np.full(4, gain), mistakes), 0.25)
            np.testing.assert_allclose(rad_marginals(np.full(4, gain), mistakes, 3).sum(), 3)
        np.testing.assert_allclose(rad_marginals(np.full(4, 0.3), 2.0, 3), 0.75)

    def test_ends_of_the_budget(self) -> None:
        gain = np.random.default_rng(3).random(6)
        np.testing.assert_array_equal(rad_marginals(gain, 2, 0), np.zeros(6))
        np.testing.assert_array_equal(rad_marginals(gain, 2, 6), np.ones(6))
        assert len(rad_marginals([], 0, 0)) == 0

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (([0.5, -0.1], 1), "gain of at least 0 and finite, found values from -0.1"),
            (([0.5, np.nan], 1), "gain of at least 0 and finite"),
            (([0.5], -1), "mistakes of at least 0, found -1"),
            (([0.5], np.nan), "mistakes of at least 0, found nan"),
            (([0.5], 1, [-0.1]), "penalty of at least 0"),
            (([], 0), "at least one row"),
        ],
    )
    def test_bad_input(self, arguments: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            rad_distribution(*arguments)


class TestDepRound:
    def test_keeps_marginals_and_number(self) -> None:
        draw = np.random.default_rng(0)
        q = draw.random(9) ** 2
        q[-1] = 1 - q[:-1].sum() % 1  # a whole sum
        q = np.concatenate([q, [0.0, 1.0]])
        budget, times = round(q.sum()), 10_000
        counts = np.zeros(len(q))
        for _ in range(times):
            chosen = dep_round(q, draw)
            assert len(chosen) == budget
            counts[chosen] += 1  # each at most once, as `bincount` would not tell
            assert len(np.unique(chosen)) == budget
        assert (counts[-2:] == [0, times]).all()
        # each row's count is binomial; they are correlated, so one test a row, and Bonferroni's bound
        inner = slice(0, 9)
        statistic = (counts - times * q)[inner] ** 2 / (times * q * (1 - q))[inner]
        assert statistic.max() < chi2.ppf(1 - 1e-3 / 9, df=1)

    def test_ends(self) -> None:
        draw = np.random.default_rng(0)
        assert dep_round(np.zeros(3), draw).tolist() == []
        assert dep_round(np.ones(3), draw).tolist() == [0, 1, 2]
        assert dep_round([], draw).tolist() == []

    @pytest.mark.parametrize("q", [[0.5, 0.2], [1.5, 0.5], [-0.5, 0.5]])
    def test_bad_marginals(self, q: list[float]) -> None:
        with pytest.raises(ValueError, match="expected marginals"):
            dep_round(q, np.random.default_rng(0))


def student(n: int = 200, classes: int = 4, features: int = 5) -> tuple[Floats, Floats]:
    """Probabilities and features of n rows."""
    draw = np.random.default_rng(5)
    return draw.dirichlet(np.ones(classes), n), draw.normal(size=(n, features))


def choose(rule: Any, p: Floats, x: Floats, budget: int) -> NDArray[np.int64]:
    draw = np.random.default_rng(0)
    return choose_rows(rule, p, budget, draw, mistakes=0.2 * len(p), features=x, known_features=x[:1] + 1)


every_rule = pytest.mark.parametrize("rule", get_args(QueryRule))


class TestRules:
    @every_rule
    def test_budget_of_different_rows(self, rule: str) -> None:
        for budget in (0, 1, 7, 200):
            chosen = choose(rule, *student(), budget)
            assert chosen.dtype == np.int64
            assert len(chosen) == len(set(chosen.tolist())) == budget
            assert set(chosen.tolist()) <= set(range(200))
        alike = choose(rule, np.full((5, 3), 1 / 3), np.ones((5, 2)), 4)
        assert len(set(alike.tolist())) == 4

    def test_bad_input(self) -> None:
        for budget in (-1, 201):
            with pytest.raises(ValueError, match=f"budget from 0 to the 200 rows of the pool, found {budget}"):
                choose("uniform", *student(), budget)
        with pytest.raises(ValueError, match="finite probabilities, found nan"):
            choose("rad", np.full((4, 2), np.nan), np.ones((4, 2)), 2)
        with pytest.raises(ValueError, match=r"expected features.* for the rule 'badge', found none"):
            choose_rows("badge", student()[0], 3, np.random.default_rng(0))

    def test_rad_draws_from_the_game(self) -> None:
        p = student(n=12)[0]
        expected = dep_round(rad_marginals(margin_gain(p), 3, 4), np.random.default_rng(0))
        found = choose_rows("rad", p, 4, np.random.default_rng(0), mistakes=3)
        assert found.tolist() == expected.tolist()

    def test_unknown_rule(self) -> None:
        with pytest.raises(ValueError, match=r"expected as rule one of .*'rad'.*found 'best'"):
            choose("best", *student(), 3)

    def test_margin_and_entropy(self) -> None:
        p = np.array([[0.5, 0.4, 0.1], [0.5, 0.25, 0.25], [0.9, 0.05, 0.05], [0.45, 0.4, 0.15]])
        np.testing.assert_allclose(margin_gain(p), [0.9, 0.75, 0.15, 0.95])
        assert choose("margin", p, p, 2).tolist() == [3, 0]
        assert choose("entropy", p, p, 2).tolist() == [1, 3]
        assert choose("entropy", np.array([[1.0, 0.0], [0.5, 0.5]]), p, 1).tolist() == [1]

    def test_coreset_covers(self) -> None:
        """Each choice is the farthest row of all, by brute force."""
        _, x = student()
        centers, pool = x[:3], x[3:]
        known = list(centers)
        for row in coreset(pool, centers, 20):
            distance = pairwise_distances(pool, np.array(known)).min(1)
            assert distance[row] == pytest.approx(distance.max())
            known.append(pool[row])

    def test_badge_draws_as_scikit_learn_on_the_embeddings(self) -> None:
        """The same distribution of pairs as k-means++ with one trial, by a test of homogeneity."""
        p, h = student(n=6, classes=3, features=2)
        residual = p - np.eye(3)[p.argmax(1)]
        embedding = np.einsum("nc,nd->ncd", residual, h).reshape(6, -1)
        times, counts = 2000, np.zeros((2, 36))
        draw, state = np.random.default_rng(0), np.random.RandomState(0)
        for _ in range(times):
            i, j = badge(p, h, 2, draw)
            counts[0, 6 * i + j] += 1
            i, j = kmeans_plusplus(embedding, 2, random_state=state, n_local_trials=1)[1]
            counts[1, 6 * i + j] += 1
        assert not counts[:, ::7].any()  # never the same row twice
        enough = counts.sum(0) > 10
        assert enough.sum() > 20
        pooled = counts[:, enough].sum(0) / 2
        statistic = ((counts[:, enough] - pooled) ** 2 / pooled).sum()
        assert statistic < chi2.ppf(1 - 1e-3, df=enough.sum() - 1)

    def test_uniform_is_uniform(self) -> None:
        p, draw = np.full((8, 2), 0.5), np.random.default_rng(0)
        counts = np.bincount(np.concatenate([choose_rows("uniform", p, 1, draw) for _ in range(4000)]), minlength=8)
        assert chisquare(counts).pvalue > 1e-3

    def test_cluster_margin_goes_round(self) -> None:
        """Three clusters far apart: one row of each before a second of any, the surest of them last."""
        x = np.repeat([[0.0], [100.0], [300.0]], [3, 8, 14], axis=0) + np.linspace(0, 1, 25)[:, None]
        top = np.linspace(0.5, 0.99, 25)
        p = np.stack([top, 1 - top], axis=1)
        cluster = np.repeat([0, 1, 2], [3, 8, 14])
        chosen = cluster_margin(p, x, 12)
        assert cluster[chosen].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 1, 2, 1]
        for own in range(3):
            rows = chosen[cluster[chosen] == own]
            assert rows.tolist() == np.flatnonzero(cluster == own)[: len(rows)].tolist()


class TestSpaced:
    def test_by_hand(self) -> None:
        """Every fourth of the rows by falling doubt; both parts of it are in [0, 1]."""
        p = np.random.default_rng(0).dirichlet(np.ones(3), 50)
        doubt = [1 - (np.sort(row)[-1] - np.sort(row)[-2]) + entropy(row, base=3) for row in p]
        order = sorted(range(50), key=lambda i: -doubt[i])
        chosen = choose_rows("spaced", p, 5, np.random.default_rng(0))
        assert chosen.tolist() == [order[i] for i in (0, 4, 8, 12, 16)]

    @pytest.mark.parametrize("budget", [0, 1, 5, 13, 20])
    def test_of_a_small_pool_it_takes_what_there_is(self, budget: int) -> None:
        p = np.random.default_rng(1).dirichlet(np.ones(4), 20)
        chosen = choose_rows("spaced", p, budget, np.random.default_rng(0))
        assert len(set(chosen.tolist())) == budget

    def test_copies_are_not_all_asked_about(self) -> None:
        """As they would be by margin."""
        p = np.array([[0.5, 0.5]] * 4 + [[0.6, 0.4]] * 4 + [[0.9, 0.1]] * 4)
        assert (choose_rows("margin", p, 3, np.random.default_rng(0)) < 4).all()
        assert choose_rows("spaced", p, 3, np.random.default_rng(0)).tolist() == [0, 4, 8]
