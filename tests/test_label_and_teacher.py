"""Label Revision, data selection and posterior distillation as methods."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from methods import CLASSES, SHAPE, Blobs, blobs, build, trained_teachers, trainer, weighted_terms
from scipy.special import rel_entr, softmax
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_kd import ALMKD, KD, Distiller, LabelRevision, PosteriorDistillation, Supervised
from lit_kd.data import DigitsDataModule
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


class TestPosteriorDistillation:
    @pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(20, 25))])
    def test_picks_the_right_one_on_digits(self, seed: int) -> None:
        """30% pair noise, that the teacher learned too: more than 85% where one of label and teacher is right."""
        seed_everything(seed, verbose=False)
        noise = {"noise": "asymmetric", "noise_rate": 0.3, "seed": seed}
        sgd = {"optimizer": lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True), "lr_scheduler": "cosine"}
        shape: dict[str, Any] = {"num_classes": 10, "input_shape": [1, 8, 8], **sgd}
        teacher, data = Supervised("mlp-256", **shape), DigitsDataModule(**noise)
        trainer(max_epochs=15, limit_val_batches=0).fit(teacher, data)
        model, data = PosteriorDistillation("mlp-32", teacher.student, **shape), DigitsDataModule(**noise)
        fitted = trainer(max_epochs=15, limit_val_batches=0)
        fitted.fit(model, data)
        n, table = data.train_size, model.table
        assert table is not None
        y, true = data.labels[:n], data.clean_labels[:n]
        said = table["teacher_probabilities"][:n].argmax(1)
        one = (y == true) ^ (said == true)
        assert one.sum() > 150
        right = (table["target"][:n].argmax(1) == true)[one].float().mean().item()
        print(
            f"seed {seed}: {int(one.sum())} rows, the right one in {right:.3f}, rate {table.shared['noise_rate']:.2f}"
        )
        assert right > 0.85
        assert table.shared["noise_rate"].item() == pytest.approx((y != true).float().mean().item(), abs=0.08)
        assert fitted.callback_metrics["samples/noise_rate"] == table.shared["noise_rate"]

    def test_clean_labels_are_taken_as_they_are(self) -> None:
        model, data = PosteriorDistillation("mlp-8", trained_teachers()[0], **SHAPED), Blobs()
        trainer(max_epochs=6).fit(model, data)
        assert model.table is not None
        n = data.train_size
        assert model.table["target"].argmax(1).equal(data.labels)
        assert model.table["target"].amax(1).unique().tolist() == [1]
        assert model.table["target_weight"].unique().tolist() == [1]
        assert model.table["clean_probability"][:n].min() > 0.5

    def test_plain_cross_entropy_in_the_warmup(self) -> None:
        def run(model: Distiller) -> dict[str, Tensor]:
            seed_everything(0, verbose=False)
            torch.manual_seed(0)
            trainer(max_epochs=3).fit(model, Blobs(**NOISE))
            return model.student.state_dict()

        torch.manual_seed(3)
        first = PosteriorDistillation("mlp-8", trained_teachers()[0], warmup_epochs=3, **SHAPED)
        second = Supervised("mlp-8", **SHAPED)
        second.student.load_state_dict(first.student.state_dict())
        torch.testing.assert_close(run(first), run(second))

    def test_unlabeled_rows_have_the_posterior_of_student_and_teacher(self) -> None:
        model, data = PosteriorDistillation("mlp-8", trained_teachers()[0], **SHAPED), Blobs(labeled=0.5)
        fitted = trainer(max_epochs=8)
        fitted.fit(model, data)
        table, n = model.table, data.train_size
        assert table is not None
        without = data.labels == UNLABELED
        assert without.sum() == n // 2
        assert (table["target"][without].argmax(1) == data.clean_labels[without]).float().mean() > 0.9
        assert torch.equal(table["clean_probability"] == 0, without)
        assert (table["weights"][without][:, 0] == 0).all()
        assert (table["weights"][without][:, 1] > 0).float().mean() > 0.9
        assert fitted.callback_metrics["val/accuracy"] > 0.9

    def test_no_label_at_all(self) -> None:
        class Unlabeled(Blobs):
            def setup(self, stage: str | None = None) -> None:
                super().setup(stage)
                self.parts.given[: self.train_size] = UNLABELED

        model = PosteriorDistillation("mlp-8", trained_teachers()[0], **SHAPED)
        fitted = trainer(max_epochs=8)
        fitted.fit(model, Unlabeled())
        assert fitted.callback_metrics["val/accuracy"] > 0.9

    def test_meta_without_some_class(self) -> None:
        class Partial(Blobs):
            def setup(self, stage: str | None = None) -> None:
                super().setup(stage)
                kept = self.labels[self.train_size :] != 0
                parts = self.parts
                parts.positions["meta"] = parts.positions["meta"][kept.numpy()]
                for name in ("given", "clean"):
                    rows = getattr(parts, name)
                    setattr(parts, name, torch.cat([rows[: self.train_size], rows[self.train_size :][kept]]))

        model = PosteriorDistillation("mlp-8", trained_teachers()[0], **SHAPED)
        fitted = trainer(max_epochs=8)
        fitted.fit(model, Partial(**NOISE))
        assert fitted.callback_metrics["val/accuracy"] > 0.9

    def test_resumed_long_after_the_calibration(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Meta rows that are trained on say something else by then: the teacher is calibrated once."""

        def data() -> Blobs:
            return Blobs(noise="symmetric", noise_rate=0.3, train_on_meta=True, seed=0)

        torch.manual_seed(0)
        whole = build("posterior")
        half = copy.deepcopy(whole)
        trainer(max_epochs=8).fit(whole, data())
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer(max_epochs=8, callbacks=keep, enable_checkpointing=True).fit(half, data())
        again = build("posterior")
        monkeypatch.delattr("lit_kd.methods.posterior.calibrate")  # not again
        trainer(max_epochs=8).fit(again, data(), ckpt_path=tmp_path / "epoch=4.ckpt")
        assert again.table["target"].allclose(whole.table["target"], rtol=0, atol=0)
        for name, value in again.table.shared.items():
            torch.testing.assert_close(value, whole.table.shared[name], rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (lambda: Blobs(meta=0), "meta split for PosteriorDistillation.*found 0 rows"),
            (lambda: DataLoader(TensorDataset(*blobs()), batch_size=10), "PosteriorDistillation needs sample indices"),
        ],
    )
    def test_data_that_will_not_do(self, data: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            trainer().fit(PosteriorDistillation("mlp-8", trained_teachers()[0], **SHAPED), data())

    def test_length_must_be_known(self) -> None:
        model = PosteriorDistillation("mlp-8", trained_teachers()[0], **SHAPED)
        with pytest.raises(ValueError, match="max_epochs or max_steps"):
            trainer(max_epochs=-1).fit(model, Blobs())

    def test_bad_warmup(self) -> None:
        with pytest.raises(ValueError, match="warmup_epochs of at least 1, found 0"):
            PosteriorDistillation("mlp-8", nn.Linear(1, 1), warmup_epochs=0, **SHAPED)
