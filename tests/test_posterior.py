"""The posterior of label and teacher, against Bayes' rule on witnesses whose channels are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.metrics import confusion_matrix
from torch import Tensor

from lit_kd.trust.posterior import (
    Habits,
    Posterior,
    calibrate,
    find_echo,
    fit_channel,
    habits,
    label_posterior,
    mean_nll,
    posterior_targets,
    stack,
)
from lit_kd.types import UNLABELED

CLASSES = 4
PAIRS = np.roll(np.eye(CLASSES), 1, axis=1)
"""Every class is mistaken for the next."""


class World(NamedTuple):
    """Rows whose witnesses have known channels; exact is the posterior of the true class by Bayes' rule."""

    true: Tensor
    label: Tensor
    said: Tensor
    student: Tensor
    teacher: Tensor
    exact: Tensor
    label_channel: Tensor
    teacher_channel: Tensor

    def found(self, y: Tensor | None = None, echo: float = 0.0, steps: int = 100) -> Posterior:
        """The posterior by EM, where all but the label's channel and what is memorised is known."""
        teacher = self.teacher
        if echo:
            label = torch.eye(CLASSES, dtype=torch.float64)[self.label]
            teacher = (teacher.log() + echo * label).softmax(1)
        mean = self.teacher_channel @ (self.teacher_channel.T / self.teacher_channel.sum(0).unsqueeze(1))
        ways = Habits(self.teacher_channel, mean)

        def both(q: Tensor) -> Tensor:
            return normalised(self.student * q)

        return label_posterior(self.student, teacher, both, ways, self.said, self.label if y is None else y, steps)


def normalised(p: Tensor) -> Tensor:
    return p / p.sum(1, keepdim=True)


def world(rows: int, noise: float, copies: float = 0.0, teacher_error: float = 0.1, seed: int = 0) -> World:
    """A label with pair noise; a teacher with uniform errors that has memorised some of the labels."""
    rng = np.random.default_rng(seed)

    def draw(p: np.ndarray) -> np.ndarray:
        return (p.cumsum(1) < rng.random((len(p), 1))).sum(1).clip(max=CLASSES - 1)

    student = rng.dirichlet(np.full(CLASSES, 0.3), rows)
    true = draw(student)
    tm = (1 - noise) * np.eye(CLASSES) + noise * PAIRS
    tc = (1 - teacher_error) * np.eye(CLASSES) + teacher_error * (1 - np.eye(CLASSES)) / (CLASSES - 1)
    label = draw(tm[true])
    own = draw(tc[true])
    copied = rng.random(rows) < copies
    said = np.where(copied, label, own)
    exact = (copies * (said == label)[:, None] + (1 - copies) * tc[:, said].T) * student * tm[:, label].T
    true, label, said, student, teacher, exact, tm, tc = (
        torch.from_numpy(a) for a in (true, label, said, student, tc[:, said].T, exact, tm, tc)
    )
    return World(true, label, said, student, normalised(teacher), normalised(exact), tm, tc)


class TestLabelPosterior:
    @pytest.mark.parametrize(("noise", "copies"), [(0.3, 0.4), (0.0, 0.0)])
    def test_channels_rate_and_posterior_are_bayes(self, noise: float, copies: float) -> None:
        """10000 rows: 0.04 is four standard deviations of a channel's entry (of 2500 rows), 0.02 of the rate."""
        w = world(10_000, noise, copies)
        found = w.found()
        assert (found.channel - w.label_channel).abs().max() < 0.04
        assert found.noise_rate == pytest.approx(noise, abs=0.02)
        if copies:
            assert found.copied == pytest.approx(copies, abs=0.04)
        # the largest are where all classes but those of probability 0 are next to impossible
        error = (found.classes - w.exact).abs()
        assert error.mean() < 0.01
        assert error.quantile(0.99) < 0.1

    def test_posterior_is_calibrated(self) -> None:
        """Of the rows whose class is given a probability of about p, a share p has it: 10000 rows, bins of a tenth."""
        w = world(10_000, 0.3, 0.4)
        p = w.found().classes
        for c in range(CLASSES):
            for low in np.arange(0, 1, 0.1):
                rows = (p[:, c] >= low) & (p[:, c] < low + 0.1)
                deviation = 0.5 / np.sqrt(int(rows.sum()))
                assert (w.true[rows] == c).double().mean() == pytest.approx(p[rows, c].mean(), abs=4 * deviation)

    def test_missing_labels_are_absent_witnesses(self) -> None:
        w = world(5000, 0.3)
        y = w.label.clone()
        y[::2] = UNLABELED
        found = w.found(y)
        torch.testing.assert_close(found.classes[::2], normalised(w.student * w.teacher)[::2])
        half = World(*(t[1::2] for t in w[:6]), *w[6:])
        alone = half.found()
        torch.testing.assert_close(found.classes[1::2], alone.classes)
        assert found[2:] == pytest.approx(alone[2:], abs=1e-9)

    def test_echo_of_labels_is_taken_away(self) -> None:
        """A teacher whose log-odds of the given label are raised: what remains is what it would say without."""
        w = world(10_000, 0.3)
        found = w.found(echo=2.0)
        assert found.echo == pytest.approx(2, abs=0.15)
        assert found.noise_rate == pytest.approx(0.3, abs=0.02)
        error = (found.classes - w.exact).abs()
        assert error.mean() < 0.015
        assert error.quantile(0.99) < 0.15

    def test_find_echo(self) -> None:
        """Exactly, where the expectation is that of lowered log-odds; none, where they are too low already."""
        odds = torch.linspace(-4, 6, 50, dtype=torch.float64)
        weights = torch.rand(50, dtype=torch.float64)
        assert find_echo(odds, (odds - 1.7).sigmoid(), weights) == pytest.approx(1.7, abs=1e-6)
        assert find_echo(odds, (odds + 1).sigmoid(), weights) == 0


class TestFit:
    def test_whole_way_from_trusted_rows(self) -> None:
        """A student too unsure by a factor, a teacher's logits on another scale: fitted on 4000 trusted rows.

        Exponents have a standard deviation of about 0.03 there, the ridge adds as much; the posterior's error is a
        hundredth or two.
        """
        w = world(10_000, 0.3, 0.3)
        trusted = world(4000, 0.3, 0.0, seed=1)  # of the same teacher, which has memorised none of their labels
        student, teacher = (lambda v: 0.5 * v.student.log()), (lambda v: 3 * v.teacher_channel[:, v.said].T.log())
        opinion = calibrate(teacher(trusted), trusted.true)
        alone = stack(student(trusted).unsqueeze(0), trusted.true)
        assert alone.exponents.item() == pytest.approx(2, abs=0.15)
        assert opinion.exponents.item() == pytest.approx(1 / 3, abs=0.08)  # a step of the grid

        def sources(v: World) -> Tensor:
            return torch.stack([student(v).log_softmax(1), opinion(teacher(v).unsqueeze(0)).log()])

        together = stack(sources(trusted), trusted.true)
        calibrated = [opinion(teacher(v).unsqueeze(0)) for v in (w, trusted)]
        halved = student(w).log_softmax(1)
        found = label_posterior(
            alone(halved.unsqueeze(0)),
            calibrated[0],
            lambda q: together(torch.stack([halved, q.log()])),
            habits(trusted.said, calibrated[1], trusted.true),
            w.said,
            w.label,
            steps=100,
        )
        assert (found.classes - w.exact).abs().mean() < 0.02
        assert found.noise_rate == pytest.approx(0.3, abs=0.02)
        assert (found.channel - w.label_channel).abs().max() < 0.03

    def test_stack_is_where_another_solver_finds_it(self) -> None:
        w = world(300, 0.3)
        s = torch.stack([w.student.log(), w.teacher_channel[:, w.said].T.log()]).numpy()

        def loss(e: np.ndarray) -> float:
            z = e[0] * s[0] + e[1] * s[1]
            picked = z[np.arange(300), w.true.numpy()]
            return float((logsumexp(z, axis=1) - picked).mean() + 1e-3 * (e**2).sum())

        best = minimize(loss, [1.0, 1.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-12})
        np.testing.assert_allclose(stack(torch.from_numpy(s), w.true).exponents.numpy(), best.x, atol=1e-4)

    def test_channel_is_the_most_likely_one(self) -> None:
        """Of sure predictions: the counts, with 5 on the diagonal."""
        w = world(600, 0.0, teacher_error=0.3)
        sure = torch.eye(CLASSES, dtype=torch.float64)[w.said]
        counts = confusion_matrix(w.said, w.true) + 5 * np.eye(CLASSES)
        np.testing.assert_allclose(fit_channel(sure, w.true), counts / counts.sum(1, keepdims=True), atol=1e-12)

    def test_channel_of_unsure_predictions(self) -> None:
        """Penalised likelihood is lower at the EM's channel than anywhere near it, for a general optimiser too."""
        w = world(500, 0.4)
        p, y = w.student.numpy(), w.label.numpy()

        def loss(a: np.ndarray) -> float:
            channel = softmax(a.reshape(CLASSES, CLASSES), axis=1)
            fit = np.log((p * channel[:, y].T).sum(1)).sum()
            return -float(fit + 5 * np.log(channel.diagonal()).sum())

        best = minimize(loss, np.zeros(CLASSES**2), method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-14})
        expected = softmax(best.x.reshape(CLASSES, CLASSES), axis=1)
        np.testing.assert_allclose(fit_channel(w.student, w.label, steps=1000), expected, atol=2e-3)

    def test_teacher_that_mistakes_classes_gets_a_channel(self) -> None:
        """It swaps two classes: with a channel it is as good as one that does not."""
        w = world(400, 0.0, teacher_error=0.05)
        logits = 6 * torch.eye(CLASSES)[w.said]
        swapped = logits[:, [1, 0, 2, 3]]
        found, plain = calibrate(swapped, w.true), calibrate(logits, w.true)
        assert found.channel[0].argmax() == 1
        nll = [mean_nll(o(z.unsqueeze(0)), w.true) for o, z in ((found, swapped), (plain, logits))]
        assert nll[0] < nll[1] + 0.1
        assert nll[0] < mean_nll(torch.full((400, CLASSES), 0.25), w.true) - 0.8

    @pytest.mark.parametrize("rows", [1, 30])
    def test_meta_without_some_class(self, rows: int) -> None:
        """The class that no trusted row has stays possible."""
        y = torch.arange(rows) % (CLASSES - 1)
        said = torch.arange(rows) % CLASSES
        z = 4 * torch.eye(CLASSES, dtype=torch.float64)
        opinion = calibrate(z[said].log_softmax(1), y)
        together = stack(torch.stack([z[said], z[y]]).log_softmax(2), y)
        for p in (opinion(z.log_softmax(1).unsqueeze(0)), together(torch.stack([z, z]).log_softmax(2))):
            torch.testing.assert_close(p.sum(1), torch.ones(CLASSES, dtype=torch.float64))
            assert p[CLASSES - 1, CLASSES - 1] > 1e-4
        ways = habits(said, z[said].softmax(1), y)
        assert ways.said[CLASSES - 1].tolist() == ways.mean[CLASSES - 1].tolist() == [0.25] * CLASSES

    def test_habits_are_counts_and_means(self) -> None:
        w = world(300, 0.0)
        found = habits(w.said, w.teacher, w.true)
        counts = confusion_matrix(w.true, w.said) + 0.1
        np.testing.assert_allclose(found.said, counts / counts.sum(1, keepdims=True))
        sums = np.stack([w.teacher[w.true == c].sum(0) for c in range(CLASSES)]) + 0.1
        np.testing.assert_allclose(found.mean, sums / sums.sum(1, keepdims=True))


class TestTargets:
    posterior = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5]], dtype=torch.float64)
    y = torch.tensor([0, 0, UNLABELED])

    def test_of_both_halves_of_a_training(self) -> None:
        targets, weights = posterior_targets(self.posterior, self.y, 0.3, soft=False)
        assert targets.tolist() == [[1, 0, 0], [1, 0, 0], [0.2, 0.3, 0.5]]
        np.testing.assert_allclose(weights, np.array([0.7, 0.1, 0.5]) * 3 / 1.3)
        targets, weights = posterior_targets(self.posterior, self.y, 0.3, soft=True)
        assert torch.equal(targets, self.posterior)
        np.testing.assert_allclose(weights, np.array([0.7, 0.6, 0.5]) * 3 / 1.8)

    @pytest.mark.parametrize("soft", [True, False])
    def test_no_noise_is_plain_training(self, soft: bool) -> None:
        targets, weights = posterior_targets(self.posterior[:2], self.y[:2], 0.019, soft)
        assert targets.tolist() == [[1, 0, 0], [1, 0, 0]]
        assert weights.tolist() == [1, 1]
