"""Evidence about labels: the positive-unlabeled fit against known mixtures, channels, and what a step shows."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import binom, chi2, iqr, norm
from sklearn.metrics import confusion_matrix, roc_auc_score
from test_meta import CLASSES, problem
from test_rules import Planted, single, started

from lit_kd.data.table import SampleTable
from lit_kd.losses import cross_entropy
from lit_kd.trust.evidence import fit_clean_probability, label_channel, label_log_odds, teacher_channel
from lit_kd.types import UNLABELED
from lit_kd.weightings import Robust

torch.set_num_threads(1)

Array = NDArray[np.float64]


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
    @pytest.mark.parametrize(("features", "distance", "rate"), [(1, 2.5, 0.1), (2, 2.5, 0.6)])
    def test_noise_rate(self, rate: float, distance: float, features: int) -> None:
        x, trusted, noisy, _ = mixture(0, 20_000, 2_000, rate, distance, features)
        fit = fit_clean_probability(x, trusted)
        assert fit.noise_rate == pytest.approx(noisy[~trusted].mean(), abs=0.03)
        assert fit.noise_rate == pytest.approx(1 - fit.clean[~trusted].mean(), abs=1e-12)

    @pytest.mark.parametrize(("rate", "distance", "limit"), [(0.4, 2.0, 0.04), (0.4, 4.0, 0.01)])
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

    def test_false_alarms_are_rare(self) -> None:
        """A likelihood ratio of 10 by chance: a chi-square's tail at most, with a degree of freedom a parameter."""
        alarms, features = 0, 2
        for seed in range(100):
            x, trusted, _, _ = mixture(seed, 2_000, 200, 0.0, 0.0, features)
            fit = fit_clean_probability(x, trusted)
            alarms += fit.noise_rate > 0
            assert fit.noise_rate > 0 or (fit.clean == 1).all()
        tail = chi2.sf(10 / (1 + 200 / 2_000), features + 1)  # the 2000 are a sample too
        assert tail < 0.03
        assert alarms <= binom.ppf(0.999, 100, tail)

    def test_trusted_rows_are_clean_whatever_their_evidence(self) -> None:
        x, trusted, _, _ = mixture(0, 2_000, 500, 0.4, 4.0)
        x[-1] = -50.0
        fit = fit_clean_probability(x, trusted)
        assert fit.noise_rate > 0
        assert (fit.clean[trusted] == 1).all()
        assert fit.clean[~trusted].max() < 1

    @pytest.mark.parametrize(("scale", "shift"), [(1e-30, 0.0), (7.0, 1e4), (1e30, -3.0)])
    def test_scale_and_shift_do_not_matter(self, scale: float, shift: float) -> None:
        x, trusted, _, _ = mixture(0, 2_000, 300, 0.3, 3.0, features=2)
        expected = fit_clean_probability(x, trusted)
        found = fit_clean_probability((x + np.array([1.0, 0.5]) * shift) * np.array([1.0, 0.1]) * scale, trusted)
        assert found.noise_rate == pytest.approx(expected.noise_rate, abs=1e-5)
        np.testing.assert_allclose(found.clean, expected.clean, atol=1e-5)

    def test_is_the_best_in_the_box(self) -> None:
        """No other (alpha, beta) has a larger bound: the one found is read off the probabilities."""
        x, trusted, _, _ = mixture(0, 1_000, 300, rate=0.3, distance=3.0, features=2)
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
        for at in np.random.default_rng(0).uniform(low, high, size=(8, 3)):
            other = minimize(lambda t: -bound(t), at, method="Nelder-Mead", bounds=list(zip(low, high, strict=True)))
            assert bound(theta) >= -other.fun - 1e-6

    def test_few_or_only_trusted_rows_or_no_evidence(self) -> None:
        x = np.random.default_rng(0).normal(size=(200, 2))
        for trusted in (1, 2):
            fit = fit_clean_probability(x, np.arange(200) >= 200 - trusted)
            assert np.isfinite(fit.clean).all()
            assert 0 <= fit.noise_rate <= 1
        for trusted, values in (0, x), (200, x), (60, np.full((200, 2), 3.0)):
            fit = fit_clean_probability(values, np.arange(200) >= 200 - trusted)
            assert (fit.noise_rate, fit.clean.min()) == (0, 1)


class TestChannels:
    def test_against_confusion_matrices(self) -> None:
        rng = np.random.default_rng(0)
        y, classes = rng.integers(0, 4, 50), rng.integers(0, 4, (50, 2))
        found = teacher_channel(torch.from_numpy(classes), torch.from_numpy(y), 4)
        for k in range(2):
            counts = confusion_matrix(y, classes[:, k]).T + 5 * np.eye(4) + 0.1
            np.testing.assert_allclose(found[k].numpy(), counts / counts.sum(1, keepdims=True), rtol=1e-6)
        counts = confusion_matrix(classes[:, 0], y) + 5 * (0.7 * np.eye(4) + 0.3 / 4)
        of_labels = label_channel(torch.from_numpy(classes[:, 0]), torch.from_numpy(y), 4)
        np.testing.assert_allclose(of_labels.numpy(), counts / counts.sum(1, keepdims=True), rtol=1e-6)

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
        table = started(rule, 900, 1, 300)
        before = table.state_dict()["columns"]
        rule.renew(table, epoch=1)
        for name, column in before.items():
            torch.testing.assert_close(table[name], column, equal_nan=True)
        assert not rule.active(1)
        assert rule.active(2)
