"""USKD against loops in float64 that are written from the equations, its limits, and the published defect."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from scipy.special import log_softmax, softmax
from torch import Tensor

from lit_kd import ALMKD, Supervised
from lit_kd.losses import cross_entropy
from lit_kd.losses.own_labels import uskd_loss
from lit_kd.terms import USKD
from lit_kd.types import UNLABELED, Batch, Outputs
from lit_kd.weightings import Paper

B, C = 7, 5
BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, those of the linear layer, and labels."""
    g = torch.Generator().manual_seed(0)
    z, a = 2 * torch.randn(2, B, C, generator=g, dtype=torch.float64)
    return z, a, torch.tensor([0, 3, UNLABELED, 1, 4, 4, 2])


def ranks(scores: list[float]) -> list[int]:
    return [1 + sum(other > score for other in scores) for score in scores]


def by_hand(z: Tensor, a: Tensor, y: Tensor, alpha: float, beta: float, mu: float, logs: bool = False) -> list[float]:
    """With ``logs`` as the published code ranks."""
    rows = [b for b in range(len(y)) if y[b] != UNLABELED]
    squares = {b: softmax(z[b].numpy())[y[b]] ** 2 for b in rows}
    found = []
    for b in range(len(y)):
        if b not in rows:
            found.append(0.0)
            continue
        c, p, w = int(y[b]), softmax(z[b].numpy()), softmax(a[b].numpy())
        s = squares[b] + 1 - np.mean(list(squares.values()))
        own = np.log(p) / (1 - np.log(p[c])) if logs else p / (1 - p[c])
        rank = ranks(list(w / (1 - w[c]) + own))
        zipf = [0 if k == c else 1 / rank[k] for k in range(C)]
        others = [k for k in range(C) if k != c]
        log_q = dict(zip(others, log_softmax(z[b].numpy()[others]), strict=True))
        taught = -sum(zipf[k] / sum(zipf) * log_q[k] for k in others)
        smooth = -sum((0.9 * (k == c) + 0.1 / C) * math.log(w[k]) for k in range(C))
        found.append(-math.log(p[c]) - alpha * s * math.log(p[c]) + beta * taught + mu * smooth)
    return found


@pytest.mark.parametrize("weights", [(1.0, 0.1, 0.005), (0.1, 0.1, 0.1), (0.3, 2.0, 0.7), (0.0, 0.0, 0.0)])
def test_by_row(weights: tuple[float, float, float]) -> None:
    z, a, y = draw()
    np.testing.assert_allclose(uskd_loss(z, a, y, *weights).numpy(), by_hand(z, a, y, *weights), rtol=1e-10)


def test_classes_are_not_ranked_by_a_sum_of_a_probability_and_a_logarithm() -> None:
    z, a, y = draw()
    z[0], a[0] = torch.tensor([0.0, 2.0, 1.9, -3.0, -4.0]), torch.tensor([0.0, 0.1, 0.5, 0.6, -1.0])
    found, published = (by_hand(z, a, y, 0.0, 1.0, 0.0, logs=logs) for logs in (False, True))
    assert abs(found[0] - published[0]) > 1e-3
    np.testing.assert_allclose(uskd_loss(z, a, y, 0.0, 1.0, 0.0).numpy(), found, rtol=1e-10)


def test_limits() -> None:
    z, a, y = draw()
    torch.testing.assert_close(uskd_loss(z, a, y, 0.0, 0.0, 0.0), cross_entropy(z, y))
    alone = uskd_loss(z[:1], a[:1], y[:1], 1.0, 0.0, 0.0)  # s is 1
    torch.testing.assert_close(alone, 2 * cross_entropy(z[:1], y[:1]))
    torch.testing.assert_close(uskd_loss(z + 3, a - 2, y), uskd_loss(z, a, y))
    assert not uskd_loss(z, a, torch.full((B,), UNLABELED)).any()
    two = uskd_loss(z[:, :2], a[:, :2], y.clamp(max=1), 0.0, 1.0, 0.0)  # nothing is left to share out
    torch.testing.assert_close(two, cross_entropy(z[:, :2], y.clamp(max=1)))
    soft = torch.nn.functional.one_hot(y.clamp(min=0), C).double() * (y != UNLABELED).unsqueeze(1)
    torch.testing.assert_close(uskd_loss(z, a, soft), uskd_loss(z, a, y))


def test_targets_have_no_gradient() -> None:
    """With s and z held, the gradient is that of two cross-entropies; the linear layer learns its own loss alone."""
    z, a, y = draw()
    z, a = z.requires_grad_(), a.requires_grad_()
    uskd_loss(z, a, y, 0.0, 0.0, 0.3).sum().backward()
    torch.testing.assert_close(a.grad, torch.autograd.grad(0.3 * cross_entropy(a, y, 0.1).sum(), a)[0])
    [by_beta] = torch.autograd.grad(uskd_loss(z, a, y, 0.0, 1.0, 0.0).sum() - cross_entropy(z, y).sum(), z)
    labelled = y != UNLABELED
    assert not by_beta[torch.arange(B), y.clamp(min=0)][labelled].any()  # none in the label's class
    [by_alpha] = torch.autograd.grad(uskd_loss(z, a, y, 1.0, 0.0, 0.0).sum() - cross_entropy(z, y).sum(), z)
    [plain] = torch.autograd.grad(cross_entropy(z, y).sum(), z)
    square = z.detach().softmax(1)[torch.arange(B), y.clamp(min=0)].square()
    s = square + 1 - square[labelled].mean()
    torch.testing.assert_close(by_alpha, s.unsqueeze(1) * plain, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values(dtype: torch.dtype) -> None:
    term = USKD("f").to(dtype)
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    out = Outputs(z, {"f": 1e3 * torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)})
    term.build(out, None)
    term = term.to(dtype)
    found = term(out, None, Batch(z, torch.tensor([0, 0, UNLABELED])))
    found.sum().backward()
    assert z.grad is not None
    assert found.isfinite().all()
    assert z.grad.isfinite().all()
    assert found.dtype == torch.float32


def test_under_learned_weights() -> None:
    """It is of each sample: ALM-KD can weigh it where its gradient is exact."""
    model = ALMKD(
        "mlp-8", trained_teachers()[0], label_term=USKD("penultimate"), rule=Paper(warmup_epochs=1, every=1),
        meta_gradient="exact", **BASE,
    )  # fmt: skip
    fitted = trainer()
    fitted.fit(model, Blobs())
    assert fitted.callback_metrics["train/loss"].isfinite()


def test_refused() -> None:
    with pytest.raises(ValueError, match="alpha, beta and mu of at least 0, found -1"):
        USKD(alpha=-1.0)
    tokens = Outputs(torch.zeros(2, 3), {"f": torch.zeros(2, 4, 5)})
    with pytest.raises(ValueError, match=r"expected vectors or maps of layer 'f', found \(4, 5\)"):
        USKD("f").build(tokens, None)
    with pytest.raises(ValueError, match="no layer 'layer2' in Sequential"):
        trainer().fit(Supervised("mlp-8", label_term=USKD(), **BASE), Blobs())
