"""Pixels, tokens and numbers: losses against torch, masks, and whole trainings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from torch import Tensor, nn

from lit_kd import ALMKD, DKD, KD, Supervised
from lit_kd.data import DataModule, Source, TensorRows
from lit_kd.losses import bounded_error, gaussian_error, squared_error
from lit_kd.terms import KL, CrossEntropy, DecoupledKL, GaussianError, TeacherBound
from lit_kd.types import IGNORED, Batch, Outputs

CLASSES = {"dense": 3, "tokens": 3, "regression": 2}


class Drawn(DataModule):
    """80 samples of random inputs; the targets follow from them."""

    def __init__(self, task: str, **options: Any) -> None:
        super().__init__(**{"batch_size": 8, "meta": 16, "val": 8} | options)
        self.task, self.num_classes = task, CLASSES[task]

    def load(self) -> Source:
        draw = torch.Generator().manual_seed(0)
        if self.task == "dense":
            x = torch.randn(80, 1, 5, 6, generator=draw)
            y = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
        elif self.task == "tokens":
            x = torch.randint(7, (80, 5), generator=draw)
            y = x % 3
        else:
            x = torch.randn(80, 4, generator=draw)
            y = x[:, :2] * 2 + 1
        labels = y.numpy().copy()
        if self.task == "regression":
            labels[3] = np.nan
        else:
            labels[:, -1] = IGNORED
        return Source(TensorRows(x), TensorRows(x), labels, test_size=16)


def net(task: str) -> nn.Module:
    if task == "dense":
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))
    if task == "tokens":
        return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 3))
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


def made(kind: Any, task: str, teacher: bool = False, **options: Any) -> Any:
    seed_everything(0, verbose=False)
    options |= {"teacher": net(task)} if teacher else {}
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.02)  # noqa: E731
    return kind(student=net(task), num_classes=CLASSES[task], task=task, optimizer=adam, **options)


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**quiet | {"enable_checkpointing": False} | options)


def shaped(task: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two networks in float64, and labels, of which some count for nothing, and one sample wholly."""
    draw = torch.Generator().manual_seed(1)
    shape = (4, 3, 5, 6) if task == "dense" else (4, 5, 3)
    z, t = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    y = torch.randint(3, (4, 5, 6) if task == "dense" else (4, 5), generator=draw)
    y[0], y[1, :2] = IGNORED, IGNORED
    return z.requires_grad_(), t, y


@pytest.mark.parametrize("task", ["dense", "tokens"])
class TestElements:
    def test_cross_entropy_is_torchs(self, task: str) -> None:
        z, _, y = shaped(task)
        found = CrossEntropy()(Outputs(z, {}), None, Batch(z, y))
        first = z if task == "dense" else z.mT
        for i in range(1, 4):
            expected = F.cross_entropy(first[i : i + 1], y[i : i + 1], ignore_index=IGNORED)
            torch.testing.assert_close(found[i], expected)
        assert found[0] == 0

    @pytest.mark.parametrize("term", [KL(2.0), KL(3.0, divergence="reverse", standardise=True), DecoupledKL()])
    def test_terms_are_those_of_each_element(self, task: str, term: KL) -> None:
        z, t, y = shaped(task)
        found = term(Outputs(z, {}), Outputs(t, {}), Batch(z, y))
        for i in range(4):
            each = []
            for place in (y[i] != IGNORED).nonzero().tolist():
                at = (i, slice(None), *place) if task == "dense" else (i, *place)
                one = Outputs(z[at].unsqueeze(0), {}), Outputs(t[at].unsqueeze(0), {})
                each.append(term(*one, Batch(z, y[(i, *place)].view(1))))
            expected = torch.cat(each).mean() if each else torch.zeros((), dtype=z.dtype)
            torch.testing.assert_close(found[i], expected)

    def test_ignored_elements_have_no_gradient(self, task: str) -> None:
        z, t, y = shaped(task)
        with torch.no_grad():
            z[0] = torch.nan  # what is ignored may be anything
        total = KL()(Outputs(z, {}), Outputs(t, {}), Batch(z, y)) + CrossEntropy()(Outputs(z, {}), None, Batch(z, y))
        total.sum().backward()
        assert z.grad is not None
        gradient = z.grad.movedim(1, -1) if task == "dense" else z.grad
        assert (gradient[y == IGNORED] == 0).all()
        assert (gradient[y != IGNORED] != 0).any()
        assert gradient.isfinite().all()


class TestNumbers:
    def test_losses(self) -> None:
        draw = torch.Generator().manual_seed(0)
        z, t, y, scale = (torch.randn(6, 2, generator=draw, dtype=torch.float64) for _ in range(4))
        torch.testing.assert_close(squared_error(z, y), F.mse_loss(z, y, reduction="none").mean(1))
        expected = F.gaussian_nll_loss(z, y, scale[0].exp().square().expand(6, 2), full=True, reduction="none")
        torch.testing.assert_close(gaussian_error(z, y, scale[0]), expected.mean(1))
        for i, found in enumerate(bounded_error(z, t, y, 0.5)):
            own, bound = ((x[i] - y[i]).square().mean() for x in (z, t))
            torch.testing.assert_close(found, own if own + 0.5 > bound else torch.zeros_like(own))

    def test_a_missing_target_teaches_nothing(self) -> None:
        z = torch.ones(2, 2, requires_grad=True)
        y = torch.tensor([[torch.nan, torch.nan], [3.0, torch.nan]])
        (squared_error(z, y) + gaussian_error(z, y, torch.zeros(2))).sum().backward()
        assert z.grad is not None
        assert z.grad.tolist() == [[0, 0], [-3, 0]]  # of (z - y)^2 / 2 twice, once halved


METHODS = {
    "label": lambda task: made(Supervised, task),
    "kd": lambda task: made(KD, task, teacher=True, weight=0.2),
    "paper": lambda task: made(ALMKD, task, teacher=True, rule="paper", meta_gradient="exact"),
    "amal": lambda task: made(ALMKD, task, teacher=True, rule="amal", meta_gradient="central"),
}


@pytest.mark.parametrize("task", CLASSES)
@pytest.mark.parametrize("method", METHODS)
def test_trainings(task: str, method: str) -> None:
    epochs = 25 if method in ("label", "kd") else 12
    fitted, data, model = trainer(max_epochs=epochs), Drawn(task), METHODS[method](task)
    fitted.fit(model, data)
    (metrics,) = fitted.test(model, data, verbose=False)
    least = {"label": 0.8, "kd": 0.5}.get(method, 0.3)
    assert metrics[f"test/{model.task.score}"] > least
    if method != "label":
        assert "test/teacher_agreement" in metrics
    said = fitted.predict(model, data)
    assert said is not None
    assert [*said[0]] == (["value"] if task == "regression" else ["class", "probability"])  # type: ignore[list-item]


@pytest.mark.parametrize("task", CLASSES)
def test_accumulated_batches_equal_one(task: str) -> None:
    weights = []
    for size, batches in ((16, 1), (4, 4)):
        model = made(KD, task, teacher=True)
        fitted = trainer(max_epochs=1, accumulate_grad_batches=batches)
        fitted.fit(model, Drawn(task, batch_size=size, seed=0, val=16))
        weights.append(torch.cat([p.detach().flatten() for p in model.student.parameters()]))
    torch.testing.assert_close(*weights)


def test_learned_scale() -> None:
    model = made(Supervised, "regression", label_term=GaussianError())
    fitted = trainer(max_epochs=25)
    fitted.fit(model, Drawn("regression"))
    scale = dict(model.named_parameters())["terms.label.0.log_scale"].exp()
    assert (scale < 0.7).all()  # it began at 1, and there is no noise
    assert fitted.test(model, Drawn("regression"), verbose=False)[0]["test/r2"] > 0.8


def test_teacher_bound() -> None:
    model = made(KD, "regression", teacher=True, term=TeacherBound(margin=0.1))
    fitted = trainer(max_epochs=10)
    fitted.fit(model, Drawn("regression"))
    assert fitted.callback_metrics["train/teacher"] > 0


@pytest.mark.parametrize(
    ("task", "options", "match"),
    [
        ("tokens", {"noise": "symmetric", "noise_rate": 0.2}, "expected no noise and no labeled with the task tokens"),
        ("dense", {"labeled": 8}, "expected no noise and no labeled with the task dense"),
    ],
)
def test_refused_data(task: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Drawn(task, **options).setup()


@pytest.mark.parametrize(
    ("task", "make", "match"),
    [
        ("dense", lambda: made(ALMKD, "dense", teacher=True), "Robust needs one class a sample, found task 'dense'"),
        ("tokens", lambda: made(ALMKD, "tokens", teacher=True, rule="paper"), "expected meta_gradient: exact where"),
        ("regression", lambda: made(DKD, "regression", teacher=True), "expected terms for regression, found Decoupled"),
        ("dense", lambda: KD(net("dense"), net("dense"), num_classes=3), "the data's task, .*: set task='dense'"),
        ("dense", lambda: made(KD, "tokens", teacher=True), "the data's task, found task='tokens': set task='dense'"),
    ],
)
def test_refused(task: str, make: Any, match: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=match):
        trainer(max_epochs=1).fit(model, Drawn(task))
