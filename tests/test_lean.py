"""What takes Lightning less time does the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.model_helpers import is_overridden
from methods import CLASSES, SHAPE, Blobs, build, trained_teachers, trainer
from torch import Tensor

from lit_kd import ALMKD, KD
from lit_kd.data import Batch


class Heavy(KD):
    """The hooks that are made lean are Lightning's own again."""

    __setattr__ = LightningModule.__setattr__
    configure_gradient_clipping = LightningModule.configure_gradient_clipping
    optimizer_zero_grad = LightningModule.optimizer_zero_grad


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
)
def test_weights_are_bit_for_bit_those_of_lightnings_hooks(options: dict[str, Any]) -> None:
    found = []
    for method in (KD, Heavy):
        torch.manual_seed(0)
        model = method("mlp-8", trained_teachers()[0], num_classes=CLASSES, input_shape=list(SHAPE))
        trainer(**options).fit(model, Blobs())
        found.append(torch.cat([p.detach().flatten() for p in model.student.parameters()]))
    assert torch.equal(*found)


class Mine(KD):
    """A user's module with hooks of its own."""

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Call the lean one."""
        super().optimizer_zero_grad(*args)

    def configure_gradient_clipping(self, *args: Any) -> None:
        """Call the lean one."""
        super().configure_gradient_clipping(*args)


class Large(KD):
    """Asks for the trainer's clipping as Lightning's documentation shows it, and notes what is left of a gradient."""

    largest = 0.0

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """By no value of its own."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        for gradient in gradients:
            gradient.fill_(10.0)
        super().configure_gradient_clipping(optimizer)
        self.largest = max(float(gradient.abs().max()) for gradient in gradients)


def test_the_trainers_clipping_is_the_default() -> None:
    model = Large("mlp-8", trained_teachers()[0], num_classes=CLASSES, input_shape=list(SHAPE))
    trainer(max_steps=1, gradient_clip_val=0.05).fit(model, Blobs())
    assert 0 < model.largest < 0.05


@pytest.mark.parametrize("hook", ["optimizer_zero_grad", "configure_gradient_clipping"])
def test_lightning_notices_a_users_hooks_and_not_ours(hook: str) -> None:
    for method, noticed in ((KD, False), (Mine, True)):
        model = method("mlp-8", num_classes=CLASSES, input_shape=list(SHAPE))
        assert is_overridden(hook, model) is noticed


def test_no_warning_of_hooks_that_nobody_overrides(recwarn: pytest.WarningsRecorder) -> None:
    fitted = trainer(max_epochs=3, callbacks=[GradientAccumulationScheduler({0: 2, 1: 3})])
    fitted.fit(build("kd"), Blobs())
    assert not [w for w in recwarn if "overriding" in str(w.message)]


class Counting(torch.optim.SGD):
    """Has a `zero_grad` of its own."""

    zeroed = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Count, too."""
        self.zeroed += 1
        super().zero_grad(set_to_none)


@pytest.mark.parametrize("method", [KD, ALMKD])
@pytest.mark.parametrize("patched", [False, True])
def test_an_optimizers_own_zero_grad_is_called(method: type[KD] | type[ALMKD], patched: bool) -> None:
    made: list[Any] = []

    def optimizer(params: Any) -> torch.optim.Optimizer:
        made.append(Counting(params, lr=0.1) if not patched else torch.optim.SGD(params, lr=0.1))
        if patched:
            zero_grad: Callable[[], None] = made[-1].zero_grad
            made[-1].zeroed = 0

            def counted() -> None:
                made[-1].zeroed += 1
                zero_grad()

            made[-1].zero_grad = counted
        return made[-1]  # type: ignore[no-any-return]

    model = method("mlp-8", trained_teachers()[0], num_classes=CLASSES, input_shape=list(SHAPE), optimizer=optimizer)
    fitted = trainer()
    fitted.fit(model, Blobs())
    assert made[-1].zeroed == fitted.global_step > 0


@pytest.mark.parametrize("index", [None, torch.arange(3)])
@pytest.mark.parametrize("x", [torch.zeros(3, 2), {"ids": torch.zeros(3, 2), "mask": torch.ones(3)}])
@pytest.mark.parametrize("wrap", [lambda batch: batch, lambda batch: {"train": batch, "meta": batch}])
def test_a_batch_moves_as_a_whole(x: Any, index: Tensor | None, wrap: Callable[[Batch], Any]) -> None:
    batch, device = Batch(x, torch.arange(3), index), torch.device("meta")
    found = move_data_to_device(wrap(batch), device)
    for moved in found.values() if isinstance(found, dict) else [found]:
        assert type(moved) is Batch
        parts = moved.x if isinstance(moved.x, dict) else {"": moved.x}
        kept = x if isinstance(x, dict) else {"": x}
        assert {name: (part.device, part.shape) for name, part in parts.items()} == {
            name: (device, part.shape) for name, part in kept.items()
        }
        assert moved.y.device == device
        assert (moved.index is None) if index is None else (moved.index.device == device)
    here = batch.to("cpu", non_blocking=True)
    assert here.y is batch.y
    assert here.index is batch.index


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_a_batch_waits_for_its_copy_where_lightning_does(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        asked.append((torch.device(options.pop("device", *args)), options.get("non_blocking", False)))
        return tensor

    monkeypatch.setattr(Tensor, "to", to)
    parts = torch.zeros(3, 2), torch.arange(3), torch.arange(3)
    move_data_to_device(Batch(*parts), torch.device(device))
    ours = asked.copy()
    asked.clear()
    move_data_to_device(parts, torch.device(device))
    assert ours == asked
    assert len(ours) == 3
