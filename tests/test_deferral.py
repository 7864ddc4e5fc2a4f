"""The score that tells where to ask the teacher, and the curve of a cascade."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from methods import CLASSES, SHAPE, Blobs, blobs, trained_teachers, trainer

from lit_kd import KD
from lit_kd.cli.training import train
from lit_kd.models import load_student
from lit_kd.models.taps import Tapped
from lit_kd.report.deferral import deferral_chart
from lit_kd.report.evidence import KeepEvidence
from lit_kd.report.runs import EVIDENCE, Job
from lit_kd.terms import Deferral
from lit_kd.trust.deferral import deferral_curve
from lit_kd.types import Batch, Outputs

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


class TestCurve:
    def test_by_counting(self) -> None:
        draw = np.random.default_rng(0)
        ours, theirs, score = draw.random(9) < 0.5, draw.random(9) < 0.8, draw.random(9)
        shares, found = deferral_curve(ours, theirs, score)
        for k in range(10):
            deferred = set(sorted(range(9), key=lambda i: score[i])[:k])
            right = sum(theirs[i] if i in deferred else ours[i] for i in range(9))
            assert found[k] == pytest.approx(right / 9, abs=1e-12)
            assert shares[k] == pytest.approx(k / 9)
        assert (found[0], found[-1]) == pytest.approx((ours.mean(), theirs.mean()))

    def test_equal_scores_are_the_mean_of_all_orders(self) -> None:
        ours, theirs = np.array([1, 0, 1, 0, 0]), np.array([1, 1, 0, 1, 0])
        score = np.array([0.3, 0.7, 0.3, 0.3, 0.7])
        orders = [o for o in itertools.permutations(range(5)) if sorted(score[list(o)]) == list(score[list(o)])]
        each = [[sum(theirs[list(o[:k])]) + sum(ours[list(o[k:])]) for k in range(6)] for o in orders]
        np.testing.assert_allclose(deferral_curve(ours, theirs, score)[1], np.mean(each, 0) / 5)

    def test_no_score_is_a_line_and_only_the_order_counts(self) -> None:
        ours, theirs = np.array([1, 0, 1, 0]), np.array([1, 1, 1, 1])
        np.testing.assert_allclose(deferral_curve(ours, theirs, np.ones(4))[1], np.linspace(0.5, 1, 5))
        score = np.array([0.3, 0.1, 0.9, 0.5])
        same = deferral_curve(ours, theirs, np.log(score) * 7)[1]
        np.testing.assert_allclose(deferral_curve(ours, theirs, score)[1], same)
        best = deferral_curve(ours, theirs, ours - theirs)[1]  # which knows where the teacher helps
        assert (best >= same).all()

    @pytest.mark.parametrize("score", [[0.5], [0.5, np.nan], [[0.5, 0.1]]])
    def test_bad_input(self, score: Any) -> None:
        with pytest.raises(ValueError, match="expected"):
            deferral_curve([True, False], [True, True], score)
        with pytest.raises(ValueError, match="expected three arrays"):
            deferral_curve([], [], [])


class TestTerm:
    def outputs(self, size: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Outputs, Outputs, Batch]:
        g = torch.Generator().manual_seed(0)
        z, t, h = (size * torch.randn(6, n, generator=g, dtype=torch.float64).to(dtype) for n in (3, 3, 4))
        return Outputs(z, {"penultimate": h}), Outputs(t, {}), Batch(h, torch.zeros(6).long(), None)

    def test_by_row(self) -> None:
        student, teacher, batch = self.outputs()
        term = Deferral()
        term.build(student, teacher)
        term.double()
        found, score = term(student, teacher, batch), term.score(student)
        w, b = term.agrees.weight[0], term.agrees.bias[0]
        for i in range(6):
            p = 1 / (1 + torch.exp(-(w @ student.features["penultimate"][i] + b)))
            same = student.logits[i].argmax() == teacher.logits[i].argmax()
            assert score[i].item() == pytest.approx(p.item(), rel=1e-6)
            assert found[i].item() == pytest.approx(-torch.log(p if same else 1 - p).item(), rel=1e-5)

    def test_the_student_learns_nothing_from_it(self) -> None:
        student, teacher, batch = self.outputs(dtype=torch.float32)
        term = Deferral()
        term.build(student, teacher)
        student.features["penultimate"].requires_grad_()
        student.logits.requires_grad_()
        term(student, teacher, batch).sum().backward()
        assert student.features["penultimate"].grad is None
        assert student.logits.grad is None
        assert term.agrees.weight.grad is not None

    def test_large_features(self) -> None:
        student, teacher, batch = self.outputs(1e4, torch.float32)
        term = Deferral()
        term.build(student, teacher)
        loss = term(student, teacher, batch)
        loss.sum().backward()
        assert loss.isfinite().all()
        assert term.agrees.weight.grad is not None
        assert term.agrees.weight.grad.isfinite().all()

    def test_it_changes_no_student_and_is_found_in_the_checkpoint(self, tmp_path: Path) -> None:
        def fit(**extra: Any) -> KD:
            torch.manual_seed(0)
            model = KD("mlp-8", trained_teachers(), **BASE, **extra)
            fitted = trainer()
            fitted.fit(model, Blobs())
            fitted.save_checkpoint(tmp_path / "c.ckpt")
            return model

        plain, model = fit(), fit(extra=[Deferral()])
        for name, value in plain.student.state_dict().items():
            torch.testing.assert_close(model.student.state_dict()[name], value, rtol=0, atol=0)
        loaded, x = Deferral.from_checkpoint(tmp_path / "c.ckpt"), blobs()[0]
        found = loaded.score(Tapped(load_student(tmp_path / "c.ckpt"), ["penultimate"])(x))
        assert model.terms is not None
        [term] = [one for one in model.terms if isinstance(one, Deferral)]
        torch.testing.assert_close(found, term.score(Tapped(model.student.eval(), ["penultimate"])(x)))
        kept = torch.load(tmp_path / "c.ckpt", weights_only=True)
        layer = {name: value for name, value in kept["state_dict"].items() if ".agrees." in name}
        for names, found_there in (
            ({name.replace("terms.extra.0.0", "student.block"): value for name, value in layer.items()}, "none"),
            (layer | {name.replace("0.0", "0.1"): value for name, value in layer.items()}, "2"),
        ):
            torch.save(kept | {"state_dict": names}, tmp_path / "other.ckpt")
            with pytest.raises(ValueError, match=f"extra term Deferral and one teacher, found {found_there}"):
                Deferral.from_checkpoint(tmp_path / "other.ckpt")

    def test_several_scores_are_averaged(self) -> None:
        """As with teachers that are apart."""
        model, keep = KD("mlp-8", trained_teachers(), extra=[Deferral(), Deferral()], **BASE), KeepEvidence()
        fitted = trainer(max_epochs=1, callbacks=[keep])
        fitted.fit(model, Blobs())
        data = Blobs()
        fitted.test(model, data, verbose=False)
        x = torch.cat([batch.x for batch in data.test_dataloader()])
        scores = [term.score(model.tapped_student(x)) for term in model.terms or () if isinstance(term, Deferral)]
        found = torch.cat([part["deferral_score"] for part in keep.parts])
        torch.testing.assert_close(found, (scores[0] + scores[1]) / 2, rtol=1e-5, atol=1e-7)
        assert (scores[0] - scores[1]).abs().max() > 1e-3


def test_the_picture() -> None:
    draw = np.random.default_rng(0)
    seed = {name: draw.random(30) < 0.7 for name in ("correct", "teacher_correct")}
    scores = {name: draw.random(30) for name in ("confidence", "deferral_score")}
    figure, told = deferral_chart([seed | scores])
    expected = deferral_curve(seed["correct"], seed["teacher_correct"], scores["deferral_score"])
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), 100 * np.stack(expected, 1))
    assert f"{100 * np.interp(0.2, *expected):.1f}%" in told


def accuracy_of(job: Job) -> float:
    found: float = json.loads((job.folder / "result.json").read_text())["test_accuracy"]
    return found


def test_a_comparison_keeps_the_score(tmp_path: Path) -> None:
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "KD",
            "init_args": {"student": "mlp-8", "teacher": ["mlp-4"], "extra": [{"class_path": "Deferral"}]},
        },
        "data": {"class_path": "DigitsDataModule"},
        "trainer": {"max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu"},
    }
    job = Job("KD", 0, tmp_path / "kd" / "seed-0", config)
    train(job)
    kept = job.arrays(EVIDENCE)
    assert kept["deferral_score"].shape == kept["teacher_correct"].shape == kept["confidence"].shape
    assert json.loads((job.folder / "result.json").read_text())["test_accuracy"] == pytest.approx(
        kept["correct"].mean()
    )
