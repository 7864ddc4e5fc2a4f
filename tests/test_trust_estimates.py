"""Estimates of a teacher's reliability: against scikit-learn, what the estimate is of, and Monte-Carlo means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.isotonic import IsotonicRegression
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from lit_kd.losses import slam_loss, slam_mix, teacher_labels
from lit_kd.trust.reliability import (
    Neighbours,
    accuracy_curve,
    class_ranks,
    distillation_weights,
    distortions,
    margin,
    mixing_rates,
)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_hot(y: Tensor, classes: int) -> Tensor:
    return F.one_hot(y, classes).float()


class Cells:
    """Kinds of inputs, each with a truth, a student, and an adversary's mistake that the teacher makes at times."""

    classes = 4

    def __init__(self) -> None:
        self.student = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.15, 0.05, 0.6, 0.2]]).log()
        self.true, self.wrong = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 1])
        self.error = torch.tensor([0.4, 0.2, 0.1])
        self.loss = F.cross_entropy(self.student, self.true, reduction="none")
        self.margins = torch.stack([torch.tensor([0.1, 0.5, 0.9]), margin(self.student)], dim=1)

    def teacher(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Which cell, and the teacher's class, of random rows."""
        cell = torch.randint(3, (rows,), generator=draw(seed))
        errs = torch.rand(rows, generator=draw(seed + 1)) < self.error[cell]
        return cell, torch.where(errs, self.wrong[cell], self.true[cell])


class TestUnbiased:
    ROWS = 100_000

    def test_estimated_by_neighbours(self) -> None:
        """Of k rows, so the weight is off by about sqrt(var r / k), and high by var r / k [Jensen]: 15% is allowed."""
        cells, meta, deviations = Cells(), 400, []
        cell, said = cells.teacher(self.ROWS, seed=3)
        noisy = F.cross_entropy(cells.student[cell], said, reduction="none")
        true = cells.loss[cell].mean()
        for seed in range(10, 30, 2):
            at, labels = cells.teacher(meta, seed)
            r = distortions(cells.student[at], one_hot(labels, cells.classes), cells.true[at])
            jitter = 1e-3 * torch.randn(meta, 2, generator=draw(seed))
            weights = distillation_weights(cells.margins, Neighbours(cells.margins[at] + jitter), r)
            deviations.append(float((weights[cell] * noisy).mean() / true - 1))
        assert abs(np.mean(deviations)) < 0.15
        assert noisy.mean() / true - 1 > 0.7

    def test_soft_labels(self) -> None:
        """The weighted loss is that with the true labels, too: here the teacher's doubt costs as much as its errors."""
        cells, rows = Cells(), self.ROWS
        cell, said = cells.teacher(rows, seed=5)
        soft = 0.7 * one_hot(said, cells.classes) + 0.3 / cells.classes
        noisy = F.cross_entropy(cells.student[cell], soft, reduction="none")
        r = distortions(cells.student[cell], soft, cells.true[cell])
        half = rows // 2  # one estimates, the other is weighed
        weights = 1 / torch.stack([r[:half][cell[:half] == c].mean() for c in range(3)])
        weighted = (weights[cell] * noisy)[half:].mean()
        true = cells.loss[cell].mean()
        assert weighted.item() == pytest.approx(true.item(), rel=0.01)
        assert noisy.mean() > 2 * true


class TestDistortions:
    Z = 2 * torch.randn(50, 4, generator=draw(0))
    Y = torch.arange(50) % 4

    def test_hard_labels(self) -> None:
        said, rows, log_p = (self.Y + 1) % 4, np.arange(50), torch.log_softmax(self.Z, 1).numpy()
        found = distortions(self.Z, one_hot(said, 4), self.Y, floor=1e-9)
        np.testing.assert_allclose(found.numpy(), log_p[rows, said] / log_p[rows, self.Y], rtol=1e-5)
        torch.testing.assert_close(distortions(self.Z, one_hot(self.Y, 4), self.Y, floor=1e-9), torch.ones(50))

    def test_soft_labels_by_drawing_hard_ones(self) -> None:
        soft = torch.randn(50, 4, generator=draw(1)).softmax(1)
        draws = 20_000
        drawn = torch.multinomial(soft, draws, replacement=True, generator=draw(2))
        log_p = self.Z.log_softmax(1)
        ratios = log_p.gather(1, drawn) / log_p.gather(1, self.Y[:, None])
        error = (distortions(self.Z, soft, self.Y, floor=1e-9) - ratios.mean(1)).abs()
        assert (error < 5 * ratios.std(1) / draws**0.5).all()

    def test_floor(self) -> None:
        sure, labels = torch.tensor([[30.0, 0.0]]), one_hot(torch.tensor([1, 0]), 2)
        assert distortions(sure, labels[:1], torch.tensor([0])).item() == pytest.approx(30 / 1e-2)
        assert distortions(sure, labels[1:], torch.tensor([0])).item() == 1


class TestNeighbours:
    @pytest.mark.parametrize(("rows", "k"), [(3, 3), (100, 5), (2000, 22)])
    def test_by_scikit_learn(self, rows: int, k: int) -> None:
        points = torch.rand(rows, 2, generator=draw(1)) * torch.tensor([1.0, 0.05])
        asked = torch.rand(30, 2, generator=draw(2)) * torch.tensor([1.0, 0.05])
        spread = points.numpy().std(0)
        brute = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points.numpy() / spread)
        expected = brute.kneighbors(asked.numpy() / spread, return_distance=False)
        neighbours = Neighbours(points)
        assert neighbours.k == k
        np.testing.assert_array_equal(np.sort(neighbours(asked).numpy(), 1), np.sort(expected, 1))

    def test_a_margin_that_is_the_same_everywhere(self) -> None:
        points = torch.stack([torch.ones(40), torch.rand(40, generator=draw(3))], 1)
        assert distillation_weights(points, Neighbours(points), torch.full((40,), 2.0)).tolist() == [0.5] * 40

    def test_a_teacher_that_is_never_wrong(self) -> None:
        z, y = torch.randn(40, 3, generator=draw(4)), torch.arange(40) % 3
        r = distortions(z, one_hot(y, 3), y)
        points = torch.rand(40, 2, generator=draw(5))
        assert (distillation_weights(points, Neighbours(points), r) == 1).all()


def noisy_margins(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Margins with ties, and whether the teacher is right, more often where it is sure."""
    at = (torch.rand(rows, generator=draw(seed)) * 50).round() / 50
    return at, torch.rand(rows, generator=draw(seed + 1)) < 0.3 + 0.7 * at


class TestIsotonic:
    @pytest.mark.parametrize("rows", [1, 2, 500])
    def test_curve_by_scikit_learn(self, rows: int) -> None:
        at, right = noisy_margins(rows)
        model = IsotonicRegression(out_of_bounds="clip").fit(at.numpy(), right.numpy())
        asked = torch.linspace(-0.1, 1.1, 301)
        found = accuracy_curve(at, right)(asked)
        np.testing.assert_allclose(found.numpy(), model.predict(asked.numpy()), atol=1e-5)

    @pytest.mark.parametrize("level", [0.2, 0.5, 0.9, 1.0])
    def test_where_a_level_is_reached(self, level: float) -> None:
        curve = accuracy_curve(*noisy_margins(300))
        grid = torch.linspace(0, 1, 100_001)
        above = (curve(grid) >= level - 1e-6).nonzero()
        found = curve.reaches(level)
        if len(above) == len(grid):
            assert found == -float("inf")
        elif len(above) == 0:
            assert found == float("inf")
        else:
            assert found == pytest.approx(grid[above[0, 0]].item(), abs=1e-4)

    def test_alpha_and_k_by_brute_force(self) -> None:
        classes, rows = 6, 400
        logits = 2 * torch.randn(rows, classes, generator=draw(1))
        y = (logits + 2 * torch.randn(rows, classes, generator=draw(2))).argmax(1)
        at, order = margin(logits).numpy(), logits.argsort(dim=1, descending=True)
        asked = torch.rand(200, generator=draw(3))
        rates = mixing_rates(logits, y)
        enough = []
        for k in range(2, classes + 1):
            hit = (order[:, :k] == y[:, None]).any(1).numpy()
            enough.append(IsotonicRegression(out_of_bounds="clip").fit(at, hit).predict(asked.numpy()) >= 0.9 - 1e-6)
        expected = 2 + np.argmax(enough, axis=0)
        assert len(np.unique(expected)) > 2
        np.testing.assert_array_equal(rates.k(asked).numpy(), expected)
        right = IsotonicRegression(out_of_bounds="clip").fit(at, (order[:, 0] == y).numpy()).predict(asked.numpy())
        np.testing.assert_allclose(rates.alpha(asked).numpy(), np.clip(right, 0.5, 1), atol=1e-5)

    @pytest.mark.parametrize("right", [True, False])
    def test_a_teacher_that_is_always_right_or_always_wrong(self, right: bool) -> None:
        logits = torch.randn(50, 4, generator=draw(1))
        rates = mixing_rates(logits, (logits if right else -logits).argmax(1))
        asked = torch.rand(20, generator=draw(2))
        assert (rates.alpha(asked) == (1 if right else 0.5)).all()
        assert (rates.k(asked) == (2 if right else 4)).all()


class TestMixing:
    def test_two_classes(self) -> None:
        f = torch.rand(20, 1, generator=draw(0))
        f, alpha = torch.cat([f, 1 - f], 1), torch.rand(20, generator=draw(1))
        for normalise in (False, True):
            mix = slam_mix(f, torch.ones(20, 2, dtype=torch.bool), alpha, normalise)
            torch.testing.assert_close(mix, alpha[:, None] * f + (1 - alpha[:, None]) * (1 - f))

    def test_mass(self) -> None:
        sure = one_hot(torch.tensor([1, 0]), 5)
        top, alpha = torch.tensor([[True] * 4 + [False]] * 2), torch.tensor([0.7, 0.5])
        torch.testing.assert_close(slam_mix(sure, top, alpha, normalise=True).sum(1), torch.ones(2))
        torch.testing.assert_close(slam_mix(sure, top, alpha).sum(1), alpha + 3 * (1 - alpha))

    def test_loss_may_be_negative_and_never_infinite(self) -> None:
        assert slam_loss(torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0, 0.0]])).item() < 0
        assert slam_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])).isfinite().all()

    def test_student_learns_the_truth_where_distillation_learns_the_noise(self) -> None:
        """A teacher that is right with probability alpha, and otherwise says any other of its first k."""
        classes, seen = 6, 4000
        alpha, k = torch.tensor([0.4, 0.6, 0.7, 0.9]), torch.tensor([6, 2, 3, 5])
        first = torch.arange(classes) < k[:, None]  # of four inputs, of which class 0 is the truth
        noise = torch.cat([alpha[:, None], first[:, 1:] * ((1 - alpha) / (k - 1))[:, None]], dim=1)
        said = torch.multinomial(noise, seen, replacement=True, generator=draw(0))
        labels = one_hot(said, classes).mean(1)  # the loss is linear in the labels: as good as 4000 rows of an input

        def learned(mixed: bool) -> Tensor:
            table = torch.zeros(4, classes, requires_grad=True)
            optimizer = torch.optim.Adam([table], lr=0.1)
            for _ in range(300):
                f = table.softmax(1)
                loss = slam_loss(slam_mix(f, first, alpha, normalise=True) if mixed else f, labels).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return table.softmax(1)[:, 0].detach()

        assert (learned(True) > 0.95).all()
        torch.testing.assert_close(learned(False), alpha, rtol=0, atol=0.03)


def test_margin_and_ranks() -> None:
    p = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    torch.testing.assert_close(margin(p.log()), torch.tensor([0.3, 0.4]))
    assert class_ranks(p).tolist() == [[2, 0, 1], [1, 2, 0]]
    assert teacher_labels(p.log(), hard=True).tolist() == [[0, 1, 0], [0, 0, 1]]
    torch.testing.assert_close(teacher_labels(p.log(), hard=False), p)
