"""What manual optimisation must not lose, and which students and trainers ALM-KD refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from test_every_method import Each, assert_same, module, noisy
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

from lit_kd import ALMKD, Distiller
from lit_kd.data.table import SampleTable
from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.weightings import MetaStep, Rule


class Frozen(Rule):
    """Takes the meta-step, if it is to, and lets the weights be."""

    def __init__(self, taken: bool = False) -> None:
        self.taken = taken
        self.seen: list[Tensor] = []

    def start(self, table: SampleTable, teachers: int, trusted: Tensor, labelled: Tensor, epochs: int | None) -> None:
        table.add("weights", torch.tensor([0.3, 0.7]))

    def active(self, epoch: int) -> bool:
        return self.taken

    def observe(self, table: SampleTable, step: MetaStep) -> None:
        weights = table["weights"][step.index]
        self.seen.append(step.gradient(weights))
        table.write(step.index, weights=weights)


def almkd(student: nn.Module | str = "mlp-8", rule: Rule | None = None, **options: Any) -> ALMKD:
    shape = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
    return ALMKD(student, trained_teachers()[0], rule=rule or Frozen(), **(shape | options))


class TestManualOptimisation:
    @pytest.mark.parametrize("student", ["cnn-2", "dropout"])
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_meta_step_leaves_no_trace(self, student: str, precision: Any, tmp_path: Path) -> None:
        def run(taken: bool) -> tuple[Rule, list[Any]]:
            trace: list[Any] = []

            def note(_: str, t: Trainer, module: Distiller, *__: Any) -> None:
                gradients = [p.grad for p in module.student.parameters() if p.grad is not None]
                state = (module.student.state_dict(), t.optimizers[0].state_dict(), gradients, torch.get_rng_state())
                trace.append(copy.deepcopy(state))
                assert all(part.training for part in module.student.modules())

            model = almkd(module(student), Frozen(taken), accumulate_grad_batches=2)  # gradients stay between batches
            trainer(precision=precision, callbacks=Each(note, "on_train_batch_end")).fit(model, noisy())
            assert sum(bool(gradients) for _, _, gradients, _ in trace) == 6
            return model.rule, trace

        (without, expected), (with_it, found) = run(False), run(True)
        assert len(without.seen) == 0
        assert len(with_it.seen) == len(found) == 12
        assert all(gradient.any() for gradient in with_it.seen)
        assert_same(found, expected)

    @pytest.mark.parametrize(
        ("clip", "accumulate", "steps"), [(None, 1, -1), (0.05, 1, -1), (None, 2, -1), (0.05, 4, -1), (0.05, 4, 3)]
    )
    def test_equals_a_loop_by_hand(self, clip: float | None, accumulate: int, steps: int) -> None:
        student = module("mlp-8")
        by_hand = copy.deepcopy(student)
        model = almkd(
            student,
            temperature=2.0,
            gradient_clip_val=clip,
            accumulate_grad_batches=accumulate,
            optimizer=lambda parameters: SGD(parameters, 0.1, momentum=0.9),
            lr_scheduler=lambda optimizer: ExponentialLR(optimizer, 0.9),
            lr_interval="step",
        )
        batches: list[str] = []
        watch = Each(lambda hook, *_: batches.append(hook), "on_train_batch_end")
        fitted = trainer(max_steps=steps, callbacks=watch)
        fitted.fit(model, Blobs(seed=0))

        data, teacher = Blobs(seed=0), trained_teachers()[0].eval()
        data.setup()
        loader, updates, seen = data.train_dataloader(), 0, 0
        optimizer = SGD(by_hand.parameters(), 0.1, momentum=0.9)
        scheduler = ExponentialLR(optimizer, 0.9)
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            for i, batch in enumerate(loader):
                if updates == steps:
                    break
                seen += 1
                logits, taught = by_hand(batch.x), teacher(batch.x).detach()
                loss = 0.3 * cross_entropy(logits, batch.y) + 0.7 * kd_loss(logits, taught, 2.0)
                (loss.mean() / accumulate).backward()
                if (i + 1) % accumulate == 0 or i + 1 == len(loader):
                    if clip is not None:
                        assert nn.utils.clip_grad_norm_(by_hand.parameters(), clip) > clip
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()
                    updates += 1
        assert fitted.global_step == updates
        assert (updates, seen) == ((3, 10) if steps == 3 else (12 // accumulate + (accumulate == 4), 12))
        assert len(batches) == seen
        torch.testing.assert_close(student.state_dict(), by_hand.state_dict(), rtol=1e-5, atol=1e-6)

    def test_progress_bar_counts_the_batches_of_the_training_stream(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Neither meta-steps nor meta batches."""

        class Bar(TQDMProgressBar):
            def on_train_epoch_end(self, *args: Any) -> None:
                super().on_train_epoch_end(*args)
                counted.append((self.train_progress_bar.n, self.train_progress_bar.total))

        counted: list[tuple[int, int]] = []
        fitted = trainer(enable_progress_bar=True, callbacks=Bar())
        fitted.fit(almkd(rule=Frozen(True)), Blobs())
        assert counted == [(6, 6)] * 2
        assert fitted.global_step == 12

    def test_validation_between_accumulated_batches(self) -> None:
        """Lightning clears gradients before a validation, unless it accumulates them itself."""

        def run(**options: Any) -> dict[str, Tensor]:
            torch.manual_seed(0)
            model = almkd(module("mlp-8"), accumulate_grad_batches=3)
            trainer(**options).fit(model, Blobs())
            return model.student.state_dict()

        assert_same(run(val_check_interval=2), run())

    def test_cosine_counts_updates(self) -> None:
        fitted = trainer()
        fitted.fit(almkd(accumulate_grad_batches=4, lr_scheduler="cosine", lr_interval="step"), Blobs())
        assert fitted.global_step == 4
        assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("option", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
    def test_trainers_own_options_are_refused(self, option: dict[str, Any]) -> None:
        [(name, value)] = option.items()
        fitted, model = trainer(**option), almkd()
        with pytest.raises(MisconfigurationException, match=rf"manual.* Remove `Trainer\({name}={value}\)`"):
            fitted.fit(model, Blobs())
        fitted.test(model, Blobs(), verbose=False)  # where they do no harm

    @pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
    def test_fp16_is_refused(self, precision: str) -> None:
        mixed = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        plugin = mixed if precision == "16-mixed" else HalfPrecision("16-true")
        student = module("mlp-8")
        before = copy.deepcopy(student.state_dict())
        with pytest.raises(ValueError, match=f"does not support precision {precision}: use bf16-mixed or 32-true"):
            trainer(plugins=plugin).fit(almkd(student), Blobs())
        assert_same({name: value.float() for name, value in student.state_dict().items()}, before)

    @pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
    def test_sharded_strategies_are_refused(self, kind: type[Strategy], monkeypatch: pytest.MonkeyPatch) -> None:
        """None can be started here; at the hook that asks, none has done anything yet."""
        model, fitted = almkd(), trainer()
        model.trainer = fitted
        strategy = kind.__new__(kind)
        strategy._precision_plugin = None  # that is, 32-true
        monkeypatch.setattr(Trainer, "strategy", property(lambda _: strategy))
        with pytest.raises(ValueError, match=rf"ALMKD reads .*{kind.__name__} shards: use the strategy ddp"):
            model.setup("fit")


class Wrapped(nn.Module):
    """A network that is good for KD, but whose last linear layer does not give the logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)
        self.kind = kind
        if kind == "narrow":
            self.auxiliary = nn.Linear(CLASSES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        if self.kind == "scaled":
            return logits * 3
        if self.kind == "small":  # whatever the scale
            return logits * 1e-4
        if self.kind == "narrow":
            return logits + self.auxiliary(logits)
        return logits


class TestHead:
    @pytest.mark.parametrize("kind", ["scaled", "small", "narrow"])
    @pytest.mark.parametrize("rule", ["amal", "paper"])
    def test_logits_must_come_from_the_last_linear(self, kind: str, rule: Any) -> None:
        student = Wrapped(kind)
        before = copy.deepcopy(student.state_dict())
        with pytest.raises(ValueError, match=r"output of its last linear layer, .*end in torch\.nn\.Linear"):
            trainer().fit(almkd(student, rule=rule), Blobs())
        assert_same(student.state_dict(), before)

    def test_any_scale_is_fine(self) -> None:
        student = module("mlp-8")
        for factor in (1e-6, 1e6):
            with torch.no_grad():
                student[3].weight *= factor  # type: ignore[index]
            trainer(max_epochs=1, precision="bf16-mixed").fit(almkd(student, Frozen(True)), Blobs())

    def test_no_linear_layer(self) -> None:
        student = nn.Sequential(nn.Conv2d(1, CLASSES, 4), nn.Flatten())
        with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear"):
            trainer().fit(almkd(student), Blobs())

    def test_frozen_head(self) -> None:
        """Said at once, though the first meta-step may come many epochs later."""
        student = module("mlp-8")
        student[3].requires_grad_(False)  # type: ignore[index]
        before = copy.deepcopy(student.state_dict())
        with pytest.raises(ValueError, match="unfreeze it"):
            trainer().fit(almkd(student), Blobs())
        assert_same(student.state_dict(), before)
