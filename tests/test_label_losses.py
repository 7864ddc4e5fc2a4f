"""Losses with labels that may be wrong, against scipy, numpy and their limits on paper; see also test_losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from methods import weighted_terms
from scipy.optimize import minimize_scalar
from scipy.special import lambertw, softmax
from torch import nn

from lit_kd import KD, Supervised
from lit_kd.losses import cross_entropy
from lit_kd.losses.labels import generalized_cross_entropy, lambert_w, superloss, taylor_cross_entropy
from lit_kd.terms import CrossEntropy, GeneralizedCrossEntropy, LabelTerm, SuperLoss, TaylorCrossEntropy
from lit_kd.types import UNLABELED, Batch, Outputs

every_loss = pytest.mark.parametrize(
    "term", [CrossEntropy(), GeneralizedCrossEntropy(), TaylorCrossEntropy(), SuperLoss()], ids=lambda t: t.name
)
C = 5
Y = torch.arange(40) % C
Z = 3 * torch.randn(40, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
P = softmax(Z.numpy(), axis=1)[np.arange(40), Y.numpy()]


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_generalized_cross_entropy_by_its_formula(q: float) -> None:
    np.testing.assert_allclose(generalized_cross_entropy(Z, Y, q).numpy(), (1 - P**q) / q, rtol=1e-9)


def test_generalized_cross_entropy_from_cross_entropy_to_absolute_error() -> None:
    torch.testing.assert_close(generalized_cross_entropy(Z, Y, 1e-8), cross_entropy(Z, Y), rtol=1e-6, atol=1e-8)
    one_hot = np.eye(C)[Y.numpy()]
    absolute = np.abs(softmax(Z.numpy(), axis=1) - one_hot).sum(1) / 2
    np.testing.assert_allclose(generalized_cross_entropy(Z, Y, 1.0).numpy(), absolute, rtol=1e-9)


def test_taylor_cross_entropy_by_hand() -> None:
    np.testing.assert_allclose(taylor_cross_entropy(Z, Y, 1).numpy(), 1 - P, rtol=1e-9)
    expected = (1 - P) + (1 - P) ** 2 / 2 + (1 - P) ** 3 / 3
    np.testing.assert_allclose(taylor_cross_entropy(Z, Y, 3).numpy(), expected, rtol=1e-9)


def test_taylor_cross_entropy_of_many_terms_is_cross_entropy() -> None:
    z = Z / 3  # the series converges slowly where the label is improbable
    torch.testing.assert_close(taylor_cross_entropy(z, Y, 2000), cross_entropy(z, Y), rtol=1e-6, atol=0)


@pytest.mark.parametrize("strength", [0.25, 1.0, 10.0])
def test_superloss_by_scipys_lambert_w(strength: float) -> None:
    loss, tau = -np.log(P), np.log(C)
    s = np.exp(-lambertw(np.maximum(-2 / np.e * (1 - 1e-12), (loss - tau) / strength) / 2).real)
    expected = (loss - tau) * s + strength * np.log(s) ** 2
    np.testing.assert_allclose(superloss(Z, Y, strength).numpy(), expected, rtol=1e-5, atol=1e-9)


def test_superloss_is_the_minimum_over_confidences() -> None:
    for loss, found in zip(-np.log(P), superloss(Z, Y, 2.0).tolist(), strict=True):
        # confidence between 0 and e, where the paper's formula has its minimum
        best = minimize_scalar(
            lambda log_s, loss=loss: (loss - np.log(C)) * np.exp(log_s) + 2 * log_s**2, bounds=(-8, 1), method="bounded"
        )
        assert found == pytest.approx(best.fun, abs=1e-4)


def test_superloss_weighs_hard_samples_less() -> None:
    z = Z.clone().requires_grad_()
    [gradient] = torch.autograd.grad(superloss(z, Y).sum(), z)
    [plain] = torch.autograd.grad(cross_entropy(z, Y).sum(), z)
    weights = gradient.norm(dim=1) / plain.norm(dim=1)
    order = cross_entropy(Z, Y).argsort()
    assert (weights[order].diff() <= 1e-9).all()
    assert weights[order[0]] > 1.5
    assert weights[order[-1]] < 0.6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_lambert_w(dtype: torch.dtype, limit: float) -> None:
    near = -1 / np.e + np.logspace(-12, -1, 60)
    x = torch.from_numpy(np.concatenate([near, np.linspace(-0.3, 3, 200), np.logspace(1, 6, 50)])).to(dtype)
    x = x[x.double() > -1 / np.e]  # scipy has no number for what rounding puts below
    expected = lambertw(x.double().numpy()).real
    np.testing.assert_allclose(lambert_w(x).double().numpy(), expected, rtol=limit, atol=limit)
    assert lambert_w(torch.tensor(-1 / np.e, dtype=dtype)).item() == pytest.approx(-1, abs=limit)


@every_loss
def test_missing_labels_cost_nothing(term: LabelTerm) -> None:
    z, y = Z.clone().requires_grad_(), Y.clone()
    y[::3] = UNLABELED
    loss = term.loss(z, y)
    assert loss.shape == (40,)
    assert (loss[::3] == 0).all()
    assert (loss[1::3] != 0).all()
    [gradient] = torch.autograd.grad(loss.sum(), z)
    assert (gradient[::3] == 0).all()
    torch.testing.assert_close(term.loss(Z, Y)[1::3], loss[1::3])


@every_loss
def test_methods_take_it_as_a_term(term: LabelTerm) -> None:
    student, batch, shared = Outputs(Z, {}), Batch(Z, Y), {"num_classes": C, "label_term": term}
    found = weighted_terms(Supervised(nn.Linear(C, C), **shared), student, [], batch)
    torch.testing.assert_close(found["label"], term.loss(Z, Y))
    kd = KD(nn.Linear(C, C), nn.Linear(C, C), weight=0.25, **shared)
    torch.testing.assert_close(weighted_terms(kd, student, [student], batch)["label"], 0.75 * term.loss(Z, Y))


def test_hard_labels_of_the_teacher() -> None:
    kd = KD(nn.Linear(C, C), nn.Linear(C, C), num_classes=C, weight=0.7, hard=True)
    teacher = torch.roll(Z, 1, dims=1)
    found = weighted_terms(kd, Outputs(Z, {}), [Outputs(teacher, {})], Batch(Z, Y))["teacher"]
    torch.testing.assert_close(found, 0.7 * nn.CrossEntropyLoss(reduction="none")(Z, teacher.argmax(1)))


def test_label_smoothing_and_class_weights_by_their_formula() -> None:
    weights, log_p = np.array([0.5, 1.0, 2.0, 0.0, 3.0]), np.log(softmax(Z.numpy(), axis=1))
    smooth = 0.9 * np.eye(C)[Y.numpy()] + 0.1 / C
    term = CrossEntropy(label_smoothing=0.1, class_weights=weights.tolist()).double()
    np.testing.assert_allclose(term.loss(Z, Y).numpy(), -(weights * smooth * log_p).sum(1), rtol=1e-9)
    soft = torch.from_numpy(softmax(Z.numpy()[:, ::-1], axis=1).copy())
    expected = -(weights * (0.9 * soft.numpy() + 0.1 / C) * log_p).sum(1)
    np.testing.assert_allclose(term.loss(Z, soft).numpy(), expected, rtol=1e-9)
    assert term.loss(Z[:1], torch.tensor([UNLABELED])) == 0
    assert term.loss(Z[:1], torch.zeros(1, C).double()) == 0


@pytest.mark.parametrize("wrong", [{"label_smoothing": 1.0}, {"class_weights": [1.0, -1.0]}])
def test_label_smoothing_and_class_weights_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing in \[0, 1\) and class_weights of at least 0"):
        CrossEntropy(**wrong)
