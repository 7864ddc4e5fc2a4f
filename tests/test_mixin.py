"""A method within somebody's own LightningModule trains as the method by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import EarlyStopping
from methods import CLASSES, SHAPE, Blobs, blobs, trained_teachers, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_kd import ALMKD, CRD, KD, SRRL, Distilled, Distiller, FitNet, MixKD, SimKD
from lit_kd.data import DistillationDataModule
from lit_kd.models import build_model
from lit_kd.weightings import Paper

METHODS: dict[str, Any] = {
    "kd": lambda net: KD(net, trained_teachers()[0], num_classes=CLASSES, optimizer=sgd),
    "fitnet": lambda net: FitNet(net, trained_teachers()[0], weight=1.0, num_classes=CLASSES, optimizer=sgd),
    "crd": lambda net: CRD(net, trained_teachers()[0], num_classes=CLASSES, optimizer=sgd),
    "srrl": lambda net: SRRL(net, trained_teachers()[0], weight=0.3, num_classes=CLASSES, optimizer=sgd),
    "robust": lambda net: ALMKD(net, trained_teachers()[0], num_classes=CLASSES, optimizer=sgd),
    "late": lambda net: ALMKD(
        net, trained_teachers()[0], num_classes=CLASSES, optimizer=sgd, rule=Paper(warmup_epochs=5)
    ),
    "exact": lambda net: ALMKD(
        net,
        trained_teachers()[0],
        num_classes=CLASSES,
        optimizer=sgd,
        rule=Paper(warmup_epochs=1, every=1),
        meta_gradient="exact",
    ),
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


class Mine(Distilled, LightningModule):
    """A project's module with a loss of its own."""

    def __init__(self, name: str, penalty: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = build_model("mlp-8", CLASSES, SHAPE)
        self.name, self.penalty = name, penalty

    def configure_distillation(self) -> Distiller:
        method: Distiller = METHODS[self.name](self.net)
        return method

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        logits = self.net(x)
        return self.distillation(logits, batch).mean() + self.penalty * logits.square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/mine", (self.net(x).argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return sgd(self.parameters())


def noisy() -> Blobs:
    return Blobs(noise="symmetric", noise_rate=0.4, seed=0)


def alone(name: str) -> Distiller:
    torch.manual_seed(0)
    model: Distiller = METHODS[name](build_model("mlp-8", CLASSES, SHAPE))
    trainer(max_epochs=4).fit(model, noisy())
    return model


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_what_the_method_learns(name: str) -> None:
    expected, mine = alone(name), Mine(name)
    fitted = trainer(max_epochs=4)
    fitted.fit(mine, noisy())
    for key, value in expected.student.state_dict().items():
        torch.testing.assert_close(mine.net.state_dict()[key], value)
    assert fitted.callback_metrics["val/mine"] > 0.5
    assert {"distillation/label", "distillation/loss"} <= set(fitted.callback_metrics)
    if expected.table is not None:
        assert mine.distiller.table is not None
        for column, value in expected.table.columns.items():
            torch.testing.assert_close(mine.distiller.table[column], value, equal_nan=True)


def test_further_losses_count() -> None:
    with_loss, without = Mine("kd", penalty=1.0), Mine("kd")
    for module in (with_loss, without):
        trainer(max_epochs=2).fit(module, noisy())
    size = [m.net(noisy_inputs()).square().mean() for m in (with_loss, without)]
    assert size[0] < 0.7 * size[1]


def noisy_inputs() -> Tensor:
    data = noisy()
    data.setup()
    x = next(iter(data.val_dataloader())).x
    assert isinstance(x, Tensor)
    return x


@pytest.mark.parametrize("name", ["robust", "crd"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    whole, path = Mine(name), tmp_path / "half.ckpt"
    trainer(max_epochs=4).fit(whole, noisy())
    half = trainer(max_epochs=2)
    half.fit(module := Mine(name), noisy())
    half.save_checkpoint(path)
    assert {key.split(".")[0] for key in module.state_dict()} <= {"net", "distillation_terms"}
    resumed = Mine(name)
    trainer(max_epochs=4).fit(resumed, noisy(), ckpt_path=path, weights_only=True)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value)


def test_a_cached_teacher_is_asked_once_a_row() -> None:
    teacher, seen = trained_teachers()[1], []
    teacher.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))

    class Cached(Mine):
        def configure_distillation(self) -> Distiller:
            return KD(self.net, teacher, num_classes=CLASSES, teacher_cache="memory")

    data = noisy()
    trainer(max_epochs=3).fit(Cached("kd"), data)
    assert sum(seen) == len(data.labels)


def test_steps_see_batches_alike() -> None:
    """Also those of the wrapper's test loader, which stays its own; prediction steps see what that gives."""
    seen: dict[str, Any] = {}

    class Steps(Mine):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen["train"] = dict(batch)
            batch["image"] = batch["image"] + 1
            seen["read"] = self.distiller.unpack(batch).x
            return self.distillation(self.net(batch["image"]), batch).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen["val"] = batch

        def test_step(self, batch: Any, batch_idx: int) -> None:
            seen["test"] = batch

        def predict_step(self, batch: Any, batch_idx: int) -> None:
            seen["predict"] = batch

    rows = [{"image": x, "target": y, "place": i} for i, (x, y) in enumerate(zip(*blobs(24), strict=True))]
    loaders = [DataLoader(rows[start : start + 8], batch_size=8) for start in (0, 8, 16)]  # type: ignore[arg-type]
    data = DistillationDataModule.from_loaders(*loaders, meta=0, label_key="target", input_key="image")
    fitted, mine = trainer(max_epochs=1), Steps("kd")
    fitted.fit(mine, data)
    fitted.test(mine, data, verbose=False)
    fitted.predict(mine, data)
    assert seen["predict"].keys() == {"image", "target", "place"}
    assert torch.equal(seen["read"], seen["train"]["image"] + 1)  # as the step changed it
    assert seen["train"].keys() == {"image", "target"}
    for name, start in (("val", 8), ("test", 16)):
        own = rows[start : start + 8]
        assert seen[name].keys() == {"image", "target"}
        for key in seen[name]:
            assert torch.equal(seen[name][key], torch.stack([row[key] for row in own]))


def test_a_teacher_within_the_module_is_told(recwarn: pytest.WarningsRecorder) -> None:
    class Holds(Mine):
        def __init__(self, name: str, within: bool) -> None:
            super().__init__(name)
            self.teacher = trained_teachers()[0] if within else (trained_teachers()[0],)

        def configure_distillation(self) -> Distiller:
            teacher = self.teacher[0] if isinstance(self.teacher, tuple) else self.teacher
            return KD(self.net, teacher, num_classes=CLASSES)

    for within in (False, True):
        recwarn.clear()
        trainer(max_epochs=1).fit(module := Holds("kd", within), noisy())
        told = [str(one.message) for one in recwarn if "keep it in a tuple" in str(one.message)]
        assert len(told) == within == any(key.startswith("teacher.") for key in module.state_dict())


def test_the_end_of_a_warm_up_that_was_all_is_told() -> None:
    """By the method's own callback, where a training stops early."""
    stop = EarlyStopping("val/mine", mode="max", patience=0, min_delta=2.0)
    with pytest.warns(UserWarning, match="the rule Paper learns nothing in 2 epochs"):
        trainer(max_epochs=100, callbacks=[stop]).fit(Mine("late"), noisy())


class TestRefused:
    def test_a_method_that_changes_batches(self) -> None:
        class Mixing(Mine):
            def configure_distillation(self) -> Distiller:
                return MixKD(self.net, trained_teachers()[0], num_classes=CLASSES)

        with pytest.raises(ValueError, match="leaves batches and networks as they are, found MixKD"):
            trainer(max_epochs=1).fit(Mixing("kd"), noisy())

    def test_a_method_that_changes_the_network(self) -> None:
        class Extending(Mine):
            def configure_distillation(self) -> Distiller:
                return SimKD(self.net, trained_teachers()[0], num_classes=CLASSES)

        with pytest.raises(ValueError, match="leaves batches and networks as they are, found SimKD"):
            trainer(max_epochs=1).fit(Extending("kd"), noisy())

    def test_hooks_without_super(self) -> None:
        class Silent(Mine):
            def on_fit_start(self) -> None:
                pass

        with pytest.raises(ValueError, match=r"let overridden hooks call super\(\)"):
            trainer(max_epochs=1).fit(Silent("kd"), noisy())

    def test_no_method(self) -> None:
        class Forgot(Distilled, LightningModule):
            pass

        with pytest.raises(NotImplementedError, match="Forgot must override configure_distillation"):
            trainer(max_epochs=1).fit(Forgot(), noisy())

    def test_a_network_that_did_not_run(self) -> None:
        class Lazy(Mine):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return self.distillation(nn.functional.one_hot(batch[1], CLASSES).float(), batch).mean()

        with pytest.raises(ValueError, match="network has just run on this batch"):
            trainer(max_epochs=1).fit(Lazy("crd"), noisy())


class TestBeyondOneFit:
    """Checkpoints, precision, and errors on the way."""

    @pytest.mark.parametrize("name", ["crd", "kd"])
    def test_a_checkpoint_loads_into_a_fresh_module(self, name: str, tmp_path: Path) -> None:
        fitted = trainer(max_epochs=1)
        fitted.fit(module := Mine(name), noisy())
        fitted.save_checkpoint(tmp_path / "one.ckpt")
        fresh = Mine(name)
        trainer().validate(fresh, noisy(), ckpt_path=tmp_path / "one.ckpt", weights_only=True, verbose=False)
        for key, value in module.net.state_dict().items():
            assert torch.equal(fresh.net.state_dict()[key], value)

    @pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
    def test_teachers_follow_the_precision(self, precision: Any) -> None:
        fitted = trainer(max_epochs=1, precision=precision)
        fitted.fit(Mine("kd"), noisy())
        assert fitted.callback_metrics["distillation/loss"].isfinite()

    def test_a_mistake_in_the_hook_is_told(self) -> None:
        class Wrong(Mine):
            def configure_distillation(self) -> Distiller:
                return KD(self.nett, trained_teachers()[0], num_classes=CLASSES)

        with pytest.raises(RuntimeError, match=r"configure_distillation\(\) failed: .*nett"):
            trainer().fit(Wrong("kd"), noisy())

    def test_an_error_leaves_no_hooks(self) -> None:
        class Failing(Mine):
            fails = True

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                if self.fails:
                    raise ValueError("no")
                return super().training_step(batch, batch_idx)

        mine = Failing("fitnet")
        with pytest.raises(ValueError, match="no"):
            trainer().fit(mine, noisy())
        mine.fails = False
        trainer(max_epochs=1).fit(mine, noisy())
        assert not any(layer._forward_hooks for layer in mine.net.modules())

    def test_a_network_keeps_its_own_dtype(self) -> None:
        class Double(Mine):
            def __init__(self, name: str) -> None:
                super().__init__(name)
                self.net[1].double()

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                hidden = self.net[:1](batch[0]).double()
                return self.distillation(self.net[2:](self.net[1](hidden).float()), batch).mean()

        mine = Double("kd")
        trainer(max_epochs=1, limit_val_batches=0).fit(mine, noisy())
        assert mine.net[1].weight.dtype == torch.float64
