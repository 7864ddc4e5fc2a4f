"""DOT: the gradients of label and teacher have momenta of their own."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_every_method
import torch
from lightning import LightningModule
from methods import CLASSES, SHAPE, Blobs, build, trained_teachers, trainer
from test_every_method import assert_same, module, saved
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from lit_kd import DOT, KD, Distilled
from lit_kd.cli.lightning import make_cli
from lit_kd.distiller.momenta import TwoMomenta
from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.terms import Hint

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


class TestTwoMomenta:
    def test_by_hand(self) -> None:
        """w is (2,), the third parameter is reached by what is distilled alone."""
        w, other = nn.Parameter(torch.tensor([1.0, -2.0]).double()), nn.Parameter(torch.tensor([3.0]).double())
        optimizer = TwoMomenta([w, other], lr=0.1, momentum=0.9, delta=0.05, weight_decay=0.01)
        v, u, alone = torch.zeros(2).double(), torch.zeros(2).double(), 0.0
        expected, third = w.detach().clone(), 3.0
        for k in range(4):
            label, taught, rest = torch.tensor([1.0, k]).double(), torch.tensor([-k, 0.5]).double(), float(k - 1)
            v = 0.85 * v + label + 0.01 * expected
            u = 0.95 * u + taught
            alone = 0.9 * alone + rest + 0.01 * third
            expected, third = expected - 0.1 * (v + u), third - 0.1 * alone
            optimizer.zero_grad()
            w.grad, other.grad = label + taught, torch.tensor([rest]).double()
            optimizer.of_label[w] = label
            optimizer.step()
            torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=0)
            assert other.item() == pytest.approx(third, rel=1e-12)

    def test_a_copy_keeps_the_momenta(self) -> None:
        w = nn.Parameter(torch.ones(2))
        optimizer = TwoMomenta([w])
        w.grad = torch.ones(2)
        optimizer.of_label[w] = torch.ones(2)
        optimizer.step()
        other = copy.deepcopy(optimizer)
        [state] = other.state.values()
        assert_same(state, optimizer.state[w])
        other.zero_grad()
        assert not other.of_label
        assert optimizer.of_label

    @pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"delta": 0.2}, {"momentum": 0.05}, {"weight_decay": -1.0}])
    def test_what_does_not_fit(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="expected lr and weight_decay of at least 0"):
            TwoMomenta([nn.Parameter(torch.zeros(1))], **wrong)


def doubled() -> nn.Module:
    return trained_teachers()[0].double()


def train(method: type[KD], optimizer: Any, base: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    model = method(module("mlp-8"), trained_teachers()[0], optimizer=optimizer, **(BASE | base))
    trainer(**options).fit(model, Blobs(noise="symmetric", noise_rate=0.3, labeled=0.8))
    return model.state_dict()


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.2}, {"accumulate_grad_batches": 4}])
def test_at_delta_0_it_is_sgd(options: dict[str, Any]) -> None:
    """Also of a part of a term, which the label does not reach."""
    extra = {"extra": [Hint()]}
    expected = train(KD, partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.01), extra, **options)
    assert any(name.startswith("terms.") for name in expected)
    for delta in (0.0, 0.075):
        found = train(DOT, partial(TwoMomenta, lr=0.1, delta=delta, weight_decay=0.01), extra | options)
        far = max((found[name] - expected[name]).abs().max() for name in expected)
        assert far < 1e-5 if delta == 0 else far > 1e-3


@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.05, 1), (0.05, 4)])
def test_equals_a_loop_by_hand(clip: float | None, accumulate: int) -> None:
    """Two backward passes, each into gradients of its own, and clipping by the norm of their sum."""
    student = module("mlp-8").double()
    net = copy.deepcopy(student)
    model = DOT(
        student, doubled(), weight=0.6, temperature=2.0, gradient_clip_val=clip, accumulate_grad_batches=accumulate,
        optimizer=partial(TwoMomenta, lr=0.1, delta=0.075, weight_decay=0.01),
        lr_scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9), lr_interval="step", **BASE,
    )  # fmt: skip
    trainer(precision="64-true").fit(model, Blobs(seed=0))

    data, teacher = Blobs(seed=0), doubled().eval()
    data.setup()
    loader, lr, parameters = data.train_dataloader(), 0.1, list(net.parameters())
    sums, momenta = (
        {name: [torch.zeros_like(p) for p in parameters] for name in ("label", "taught")} for _ in range(2)
    )
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for i, batch in enumerate(loader):
            x = batch.x.double()
            losses = {
                "label": 0.4 * cross_entropy(net(x), batch.y).mean(),
                "taught": 0.6 * kd_loss(net(x), teacher(x).detach(), 2.0).mean(),
            }
            for name, loss in losses.items():
                for total, gradient in zip(sums[name], torch.autograd.grad(loss, parameters), strict=True):
                    total += gradient / accumulate
            if (i + 1) % accumulate == 0 or i + 1 == len(loader):
                norm = sum((a + b).square().sum() for a, b in zip(*sums.values(), strict=True)).sqrt()  # type: ignore[union-attr]
                scale = 1.0 if clip is None else clip / (norm + 1e-6)
                assert clip is None or scale < 1
                with torch.no_grad():
                    for k, p in enumerate(parameters):
                        momenta["label"][k] = 0.825 * momenta["label"][k] + scale * sums["label"][k] + 0.01 * p
                        momenta["taught"][k] = 0.975 * momenta["taught"][k] + scale * sums["taught"][k]
                        p -= lr * (momenta["label"][k] + momenta["taught"][k])
                        sums["label"][k].zero_()
                        sums["taught"][k].zero_()
                lr *= 0.9
    torch.testing.assert_close(student.state_dict(), net.state_dict(), rtol=1e-9, atol=1e-11)


class TestTraining:
    def test_resume_with_accumulation_and_clipping(self, tmp_path: Path) -> None:
        own: dict[str, Any] = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}
        test_every_method.TestCheckpoint.check_resume("dot", tmp_path, "epoch", lr_interval="step", **own)

    def test_the_command_line_knows_its_optimizer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.argv", ["lit-kd"])
        given = ["--model=DOT", "--model.student=mlp-8", "--data=DigitsDataModule", "--trainer.logger=false"]
        made = make_cli([*given, "--trainer.accelerator=cpu"], run=False).model.optimizer(nn.Linear(1, 1).parameters())
        assert (type(made), made.defaults["delta"]) == (TwoMomenta, 0.075)

    def test_momenta_are_saved(self, tmp_path: Path) -> None:
        fitted = trainer()
        fitted.fit(build("dot"), Blobs())
        [state] = saved(fitted, tmp_path / "c.ckpt")["optimizer_states"]
        assert all(set(one) == {"label", "taught"} for one in state["state"].values())
        assert all(tensor.any() for one in state["state"].values() for tensor in one.values())

    def test_validation_between_accumulated_batches(self) -> None:
        def run(**options: Any) -> dict[str, Tensor]:
            model = build("dot", module("mlp-8"), accumulate_grad_batches=3)
            trainer(**options).fit(model, Blobs())
            return model.student.state_dict()

        assert_same(run(val_check_interval=2), run())

    def test_a_part_is_frozen_on_the_way(self) -> None:
        student = module("mlp-8")
        model = build("dot", student)
        model.on_train_epoch_end = lambda: student[1].requires_grad_(False)  # type: ignore[index, method-assign]
        trainer().fit(model, Blobs())
        assert not student[1].weight.requires_grad  # type: ignore[index, union-attr]

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"optimizer": Adam}, "as optimizer lit_kd.distiller.momenta.TwoMomenta, found Adam"),
            ({"compile": True}, "expected compile=False with DOT"),
        ],
    )
    def test_what_is_refused(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            trainer().fit(build("dot", **options), Blobs())

    def test_within_a_module_of_ones_own(self) -> None:
        class Mine(Distilled, LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = module("mlp-8")

            def configure_distillation(self) -> DOT:
                return DOT(self.net, trained_teachers()[0], **BASE)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return self.distillation(self.net(batch[0]), batch).mean()

            def configure_optimizers(self) -> Any:
                return SGD(self.parameters(), 0.1)

        with pytest.raises(ValueError, match="expected DOT by itself"):
            trainer().fit(Mine(), Blobs())
