"""Attacks on linear networks of two classes, where the worst input is known, and what is learned there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from methods import CLASSES, SHAPE, Blobs, build, trained_teachers, trainer
from torch import Tensor, nn

from lit_kd import KD, AdversarialKD
from lit_kd.models.taps import Tapped
from lit_kd.teachers import AdaptedTeacher
from lit_kd.teachers.modules import Teachers
from lit_kd.terms.base import weighted_means
from lit_kd.types import UNLABELED, Batch, Outputs

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
EPS = 0.05


class Linear(nn.Module):
    """Logits ``(0, m)`` of ``m = <w, x>``: p of class 1 is sigmoid(m)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        m = x @ self.w
        return torch.stack([torch.zeros_like(m), m], 1)


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x, torch.tensor([0, 1, 1, 0, UNLABELED, 1])


def losses(attack: str, **options: Any) -> tuple[AdversarialKD, Tensor, Tensor]:
    """The method on linear networks, and its unweighted terms."""
    student, teacher, (x, y) = Linear(0), Linear(1), inputs()
    model = AdversarialKD(student, teacher, num_classes=2, attack=attack, epsilon=EPS, temperature=1.0, **options)  # type: ignore[arg-type]
    model.teachers, model.tapped_student = Teachers([teacher]), Tapped(student)
    model.terms = model.make_terms()
    model._trainer = SimpleNamespace(training=True)  # type: ignore[assignment]
    [label, taught], weights, _ = model.weighed(
        Outputs(student(x), {}), model.teachers(Batch(x, y, None)), Batch(x, y, None)
    )
    assert list(weights) == pytest.approx([0.1, 0.9])
    return model, label, taught


def kl(p: Tensor, q: Tensor) -> Tensor:
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


def test_the_student_at_its_worst_input() -> None:
    """KL grows with m above the teacher's log-odds and falls below: so m moves away, by epsilon times the 1-norm."""
    _, label, taught = losses("student")
    w, v, (x, y) = Linear(0).w, Linear(1).w, inputs()
    p, m = (x @ v).sigmoid(), x @ w
    away = (m - x @ v).sign()
    expected = kl(p, (m + away * EPS * w.abs().sum()).sigmoid())
    torch.testing.assert_close(taught, expected, rtol=1e-10, atol=1e-12)
    assert (taught > kl(p, m.sigmoid())).all()
    q = m.sigmoid()
    plain = -torch.where(y == 1, q, 1 - q).log() * (y != UNLABELED)  # the label counts at x itself
    torch.testing.assert_close(label, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 5])
def test_the_teacher_at_its_worst_input(steps: int) -> None:
    """Of a linear classifier the largest loss is ``softplus(-margin + epsilon |w|_1)``; its own class for no label."""
    _, _, taught = losses("teacher", steps=steps)
    w, v, (x, y) = Linear(0).w, Linear(1).w, inputs()
    sign = torch.where(y == UNLABELED, (x @ v > 0).long(), y).double() * 2 - 1
    d = -sign.unsqueeze(1) * EPS * v.sign()
    p, q = (((x + d) @ one).sigmoid() for one in (v, w))
    torch.testing.assert_close(taught, kl(p, q), rtol=1e-10, atol=1e-12)
    worst = nn.functional.softplus(-sign * (x @ v) + EPS * v.abs().sum())
    torch.testing.assert_close(-torch.where(sign > 0, p, 1 - p).log(), worst)


def test_it_stays_within_epsilon() -> None:
    model, (x, _) = losses("student", steps=7)[0], inputs()
    draw = torch.randn(6, 4, dtype=torch.float64)
    far = (model.attacked(x, lambda z: (z * draw).sum(1)) - x).abs().max().item()
    assert far == pytest.approx(EPS)
    torch.testing.assert_close(model.attacked(x, lambda z: 0 * z.sum(1)), x)


@pytest.mark.parametrize("attack", ["student", "teacher"])
def test_without_room_it_is_kd(attack: str) -> None:
    def loss(kind: type[KD], **options: Any) -> float:
        torch.manual_seed(0)
        fitted = trainer()
        fitted.fit(kind("mlp-8", trained_teachers()[:1], **options, **BASE), Blobs())
        return fitted.callback_metrics["train/loss"].item()

    assert loss(AdversarialKD, attack=attack, epsilon=1e-12) == pytest.approx(loss(KD), rel=1e-5)


def test_an_attack_leaves_the_students_statistics() -> None:
    """BatchNorm of the student counts the clean pass and the one that is learned from, and no step of the attack."""
    model = AdversarialKD("cnn-2", trained_teachers()[:1], steps=9, **BASE)
    fitted = trainer(max_epochs=1, limit_train_batches=3)
    fitted.fit(model, Blobs())
    counts = [m.num_batches_tracked for m in model.student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(n) for n in counts if n is not None} == {6}


def test_far_logits() -> None:
    model, (x, _) = losses("student")[0], inputs()
    x = (1e4 * x).requires_grad_()
    batch = Batch(x, torch.ones(6).long(), None)
    means = weighted_means(*model.weighed(Outputs(model.student(x), {}), model.teachers(batch._replace(x=-x)), batch))
    means["loss"].backward()
    assert means["loss"].isfinite()
    assert model.student.w.grad.isfinite().all()  # type: ignore[union-attr]


def test_what_is_refused() -> None:
    for options, match in (
        ({"attack": "label"}, "expected as attack one of"),
        ({"epsilon": 0.0}, "epsilon above 0"),
        ({"steps": 0}, "at least 1 step"),
        ({"mix": "mixup"}, "expected no mix"),
        ({"attack": "teacher", "teacher_cache": "memory"}, "no teacher_cache with attack='teacher'"),
    ):
        with pytest.raises(ValueError, match=match):
            AdversarialKD("mlp-8", **options, **BASE)
    trainer().fit(build("adversarial", teacher_cache="memory"), Blobs())
    for attack in ("student", "teacher"):
        model = AdversarialKD("mlp-8", AdaptedTeacher(trained_teachers()[0]), attack=attack, **BASE)  # type: ignore[arg-type]
        if attack == "student":
            trainer(max_epochs=1).fit(model, Blobs())
            continue
        with pytest.raises(
            ValueError, match="neither an AdaptedTeacher nor a file as the teacher with attack='teacher'"
        ):
            trainer().fit(model, Blobs())


@pytest.mark.parametrize("attack", ["student", "teacher"])
def test_several_teachers(attack: Any) -> None:
    """Of the median of three an outlier changes nothing; and what both passes drop is the same."""
    student, other, (x, y) = Linear(0), Linear(1), inputs()
    other.w.data *= -50

    def made(teachers: list[nn.Module], **options: Any) -> AdversarialKD:
        model = AdversarialKD(student, teachers, num_classes=2, attack=attack, **options)
        model.teachers, model.tapped_student = Teachers(teachers), Tapped(student)
        model.terms = model.make_terms()
        model.log_means = lambda *_: None  # type: ignore[assignment, method-assign]
        model._trainer = SimpleNamespace(training=True)  # type: ignore[assignment]
        return model

    def taught(model: AdversarialKD) -> Tensor:
        return model.weighed(Outputs(student(x), {}), model.teachers(Batch(x, y, None)), Batch(x, y, None))[0][1]

    found = taught(made([Linear(1), Linear(1), other], average="median"))
    torch.testing.assert_close(found, taught(made([Linear(1)])), rtol=1e-10, atol=1e-12)

    model, heard = made([Linear(1), other], drop=0.5, epsilon=1e-9), []
    sources = model.sources
    model.sources = lambda *given: [heard.append(one.logits) or one for one in sources(*given)]  # type: ignore[func-returns-value, method-assign]
    for _ in range(8):
        taught(model)
    for clean, moved in zip(heard[::2], heard[1::2], strict=True):
        torch.testing.assert_close(clean, moved, rtol=0, atol=1e-5)
    assert len({one[0, 1].sign().item() for one in heard}) == 2
