"""What is wrong is said, before the student learns anything: what was expected, what was found, what to do."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from methods import CLASSES, METHODS, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_kd.distiller.base
from lit_kd import ALMKD, KD, Distiller, Supervised
from lit_kd.data import DigitsDataModule, DistillationDataModule, TensorRows
from lit_kd.models import build_model
from lit_kd.models.taps import Tapped

DISTILLED = [method for method in METHODS if method != "supervised"]
NEED_META = [method for method in METHODS if method.startswith("almkd")]
MEET_BATCHES = [method for method in NEED_META if method != "almkd-revised"]  # which asks its teachers before


def shaped(**options: Any) -> dict[str, Any]:
    return {"num_classes": CLASSES, "input_shape": list(SHAPE)} | options


def refused(
    model: Distiller, match: str, data: Any = None, error: type[Exception] = ValueError, **options: Any
) -> None:
    """The training ends with this error, and has left the student as it was."""
    before = copy.deepcopy(model.student.state_dict())
    fitted = trainer(num_sanity_val_steps=2)  # Lightning's default
    with pytest.raises(error, match=match):
        fitted.fit(model, datamodule=data, **options)
    assert fitted.global_step == 0
    for name, value in model.student.state_dict().items():
        assert torch.equal(value, before[name]), name


def loader(y: torch.Tensor | None = None, indexed: bool = False) -> DataLoader[Any]:
    """Plain batches, of the labels if given."""
    x, right = blobs()
    index = [torch.arange(len(x))] if indexed else []
    return DataLoader(TensorDataset(x, right if y is None else y, *index), batch_size=8)


class TestData:
    @pytest.mark.parametrize("method", NEED_META)
    def test_no_meta_split(self, method: str) -> None:
        refused(
            build(method),
            r"expected a meta split for (?:ALMKD|select=0.7, by which rows are scored), found 0 rows.*meta=0\.1",
            Blobs(meta=0),
        )

    @pytest.mark.parametrize("method", NEED_META)
    def test_plain_loaders_where_indices_are_needed(self, method: str) -> None:
        match = r"ALMKD needs sample indices and a meta split.*DistillationDataModule\(inner\); found none"
        refused(build(method), match, train_dataloaders=loader(), val_dataloaders=loader())

    @pytest.mark.parametrize("method", NEED_META)
    def test_foreign_data_module_unwrapped(self, method: str) -> None:
        inner = LightningDataModule.from_datasets(loader().dataset, loader().dataset, batch_size=8)
        match = r"wrap your own in lit_kd\.data\.DistillationDataModule\(inner\); found LightningDataModule"
        refused(build(method), match, inner)

    @pytest.mark.parametrize("method", ["supervised", "kd", "almkd-robust"])
    @pytest.mark.parametrize("wrong", [CLASSES, -2])
    def test_labels_out_of_range_in_a_data_module(self, method: str, wrong: int) -> None:
        class Wrong(Blobs):
            def load(self) -> Any:
                source = super().load()
                source.labels[5] = wrong
                return source

        match = rf"expected training labels in \[0, 3\).*found {wrong} in row 5.*Give the right num_classes"
        refused(build(method), match, Wrong())

    @pytest.mark.parametrize("wrong", [CLASSES, -2])
    @pytest.mark.parametrize("checks", [0, 2])
    def test_labels_out_of_range_in_a_plain_loader(self, wrong: int, checks: int) -> None:
        y = blobs()[1]
        y[2] = wrong
        model = build("kd")
        before = copy.deepcopy(model.student.state_dict())
        low, high = min(wrong, 0), max(wrong, 2)
        match = rf"expected labels in \[0, 3\), found {low} to {high}: correct the labels or num_classes"
        with pytest.raises(ValueError, match=match):
            trainer(num_sanity_val_steps=checks).fit(model, loader(y), loader())
        for name, value in model.student.state_dict().items():
            assert torch.equal(value, before[name])

    @pytest.mark.parametrize("indexed", [False, True])
    def test_labels_out_of_range_in_a_later_batch(self, indexed: bool) -> None:
        y = blobs()[1]
        y[-1] = 7
        with pytest.raises(ValueError, match=r"expected labels in \[0, 3\), found 0 to 7"):
            trainer().fit(build("kd"), loader(y, indexed))

    def test_missing_labels_in_validation(self) -> None:
        y = blobs()[1]
        y[0] = -1
        match = r"expected labels in \[0, 3\), found -1 to 2"
        refused(build("kd"), match, train_dataloaders=loader(), val_dataloaders=loader(y))

    @pytest.mark.parametrize("indexed", [False, True])
    def test_missing_labels_in_a_later_batch_of_validation(self, indexed: bool) -> None:
        y = blobs()[1]
        y[-1] = -1
        with pytest.raises(ValueError, match=r"expected labels in \[0, 3\), found -1 to 2"):
            trainer().fit(build("kd"), loader(), loader(y, indexed))

    @pytest.mark.parametrize("method", NEED_META)
    def test_fewer_meta_rows_than_classes(self, method: str) -> None:
        match = r"expected in meta at least one row a class \(3\), found 2.*Give a larger size"
        refused(build(method), match, Blobs(meta=2))
        rows = TensorDataset(*blobs())
        inner = LightningDataModule.from_datasets(rows, val_dataset=rows, batch_size=8)
        refused(build(method), match, DistillationDataModule(inner, meta=2))

    def test_no_meta_row_outside_of_the_batch(self) -> None:
        match = r"expected batches smaller than the 72 rows that are trained on, found 72 rows: a meta row speaks"
        refused(build("almkd-robust"), match, Blobs(batch_size=72))
        trainer(max_epochs=1).fit(build("almkd-paper"), Blobs(batch_size=72))  # does not train on meta rows

    def test_batches_that_hold_all_meta_rows_at_times(self) -> None:
        model, data = build("almkd-robust"), Blobs(batch_size=70, meta=3, noise="symmetric", noise_rate=0.4)
        fitted = trainer(max_epochs=6)
        fitted.fit(model, data)
        assert isinstance(model, ALMKD)
        assert model.table is not None
        assert model.table["weights"].isfinite().all()
        assert (model.table["epochs"][-3:] < 6).any()  # not counted where nobody vouched

    def test_batches_that_are_no_pairs(self) -> None:
        match = r"expected a batch \(x, y\).*found list of \['Tensor'\].*collate_fn"
        alone = DataLoader(TensorDataset(blobs()[0]), batch_size=8)
        refused(build("kd"), match, error=TypeError, train_dataloaders=alone)

    @pytest.mark.parametrize("method", NEED_META)
    @pytest.mark.parametrize("other", [{"seed": 1}, {"noise_rate": 0.2}, {"meta": 12}])
    def test_checkpoint_of_other_data(self, method: str, other: dict[str, Any], tmp_path: Path) -> None:
        noise = {"noise": "symmetric", "noise_rate": 0.4, "seed": 0}
        fitted = trainer(max_steps=1)
        fitted.fit(build(method), Blobs(**noise))
        fitted.save_checkpoint(tmp_path / "c.ckpt")
        model = build(method)
        match = r"the sample table belongs to another data set: expected \d+ rows.*found.*Use the data, split"
        with pytest.raises(ValueError, match=match):
            trainer().fit(model, Blobs(**(noise | other)), ckpt_path=tmp_path / "c.ckpt")
        saved = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
        for name, value in model.student.state_dict().items():
            assert torch.equal(value, saved[f"student.{name}"])

    def test_checkpoint_of_another_rule(self, tmp_path: Path) -> None:
        fitted = trainer(max_steps=1)
        fitted.fit(build("almkd-paper"), Blobs())
        fitted.save_checkpoint(tmp_path / "c.ckpt")
        match = "expected the rule that the checkpoint's sample table was made by, Paper, found Amal: pass the same"
        with pytest.raises(ValueError, match=match):
            trainer().fit(build("almkd-amal"), Blobs(), ckpt_path=tmp_path / "c.ckpt")

    @pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
    def test_noise_rate(self, rate: float) -> None:
        with pytest.raises(ValueError, match=rf"expected a noise rate in \[0, 1\], found {rate}.*probability"):
            DigitsDataModule(noise="symmetric", noise_rate=rate).setup()


class TestTeacher:
    @pytest.mark.parametrize("method", DISTILLED)
    @pytest.mark.parametrize("none", [None, []])
    def test_no_teacher_at_all(self, method: str, none: Any) -> None:
        template = build(method)
        options: dict[str, Any] = {"rule": template.rule} if isinstance(template, ALMKD) else {}
        options |= {"budget": 12, "rounds": 1} if method == "rad" else {}
        model = type(template)("mlp-8", none, **shaped(), **options)  # type: ignore[arg-type]
        refused(model, rf"{type(template).__name__} needs a teacher, found none: pass teacher=", Blobs())

    @pytest.mark.parametrize("method", DISTILLED)
    def test_teacher_is_the_student(self, method: str) -> None:
        student = build_model("mlp-8", CLASSES, SHAPE)
        with pytest.raises(ValueError, match=r"expected a teacher other than the student itself; pass a copy"):
            build(method, student, [student, student])

    @pytest.mark.parametrize("method", DISTILLED)
    @pytest.mark.parametrize("checks", [0, 2])
    def test_module_of_other_classes(self, method: str, checks: int) -> None:
        teachers = [build_model("mlp-8", 5, SHAPE), build_model("mlp-8", 5, SHAPE)]
        model = build(method, teachers=teachers)
        before = copy.deepcopy(model.student.state_dict())
        match = r"expected teacher 0's logits of shape \(\d+, 3\).*found \(\d+, 5\).*must agree on the classes"
        with pytest.raises(ValueError, match=match):
            trainer(num_sanity_val_steps=checks).fit(model, Blobs())
        for name, value in model.student.state_dict().items():
            assert torch.equal(value, before[name])

    @pytest.mark.parametrize("method", DISTILLED)
    def test_checkpoint_of_other_classes(self, method: str, teacher_file: Path) -> None:
        model = build(method, teachers=[str(teacher_file)] * 2, num_classes=4)
        match = rf"{teacher_file}: a network with another class count: it gives 3 logits, this task has 4 classes"
        refused(model, match, Blobs())

    @pytest.mark.parametrize("method", DISTILLED)
    def test_missing_file(self, method: str, teacher_file: Path, tmp_path: Path) -> None:
        gone = tmp_path / "gone.ckpt"
        match = rf"no checkpoint at {gone}: expected a \.ckpt file that a lit_kd run wrote"
        model = build(method, teachers=[str(gone)] * 2)
        refused(model, match, Blobs(), FileNotFoundError)
        with pytest.warns(UserWarning, match=rf"{gone}.* not found: evaluating without the agreement"):
            [tested] = trainer().test(model, Blobs(), verbose=False)
        assert set(tested) == {"test/accuracy", "test/ece", "test/nll"}

    def test_name_of_an_untrained_network(self) -> None:
        with pytest.warns(UserWarning, match=r"'mlp-8' is a model name: its weights are random. Give a checkpoint"):
            trainer(max_steps=1).fit(build("kd", teachers=["mlp-8"]), Blobs())


class Sick(nn.Module):
    """A network that from some batch on gives a value that is no number for its first row."""

    def __init__(self, value: float, batches: int = 0) -> None:
        super().__init__()
        self.net = trained_teachers()[1]
        self.value, self.batches = value, batches

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.net(x).clone()
        self.batches -= 1
        if self.batches < 0:
            logits[0, 1] = self.value
        return logits


class Rotten(Blobs):
    """Some inputs are no numbers: those of training rows, or of meta and validation rows."""

    def __init__(self, part: str, **shared: Any) -> None:
        super().__init__(**shared)
        self.part = part

    def load(self) -> Any:
        source = super().load()
        x = blobs()[0]
        x[:, 0, 0, 0] = torch.nan
        setattr(source, self.part, TensorRows(x))
        return source


class Infinite(KD):
    """A method with a loss that is no number."""

    def distill(self, *args: Any) -> dict[str, torch.Tensor]:
        return super().distill(*args) | {"extra": torch.tensor(torch.inf)}


VALUES = pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])


class TestNotFinite:
    @pytest.mark.parametrize("method", DISTILLED)
    @VALUES
    def test_a_teacher(self, method: str, value: float) -> None:
        k = 1 if method in ("kd-two-teachers", "almkd-amal") else 0
        teachers = [*trained_teachers()[:k], Sick(value), *trained_teachers()[k + 1 :]]
        match = rf"expected finite numbers in teacher {k}'s logits, found nan or infinity: .*or check its weights"
        refused(build(method, teachers=teachers), match, Blobs())

    @pytest.mark.parametrize("method", METHODS)
    def test_a_student(self, method: str) -> None:
        match = "expected finite numbers in student's logits, .* lower the learning rate"
        refused(build(method, Tailed(), trained_teachers()), match, Blobs())

    @pytest.mark.parametrize("method", MEET_BATCHES)
    def test_a_teacher_in_a_later_batch(self, method: str) -> None:
        """The table is as finite as before."""
        teachers = [trained_teachers()[0], Sick(torch.nan, 8)]
        model = build(method, teachers=teachers if method == "almkd-amal" else teachers[::-1])
        assert isinstance(model, ALMKD)
        if method == "almkd-robust":
            model.rule.warmup_epochs = 1  # type: ignore[attr-defined]
        fitted = trainer(max_epochs=3, limit_val_batches=0)
        with pytest.raises(ValueError, match=r"teacher \d's logits"):
            fitted.fit(model, Blobs())
        assert fitted.global_step == 8
        assert model.table is not None
        assert model.table["weights"].isfinite().all()

    @pytest.mark.parametrize("method", METHODS)
    def test_inputs(self, method: str) -> None:
        model = build(method)
        who = "teacher 0" if model.needs_teacher and method != "rad" else "student"  # rad's training asks no teacher
        with pytest.raises(ValueError, match=f"expected finite numbers in {who}'s logits.*check that the inputs"):
            trainer().fit(model, Rotten("train"))
        assert all(p.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("method", ["almkd-paper", "almkd-amal", "almkd-robust"])
    def test_inputs_of_meta_rows(self, method: str) -> None:
        model = build(method)
        with pytest.raises(ValueError, match="expected finite numbers in the validation gradient of the meta rows"):
            trainer(limit_val_batches=0, max_epochs=6).fit(model, Rotten("plain"))
        assert all(p.isfinite().all() for p in model.parameters())
        assert isinstance(model, ALMKD)
        assert model.table is not None
        assert model.table["weights"].isfinite().all()

    def test_a_loss(self) -> None:
        model = Infinite("mlp-8", trained_teachers()[0], **shaped())
        refused(model, "expected finite numbers in train/extra, found nan or infinity", Blobs())

    @pytest.mark.parametrize("method", ["kd", *MEET_BATCHES])
    def test_on_an_accelerator_at_the_end_of_the_epoch(
        self, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """To read each batch would stall it; no weights are renewed with what it said, and no checkpoint is written."""
        monkeypatch.setattr(lit_kd.distiller.base, "stalls", lambda device: True)
        teachers = [Sick(torch.nan, 4), trained_teachers()[0]]
        model = build(method, teachers=teachers)
        if isinstance(model, ALMKD):
            model.rule.warmup_epochs = 1 if method == "almkd-robust" else 0  # type: ignore[attr-defined]
        keep = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True)
        fitted = trainer(enable_checkpointing=True, callbacks=keep)
        with pytest.raises(ValueError, match=r"expected finite numbers in teacher 0's logits"):
            fitted.fit(model, Blobs())
        assert fitted.current_epoch == 0
        assert fitted.global_step == fitted.num_training_batches
        assert not list(tmp_path.iterdir())

    def test_on_an_accelerator_at_the_first_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lit_kd.distiller.base, "stalls", lambda device: True)
        refused(build("kd", teachers=[Sick(torch.nan)]), "expected finite numbers in teacher 0's logits", Blobs())

    def test_what_was_wrong_is_forgotten(self) -> None:
        model, fitted = build("kd", teachers=[Sick(torch.nan)]), trainer()
        with pytest.raises(ValueError, match="teacher 0's logits"):
            fitted.fit(model, Blobs())
        model.teachers.models[0].batches = 1000  # type: ignore[assignment]
        fitted.fit(model, Blobs())


class Tailed(nn.Module):
    """A student with a weight that is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_model("mlp-8", CLASSES, SHAPE)
        with torch.no_grad():
            self.net[-1].bias[2] = -torch.inf  # type: ignore[index]

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)


class TestArguments:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize(("name", "near"), [("resnet21", "resnet20"), ("mpl-32", "mlp-32"), ("cnn16", "cnn-16")])
    def test_unknown_model_name(self, method: str, name: str, near: str) -> None:
        with pytest.raises(ValueError, match=rf"unknown model '{name}'.*did you mean .*{near}.*Known: "):
            build(method, name)

    def test_unknown_teacher_name(self) -> None:
        refused(build("kd", teachers=["resnet21"]), r"unknown model 'resnet21'; did you mean resnet20", Blobs())

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("classes", [1, 0, -3])
    def test_num_classes(self, method: str, classes: int) -> None:
        with pytest.raises(ValueError, match=rf"expected num_classes of at least 2, found {classes}"):
            build(method, num_classes=classes)

    def test_teacher_precision(self) -> None:
        with pytest.raises(ValueError, match="expected a teacher_precision 'bf16', or None, found 'fp16'"):
            build("kd", teacher_precision="fp16")

    def test_out_of_memory_is_no_wrong_shape(self) -> None:
        class Greedy(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.empty(2**60)

        with pytest.raises(RuntimeError, match="memory"):
            Tapped(Greedy())(torch.zeros(2, 3))

    @pytest.mark.parametrize("method", [m for m in DISTILLED if hasattr(build(m), "temperature")])
    @pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
    def test_temperature(self, method: str, temperature: float) -> None:
        with pytest.raises(ValueError, match=rf"expected a temperature above 0, found {temperature}"):
            build(method, temperature=temperature)

    @pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
    def test_weight(self, weight: float) -> None:
        with pytest.raises(ValueError, match=rf"expected a weight in \[0, 1\].*found {weight}"):
            KD("mlp-8", trained_teachers()[0], weight=weight, **shaped())

    @pytest.mark.parametrize("drop", [-0.1, 1.5, float("nan")])
    def test_drop(self, drop: float) -> None:
        with pytest.raises(ValueError, match=rf"expected drop in \[0, 1\].*found {drop}"):
            KD("mlp-8", trained_teachers(), drop=drop, **shaped())

    def test_average(self) -> None:
        with pytest.raises(ValueError, match="expected average 'probabilities' or 'logits', found 'losses'"):
            KD("mlp-8", trained_teachers(), average="losses", **shaped())  # type: ignore[arg-type]

    def test_unknown_rule(self) -> None:
        known = re.escape("['robust', 'paper', 'amal']")
        with pytest.raises(ValueError, match=rf"expected a rule of {known}.*found 'robusst'"):
            ALMKD("mlp-8", trained_teachers()[0], rule="robusst", **shaped())  # type: ignore[arg-type]

    @pytest.mark.parametrize("rule", ["robust", "paper", "amal"])
    def test_known_rules(self, rule: Any) -> None:
        trainer(max_steps=1).fit(ALMKD("mlp-8", trained_teachers()[0], rule=rule, **shaped()), Blobs())

    @pytest.mark.parametrize("batches", [0, -1])
    def test_accumulation(self, batches: int) -> None:
        with pytest.raises(ValueError, match=rf"expected accumulate_grad_batches of at least 1, found {batches}"):
            build("almkd-robust", accumulate_grad_batches=batches)

    def test_student_of_other_classes(self) -> None:
        match = r"expected student's logits of shape \(\d+, 3\).*found \(\d+, 4\)"
        refused(build("kd", build_model("mlp-8", 4, SHAPE)), match, Blobs())

    def test_student_that_returns_no_logits(self) -> None:
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = build_model("mlp-8", CLASSES, SHAPE)

            def forward(self, x: torch.Tensor) -> Any:
                return self.net(x), None

        match = r"expected Pair to return logits, a tensor, or an object with \.logits; found tuple"
        refused(Supervised(Pair(), num_classes=CLASSES), match, Blobs(), TypeError)

    def test_cosine_without_an_end(self) -> None:
        model = build("kd", lr_scheduler="cosine")
        with pytest.raises(ValueError, match=r"'cosine' needs to know the end: set the trainer's max_epochs"):
            trainer(max_epochs=-1).fit(model, Blobs())
