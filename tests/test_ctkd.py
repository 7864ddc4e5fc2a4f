"""CTKD: a temperature that is learned against the student."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from methods import CLASSES, SHAPE, Blobs, build, trained_teachers, trainer
from scipy.special import rel_entr, softmax
from test_every_method import Each, saved
from torch import Tensor
from torch.optim import SGD

from lit_kd import ALMKD, CTKD, KD, Distiller
from lit_kd.terms import KL, LearnedTemperature
from lit_kd.types import UNLABELED, Batch, Outputs
from lit_kd.weightings import Paper

B, C = 6, 5
Y = torch.tensor([0, 4, UNLABELED, 1, 3, 3])
BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def logits(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, C, generator=g).double(), 2 * torch.randn(B, C, generator=g).double()


def by_hand(z: Tensor, t: Tensor, theta: float) -> list[float]:
    """T^2 KL of each row at T of theta."""
    temperature = 1 + 20 / (1 + math.exp(-theta))
    rows = zip(t.detach().numpy(), z.detach().numpy(), strict=True)
    return [temperature**2 * rel_entr(softmax(a / temperature), softmax(b / temperature)).sum() for a, b in rows]


class TestTerm:
    def test_by_row(self) -> None:
        z, t = logits()
        term = LearnedTemperature().double()
        assert term.learned.item() == pytest.approx(15.62, abs=0.01)
        np.testing.assert_allclose(term.loss(z, t, Y).detach().numpy(), by_hand(z, t, 1.0), rtol=1e-10)

    @pytest.mark.parametrize("reversal", [0.0, 0.3, 1.0])
    def test_its_gradient_is_reversed(self, reversal: float) -> None:
        """Against a difference of the loss by hand, which knows of T^2 in front, too."""
        z, t = logits()
        term, step = LearnedTemperature().double(), 1e-5
        term.reversal = reversal
        term.loss(z, t, Y).sum().backward()
        slope = (sum(by_hand(z, t, 1 + step)) - sum(by_hand(z, t, 1 - step))) / (2 * step)
        assert abs(slope) > 1e-2
        assert term.theta.grad is not None
        assert term.theta.grad.item() == pytest.approx(-reversal * slope, rel=1e-5, abs=1e-12)

    @pytest.mark.parametrize("standardise", [False, True])
    def test_the_student_learns_what_kd_teaches_at_this_temperature(self, standardise: bool) -> None:
        z, t = logits()
        z.requires_grad_()
        term = LearnedTemperature(standardise=standardise).double()
        fixed = KL(term.learned.item(), standardise=standardise)
        found, expected = (
            torch.autograd.grad(one(Outputs(z, {}), Outputs(t, {}), Batch(z, Y)).sum(), z)[0] for one in (term, fixed)
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_extreme_logits(self, dtype: torch.dtype) -> None:
        z = torch.tensor([[1e4, -1e4, 0], [0.0, 0, 0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
        t = torch.tensor([[-1e4, 1e4, 0], [1e4, -1e4, 0], [0, 0, 0.0]], dtype=dtype)
        term = LearnedTemperature()
        found = term.loss(z, t, Y)
        found.sum().backward()
        assert found.dtype == torch.float32
        assert z.grad is not None
        assert term.theta.grad is not None
        assert all(part.isfinite().all() for part in (found, z.grad, term.theta.grad))


def temperatures(model: Distiller, **options: Any) -> list[tuple[float, float]]:
    """lambda and theta after each epoch."""
    found: list[tuple[float, float]] = []

    def note(*_: Any) -> None:
        [term] = [one for one in model.terms or () if isinstance(one, LearnedTemperature)]
        found.append((term.reversal, term.theta.item()))

    trainer(callbacks=Each(note, "on_train_epoch_end"), **options).fit(model, Blobs())
    return found


class TestTraining:
    def test_lambda_rises(self) -> None:
        found = temperatures(CTKD("mlp-8", trained_teachers()[0], ramp_epochs=4, **BASE), max_epochs=6)
        expected = [(1 - math.cos(math.pi * min(epoch, 4) / 4)) / 2 for epoch in range(1, 7)]
        assert [reversal for reversal, _ in found] == pytest.approx(expected)
        assert all(theta != 1 for _, theta in found)
        assert temperatures(CTKD("mlp-8", trained_teachers()[0], ramp_epochs=0, **BASE), max_epochs=1)[0][0] == 1

    def test_lambda_is_what_it_was_after_a_resume(self, tmp_path: Path) -> None:
        make = lambda: CTKD("mlp-8", trained_teachers()[0], ramp_epochs=4, **BASE)  # noqa: E731
        first = trainer(max_epochs=2)
        first.fit(make(), Blobs())
        state = saved(first, tmp_path / "c.ckpt")["state_dict"]
        assert state["terms.each.0.theta"].item() != 1
        model = make()
        trainer(max_epochs=3).fit(model, Blobs(), ckpt_path=tmp_path / "c.ckpt", weights_only=True)
        [term] = [one for one in model.terms or () if isinstance(one, LearnedTemperature)]
        assert term.reversal == pytest.approx((1 - math.cos(math.pi * 3 / 4)) / 2)

    def test_a_published_defect(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """At lambda 0 the temperature stays; in the published code weight decay moves it."""
        sgd = lambda params: SGD(params, 0.1, momentum=0.9, weight_decay=0.1)  # noqa: E731
        term = LearnedTemperature()
        term.reversal = 0.0
        make = lambda: KD("mlp-8", trained_teachers()[0], term=term, optimizer=sgd, **BASE)  # noqa: E731
        assert temperatures(make()) == [(0.0, 1.0), (0.0, 1.0)]
        monkeypatch.setattr(LearnedTemperature, "decays", True)
        assert temperatures(make())[-1][1] < 0.95

    def test_groups_of_the_optimizer(self) -> None:
        model = build("ctkd", lr_scheduler="cosine")
        fitted = trainer()
        fitted.fit(model, Blobs())
        own, apart = fitted.optimizers[0].param_groups
        assert (own["weight_decay"], apart["weight_decay"]) == (5e-4, 0)
        assert own["lr"] == apart["lr"]
        assert [p.shape for p in apart["params"]] == [(1,)] * len(model._teacher_specs)
        assert {id(p) for p in own["params"]} == {id(p) for p in model.student.parameters()}

    @pytest.mark.parametrize("meta_gradient", ["last_layer", "exact"])
    def test_weights_are_learned_over_it(self, meta_gradient: Any) -> None:
        rule = Paper(warmup_epochs=0, every=1)
        term = LearnedTemperature()
        model = ALMKD("mlp-8", trained_teachers()[0], term=term, rule=rule, meta_gradient=meta_gradient, **BASE)
        assert temperatures(model)[-1][1] != 1
        assert model.table["weights"].std(0).max() > 0

    def test_what_does_not_fit(self) -> None:
        with pytest.raises(ValueError, match="expected ramp_epochs of at least 0, found -1"):
            CTKD("mlp-8", "t", ramp_epochs=-1, **BASE)
        with pytest.raises(ValueError, match=r"expected a weight in \[0, 1\]"):
            CTKD("mlp-8", "t", weight=1.5, **BASE)
