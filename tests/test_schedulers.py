"""Learning rates go as in a plain loop, in automatic and in manual optimisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods import Blobs, build, trainer
from test_every_method import Each, automatic_and_manual
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from lit_kd.weightings.stretches import Stretched


class TestSchedulers:
    @pytest.mark.parametrize("method", ["kd", "almkd-paper", "rad", "glc"])
    @pytest.mark.parametrize("interval", ["epoch", "step"])
    def test_as_in_a_plain_loop(self, method: str, interval: Any) -> None:
        rates: list[float] = []
        watch = Each(lambda _, t, *__: rates.append(t.optimizers[0].param_groups[0]["lr"]), "on_train_batch_start")
        model = build(
            method,
            optimizer=lambda parameters: SGD(parameters, 0.1),
            lr_scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9),
            lr_interval=interval,
        )
        fitted = trainer(max_epochs=3, limit_train_batches=4, callbacks=watch)
        fitted.fit(model, Blobs())

        expected = []
        starts = model.stretches()[:-1] if isinstance(model, Stretched) else [0]
        for epoch in range(3):
            if epoch in starts:  # where a method begins anew
                plain = SGD([nn.Parameter(torch.zeros(1))], 0.1)
                scheduler = ExponentialLR(plain, 0.9)
            for _ in range(4):
                expected.append(plain.param_groups[0]["lr"])
                plain.step()
                if interval == "step":
                    scheduler.step()
            if interval == "epoch":
                scheduler.step()
        assert rates == expected
        assert fitted.optimizers[0].param_groups[0]["lr"] == plain.param_groups[0]["lr"]

    @automatic_and_manual
    @pytest.mark.parametrize(
        ("interval", "length"), [("epoch", {"max_epochs": 3}), ("step", {"max_epochs": -1, "max_steps": 12})]
    )
    def test_cosine_ends_at_zero(self, method: str, interval: Any, length: dict[str, int]) -> None:
        fitted = trainer(limit_train_batches=4, **length)
        fitted.fit(build(method, lr_scheduler="cosine", lr_interval=interval), Blobs())
        assert fitted.global_step == 12
        assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)

    @automatic_and_manual
    def test_plateau(self, method: str) -> None:
        """The learning rate falls where the metric no longer improves."""

        def plateau(optimizer: Any) -> ReduceLROnPlateau:
            return ReduceLROnPlateau(optimizer, "val/accuracy", mode="max", patience=1, factor=0.1)

        fitted = trainer(max_epochs=12)
        fitted.fit(build(method, lr_scheduler=plateau), Blobs())  # perfect after a few epochs
        assert fitted.optimizers[0].param_groups[0]["lr"] < 0.05

    @automatic_and_manual
    def test_plateau_of_an_unknown_metric(self, method: str) -> None:
        model = build(method, lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, "val/acuracy"))
        # Lightning's own error in automatic optimisation, ours in manual
        with pytest.raises((MisconfigurationException, ValueError), match=r"val/acuracy.*val/accuracy"):
            trainer(max_epochs=3).fit(model, Blobs())


def test_cosine_of_a_resumed_longer_training(tmp_path: Path) -> None:
    """The learning rate goes on as if the training had been that long from the start."""

    def rates(epochs: int, ckpt_path: Path | None) -> list[float]:
        seen: list[float] = []

        class Watch(Callback):
            def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        model = build("supervised", optimizer=lambda p: SGD(p, lr=0.4), lr_scheduler="cosine")
        fitted = trainer(max_epochs=epochs, callbacks=[Watch()])
        fitted.fit(model, Blobs(), ckpt_path=ckpt_path)
        fitted.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return seen

    rates(2, None)
    resumed = rates(6, tmp_path / "2.ckpt")
    assert resumed[1:] == pytest.approx([0.2 * (1 + np.cos(np.pi * epoch / 6)) for epoch in (3, 4, 5)])
