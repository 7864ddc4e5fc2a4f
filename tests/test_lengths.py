"""What a training is too short for, and what its batches are too small for, is said before it starts."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from methods import CLASSES, SHAPE, Blobs, build, trained_teachers, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_kd import DKD, KD, Distiller
from lit_kd.terms import Similarity

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
STRENGTH = "never comes to its full strength"
LONE = "expected batches of several rows"


def said(model: Distiller, data: Any, epochs: int = 1) -> list[str]:
    """The warnings of a training."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fitted = trainer(max_epochs=epochs)
        fitted.fit(model, data) if isinstance(data, Blobs) else fitted.fit(model, train_dataloaders=data)
    return [str(one.message) for one in found if STRENGTH in str(one.message) or LONE in str(one.message)]


RISING = [("dkd", "warmup_epochs"), ("review-kd", "warmup_epochs"), ("ctkd", "ramp_epochs"), ("jocor", "ramp_epochs")]


@pytest.mark.parametrize(("method", "option"), RISING)
def test_a_rise_that_does_not_end(method: str, option: str) -> None:
    model = build(method)
    setattr(model, option, 3)
    [found] = said(model, Blobs(), epochs=2)
    assert f"expected {option} within the training's 2 epochs, found 3 with {type(model).__name__}" in found


@pytest.mark.parametrize(("method", "option"), RISING)
def test_a_rise_that_ends(method: str, option: str) -> None:
    model = build(method)
    setattr(model, option, 2)
    assert not said(model, Blobs(), epochs=2)


def test_updates_tell_the_length_too() -> None:
    model = DKD("mlp-8", trained_teachers()[0], warmup_epochs=2, **BASE)
    with pytest.warns(UserWarning, match="within the training's 1 epochs, found 2 with DKD"):
        trainer(max_epochs=-1, max_steps=4).fit(model, Blobs())  # an epoch has 6 batches


@pytest.mark.parametrize("method", ["similarity-preserving", "pkt", "rkd", "comparative-kd", "dist", "multi-level"])
def test_a_batch_of_one_row_for_a_method_that_compares_rows(method: str) -> None:
    [found] = said(build(method), Blobs(batch_size=47))  # of 48 rows
    assert "set drop_last=True, or another batch_size" in found


@pytest.mark.parametrize(
    ("options", "rows"), [({"batch_size": 1}, 1), ({"batch_size": 47, "drop_last": True}, 0), ({"batch_size": 46}, 0)]
)
def test_when_an_epoch_has_a_batch_of_one_row(options: dict[str, Any], rows: int) -> None:
    model = KD("mlp-8", trained_teachers()[1], extra=[Similarity()], **BASE)
    assert len(said(model, Blobs(**options))) == rows


def test_a_method_that_compares_no_rows_does_not_care() -> None:
    assert not said(KD("mlp-8", trained_teachers()[1], **BASE), Blobs(batch_size=47))


def rows_of(count: int) -> TensorDataset:
    return TensorDataset(torch.randn(count, *SHAPE), torch.arange(count) % CLASSES)


@pytest.mark.parametrize(("loader", "lone"), [(DataLoader(rows_of(5), 4), 1), (DataLoader(rows_of(6), 4), 0)])
def test_loaders_without_a_data_module(loader: DataLoader[tuple[Tensor, Tensor]], lone: int) -> None:
    model = KD(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), trained_teachers()[1], extra=[Similarity()], **BASE)
    assert len(said(model, loader)) == lone
