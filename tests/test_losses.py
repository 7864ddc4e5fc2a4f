"""Losses against torch's own modules, numpy in float64 and limits known on paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy
from torch import Tensor, nn

from lit_kd.losses import cross_entropy, kd_loss, mean_teacher
from lit_kd.types import UNLABELED

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestKDLoss:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
    def test_equals_scipys_relative_entropy(self, temperature: float) -> None:
        z, t = 3 * normal(16, 10, seed=1), 3 * normal(16, 10, seed=2)
        p, q = softmax(t.numpy() / temperature, axis=1), softmax(z.numpy() / temperature, axis=1)
        expected = temperature**2 * rel_entr(p, q).sum(1)
        np.testing.assert_allclose(kd_loss(z, t, temperature).numpy(), expected, rtol=1e-10)

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_mean_over_the_batch_is_torchs_batchmean(self, temperature: float) -> None:
        z, t = normal(16, 10, seed=1), normal(16, 10, seed=2)
        kl = nn.KLDivLoss(reduction="batchmean")(
            torch.log(torch.softmax(z / temperature, 1)), torch.softmax(t / temperature, 1)
        )
        torch.testing.assert_close(kd_loss(z, t, temperature).mean(), temperature**2 * kl, rtol=1e-10, atol=0)

    def test_two_classes_by_hand(self) -> None:
        # student (1/2, 1/2), teacher (3/4, 1/4)
        loss = kd_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log())
        assert loss.item() == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5), rel=1e-5)

    def test_sums_over_classes(self) -> None:
        # Every class split into m equal ones leaves the divergence as it is; a mean over classes would shrink it.
        z, t = normal(8, 5, seed=1), normal(8, 5, seed=2)
        torch.testing.assert_close(kd_loss(z.repeat(1, 20), t.repeat(1, 20)), kd_loss(z, t))

    def test_each_sample_on_its_own(self) -> None:
        z, t = normal(6, 4, seed=1), normal(6, 4, seed=2)
        assert kd_loss(z, t, 3.0).shape == (6,)
        rows = torch.cat([kd_loss(z[i : i + 1], t[i : i + 1], 3.0) for i in range(6)])
        torch.testing.assert_close(kd_loss(z, t, 3.0), rows)

    @pytest.mark.parametrize("weight", [0.3, torch.linspace(0, 1, 6, dtype=torch.float64)])
    def test_counts_as_much_as_its_weight(self, weight: float | Tensor) -> None:
        z, t = normal(6, 4), normal(6, 4, seed=1)
        p, q = softmax(t.numpy() / 3, axis=1), softmax(z.numpy() / 3, axis=1)
        expected = np.asarray(weight) * 9 * rel_entr(p, q).sum(1)
        np.testing.assert_allclose(kd_loss(z, t, 3.0, weight).numpy(), expected, rtol=1e-10)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_zero_where_both_agree(self, temperature: float, dtype: torch.dtype) -> None:
        z = 10 * normal(64, 10, dtype=dtype)
        assert (kd_loss(z, z.clone(), temperature) == 0).all()
        shifted = kd_loss(z, z + 3.0, temperature)  # a constant on all logits changes no probability
        torch.testing.assert_close(
            shifted, torch.zeros_like(shifted), rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-13
        )

    def test_positive_where_they_differ(self) -> None:
        assert (kd_loss(normal(500, 10, seed=1), normal(500, 10, seed=2), 2.0) > 0).all()

    @pytest.mark.parametrize("temperature", [1.0, 4.0, 50.0])
    def test_gradient_size_barely_depends_on_the_temperature(self, temperature: float) -> None:
        z, t = normal(200, 10, seed=1), normal(200, 10, seed=2)

        def size(at: float) -> float:
            leaf = z.clone().requires_grad_()
            return float(torch.autograd.grad(kd_loss(leaf, t, at).sum(), leaf)[0].norm())

        # the limit for large temperatures, from a first-order expansion of softmax
        gap = (z - z.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
        limit = float(gap.norm()) / 10
        assert size(temperature) == pytest.approx(limit, rel=0.6 / temperature)

    def test_extreme_logits_stay_finite(self) -> None:
        z = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1e4, -1e4]], requires_grad=True)
        loss = kd_loss(z, -z.detach(), 1.0)
        loss.sum().backward()
        assert z.grad is not None
        assert loss.isfinite().all()
        assert z.grad.isfinite().all()

    def test_teacher_gets_no_other_role_than_the_target(self) -> None:
        z, t = normal(4, 3, seed=1), normal(4, 3, seed=2)
        assert not torch.allclose(kd_loss(z, t), kd_loss(t, z))
        p, q = softmax(t.numpy(), axis=1), softmax(z.numpy(), axis=1)
        np.testing.assert_allclose(kd_loss(z, t).numpy(), (p * np.log(p / q)).sum(1), rtol=1e-10)


class TestCrossEntropy:
    def test_equals_numpy(self) -> None:
        z, y = 3 * normal(16, 10), torch.arange(16) % 10
        expected = -log_softmax(z.numpy(), axis=1)[np.arange(16), y.numpy()]
        np.testing.assert_allclose(cross_entropy(z, y).numpy(), expected, rtol=1e-12)

    def test_ignores_missing_labels(self) -> None:
        z = normal(6, 4).requires_grad_()
        y = torch.tensor([0, UNLABELED, 3, UNLABELED, 1, 2])
        loss = cross_entropy(z, y)
        assert loss.shape == (6,)
        assert (loss[[1, 3]] == 0).all()
        assert (loss[[0, 2, 4, 5]] > 0).all()
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert (gradient[[1, 3]] == 0).all()
        # a labelled sample does not notice that others lack a label
        torch.testing.assert_close(loss[[0, 2, 4, 5]], cross_entropy(z[[0, 2, 4, 5]], y[[0, 2, 4, 5]]))

    def test_all_labels_missing(self) -> None:
        assert (cross_entropy(normal(3, 4), torch.full((3,), UNLABELED)) == 0).all()

    def test_other_negative_labels_are_refused(self) -> None:
        with pytest.raises(IndexError, match="out of bounds"):
            cross_entropy(normal(2, 4), torch.tensor([0, -2]))


class TestMeanTeacher:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_mean_of_probabilities(self, temperature: float) -> None:
        teachers = [3 * normal(16, 10, seed=k) for k in range(3)]
        expected = np.mean([softmax(t.numpy() / temperature, axis=1) for t in teachers], axis=0)
        found = softmax(mean_teacher(teachers, temperature).numpy() / temperature, axis=1)
        np.testing.assert_allclose(found, expected, rtol=1e-10)

    def test_mean_of_logits_is_the_geometric_mean_of_probabilities(self) -> None:
        teachers = [3 * normal(16, 10, seed=k) for k in range(3)]
        product = np.prod([softmax(t.numpy(), axis=1) for t in teachers], axis=0) ** (1 / 3)
        found = softmax(mean_teacher(teachers, of="logits").numpy(), axis=1)
        np.testing.assert_allclose(found, product / product.sum(1, keepdims=True), rtol=1e-10)

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_losses_averaged_differ_by_what_the_student_cannot_change(self, temperature: float) -> None:
        teachers = [3 * normal(16, 10, seed=k) for k in range(3)]
        z = normal(16, 10, seed=9).requires_grad_()
        averaged = torch.stack([kd_loss(z, t, temperature) for t in teachers]).mean(0)
        together = kd_loss(z, mean_teacher(teachers, temperature), temperature)
        p = np.stack([softmax(t.numpy() / temperature, axis=1) for t in teachers])
        constant = temperature**2 * (entropy(p.mean(0), axis=1) - entropy(p, axis=2).mean(0))  # Jensen-Shannon's
        np.testing.assert_allclose((averaged - together).detach().numpy(), constant, rtol=1e-9)
        gradients = (torch.autograd.grad(loss.sum(), z)[0] for loss in (averaged, together))
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)

    def test_extreme_logits_stay_finite(self) -> None:
        sure = [torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])]
        torch.testing.assert_close(mean_teacher(sure).softmax(1), torch.tensor([[0.5, 0.5]]))

    @pytest.mark.parametrize("of", ["probabilities", "logits"])
    def test_one_alone_stays_as_it_is(self, of: Any) -> None:
        t = normal(4, 3)
        assert mean_teacher([t], 4.0, of) is t
