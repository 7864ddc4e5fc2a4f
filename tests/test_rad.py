"""Rounds of queries within one training: who is asked, what is learned from it, and that each stretch begins anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import FSDPStrategy
from methods import CLASSES, SHAPE, Blobs, blobs, trained_teachers, trainer
from test_every_method import Record, assert_same, module, saved
from torch import Tensor, nn
from torch.optim import SGD

from lit_kd import RobustActiveDistillation, Supervised
from lit_kd.data import DataModule
from lit_kd.report.evidence import accuracy_by_queries
from lit_kd.report.runs import read_metrics
from lit_kd.types import UNLABELED

ROUNDS, BUDGET = 2, 5


def rad(student: nn.Module | str = "mlp-8", **options: Any) -> RobustActiveDistillation:
    """36 of the 48 training rows are the pool."""
    teacher = options.pop("teacher", trained_teachers()[1])
    shared: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE), "budget": BUDGET, "rounds": ROUNDS}
    return RobustActiveDistillation(student, teacher, **(shared | options))


def data(**options: Any) -> Blobs:
    return Blobs(**({"labeled": 12} | options))


class Watch(Callback):
    """What is there before and after a method prepares an epoch."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.rows: list[set[int]] = []
        self.momentum: list[bool] = []

    @staticmethod
    def state(module: LightningModule) -> dict[str, Tensor]:
        student: nn.Module = module.student  # type: ignore[assignment]
        kept = {name: value.clone() for name, value in student.state_dict().items()}
        return kept | {"query": module.table["query"].clone()}  # type: ignore[index]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before.append(self.state(pl_module))
        self.rows.append(set())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.rows[-1] |= set(batch.index.tolist())
        if batch_idx == 0:
            self.after.append(self.state(pl_module))
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            self.momentum.append(bool(trainer.optimizers[0].state))


class TestRounds:
    @pytest.mark.parametrize("rule", ["rad", "coreset", "cluster_margin"])
    def test_asks_for_other_rows_of_the_pool_in_each_round(self, rule: Any) -> None:
        watch, record, blob = Watch(), Record(), data()
        trainer(max_epochs=6, callbacks=watch, logger=record).fit(rad(rule=rule), blob)
        asked = [row["rad/queries"] for row in record.rows if "rad/queries" in row]
        assert asked == [0, 0, 5, 5, 10, 10]
        labeled = set((blob.labels[:48] != UNLABELED).nonzero().flatten().tolist())
        for epoch, state in enumerate(watch.after):
            queried = set((state["query"] >= 0).nonzero().flatten().tolist())
            assert len(queried) == asked[epoch]
            assert not queried & labeled
            assert max(queried, default=0) < 48
            assert watch.rows[epoch] == labeled | queried  # what the epoch drew
            if epoch:
                old = watch.after[epoch - 1]["query"]
                assert torch.equal(state["query"][old >= 0], old[old >= 0])

    def test_the_teacher_is_asked_about_the_queried_rows_alone(self) -> None:
        teacher, blob = trained_teachers()[1], data()
        model = rad(teacher=teacher, mistakes=4.0)
        seen: list[Tensor] = []
        teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]) if model.trainer.training else None)
        trainer(max_epochs=6).fit(model, blob)
        assert model.table is not None
        query = model.table["query"]
        rows = query.argsort()[-ROUNDS * BUDGET :]  # in the order in which they were asked about
        x = blobs()[0][blob.parts.positions["train"][rows.numpy()]]
        assert len(seen) == ROUNDS
        assert torch.equal(torch.cat(seen).sort(0).values, x.sort(0).values)
        assert_same(model.table.shared["soft_labels"], teacher(x))

    def test_asks_where_the_student_of_the_round_has_the_smallest_margin(self) -> None:
        watch, blob = Watch(), data()
        trainer(max_epochs=6, callbacks=watch).fit(rad(module("mlp-8"), rule="margin"), blob)
        student, x = module("mlp-8").eval(), blobs()[0][blob.parts.positions["train"]]
        for epoch in (2, 4):
            before, after = watch.before[epoch].copy(), watch.after[epoch]["query"][:48]
            query = before.pop("query")[:48]
            student.load_state_dict(before)
            top = student(x).softmax(-1).topk(2).values
            margins = (top[:, 0] - top[:, 1]).masked_fill((query >= 0) | (blob.labels[:48] != UNLABELED), 2)
            expected = set(margins.argsort()[:BUDGET].tolist())
            assert set(((query < 0) & (after >= 0)).nonzero().flatten().tolist()) == expected

    def test_each_stretch_begins_anew(self) -> None:
        """Of 7 epochs: weights, momentum and the annealed learning rate."""
        student = module("mlp-8")
        initial = {name: value.clone() for name, value in student.state_dict().items()}
        watch = Watch()
        model = rad(
            student, optimizer=lambda p: SGD(p, lr=0.4, momentum=0.9), lr_scheduler="cosine", rule="entropy", rounds=2
        )
        fitted = trainer(max_epochs=7, callbacks=watch)
        fitted.fit(model, data())
        assert model.stretches() == [0, 2, 4, 7]
        for epoch, state in enumerate(watch.after):
            same = all(torch.equal(state[name], value) for name, value in initial.items())
            assert same == (epoch in (0, 2, 4))
        assert watch.momentum == [epoch not in (0, 2, 4) for epoch in range(7)]
        assert watch.rates == pytest.approx([0.4, 0.2, 0.4, 0.2, 0.4, 0.3, 0.1])
        assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("length", [{"max_epochs": 5}, {"max_epochs": -1, "max_steps": 18}])
    def test_cosine_by_steps_ends_with_the_stretch(self, length: dict[str, int]) -> None:
        """Of 2 and 3 epochs of 4 steps; of 2 epochs, and of 2 and a half."""
        rates: list[float] = []

        class Rates(Callback):
            def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        model = rad(rounds=1, optimizer=lambda p: SGD(p, lr=1.0), lr_scheduler="cosine", lr_interval="step")
        trainer(limit_train_batches=4, callbacks=Rates(), **length).fit(model, data())
        second = 12 if "max_steps" not in length else 10
        expected = [0.5 + 0.5 * torch.tensor(torch.pi * k / n).cos().item() for n in (8, second) for k in range(n)]
        assert rates == pytest.approx(expected, abs=1e-6)

    def test_first_stretch_is_training_with_labels(self) -> None:
        """Bit for bit what `Supervised` does on these rows."""
        students = []
        for model in (
            rad(module("mlp-8"), rounds=1),
            Supervised(module("mlp-8"), num_classes=CLASSES, input_shape=list(SHAPE)),
        ):
            seed_everything(0, verbose=False)
            watch = Keep()
            trainer(max_epochs=4, callbacks=watch).fit(model, data())
            students.append(watch.kept)
        assert_same(students[0], students[1])

    def test_mistakes_are_the_teachers_error_on_meta_rows(self) -> None:
        teacher, blob = trained_teachers()[1], data()
        with torch.no_grad():
            teacher[-1].bias[0] += 100  # type: ignore[index]
        model = rad(teacher=teacher)
        trainer(max_epochs=3).fit(model, blob)
        rows = blob.parts.meta_rows().__getitems__(list(range(24)))
        wrong = (teacher(rows.x).argmax(-1) != rows.y).double().mean()
        assert 0 < wrong < 1
        assert model.expected_mistakes(40) == pytest.approx(40 * wrong.item())
        assert rad(mistakes=3.5).expected_mistakes(40) == 3.5

    def test_a_second_training_asks_again(self) -> None:
        model, watch = rad(), Watch()
        trainer(max_epochs=3).fit(model, data())
        trained = {name: value.clone() for name, value in model.student.state_dict().items()}
        trainer(max_epochs=3, callbacks=watch).fit(model, data())
        assert [int((state["query"] >= 0).sum()) for state in watch.after] == [0, 5, 10]
        for state in watch.after:
            assert_same({name: state[name] for name in trained}, trained)


class Keep(Callback):
    """The student's weights when two epochs are over."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.kept = {name: value.clone() for name, value in pl_module.state_dict().items() if "student" in name}


class TestResume:
    def test_in_every_epoch(self, tmp_path: Path) -> None:
        """Also in stretches of unequal length, with a schedule, momentum and dropout."""

        def run(name: str, **options: Any) -> dict[str, Any]:
            keep = ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
            model = rad(module("dropout"), rule="badge", lr_scheduler="cosine")
            fitted = trainer(max_epochs=5, enable_checkpointing=True, callbacks=keep)
            fitted.fit(model, data(), **options)
            return saved(fitted, tmp_path / f"{name}.ckpt")

        whole = run("whole")
        for epoch in range(4):
            again = run(f"from{epoch}", ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt", weights_only=True)
            for part in ("state_dict", "sample_table", "optimizer_states", "lr_schedulers"):
                assert_same(again[part], whole[part])

    @pytest.mark.parametrize(
        ("options", "epochs"), [({"budget": 1}, 3), ({}, 6)], ids=["another budget", "a longer training"]
    )
    def test_of_another_plan(self, options: dict[str, Any], epochs: int, tmp_path: Path) -> None:
        fitted = trainer(max_epochs=3)
        fitted.fit(rad(), data())
        fitted.save_checkpoint(tmp_path / "c.ckpt")
        with pytest.raises(ValueError, match=r"checkpoint's budget and stretches, \[5, 0, 1, 2, 3\], found"):
            trainer(max_epochs=epochs).fit(rad(lr_scheduler="cosine", **options), data(), ckpt_path=tmp_path / "c.ckpt")


class AllUnlabeled(Blobs):
    def setup(self, stage: str | None = None) -> None:
        DataModule.setup(self, stage)

    def load(self) -> Any:
        source = super().load()
        source.val, source.val_labels = source.plain, source.labels.copy()
        source.test, source.test_labels, source.test_size = source.plain, source.labels.copy(), 0
        source.labels = source.labels * 0 + UNLABELED
        return source


class TestBadInput:
    def test_numbers(self) -> None:
        for options in {"budget": 0}, {"rounds": 0}, {"mistakes": -1.0}:
            with pytest.raises(ValueError, match="expected budget, rounds >= 1 and mistakes >= 0"):
                rad(**options)
        with pytest.raises(ValueError, match="expected a temperature above 0"):
            trainer(max_epochs=3).fit(rad(temperature=0.0), data())

    @pytest.mark.parametrize(
        ("options", "blob", "match"),
        [
            ({"teacher": trained_teachers()}, {}, "expected one teacher, and no teacher_cache.*found 2"),
            ({"teacher_cache": "memory"}, {}, "expected one teacher, and no teacher_cache.*found 1 and TeacherCache"),
            ({"budget": 19}, {}, "at least 38 without one to ask about, found 12 and 36"),
            ({}, {"labeled": 48}, "without one to ask about, found 48 and 0"),
            ({}, {"meta": 0}, "meta split for the rule rad without mistakes=.*found 0 rows.*meta=0.1"),
        ],
    )
    def test_data_and_teacher(self, options: dict[str, Any], blob: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            trainer(max_epochs=3).fit(rad(**options), data(**blob))

    def test_no_labels_at_all(self) -> None:
        with pytest.raises(ValueError, match=r"expected training rows with a label.*found 0 and"):
            trainer(max_epochs=3).fit(rad(), AllUnlabeled(labeled=None))

    def test_no_meta_split_is_needed(self) -> None:
        for options in {"mistakes": 2.0}, {"rule": "margin"}:
            trainer(max_epochs=3).fit(rad(**options), data(meta=0))

    @pytest.mark.parametrize(("epochs", "found"), [(2, "2"), (-1, "None")])
    def test_too_few_epochs(self, epochs: int, found: str) -> None:
        with pytest.raises(ValueError, match=f"max_epochs of at least 3, one for each stretch, found {found}"):
            trainer(max_epochs=epochs).fit(rad(), data())

    def test_sharded_strategies_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, fitted = rad(), trainer()
        model.trainer = fitted
        strategy = FSDPStrategy.__new__(FSDPStrategy)
        strategy._precision_plugin = HalfPrecision("bf16-true")
        monkeypatch.setattr(Trainer, "strategy", property(lambda _: strategy))
        with pytest.raises(ValueError, match="RobustActiveDistillation reads layers that FSDPStrategy shards"):
            model.setup("fit")


class TestCurves:
    def test_accuracy_by_queries(self, tmp_path: Path) -> None:
        log = tmp_path / "lightning_logs" / "version_0" / "metrics.csv"
        log.parent.mkdir(parents=True)
        log.write_text(
            "epoch,step,rad/queries,train/loss,val/accuracy\n0,5,,,0.1\n0,5,0.0,1.2,\n1,9,,,0.2\n1,9,0.0,1.1,\n"
            "2,14,,,0.4\n2,14,5.0,1.0,\n3,18,5.0,1.0,0.3\n"
        )
        assert accuracy_by_queries(read_metrics(tmp_path)) == [(0, 0.2), (5, 0.3)]
        log.write_text("epoch,step,val/accuracy\n0,5,0.1\n")
        assert accuracy_by_queries(read_metrics(tmp_path)) == []
