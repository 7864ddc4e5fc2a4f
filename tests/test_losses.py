"""Losses against scipy and numpy in float64, central differences, and limits known on paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, logsumexp, rel_entr, softmax
from scipy.stats import entropy
from torch import Tensor, nn

from lit_kd.losses import (
    bernoulli_cross_entropy,
    bernoulli_kd_loss,
    contrastive_loss,
    cross_entropy,
    decoupled_kd_loss,
    generalized_cross_entropy,
    hint_loss,
    kd_loss,
    mean_teacher,
    superloss,
    taylor_cross_entropy,
)
from lit_kd.types import UNLABELED

Y = torch.tensor([0, 1, 2, 3, 4, UNLABELED])
BITS = torch.tensor([[0, 1, 1, -1, 0], [1, 1, 1, 1, 1], [0] * 5, [-1] * 5, [1, 0, 1, 0, 1], [-1, -1, -1, -1, 1]])
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda z, t: cross_entropy(z, Y),
    "generalized_cross_entropy": lambda z, t: generalized_cross_entropy(z, Y),
    "taylor_cross_entropy": lambda z, t: taylor_cross_entropy(z, Y),
    "superloss": lambda z, t: superloss(z, Y),
    "soft_labels": lambda z, t: cross_entropy(z, t.softmax(-1)),
    "kd": lambda z, t: kd_loss(z, t, 4.0),
    "decoupled": lambda z, t: decoupled_kd_loss(z, t, Y),
    "bernoulli": lambda z, t: bernoulli_cross_entropy(z, BITS),
    "bernoulli_kd": lambda z, t: bernoulli_kd_loss(z, t, 4.0),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_loss
class TestEvery:
    def test_forward_mode_is_central_differences(self, loss: Any) -> None:
        z, t, v = 2 * normal(6, 5), 2 * normal(6, 5, seed=1), normal(6, 5, seed=2)
        value, found = torch.func.jvp(lambda z: loss(z, t), (z,), (v,))
        assert value.shape == (6,)
        expected = (loss(z + 1e-6 * v, t) - loss(z - 1e-6 * v, t)) / 2e-6
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, t).sum(), leaf)
        torch.testing.assert_close((gradient * v).sum(1), expected, rtol=1e-7, atol=1e-8)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_extreme_logits_stay_finite(self, loss: Any, dtype: torch.dtype) -> None:
        z = (1e4 * normal(6, 5).sign()).to(dtype).requires_grad_()
        t = (1e4 * normal(6, 5, seed=1).sign()).to(dtype)
        value = loss(z, t)
        assert value.isfinite().all()
        assert torch.autograd.grad(value.sum(), z)[0].isfinite().all()


class TestKDLoss:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
    def test_equals_scipys_relative_entropy(self, temperature: float) -> None:
        z, t = 3 * normal(16, 10, seed=1), 3 * normal(16, 10, seed=2)
        p, q = softmax(t.numpy() / temperature, axis=1), softmax(z.numpy() / temperature, axis=1)
        expected = temperature**2 * rel_entr(p, q).sum(1)
        np.testing.assert_allclose(kd_loss(z, t, temperature).numpy(), expected, rtol=1e-10)
        weight = torch.linspace(0, 1, 16, dtype=torch.float64)
        np.testing.assert_allclose(kd_loss(z, t, temperature, weight).numpy(), weight.numpy() * expected, rtol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_classes_ruled_out(self, dtype: torch.dtype) -> None:
        """0 log 0 = 0, for a teacher whose logits are -inf or 1e4 apart, and a student that rules them out, too."""
        inf = float("inf")
        t = torch.tensor([[-inf, 1.0, 2.0], [1e4, -1e4, 0.0], [-inf, -inf, 0.0], [-inf, 0.0, 1.0]], dtype=dtype)
        z = torch.tensor([[0.5, 1.0, 1.0], [0.0, 1e4, -1e4], [1.0, 2.0, 0.0], [-inf, 1.0, 1.0]], dtype=dtype)
        z.requires_grad_()
        log_q = log_softmax(z.detach().double().numpy(), axis=1)
        p = softmax(t.double().numpy(), axis=1)
        with np.errstate(all="ignore"):
            expected = np.where(p > 0, p * (np.log(p) - log_q), 0).sum(1)
        found = kd_loss(z, t)
        (gradient,) = torch.autograd.grad(found.sum(), z)
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
        np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(gradient.double().numpy(), np.exp(log_q) - p, atol=tolerance)

    def test_zero_where_both_agree_and_a_constant_changes_nothing(self) -> None:
        z = 10 * normal(64, 10)
        assert (kd_loss(z, z.clone(), 4.0) == 0).all()
        torch.testing.assert_close(kd_loss(z, z + 3.0, 4.0), torch.zeros(64, dtype=torch.float64), rtol=0, atol=1e-13)

    @pytest.mark.parametrize("temperature", [1.0, 50.0])
    def test_gradient_size_barely_depends_on_the_temperature(self, temperature: float) -> None:
        z, t = normal(200, 10, seed=1).requires_grad_(), normal(200, 10, seed=2)
        size = torch.autograd.grad(kd_loss(z, t, temperature).sum(), z)[0].norm().item()
        # the limit for large temperatures, from a first-order expansion of softmax
        gap = (z - z.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
        assert size == pytest.approx(gap.detach().norm().item() / 10, rel=0.6 / temperature)


class TestDecoupled:
    z, t, y = 3 * normal(20, 5), 3 * normal(20, 5, seed=1), torch.arange(20) % 5

    def test_equals_scipy(self) -> None:
        beta = torch.linspace(0, 8, 20, dtype=torch.float64)
        found = decoupled_kd_loss(self.z, self.t, self.y, 1.5, beta, 2.0)
        expected = []
        for z, t, y, b in zip(self.z.numpy() / 2, self.t.numpy() / 2, self.y.tolist(), beta.tolist(), strict=True):
            p, q = softmax(t), softmax(z)
            target = rel_entr([p[y], 1 - p[y]], [q[y], 1 - q[y]]).sum()
            others = rel_entr(softmax(np.delete(t, y)), softmax(np.delete(z, y))).sum()
            expected.append(4 * (1.5 * target + b * others))
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)

    def test_plain_distillation_is_a_special_case(self) -> None:
        z, t = 100 * self.z, 100 * self.t
        beta = (t / 4).softmax(1).scatter(1, self.y[:, None], 0.0).sum(1)  # 1 - p_y would cancel
        torch.testing.assert_close(decoupled_kd_loss(z, t, self.y, 1.0, beta), kd_loss(z, t, 4.0), rtol=1e-10, atol=0)

    def test_missing_labels(self) -> None:
        y = torch.where(self.y == 0, UNLABELED, self.y)
        found = decoupled_kd_loss(self.z, self.t, y)
        torch.testing.assert_close(found[y < 0], kd_loss(self.z, self.t, 4.0)[y < 0])
        torch.testing.assert_close(found[y >= 0], decoupled_kd_loss(self.z, self.t, self.y)[y >= 0])

    def test_other_classes_among_themselves(self) -> None:
        """No gradient by the label's logit; with two classes nothing is left to compare."""
        z = self.z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(decoupled_kd_loss(z, self.t, self.y, alpha=0.0).sum(), z)
        assert (gradient.gather(1, self.y[:, None]) == 0).all()
        assert gradient.abs().max() > 0.1
        assert (decoupled_kd_loss(self.z[:, :2], self.t[:, :2], self.y % 2, alpha=0.0) == 0).all()

    def test_a_teacher_that_rules_all_other_classes_out(self) -> None:
        """Nothing is left to compare but the label's class with the others; nobody else notices."""
        t = self.t.clone()
        t[:2] = t[:2].masked_fill(torch.arange(5) != self.y[:2, None], -torch.inf)
        z = self.z.clone().requires_grad_()
        found = decoupled_kd_loss(z, t, self.y, 1.5, 2.0, 4.0)
        torch.testing.assert_close(found[:2], 1.5 * 16 * cross_entropy(z / 4, self.y)[:2])
        torch.testing.assert_close(found[2:], decoupled_kd_loss(z, self.t, self.y, 1.5, 2.0, 4.0)[2:], rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(found[:2].sum(), z)
        assert gradient.isfinite().all()
        assert gradient[:2].abs().max() > 0.1

    def test_a_label_that_is_certain(self) -> None:
        """1 - p_y has no digits left in float64: the reference takes its logarithm from the other classes."""
        z, t = np.array([60.0, 1.0, 0.0]), np.array([50.0, 0.0, 2.0])
        rest = [logsumexp(x[1:]) - logsumexp(x) for x in (t, z)]
        target = -np.log1p(np.exp(rest[0])) + np.log1p(np.exp(rest[1])) + np.exp(rest[0]) * (rest[0] - rest[1])
        expected = target + rel_entr(softmax(t[1:]), softmax(z[1:])).sum()
        found = decoupled_kd_loss(*map(torch.from_numpy, (z[None], t[None])), torch.tensor([0]), 1.0, 1.0, 1.0)
        assert found.item() == pytest.approx(expected, rel=1e-10)


class TestCrossEntropy:
    def test_equals_numpy(self) -> None:
        z, y = 3 * normal(16, 10), torch.arange(16) % 10
        expected = -log_softmax(z.numpy(), axis=1)[np.arange(16), y.numpy()]
        np.testing.assert_allclose(cross_entropy(z, y).numpy(), expected, rtol=1e-12)
        torch.testing.assert_close(cross_entropy(z, nn.functional.one_hot(y, 10).double()), cross_entropy(z, y))

    def test_soft_labels(self) -> None:
        z, y = 3 * normal(16, 10), normal(16, 10, seed=1).softmax(1)
        y[3] = 0  # missing
        expected = -(y.numpy() * log_softmax(z.numpy(), axis=1)).sum(1)
        np.testing.assert_allclose(cross_entropy(z, y).numpy(), expected, rtol=1e-12)
        z[:, 0], y[:, 0] = -torch.inf, 0
        assert cross_entropy(z, y).isfinite().all()

    def test_ignores_missing_labels(self) -> None:
        z = normal(6, 4).requires_grad_()
        y = torch.tensor([0, UNLABELED, 3, UNLABELED, 1, 2])
        loss = cross_entropy(z, y)
        assert (loss[[1, 3]] == 0).all()
        assert (torch.autograd.grad(loss.sum(), z)[0][[1, 3]] == 0).all()
        # a labelled sample does not notice that others lack a label
        torch.testing.assert_close(loss[[0, 2, 4, 5]], cross_entropy(z[[0, 2, 4, 5]], y[[0, 2, 4, 5]]))

    def test_other_negative_labels_are_refused(self) -> None:
        with pytest.raises(IndexError, match="out of bounds"):
            cross_entropy(normal(2, 4), torch.tensor([0, -2]))


class TestBernoulli:
    z, t = 3 * normal(6, 5), 3 * normal(6, 5, seed=1)

    def test_cross_entropy(self) -> None:
        p, y = expit(self.z.numpy()), BITS.numpy()
        expected = np.where(y == 1, -np.log(p), np.where(y == 0, -np.log1p(-p), 0)).mean(1)
        np.testing.assert_allclose(bernoulli_cross_entropy(self.z, BITS).numpy(), expected, rtol=1e-10)
        torch.testing.assert_close(
            bernoulli_cross_entropy(self.z, BITS.double()), bernoulli_cross_entropy(self.z, BITS)
        )

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_distillation(self, temperature: float) -> None:
        p, q = expit(self.t.numpy() / temperature), expit(self.z.numpy() / temperature)
        expected = temperature**2 * (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean(1)
        np.testing.assert_allclose(bernoulli_kd_loss(self.z, self.t, temperature).numpy(), expected, rtol=1e-10)
        # one logit is two classes, of which the other has the logit 0
        two = [torch.stack([x[:, :1], torch.zeros_like(x[:, :1])], dim=-1).squeeze(1) for x in (self.z, self.t)]
        torch.testing.assert_close(
            bernoulli_kd_loss(self.z[:, :1], self.t[:, :1], temperature), kd_loss(*two, temperature)
        )


class TestFeatures:
    def test_hint_loss(self) -> None:
        s, t = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
        expected = ((s.numpy() - t.numpy()) ** 2).mean((1, 2, 3))
        np.testing.assert_allclose(hint_loss(s, t).numpy(), expected, rtol=1e-12)
        with pytest.raises(ValueError, match=r"teacher's shape, \(4, 3, 2, 2\), found \(4, 3\): put an adapter"):
            hint_loss(normal(4, 3), t)

    def test_contrastive_loss(self) -> None:
        positive, negatives = normal(4).exp() / 100, normal(4, 7, seed=1).exp() / 100
        p, n = positive.numpy(), negatives.numpy()
        noise = 7 / 100
        expected = -np.log(p / (p + noise + 1e-7))
        expected -= np.log(noise / (n + noise + 1e-7)).sum(1)
        np.testing.assert_allclose(contrastive_loss(positive, negatives, 100).numpy(), expected, rtol=1e-10)


class TestMeanTeacher:
    teachers = tuple(3 * normal(16, 10, seed=k) for k in range(3))

    @pytest.mark.parametrize("temperature", [0.5, 4.0])
    def test_mean_of_probabilities(self, temperature: float) -> None:
        expected = np.mean([softmax(t.numpy() / temperature, axis=1) for t in self.teachers], axis=0)
        found = softmax(mean_teacher(self.teachers, temperature).numpy() / temperature, axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-10)

    def test_mean_of_logits_is_the_geometric_mean_of_probabilities(self) -> None:
        product = np.prod([softmax(t.numpy(), axis=1) for t in self.teachers], axis=0) ** (1 / 3)
        found = softmax(mean_teacher(self.teachers, of="logits").numpy(), axis=1)
        np.testing.assert_allclose(found, product / product.sum(1, keepdims=True), rtol=1e-10)

    def test_losses_averaged_differ_by_what_the_student_cannot_change(self) -> None:
        z = normal(16, 10, seed=9).requires_grad_()
        averaged = torch.stack([kd_loss(z, t, 4.0) for t in self.teachers]).mean(0)
        together = kd_loss(z, mean_teacher(self.teachers, 4.0), 4.0)
        p = np.stack([softmax(t.numpy() / 4.0, axis=1) for t in self.teachers])
        constant = 16 * (entropy(p.mean(0), axis=1) - entropy(p, axis=2).mean(0))  # Jensen-Shannon's
        np.testing.assert_allclose((averaged - together).detach().numpy(), constant, rtol=1e-9)
        gradients = (torch.autograd.grad(loss.sum(), z)[0] for loss in (averaged, together))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)

    def test_one_alone_stays_as_it_is(self) -> None:
        for of in ("probabilities", "logits"):
            assert mean_teacher(self.teachers[:1], 4.0, of) is self.teachers[0]  # type: ignore[arg-type]
