"""What every method of the list must do."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from methods import CLASSES, METHODS, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from lit_kd import KD, Distiller
from lit_kd.data import Source, TensorRows
from lit_kd.models import build_model, last_linear
from lit_kd.weightings.stretches import Stretched

every_method = pytest.mark.parametrize("method", METHODS)
a_few = pytest.mark.parametrize("method", ["kd", "almkd-paper", "rad", "crd", "mutual", "simkd"])
"""What their base does for all: with manual optimisation, a start halfway, state by row, several networks, parts."""
automatic_and_manual = pytest.mark.parametrize("method", ["kd", "almkd-paper"])

NOISE = {"noise": "symmetric", "noise_rate": 0.3}


def alternating(one: str, other: str) -> list[tuple[str, str]]:
    """Each method with one of two options."""
    return [(method, (one, other)[i % 2]) for i, method in enumerate(METHODS)]


def noisy() -> Blobs:
    return Blobs(**NOISE)


def keeps_table(model: Distiller) -> bool:
    return type(model).start_table is not Distiller.start_table


def module(name: str) -> nn.Module:
    """A student that is built in Python."""
    torch.manual_seed(3)
    if name == "dropout":
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES))
    return build_model(name, CLASSES, SHAPE)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers."""
    if isinstance(tree, Tensor):
        yield tree
    for part in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ():
        yield from tensors(part)


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit, in nested containers."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, Mapping):
        assert set(found) == set(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def saved(trained: Trainer, path: Path) -> dict[str, Any]:
    """The checkpoint of a trainer, as a reader without trust sees it."""
    trained.save_checkpoint(path)
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


class Each(Callback):
    """Calls a function at every one of some hooks."""

    def __init__(self, call: Any, *hooks: str) -> None:
        for hook in hooks:
            setattr(self, hook, lambda *args, hook=hook, **_: call(hook, *args))


class Record(Logger):
    """Keeps what a logger is told."""

    name = version = "record"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({name: value for name, value in metrics.items() if name != "epoch"})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class TestFit:
    @every_method
    def test_fit_validate_test_predict(self, method: str) -> None:
        # SimKD's new projector, before a head that is fixed, takes longer than a new head
        epochs = 6 if method == "simkd" else 2
        model, data, fitted = build(method), noisy(), trainer(num_sanity_val_steps=2, max_epochs=epochs)
        fitted.fit(model, data)
        measured = {"accuracy", "ece", "nll"} | ({"teacher_agreement"} if model.needs_teacher else set())
        measured |= {f"{peer}_accuracy" for peer in model.peers}
        measured |= {"worst_group_accuracy"} if method == "group-distil" else set()
        logged = {name: value.item() for name, value in fitted.callback_metrics.items()}
        terms = {name for name in logged if name.startswith("train/") and "peer_" not in name} - {"train/loss"}
        assert terms
        learned = {name for name in logged if name.startswith(("samples/", "rad/", "groups/", "train/peer_"))}
        assert bool(learned) == (keeps_table(model) or len(model.peers) > 0)
        assert set(logged) - learned == terms | {"train/loss"} | {f"val/{name}" for name in measured}
        assert logged["train/loss"] == pytest.approx(sum(logged[term] for term in terms), rel=1e-5)

        copy.deepcopy(model)  # as no graph of the last step is kept

        [validated] = fitted.validate(model, data, verbose=False)
        [tested] = fitted.test(model, data, verbose=False)
        assert set(validated) == {f"val/{name}" for name in measured}
        assert set(tested) == {f"test/{name}" for name in measured}
        assert 0.9 <= tested["test/accuracy"] <= 1

        predicted = fitted.predict(model, data)
        assert predicted is not None
        found = torch.cat([part["class"] for part in predicted])  # type: ignore[index]
        right = torch.cat([batch.y for batch in data.test_dataloader()])
        assert (found == right).float().mean().item() == pytest.approx(tested["test/accuracy"])

    @a_few
    def test_constructor_is_quiet(self, method: str) -> None:
        """Lightning warns of modules among the hyperparameters, and would copy them."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = build(method, module("mlp-8"))
        for kept in (model.hparams, model.hparams_initial):
            assert kept["num_classes"] == CLASSES
            assert not any(isinstance(value, nn.Module) or callable(value) for value in kept.values())

    @every_method
    def test_loss_falls_in_20_steps(self, method: str) -> None:
        record, model = Record(), build(method)
        steps = 40 if isinstance(model, Stretched) else 20  # which begins anew halfway
        fitted = trainer(max_epochs=-1, max_steps=steps, logger=record, limit_val_batches=0)
        fitted.fit(model, Blobs())
        assert fitted.global_step == steps
        losses = [row["train/loss"] for row in record.rows if "train/loss" in row]
        losses = losses[model.stretches()[1] :] if isinstance(model, Stretched) else losses
        assert len(losses) >= 3
        assert losses[-1] < 0.5 * losses[0]

    @a_few
    def test_same_seed_same_losses(self, method: str) -> None:
        def run() -> tuple[list[dict[str, float]], dict[str, Tensor]]:
            seed_everything(0, verbose=False)
            record, model = Record(), build(method, module("dropout"))
            trainer(logger=record).fit(model, noisy())
            return record.rows, model.student.state_dict()

        first = run()
        assert sum("train/loss" in row for row in first[0]) == 2
        torch.rand(5)  # what happens in between must not matter
        assert_same(run(), first)

    @a_few
    def test_student_in_eval_mode_is_trained(self, method: str) -> None:
        student = module("cnn-2").eval()
        model, modes = build(method, student), []

        def note(hook: str, *_: Any) -> None:
            modes.append((hook == "on_train_batch_start", {part.training for part in student.modules()}))

        hooks = ("on_train_batch_start", "on_validation_batch_start")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*in eval mode")
            trainer(val_check_interval=2, callbacks=Each(note, *hooks)).fit(model, Blobs())
        assert {training for training, _ in modes} == {True, False}
        assert all(found == {training} for training, found in modes)

    @a_few
    @pytest.mark.parametrize(("limit", "expected"), [({}, None), ({"limit_train_batches": 4, "max_steps": 5}, 5)])
    def test_global_step_counts_student_updates(self, method: str, limit: dict[str, int], expected: int | None) -> None:
        updates, batches = [], []

        def note(hook: str, *_: Any) -> None:
            (updates if hook == "on_before_optimizer_step" else batches).append(hook)

        watch = Each(note, "on_before_optimizer_step", "on_train_batch_end")
        fitted = trainer(callbacks=watch, **limit)
        fitted.fit(build(method), Blobs())
        assert fitted.global_step == len(updates) == len(batches) == (expected or 2 * fitted.num_training_batches)

    @pytest.mark.parametrize("method", ["kd", "almkd-paper", "almkd-hint", "crd", "mutual", "simkd"])
    def test_mapping_in_object_out(self, method: str) -> None:
        """Peers are passed as modules, too; what MixKD would mix of a mapping is unknown."""
        teachers = [Keyword(teacher) for teacher in trained_teachers()]
        peers = {"peers": [Keyword(module("mlp-12"))]} if method == "mutual" else {}
        model, data = build(method, Keyword(module("mlp-8")), teachers, **peers), DictBlobs()
        fitted = trainer(max_epochs=6)
        fitted.fit(model, data)
        assert fitted.callback_metrics["val/accuracy"] > 0.9
        fitted.test(model, data, verbose=False)
        [one, *_] = fitted.predict(model, data)  # type: ignore[misc]
        assert one["class"].shape == one["probability"].shape == (8,)  # type: ignore[index, call-overload]
        bare = DataLoader([batch.x for batch in data.test_dataloader()], batch_size=None)  # type: ignore[arg-type]
        assert_same(fitted.predict(model, bare)[0], one)  # type: ignore[index]


class Keyword(nn.Module):
    """As a transformer has it: keyword arguments, and an object as output."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor, mask: Tensor | None = None) -> SimpleNamespace:
        assert mask is not None
        return SimpleNamespace(logits=self.net(pixels * mask))


class DictRows:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, positions: list[int]) -> dict[str, Tensor]:
        return {"pixels": self.x[positions], "mask": torch.ones_like(self.x[positions])}


class DictBlobs(Blobs):
    def load(self) -> Source:
        x, y = blobs()
        return Source(DictRows(x), DictRows(x), y.numpy(), test_size=24)


class TestGradients:
    @a_few
    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_every_trainable_parameter_learns(self, method: str, precision: Any) -> None:
        model = build(method, module("cnn-2"))
        without, seen = set(), set()

        def note(_: str, t: Trainer, module: LightningModule, optimizer: Any) -> None:
            trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
            without.update(trainable.keys() - seen)
            seen.update(trainable)
            for name, parameter in trainable.items():
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
                if parameter.grad.any():
                    without.discard(name)

        watch = Each(note, "on_before_optimizer_step")
        fitted = trainer(precision=precision, limit_train_batches=3, callbacks=watch)
        fitted.fit(model, noisy())
        assert without == set()
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        borrowed = {f"student.{layer}.{part}" for layer in ("head", "body.fc") for part in ("weight", "bias")}
        assert frozen == (borrowed if method == "simkd" else set())  # the teacher's head, in the place of the own
        [optimizer] = fitted.optimizers
        found = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert found == {id(p) for p in model.parameters() if p.requires_grad}

    @a_few
    def test_frozen_part_of_the_student_stays(self, method: str) -> None:
        student = module("mlp-8")
        student[1].requires_grad_(False)  # type: ignore[index]
        before, model, fitted = copy.deepcopy(student), build(method, student), trainer()
        fitted.fit(model, Blobs())
        assert all(p.requires_grad for group in fitted.optimizers[0].param_groups for p in group["params"])
        assert_same(student[1].state_dict(), before[1].state_dict())  # type: ignore[index]
        other = model.student.projector[0] if method == "simkd" else student[3]  # type: ignore[index, union-attr]
        assert other.weight.grad is not None or not torch.equal(other.weight, before[3].weight)  # type: ignore[index]

    @every_method
    def test_teachers_stay_and_stay_outside(self, method: str, tmp_path: Path) -> None:
        """Bit for bit, and no checkpoint holds them."""
        teachers, path = trained_teachers(), tmp_path / "c.ckpt"
        before = copy.deepcopy([teacher.state_dict() for teacher in teachers])
        model, fitted = build(method, teachers=teachers), trainer()
        fitted.fit(model, noisy())
        assert_same([teacher.state_dict() for teacher in teachers], before)
        used = {id(teacher) for teacher in model.teachers.models}
        assert bool(used) == model.needs_teacher
        for part in [part for teacher in teachers if id(teacher) in used for part in teacher.modules()]:
            assert not part.training
            assert not any(p.requires_grad for p in part.parameters())
        assert all(p.grad is None for teacher in teachers for p in teacher.parameters())

        checkpoint = saved(fitted, path)
        state = checkpoint["state_dict"]
        assert not any(key.startswith("teacher") for key in state)
        assert {f"student.{key}" for key in model.student.state_dict()} <= set(state)
        secret = [p for teacher in teachers for p in teacher.parameters() if p.numel() > 3]
        if method == "simkd":  # whose student ends in the teacher's head
            head = last_linear(teachers[0])[1].weight
            assert_same(model.student.head.weight, head)  # type: ignore[union-attr]
            secret = [p for p in secret if p is not head]
        assert not any(torch.equal(found, p) for found in tensors(checkpoint) for p in secret)

    @a_few
    def test_a_checkpoint_with_other_keys_is_refused(self, method: str, tmp_path: Path) -> None:
        fitted, path = trainer(limit_train_batches=1), tmp_path / "c.ckpt"
        fitted.fit(build(method), noisy())
        checkpoint = saved(fitted, path)
        state = checkpoint["state_dict"]
        own = next(key for key in state if key.startswith("student."))
        missing = {key: value for key, value in state.items() if key != own}
        extra = state | {"student.9.weight": torch.zeros(1)}
        for wrong, match in [(missing, rf'Missing key\(s\).*"{own}'), (extra, r'Unexpected key\(s\).*"student.9.')]:
            torch.save(checkpoint | {"state_dict": wrong}, path)
            with pytest.raises(RuntimeError, match=f"(?s){match}"):
                type(build(method)).load_from_checkpoint(path)
            with pytest.raises(RuntimeError, match=f"(?s){match}"):
                trainer().fit(build(method), Blobs(), ckpt_path=path)


class TestCheckpoint:
    @pytest.mark.parametrize(("method", "student"), alternating("name", "module"))
    def test_predicts_without_the_teachers_files(
        self, method: str, student: str, teacher_file: Path, tmp_path: Path
    ) -> None:
        files = [shutil.copy(teacher_file, tmp_path / f"teacher{k}.ckpt") for k in (0, 1)]
        model = build(method, "cnn-2" if student == "name" else module("cnn-2"), [str(file) for file in files])
        fitted, path, data = trainer(limit_train_batches=2), tmp_path / "c.ckpt", Blobs()
        fitted.fit(model, data)
        fitted.save_checkpoint(path)
        for file in files:
            file.unlink()
        again = {"student": module("cnn-2")} if student == "module" else {}
        loaded = type(model).load_from_checkpoint(path, weights_only=True, **again)
        assert_same(trainer().predict(loaded, data), fitted.predict(model, data))
        x = blobs()[0]
        assert_same(loaded.eval()(x), model.eval()(x))

    @pytest.mark.parametrize(("method", "after"), alternating("validation", "epoch"))
    def test_resume_equals_uninterrupted(self, method: str, after: str, tmp_path: Path) -> None:
        """From an epoch's boundary, whether validation or the epoch's end wrote it; once with few labels."""
        self.check_resume(method, tmp_path, after, labeled=0.5 if after == "epoch" else None)

    @automatic_and_manual
    def test_resume_with_workers_and_a_schedule(self, method: str, tmp_path: Path) -> None:
        """To know the schedule's length, the loader must be made before Lightning has restored the epoch."""
        self.check_resume(method, tmp_path, "epoch", workers=1, lr_scheduler="cosine", lr_interval="step")

    @pytest.mark.parametrize("method", ["almkd-paper", "almkd-robust"])
    def test_resume_with_accumulation(self, method: str, tmp_path: Path) -> None:
        """The last update of an epoch is of fewer batches: no gradient is carried over its boundary."""
        own: dict[str, Any] = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5}
        self.check_resume(method, tmp_path, "epoch", lr_interval="step", **own)

    @staticmethod
    def check_resume(
        method: str, tmp_path: Path, after: str, workers: int = 0, labeled: float | None = None, **base: Any
    ) -> None:
        """With dropout in the student, and augmentation of the data."""

        def run(directory: Path, **options: Any) -> dict[str, Any]:
            order: list[list[int]] = []

            def note(_: str, t: Trainer, __: LightningModule, batch: Any, *___: Any) -> None:
                if t.current_epoch == 2:
                    parts = batch.values() if isinstance(batch, dict) else [batch]
                    order.extend(part.index.tolist() for part in parts)

            keep = ModelCheckpoint(directory, "{epoch}", save_top_k=-1, save_on_train_epoch_end=after == "epoch")
            model = build(
                method,
                module("dropout"),
                **({"lr_scheduler": lambda optimizer: ExponentialLR(optimizer, 0.8)} | base),
            )
            watch = Each(note, "on_train_batch_start")
            resumed = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep, watch], limit_val_batches=1)
            resumed.fit(model, Augmented(**NOISE, num_workers=workers, labeled=labeled), **options)
            return saved(resumed, directory / "last.ckpt") | {"order": order}

        whole = run(tmp_path / "whole")
        torch.rand(7)
        again = run(tmp_path / "again", ckpt_path=tmp_path / "whole" / "epoch=1.ckpt", weights_only=True)
        assert not (tmp_path / "again" / "epoch=0.ckpt").exists()
        assert set(again) == set(whole)
        assert len(whole["order"]) >= 6
        kept = ["order", "epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "sample_table"]
        for name in [name for name in kept if name in whole]:
            assert_same(again[name], whole[name])
        assert ("sample_table" in whole) == (keeps_table(build(method)) or method in ("crd", "elr", "sop"))


class Augmented(Blobs):
    """Each training input comes with noise of its own."""

    def load(self) -> Source:
        source = super().load()
        source.train = TensorRows(blobs()[0], lambda x: x + 0.3 * torch.randn_like(x))
        return source


def test_paths_and_numpy_integers_are_plain_values(tmp_path: Path, teacher_file: Path) -> None:
    model = KD("mlp-8", teacher_file, num_classes=np.int64(CLASSES), input_shape=list(SHAPE))
    fitted = trainer(max_steps=1)
    fitted.fit(model, Blobs())
    fitted.save_checkpoint(tmp_path / "c.ckpt")
    found = KD.load_from_checkpoint(tmp_path / "c.ckpt").hparams
    assert (found["teacher"], found["num_classes"]) == (str(teacher_file), CLASSES)
