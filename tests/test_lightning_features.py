"""Lightning's own callbacks and the trainer's options: each does what it is for, or one sentence says why not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import callbacks
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods import CLASSES, Blobs, blobs, build, trained_teachers, trainer
from test_every_method import Each, Record, module
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from lit_kd import ALMKD, KD, Distiller
from lit_kd.distiller.optimisation import planned_length
from lit_kd.terms import Hint
from lit_kd.types import wake

STEPS = {"kd": 2, "almkd-robust": 3}  # batches of an epoch: the rule trains on meta rows, too
BATCH = 24
both = pytest.mark.parametrize("method", STEPS)


def fit(
    method: str, *watching: Any, epochs: int = 3, batch: int = BATCH, model: Distiller | None = None, **options: Any
) -> tuple[Any, Any]:
    """A trained model of a CNN with BatchNorm, and its trainer."""
    model = model or build(method, module("cnn-2"))
    fitted = trainer(max_epochs=epochs, callbacks=[*watching], **options)
    fitted.fit(model, Blobs(batch_size=batch))
    return model, fitted


def weights(model: LightningModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.student.parameters()]).clone()  # type: ignore[union-attr]


class Weights(callbacks.Callback):
    """The student's weights at a hook, each time."""

    def __init__(self, hook: str) -> None:
        self.seen: list[Tensor] = []
        setattr(self, hook, lambda _, model, *args: self.seen.append(weights(model)))


# One function a callback. Each is given the method, and asks for the value that a user would look at.


def averaged_by_swa(method: str) -> None:
    """The mean of the weights with which epochs began; then a pass that only renews the statistics of BatchNorm."""
    begins = Weights("on_train_epoch_start")
    swa = callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)
    model, fitted = fit(method, begins, swa)
    assert (planned_length(model)[0], fitted.current_epoch) == (3, 4)
    torch.testing.assert_close(weights(model), torch.stack(begins.seen[:3]).mean(0))
    [norm] = [part for part in model.student.modules() if isinstance(part, nn.BatchNorm2d)][:1]
    assert norm.num_batches_tracked == STEPS[method]


def averaged_by_steps(method: str) -> None:
    after = Weights("on_train_batch_end")
    mean = callbacks.WeightAveraging(avg_fn=lambda old, new, n: old + (new - old) / (n + 1))
    model, _ = fit(method, after, mean)
    torch.testing.assert_close(weights(model), torch.stack(after.seen).mean(0), rtol=1e-4, atol=1e-6)


def averaged_exponentially(method: str) -> None:
    after = Weights("on_train_batch_end")
    model, _ = fit(method, after, callbacks.EMAWeightAveraging(decay=0.5))
    expected = after.seen[0]
    for one in after.seen[1:]:
        expected = (expected + one) / 2
    torch.testing.assert_close(weights(model), expected, rtol=1e-4, atol=1e-6)


def accumulated(method: str) -> None:
    assert fit(method, callbacks.GradientAccumulationScheduler({0: 1, 1: 3}))[1].global_step == 2 + 1 + 1


def learning_rate_found(method: str) -> None:
    finder = callbacks.LearningRateFinder(num_training_steps=30)
    start = Weights("on_train_start")
    model = build(method, module("cnn-2"))
    before = weights(model)
    _, fitted = fit(method, finder, start, model=model, batch=8)
    assert finder.optimal_lr is not None
    assert model.lr == fitted.optimizers[0].param_groups[0]["lr"] == finder.optimal_lr.suggestion()
    torch.testing.assert_close(start.seen, [before], rtol=0, atol=0)  # the search leaves no trace


def batch_size_found(method: str) -> None:
    model, data = build(method, module("cnn-2")), Blobs()
    fitted = trainer(callbacks=[callbacks.BatchSizeFinder(max_trials=2, init_val=8)])
    fitted.fit(model, data)
    assert data.batch_size == 16
    assert fitted.global_step == 2 * 3


def stopped_early(method: str) -> None:
    assert (
        fit(method, callbacks.EarlyStopping("val/accuracy", mode="max", min_delta=2.0, patience=1))[1].current_epoch
        == 2
    )


def checkpointed(method: str) -> None:
    best = callbacks.ModelCheckpoint(".", monitor="val/nll", save_weights_only=True)
    model, _ = fit(method, best, enable_checkpointing=True)
    loaded = type(model).load_from_checkpoint(best.best_model_path, student=module("cnn-2"), teacher=None)
    [measured] = trainer().validate(loaded, Blobs(), verbose=False)
    assert measured["val/nll"] == pytest.approx(best.best_model_score.item(), rel=1e-5)


def saved_on_exception(method: str) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        fit(method, callbacks.OnExceptionCheckpoint("."), Each(fail, "on_validation_start"), enable_checkpointing=True)
    assert torch.load("on_exception.ckpt", weights_only=True)["global_step"] == STEPS[method]


def learning_rate_logged(method: str) -> None:
    monitor, log = callbacks.LearningRateMonitor(), Record()
    model = build(method, module("cnn-2"), lr_scheduler=lambda optimizer: ExponentialLR(optimizer, 0.5))
    fit(method, monitor, model=model, logger=log, log_every_n_steps=1)
    assert [row["lr-SGD"] for row in log.rows if "lr-SGD" in row] == [0.05, 0.025, 0.0125]


def pruned(method: str) -> None:
    model, _ = fit(method, callbacks.ModelPruning("l1_unstructured", amount=0.5, parameter_names=["weight"]))
    kept = torch.cat([p.detach().flatten() for name, p in model.student.named_parameters() if name.endswith("weight")])
    assert (kept == 0).float().mean() > 0.5  # half of what was left, each epoch
    assert not any("mask" in name or "orig" in name for name in model.student.state_dict())


def summarised(kind: type[callbacks.ModelSummary]) -> Callable[[str], None]:
    def check(method: str) -> None:
        class Keep(kind):  # type: ignore[misc, valid-type]
            @staticmethod
            def summarize(*args: Any, **kwargs: Any) -> None:
                counted.append(args[1])

        counted: list[int] = []
        model, _ = fit(method, Keep(), enable_model_summary=True, epochs=1)
        assert counted == [sum(p.numel() for p in model.student.parameters())]  # the teacher's are none of them

    return check


def frozen_for_a_while(method: str) -> None:
    class Thaw(callbacks.BaseFinetuning):
        def freeze_before_training(self, model: Any) -> None:
            self.freeze(model.student[0])

        def finetune_function(self, model: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(model.student[0], optimizer, lr=0.01)

    first: list[Tensor] = []
    note = Each(
        lambda _, t, m, *__: first.append(next(m.student[0].parameters()).detach().clone()), "on_train_epoch_end"
    )
    model = build(method, module("cnn-2"))
    before = next(model.student[0].parameters()).detach().clone()  # type: ignore[index]
    fit(method, Thaw(), note, model=model)
    assert [torch.equal(before, one) for one in first] == [True, False, False]


def spike_found(method: str) -> None:
    def spoil(_: str, __: Any, model: Any, *___: Any) -> None:
        if model.global_step == STEPS[method] + 1:
            with torch.no_grad():
                model.student[-1].weight.mul_(1000)

    with pytest.raises(TrainingSpikeException):
        fit(method, Each(spoil, "on_train_batch_start"), callbacks.SpikeDetection())
    assert Path("skip_batches.json").read_text().split() == ["[", "0,", "1", "]"]


def timed(method: str) -> None:
    assert fit(method, callbacks.Timer({"seconds": 0}))[1].global_step == 0


def throughput_logged(method: str) -> None:
    def rows(batch: Any) -> int:
        return len(batch["train"].y if isinstance(batch, dict) else batch.y)

    log = Record()
    log.log_metrics = lambda metrics, step=None: log.rows.append(metrics)  # type: ignore[method-assign]
    fit(method, callbacks.ThroughputMonitor(rows, window_size=2), logger=log, log_every_n_steps=1)
    assert max(row.get("train/samples", 0) for row in log.rows) == 3 * STEPS[method] * BATCH


def device_logged(method: str) -> None:
    log = Record()
    fit(method, callbacks.DeviceStatsMonitor(cpu_stats=True), logger=log, log_every_n_steps=1, epochs=1)
    assert any("cpu_percent" in name for row in log.rows for name in row)


def predictions_written(method: str) -> None:
    class Keep(callbacks.BasePredictionWriter):
        def write_on_epoch_end(self, _: Any, __: Any, predictions: Any, indices: Any) -> None:
            written.append(torch.cat([part["class"] for part in predictions]))

    written: list[Tensor] = []
    model, fitted = fit(method, Keep("epoch"))
    fitted.predict(model, Blobs())
    assert written[0].shape == (24,)


def counted_in_a_bar(method: str) -> None:
    class Bar(callbacks.TQDMProgressBar):
        def on_train_epoch_end(self, *args: Any) -> None:
            counted.append((self.train_progress_bar.n, self.train_progress_bar.total))

    counted: list[tuple[int, int]] = []
    fit(method, Bar(), enable_progress_bar=True)
    assert counted == [(STEPS[method], STEPS[method])] * 3


def counted_in_a_rich_bar(method: str) -> None:
    class Bar(callbacks.RichProgressBar):
        def on_train_epoch_end(self, *args: Any) -> None:
            task = self.progress.tasks[self.train_progress_bar_id]  # type: ignore[union-attr, index]
            counted.append((int(task.completed), int(task.total or 0)))

    counted: list[tuple[int, int]] = []
    fit(method, Bar(), enable_progress_bar=True)
    assert counted == [(STEPS[method], STEPS[method])] * 3


def called(method: str) -> None:
    calls: list[int] = []
    fit(method, callbacks.LambdaCallback(on_train_batch_end=lambda *args: calls.append(args[4])), epochs=1)
    assert calls == list(range(STEPS[method]))


def backbone(method: str) -> None:
    fit(method, callbacks.BackboneFinetuning())


NO_BACKBONE = r"KD has no backbone. Freeze a part of \w*KD.student by a BaseFinetuning"
AS_SAMPLES = "it runs before ALMKD has its state by sample. Use it on KD or Supervised with this student, then set"
CALLBACKS: dict[str, tuple[Callable[[str], None], str | None, str | None]] = {
    # what to look at, and for KD and for ALM-KD a sentence in its place
    "BackboneFinetuning": (backbone, NO_BACKBONE, NO_BACKBONE),
    "BaseFinetuning": (frozen_for_a_while, None, None),
    "BasePredictionWriter": (predictions_written, None, None),
    "BatchSizeFinder": (batch_size_found, None, f"{AS_SAMPLES} the data's batch_size"),
    "DeviceStatsMonitor": (device_logged, None, None),
    "EarlyStopping": (stopped_early, None, None),
    "GradientAccumulationScheduler": (accumulated, None, r"Use ALMKD\(accumulate_grad_batches=...\)"),
    "LambdaCallback": (called, None, None),
    "LearningRateFinder": (learning_rate_found, None, rf"{AS_SAMPLES} model\.lr"),
    "LearningRateMonitor": (learning_rate_logged, None, None),
    "ModelCheckpoint": (checkpointed, None, None),
    "ModelPruning": (pruned, None, None),
    "ModelSummary": (summarised(callbacks.ModelSummary), None, None),
    "OnExceptionCheckpoint": (saved_on_exception, None, None),
    "RichModelSummary": (summarised(callbacks.RichModelSummary), None, None),
    "RichProgressBar": (counted_in_a_rich_bar, None, None),
    "StochasticWeightAveraging": (averaged_by_swa, None, None),
    "SpikeDetection": (spike_found, None, None),
    "ThroughputMonitor": (throughput_logged, None, None),
    "Timer": (timed, None, None),
    "TQDMProgressBar": (counted_in_a_bar, None, None),
    "EMAWeightAveraging": (averaged_exponentially, None, None),
    "WeightAveraging": (averaged_by_steps, None, None),
}


@both
@pytest.mark.parametrize("name", CALLBACKS)
def test_callback(name: str, method: str) -> None:
    look, *sentences = CALLBACKS[name]
    sentence = sentences[list(STEPS).index(method)]
    if sentence is None:
        look(method)
    else:
        with pytest.raises(ValueError, match=f"expected no {name} with .*KD, found one: .*{sentence}"):
            look(method)


def test_no_callback_is_left_out() -> None:
    assert set(CALLBACKS) == set(callbacks.__all__) - {
        *("Callback", "Checkpoint", "ProgressBar"),  # bases of others
    }


FLAGS: list[tuple[dict[str, Any], int | None, int | None]] = [
    # how many updates KD makes in two epochs, and how many ALM-KD does; None: it is refused
    ({}, 4, 6),
    ({"fast_dev_run": 2}, 2, 2),
    ({"max_epochs": 1, "min_epochs": 1}, 2, 3),
    ({"max_steps": 3, "min_steps": 1}, 3, 3),
    ({"max_time": {"seconds": 0}}, 0, 0),
    ({"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1, "limit_predict_batches": 1}, 2, 2),
    ({"overfit_batches": 1}, 2, 2),
    ({"val_check_interval": 1, "num_sanity_val_steps": 1}, 4, 6),
    ({"check_val_every_n_epoch": None, "val_check_interval": 3}, 4, 6),
    ({"accumulate_grad_batches": 4}, 2, None),
    ({"gradient_clip_val": 0.1}, 4, None),
    ({"gradient_clip_algorithm": "value"}, 4, 6),
    ({"reload_dataloaders_every_n_epochs": 1, "use_distributed_sampler": False}, 4, 6),
    ({"deterministic": True, "benchmark": False, "detect_anomaly": True, "inference_mode": False}, 4, 6),
    ({"precision": "bf16-mixed"}, 4, 6),
    ({"precision": "64-true"}, 4, 6),
    ({"sync_batchnorm": True, "profiler": "simple", "accelerator": "cpu", "devices": 1, "num_nodes": 1}, 4, 6),
    ({"barebones": True, "logger": None, "enable_checkpointing": None, "num_sanity_val_steps": None}, 4, 6),
    ({"default_root_dir": ".", "enable_checkpointing": True, "enable_model_summary": True}, 4, 6),
    ({"logger": True, "log_every_n_steps": 1, "enable_autolog_hparams": False, "enable_progress_bar": True}, 4, 6),
]
# of a cluster or a service, or tested elsewhere: strategies and plugins in test_distributed.py and test_manual.py
ELSEWHERE = {"self", "callbacks", "strategy", "plugins", "model_registry"}


@both
@pytest.mark.parametrize(("flags", "kd", "almkd"), FLAGS)
def test_flag(flags: dict[str, Any], kd: int | None, almkd: int | None, method: str) -> None:
    model, updates = build(method, module("cnn-2")), kd if method == "kd" else almkd
    before, data = weights(model), Blobs(batch_size=BATCH)
    quiet = {"enable_progress_bar": None, "enable_model_summary": None} if "barebones" in flags else {}
    fitted = trainer(**(quiet | flags))
    if updates is None:
        [(name, value)] = flags.items()
        with pytest.raises(MisconfigurationException, match=rf"manual.* Remove `Trainer\({name}={value}\)`"):
            fitted.fit(model, data)
        return
    fitted.fit(model, data)
    assert fitted.global_step == updates
    assert torch.equal(before.double(), weights(model).double()) == (updates == 0)
    assert len(fitted.predict(model, data) or ()) == 1


def test_no_flag_is_left_out() -> None:
    assert {flag for flags, *_ in FLAGS for flag in flags} | ELSEWHERE == set(
        inspect.signature(Trainer.__init__).parameters
    )


def test_clip_algorithm_of_the_trainer_is_followed() -> None:
    """Signs of gradients: clipped by value, each coordinate moves as far."""

    def run(algorithm: str) -> Tensor:
        torch.manual_seed(0)
        model = build(
            "almkd-robust", module("mlp-8"), gradient_clip_val=1e-6, optimizer=lambda p: torch.optim.SGD(p, 1.0)
        )
        before = weights(model)
        trainer(max_steps=1, gradient_clip_algorithm=algorithm).fit(model, Blobs())
        return (weights(model).double() - before.double()).abs()

    assert run("value").sum() > 5 * run("norm").sum()


def test_tuner_sets_the_learning_rate_that_is_used() -> None:
    model = KD(module("mlp-8"), trained_teachers()[0], num_classes=CLASSES, lr_scheduler="cosine")
    found = Tuner(trainer(max_epochs=5)).lr_find(model, datamodule=Blobs(), num_training=30)
    assert found is not None
    rates: list[float] = []
    watch = Each(lambda _, t, *__: rates.append(t.optimizers[0].param_groups[0]["lr"]), "on_train_epoch_start")
    trainer(max_epochs=2, callbacks=watch).fit(model, Blobs())
    assert rates == pytest.approx([found.suggestion(), found.suggestion() / 2])


def test_averages_of_a_network_that_is_not_whole_are_refused() -> None:
    copies = "copies .* before all that is trained is made. "
    hint = ALMKD(
        module("mlp-8"), trained_teachers()[1], num_classes=CLASSES, term=Hint(), meta_gradient="exact", rule="paper"
    )
    with pytest.raises(ValueError, match=f"no WeightAveraging with ALMKD.*{copies}Use StochasticWeightAveraging"):
        fit("", callbacks.EMAWeightAveraging(), model=hint)
    for kind in callbacks.WeightAveraging, lambda: callbacks.StochasticWeightAveraging(0.01):
        with pytest.raises(ValueError, match=f"with SimKD.*{copies}Leave it out"):
            fit("simkd", kind())


@both
def test_callbacks_and_optimizer_can_be_had_without_a_trainer(method: str) -> None:
    model = build(method, module("cnn-2"), teacher_cache="memory")
    assert "FillTeacherCache" in [type(one).__name__ for one in model.configure_callbacks()]
    [group] = model.configure_optimizers().param_groups
    assert {*group["params"]} == {*model.student.parameters()}


def test_cosine_of_updates_that_nobody_can_count_is_refused() -> None:
    model = build("kd", lr_scheduler="cosine", lr_interval="step")
    with pytest.raises(ValueError, match=r"no GradientAccumulationScheduler with KD.*Set lr_interval='epoch'"):
        fit("kd", callbacks.GradientAccumulationScheduler({1: 2}), model=model)


class Frozen(nn.Module):
    """A body with BatchNorm and dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


class TestModes:
    """A part's mode is the user's; a student that comes wholly in evaluation mode was only loaded so."""

    @both
    @pytest.mark.parametrize("wholly", [False, True])
    def test_frozen_batch_norm_stays(self, method: str, wholly: bool) -> None:
        student = Frozen()
        student.body.requires_grad_(False).eval()
        if wholly:
            student.eval()
        modes: list[list[bool]] = []
        watch = Each(
            lambda _, t, m, *__: modes.append([m.student.head.training, *(p.training for p in m.student.body)]),
            "on_train_batch_end",
        )
        before, head = student.body[2].running_mean.clone(), student.head.weight.detach().clone()
        fit(method, watch, model=build(method, student))
        assert torch.equal(before, student.body[2].running_mean)
        assert not torch.equal(head, student.head.weight)
        assert modes == [[True, False, False, False, False]] * 3 * STEPS[method]

    @both
    def test_a_student_as_loaders_leave_it_trains(self, method: str) -> None:
        student = Frozen().eval()
        fit(method, model=build(method, student))
        assert student.body[2].num_batches_tracked == 3 * STEPS[method]

    def test_simkd_and_peers(self) -> None:
        """What is made around the student is no part that its user put into training mode."""
        student, peer = Frozen().eval(), Frozen().eval()
        fit("simkd", model=build("simkd", student))
        fit("mutual", model=build("mutual", "mlp-8", peers=[peer]))
        assert student.body[2].num_batches_tracked == peer.body[2].num_batches_tracked == 3 * 2

    def test_a_mode_of_one_part_is_kept(self) -> None:
        student = Frozen()
        student.body[3].eval()
        wake(student)
        assert [part.training for part in student.body] == [True, True, True, False]


class TestSeveralLoaders:
    def test_metrics_of_each(self) -> None:
        """As Lightning names them, in training, validation and test, and again in a training after a validation."""
        x, y = blobs()
        easy, wrong = TensorDataset(x, y), TensorDataset(x, (y + 1) % CLASSES)
        loaders = [DataLoader(easy, batch_size=16), DataLoader(wrong, batch_size=24)]
        model, fitted = KD(module("mlp-8"), trained_teachers()[0], num_classes=CLASSES), trainer(max_epochs=6)
        fitted.validate(model, loaders, verbose=False)
        fitted.fit(model, DataLoader(easy, batch_size=8, shuffle=True), {"easy": loaders[0], "wrong": loaders[1]})
        found = {name: value.item() for name, value in fitted.callback_metrics.items()}
        assert found["val/accuracy/dataloader_idx_0"] > 0.9
        assert found["val/accuracy/dataloader_idx_1"] < 0.1
        first, second = fitted.test(model, loaders, verbose=False)
        for k, tested in enumerate((first, second)):
            for name, value in tested.items():
                assert value == pytest.approx(found[name.replace("test/", "val/")], rel=1e-5)
                assert name.endswith(f"/dataloader_idx_{k}")
        assert len(fitted.predict(model, loaders)) == 2  # type: ignore[arg-type]


def test_a_new_head_on_a_network_in_evaluation_mode() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    net[3] = nn.Linear(8, CLASSES)
    trainer(max_epochs=1).fit(KD(net, trained_teachers()[0], num_classes=CLASSES), Blobs())
    assert net[2].num_batches_tracked > 0
    assert all(layer.training for layer in net)
