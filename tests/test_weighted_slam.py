"""WeightedDistillation and SLaM: what they ask of the data, what they are in the simplest cases, what they learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from methods import CLASSES, SHAPE, Blobs, blobs, build, trainer, weighted_terms
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lit_kd import Distiller, SLaM, WeightedDistillation
from lit_kd.data import UNLABELED, DistillationDataModule, Source, TensorRows
from lit_kd.terms import Mixed
from lit_kd.types import Batch, Outputs

both = pytest.mark.parametrize("method", ["weighted", "slam"])
SHAPED: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


class Oracle(nn.Module):
    """A teacher that knows the rows, and is wrong on chosen ones."""

    def __init__(self, wrong: Tensor) -> None:
        super().__init__()
        self.x, y = blobs()
        self.said = torch.where(wrong, (y + 1) % CLASSES, y)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.x.flatten(1)).argmin(1)
        return 3 * F.one_hot(self.said[nearest], CLASSES).float()


def oracle(share: float = 0.0) -> Oracle:
    return Oracle(torch.rand(120, generator=torch.Generator().manual_seed(0)) < share)


def fit(model: Distiller, data: Any, **options: Any) -> Any:
    fitted = trainer(**options)
    fitted.fit(model, data)
    return fitted


class Bare(Blobs):
    """No training row has a label."""

    def load(self) -> Source:
        source = super().load()
        y = source.labels
        rows = [TensorRows(blobs()[0][part]) for part in (slice(0, 60), slice(60, 120))]
        return Source(rows[0], rows[0], y[:60] * 0 + UNLABELED, val=rows[1], val_labels=y[60:], identity=b"bare")


class TestData:
    @both
    def test_no_meta_rows(self, method: str) -> None:
        with pytest.raises(ValueError, match=r"expected a meta split for (Weighted\w+|SLaM), found 0 rows.*meta=0\.1"):
            fit(build(method), Blobs(meta=0, labeled=12))

    @both
    def test_plain_loaders(self, method: str) -> None:
        data = Blobs()
        data.setup()
        with pytest.raises(ValueError, match=r"needs sample indices.*DistillationDataModule\(inner\)"):
            trainer().fit(build(method), data.train_dataloader())

    @both
    def test_fewer_meta_rows_than_neighbours(self, method: str) -> None:
        fit(build(method), Blobs(meta=3, labeled=12))

    @both
    @pytest.mark.filterwarnings("ignore:there are no")
    def test_no_training_row_has_a_label(self, method: str) -> None:
        fitted = fit(build(method), Bare(meta=30), max_epochs=8)
        assert fitted.callback_metrics["train/label"] == 0
        assert fitted.callback_metrics["val/accuracy"] > 0.9

    @both
    def test_all_training_rows_have_a_label(self, method: str) -> None:
        with pytest.warns(UserWarning, match="all training rows have a label: .* Set the data's argument labeled"):
            fitted = fit(build(method), Blobs())
        assert fitted.callback_metrics["train/teacher"] == 0

    def test_meta_rows_that_are_trained_on(self) -> None:
        with pytest.raises(ValueError, match=r"expected meta rows that the student is not trained on.*train_on_meta"):
            fit(build("weighted"), Blobs(labeled=12, train_on_meta=True))

    @both
    def test_foreign_data(self, method: str) -> None:
        train, val = (TensorDataset(*(part[rows] for part in blobs())) for rows in (slice(0, 60), slice(60, 120)))
        inner = LightningDataModule.from_datasets(train, val, batch_size=8)
        data = DistillationDataModule(inner, meta=0.5, labeled=12)
        assert fit(build(method), data, max_epochs=4).callback_metrics["val/accuracy"] > 0.9


def test_lower_bound_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"expected a lower_bound in \[0, 1\], of a probability; found 1.5"):
        SLaM("mlp-8", oracle(), lower_bound=1.5, **SHAPED)


def terms(model: Distiller, teacher: nn.Module, y: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The loss terms of rows with these labels after a training; student's and teacher's logits."""
    x = blobs()[0][: len(y)]
    with torch.no_grad():
        z, t = model.student(x), teacher(x)
        return weighted_terms(model, Outputs(z, {}), [Outputs(t, {})], Batch(x, y)), z, t


@pytest.mark.parametrize("kind", [WeightedDistillation, SLaM])
@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_a_teacher_that_is_never_wrong_is_distilled_plainly(kind: Any, labels: str) -> None:
    """All weights are 1, nothing is mixed: cross-entropy with the label, or else with the teacher's."""
    teacher = oracle()
    model = kind("mlp-8", teacher, labels=labels, **SHAPED)
    fitted = fit(model, Blobs(labeled=12), max_epochs=3)
    y = blobs()[1][:40].clone()
    y[10:] = UNLABELED
    if kind is WeightedDistillation and labels == "soft":
        assert model._distortions.min() > 0  # its doubt costs, as do errors: see test_trust_estimates
        model._distortions = torch.ones_like(model._distortions)
    found, z, t = terms(model, teacher, y)
    target = t.softmax(1) if labels == "soft" else t.argmax(1)
    taught = F.cross_entropy(z, target, reduction="none")
    torch.testing.assert_close(found["teacher"], taught.where(y == UNLABELED, 0))
    labelled = F.cross_entropy(z, y, reduction="none", ignore_index=UNLABELED)
    torch.testing.assert_close(found["label"], labelled)
    if kind is WeightedDistillation and labels == "hard":
        assert fitted.callback_metrics["samples/teacher_weight"] == 1


def test_warm_up_is_on_labels_alone() -> None:
    seen: list[Tensor] = []

    class Watched(WeightedDistillation):
        def prepare_batch(self, batch: Batch) -> Batch:
            seen.append(batch.y)
            return batch

    model = Watched("mlp-8", oracle(), warmup_epochs=2, **SHAPED)
    fit(model, Blobs(labeled=12), max_epochs=3)
    epochs = torch.cat(seen).view(3, 48)
    assert [(labels == UNLABELED).sum().item() for labels in epochs] == [0, 0, 36]


def test_weights_change_with_the_student() -> None:
    """A teacher that is wrong on a third of the rows costs more, and counts less, once the student knows better."""
    logged: list[float] = []

    class Watched(WeightedDistillation):
        def on_train_epoch_end(self) -> None:
            super().on_train_epoch_end()
            logged.append(self.trainer.callback_metrics["samples/teacher_weight"].item())

    fit(Watched("mlp-8", oracle(0.33), labels="hard", warmup_epochs=0, **SHAPED), Blobs(labeled=24), max_epochs=6)
    assert all(0 < weight <= 1 for weight in logged)
    assert logged[-1] < 0.8 * logged[0]
    assert logged[-1] < 0.6


def test_mixing_rates_are_estimated_once() -> None:
    passes: list[int] = []

    class Watched(SLaM):
        def predict_rows(self, rows: Any) -> Any:
            passes.append(self.current_epoch)
            return super().predict_rows(rows)

    model = Watched("mlp-8", oracle(0.3), **SHAPED)
    fit(model, Blobs(labeled=24), max_epochs=4)
    assert passes == [0]
    [term] = model.terms.each  # type: ignore[union-attr]
    assert isinstance(term, Mixed)
    assert term.rates is not None
    wrong = (model.teachers.models[0].said != blobs()[1]).float()  # type: ignore[union-attr]
    data = model.data
    positions = data.parts.positions["meta"]
    alpha = term.rates.alpha(torch.tensor([0.5])).item()
    assert alpha == pytest.approx(1 - wrong[positions].mean().item(), abs=1e-5)  # one margin only
