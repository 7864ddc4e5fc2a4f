"""Label Revision and data selection as methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods import CLASSES, SHAPE, Blobs, blobs, trained_teachers, trainer, weighted_terms
from scipy.special import rel_entr, softmax
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_kd import ALMKD, KD, Distiller, LabelRevision
from lit_kd.data.table import SampleTable
from lit_kd.models import last_linear
from lit_kd.types import UNLABELED, Batch, Outputs
from lit_kd.weightings import MetaStep, Paper

SHAPED: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
NOISE = {"noise": "symmetric", "noise_rate": 0.4}


def terms(model: Distiller, z: Tensor, t: Tensor, y: Tensor, index: Tensor | None = None) -> dict[str, Tensor]:
    return weighted_terms(model, Outputs(z, {}), [Outputs(t, {})], Batch(torch.zeros(len(y), 1), y, index))


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, and labels: right, wrong, right, wrong, missing."""
    draw = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 5, CLASSES, generator=draw, dtype=torch.float64)
    y = t.argmax(1)
    y[1], y[3], y[4] = (y[1] + 1) % CLASSES, (y[3] + 2) % CLASSES, UNLABELED
    return z, t, y


def revised(t: np.ndarray, y: int, temperature: float = 1.0) -> np.ndarray:
    p = softmax(t / temperature)
    if y == UNLABELED or p.argmax() == y:
        return p
    beta = 0.8 / (p.max() - p[y] + 1)
    return beta * p + (1 - beta) * np.eye(CLASSES)[y]


class TestLabelRevision:
    @pytest.mark.parametrize("form", ["mse", "kl"])
    @pytest.mark.parametrize("which", ["right", "all"])
    @pytest.mark.parametrize("select", [False, True])
    def test_terms_row_by_row(self, rows: tuple[Tensor, Tensor, Tensor], form: Any, which: Any, select: bool) -> None:
        z, t, y = rows
        model = LabelRevision("mlp-8", nn.Linear(1, 1), form=form, cross_entropy=which, **SHAPED)
        kept = [True, True, False, False, True] if select else [True] * 5
        if select:
            model.selected = torch.tensor([*kept[::-1], True])
        found = terms(model, z, t, y, torch.tensor([4, 3, 2, 1, 0]) if select else None)
        for i, (zi, ti, yi) in enumerate(zip(z.numpy(), t.numpy(), y.tolist(), strict=True)):
            p, right = revised(ti, yi), yi in (ti.argmax(), UNLABELED)
            if form == "kl":
                taught = rel_entr(p, softmax(zi)).sum()
            else:
                taught = 4 * ((zi - ti) ** 2).mean() if right else ((softmax(zi) - p) ** 2).mean()
            label = 0.0 if yi == UNLABELED else -np.log(softmax(zi)[yi])
            if which == "right" and not right and kept[i]:
                label = 0.0
            assert found["teacher"][i].item() == pytest.approx(taught * kept[i], rel=1e-6)
            assert found["label"][i].item() == pytest.approx(label, rel=1e-6)

    @pytest.mark.parametrize("form", ["mse", "kl"])
    def test_plain_batches_will_do(self, form: Any) -> None:
        x, y = blobs()
        rate = 0.005 if form == "mse" else 0.05  # squared differences of logits over three classes are steep
        gentle = {"optimizer": lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9)}
        model = LabelRevision("mlp-8", trained_teachers()[0], form=form, **gentle, **SHAPED)
        fitted = trainer(max_epochs=4)
        data = TensorDataset(x, y)
        fitted.fit(model, DataLoader(data, batch_size=10, shuffle=True), DataLoader(data, batch_size=40))
        assert fitted.callback_metrics["val/accuracy"] > 0.9

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"eta": 1.0}, r"eta of label revision in \[0, 1\), found 1.0"),
            ({"select": 0.0}, r"select in \(0, 1\].*found 0.0"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            LabelRevision("mlp-8", nn.Linear(1, 1), **SHAPED, **options).make_terms()


class TestKD:
    def test_revised_teacher_at_its_temperature(self, rows: tuple[Tensor, Tensor, Tensor]) -> None:
        z, t, y = rows
        model = KD("mlp-8", nn.Linear(1, 1), weight=0.6, temperature=3.0, revise=0.8, **SHAPED)
        found = terms(model, z, t, y)["teacher"]
        for i, (zi, ti, yi) in enumerate(zip(z.numpy(), t.numpy(), y.tolist(), strict=True)):
            expected = 0.6 * 9 * rel_entr(revised(ti, yi, 3.0), softmax(zi / 3)).sum()
            assert found[i].item() == pytest.approx(expected, rel=1e-6)

    def test_rows_that_are_not_selected_have_the_label_alone(self, rows: tuple[Tensor, Tensor, Tensor]) -> None:
        z, t, y = rows
        model, plain = (KD("mlp-8", nn.Linear(1, 1), weight=0.6, **SHAPED) for _ in range(2))
        model.selected = torch.tensor([True, False, False, True, True])
        found, expected = terms(model, z, t, y, torch.arange(5)), terms(plain, z, t, y)
        on = model.selected
        torch.testing.assert_close(found["teacher"], expected["teacher"] * on)
        torch.testing.assert_close(found["label"], torch.where(on, expected["label"], expected["label"] / 0.4))


class TestSelection:
    @pytest.mark.parametrize("method", [KD, LabelRevision, ALMKD])
    def test_selects_as_autograd_says(self, method: Any) -> None:
        """Both teachers' scores, from gradients of their last layers row by row."""
        model, data = method("mlp-8", trained_teachers(), select=0.3, **SHAPED), Blobs(**NOISE)
        if method is LabelRevision:
            model.form = "kl"
        trainer(max_epochs=1).fit(model, data)
        x, n = data.parts.plain.x, data.train_size  # type: ignore[attr-defined]
        train, meta = x[data.parts.positions["train"]], x[data.parts.positions["meta"]]
        total = torch.zeros(n)
        for teacher in model.teachers.models:
            layer = last_linear(teacher)[1].requires_grad_()

            def gradient(x: Tensor, y: Tensor, teacher: nn.Module = teacher, layer: nn.Module = layer) -> Tensor:
                found = torch.autograd.grad(F.cross_entropy(teacher(x), y), list(layer.parameters()))
                return torch.cat([g.flatten() for g in found])

            goal = gradient(meta, data.labels[n:])
            scores = torch.stack([goal @ gradient(train[i : i + 1], data.labels[i : i + 1]) for i in range(n)])
            total += scores / scores.square().mean().sqrt()
        chosen = total >= total.sort(descending=True).values[round(0.3 * n) - 1]
        assert chosen.sum() == round(0.3 * n)
        assert torch.equal(model.selected, torch.cat([chosen, torch.ones(24, dtype=torch.bool)]))

    def test_needs_a_meta_split(self) -> None:
        model = KD("mlp-8", trained_teachers()[0], select=0.5, **SHAPED)
        with pytest.raises(ValueError, match=r"meta split for select=0.5.*found 0 rows"):
            trainer().fit(model, Blobs(meta=0))

    def test_needs_the_teachers_last_layer(self) -> None:
        class Doubled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))

            def forward(self, x: Tensor) -> Tensor:
                return 2 * self.net(x)

        model = KD("mlp-8", Doubled(), select=0.5, **SHAPED)
        with pytest.raises(ValueError, match=r"output of its last linear layer.*leave select unset"):
            trainer().fit(model, Blobs())

    def test_almkd_has_no_meta_gradient_where_teachers_do_not_teach(self) -> None:
        steps: list[MetaStep] = []

        class Watch(Paper):
            def observe(self, table: SampleTable, step: MetaStep) -> None:
                steps.append(step)

        rule = Watch(warmup_epochs=0, every=1)
        model = ALMKD("mlp-8", trained_teachers()[0], rule=rule, select=0.5, revise=0.8, **SHAPED)
        trainer(max_epochs=1).fit(model, Blobs(**NOISE))
        assert model.selected is not None
        for step in steps:
            gradient = step.gradient(torch.full((len(step.y), 2), 0.5))
            assert torch.equal(gradient[:, 1].abs() > 1e-12, model.selected[step.index])
            assert (gradient[:, 0].abs() > 1e-12).all()
