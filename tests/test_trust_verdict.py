"""Estimates of teachers before a training, against scipy, scikit-learn and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from sklearn.linear_model import Ridge
from torch import Tensor

from lit_kd.trust import probe, verdict
from lit_kd.trust.probe import Probe, shrunk
from lit_kd.trust.teachers import (
    Interval,
    agreement,
    repeated_share,
    shared_errors,
    shares_by_class,
    wilson,
    wrong_share,
)
from lit_kd.trust.verdict import Law, Rehearsal, decide, predicted, rehearse


@pytest.mark.parametrize(("right", "total"), [(0, 5), (5, 5), (9, 10), (123, 360)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_interval_of_a_share_is_scipys(right: int, total: int, level: float) -> None:
    expected = binomtest(right, total).proportion_ci(level, method="wilson")
    assert wilson(right, total, level) == pytest.approx((right / total, expected.low, expected.high), abs=1e-12)


def test_no_rows_tell_nothing() -> None:
    estimate, *interval = wilson(0, 0)
    assert math.isnan(estimate)
    assert interval == [0, 1]


def test_shares_by_class() -> None:
    y, right = torch.tensor([0, 0, 0, 2]), torch.tensor([True, True, False, True])
    found = shares_by_class(right, y, 3)
    assert [share.estimate for share in found] == pytest.approx([2 / 3, math.nan, 1], nan_ok=True)
    assert found[0] == wilson(2, 3)


def test_an_interval_holds_its_estimate() -> None:
    for total in range(1, 400):
        for right in (0, 1, total - 1, total):
            share = wilson(right, total)
            assert 0 <= share.low <= share.estimate <= share.high <= 1


def test_agreement_and_shared_errors_by_hand() -> None:
    named = torch.tensor([[0, 0, 1], [1, 0, 1], [2, 2, 2], [0, 1, 2]])
    torch.testing.assert_close(agreement(named), torch.tensor([[1, 0.5, 0.5], [0.5, 1, 0.25], [0.5, 0.25, 1]]))
    named[1, 0] = named[3, 2] = -1  # silent
    torch.testing.assert_close(
        agreement(named), torch.tensor([[1, 2 / 3, 1 / 2], [2 / 3, 1, 1 / 3], [1 / 2, 1 / 3, 1]])
    )
    wrong = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]).bool()
    speaks = torch.ones_like(wrong)
    speaks[3, 0] = False
    torch.testing.assert_close(shared_errors(wrong, speaks)[:2], torch.tensor([[1, 0.5, 0], [0.5, 1, 0]]).double())
    found = shared_errors(wrong, torch.ones_like(wrong))
    torch.testing.assert_close(found[:2], torch.tensor([[1, 2 / 3, 0], [2 / 3, 1, 0]]).double())
    assert found[2].isnan().all()


def simulated(seed: int, noise: float, accuracy: float, classes: int = 10) -> tuple[Tensor, Tensor]:
    """A witness that errs evenly, beside labels that err evenly: right on 300 trusted, agrees on 2000 training rows."""
    draw = np.random.default_rng(seed)

    def named(y: np.ndarray, wrong: float) -> np.ndarray:
        other = (y + draw.integers(1, classes, len(y))) % classes
        return np.where(draw.random(len(y)) < wrong, other, y)

    trusted, true = draw.integers(0, classes, 300), draw.integers(0, classes, 2000)
    right = named(trusted, 1 - accuracy) == trusted
    return torch.from_numpy(right), torch.from_numpy(named(true, 1 - accuracy) == named(true, noise))


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4, 0.7])
def test_share_of_wrong_labels_is_found_and_in_its_interval(noise: float) -> None:
    found = [wrong_share(*simulated(seed, noise, 0.85), 10) for seed in range(200)]
    assert np.mean([f.estimate for f in found]) == pytest.approx(noise, abs=0.012)  # at 0 it is cut off below
    assert np.mean([f.low <= noise <= f.high for f in found]) >= 0.93


def test_a_witness_by_chance_tells_nothing() -> None:
    estimate, *interval = wrong_share(*simulated(0, 0.3, 0.1), 10)
    assert math.isnan(estimate)
    assert interval == [0, 1]


def test_bounds_of_what_a_teacher_repeats_hold_whatever_the_teacher() -> None:
    """A teacher that is right on some right labels, and repeats some wrong ones, in all proportions."""
    for wrong in (0.1, 0.5):
        for accuracy in (0.5, 0.9):
            for known in np.linspace(accuracy, 1, 4):  # of the right labels: at least as good as on trusted rows
                for repeated in np.linspace(0, 1, 5):
                    found = repeated_share((1 - wrong) * known + wrong * repeated, accuracy, wrong)
                    assert found.low - 1e-9 <= repeated <= found.high + 1e-9
    assert math.isnan(repeated_share(0.9, 0.9, 0.0).estimate)


class TestProbe:
    def test_each_fold_is_scikit_learns_ridge_fitted_to_the_others(self) -> None:
        draw = torch.Generator().manual_seed(0)
        x, y = torch.randn(200, 7, generator=draw), torch.randn(200, 3, generator=draw)
        weights = torch.rand(200, generator=draw)
        one = Probe(x, seed=3)
        found, h = one(y, weights), one.features.double().numpy()
        for k in range(probe.FOLDS):
            held = (one.folds == k).numpy()
            w = weights.double().numpy()[~held]
            alpha = probe.RIDGE * np.diag(h[~held].T @ (h[~held] * w[:, None])).mean()
            fit = Ridge(alpha, fit_intercept=False).fit(h[~held], y.double().numpy()[~held], sample_weight=w)
            np.testing.assert_allclose(found[held].numpy(), fit.predict(h[held]), atol=2e-3)

    def test_a_row_never_sees_its_own_target(self) -> None:
        x, y = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(50, 2)
        one = Probe(x, seed=0)
        changed = y.clone()
        changed[7] = 100
        rows = one.folds == one.folds[7]
        assert torch.equal(one(y)[rows], one(changed)[rows])
        assert not torch.equal(one(y)[~rows], one(changed)[~rows])

    def test_large_pictures_are_averaged(self) -> None:
        x = torch.arange(2 * 32 * 32).view(1, 2, 32, 32)
        assert torch.equal(shrunk(x)[0, 1, 0, 0], x[0, 1, :2, :2].float().mean())
        assert shrunk(x[..., :8, :8]).shape == (1, 2, 8, 8)


def task(seed: int, teacher: float, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Three Gaussians; labels wrong by chance; a teacher that is right on a share of the rows."""
    draw = torch.Generator().manual_seed(seed)
    true = torch.randint(3, (900,), generator=draw)
    x = torch.randn(900, 5, generator=draw) + 2 * F.one_hot(true, 5)
    trusted = torch.arange(900) >= 700
    other = (true + torch.randint(1, 3, true.shape, generator=draw)) % 3
    y = torch.where((torch.rand(900, generator=draw) < noise) & ~trusted, other, true)
    said = torch.where(torch.rand(900, generator=draw) < teacher, true, (true + 1) % 3)
    return x, y, trusted, F.one_hot(said, 3).float()


def test_rehearsal_tells_good_teachers_from_bad_ones() -> None:
    good, bad = (rehearse(*task(0, teacher, 0.4), seed=0) for teacher in (0.95, 0.2))
    assert good.distilled > 0 > bad.distilled
    assert good.accuracy == bad.accuracy
    assert good.wrong.low <= 0.4 <= good.wrong.high
    assert good.trusted == 200
    assert 0 < good.distilled_error < 0.05


NOWHERE = Interval(0.0, 0.0, 0.02)


def found(distilled: float, error: float = 0.005, wrong: float = 0.0, alone: float = -0.1) -> Rehearsal:
    return Rehearsal(0.9, distilled, error, alone, 0.005, Interval(wrong, wrong, wrong), 300)


@pytest.mark.parametrize(
    ("rehearsed", "advice"),
    [
        (found(0.15, wrong=0.3), "distil"),
        (found(0.03, wrong=0.4), "learned weights"),
        (found(-0.2), "labels"),
        (found(-0.2, alone=0.2), "trusted rows"),
        (found(0.0, error=0.04), "more rows"),
        (found(-0.3, error=0.04), "labels"),  # bad enough, however few rows
        (found(0.015), "unclear"),
    ],
)
def test_advice(rehearsed: Rehearsal, advice: str) -> None:
    assert decide(rehearsed).advice == advice


def test_predicted_gain_by_hand() -> None:
    law = Law((0.01, 2.0), (0.0, 1.5), (0.02, 3.0))
    gain, sampled = predicted("distil", found(0.1, error=0.02), law)
    error = 1.6448536 * 2 * 0.02
    expected = (0.21, 0.21 - math.hypot(0.06, error), 0.21 + math.hypot(0.11, error))
    assert gain == pytest.approx(expected, abs=1e-6)
    assert sampled == pytest.approx(error**2, rel=1e-6)


def test_asked_for_rows_would_do() -> None:
    few = decide(found(0.0, error=0.04))
    assert few.rows is not None
    enough = 0.04 * math.sqrt(300 / few.rows)  # a standard error falls with the root of the rows
    assert decide(found(0.0, error=enough)).advice != "more rows"
    assert decide(found(0.0, error=enough * 1.02)).advice == "more rows"
    assert 1.6448536 * verdict.LAWS["distil"].median[-1] * enough == pytest.approx(verdict.ROUGH, rel=0.01)
