"""What is wrong is said, before the student learns anything: what was expected, what was found, what to do."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from methods import CLASSES, METHODS, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_kd import ALMKD, KD, Distiller, Supervised
from lit_kd.data import DistillationDataModule, TensorRows
from lit_kd.models import build_model
from lit_kd.models.taps import Tapped
from lit_kd.terms import LabelTerm
from lit_kd.terms.task import check_outputs
from lit_kd.weightings import Paper

DISTILLED = [method for method in METHODS if method not in ("supervised", "mutual")]
SOME = ["kd", "almkd-robust", "almkd-paper"]
SHAPED: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def refused(
    model: Distiller, match: str, data: Any = None, error: type[Exception] = ValueError, **options: Any
) -> None:
    """The training ends with this error, and has left the student as it was."""
    before = copy.deepcopy(model.student.state_dict())
    fitted = trainer(num_sanity_val_steps=2)  # Lightning's default
    with pytest.raises(error, match=match):
        fitted.fit(model, datamodule=data, **options)
    assert fitted.global_step == 0
    for name, value in before.items():
        torch.testing.assert_close(model.student.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


def loader(y: Tensor | None = None) -> DataLoader[Any]:
    """Plain batches, of the labels if given."""
    x, right = blobs()
    return DataLoader(TensorDataset(x, right if y is None else y), batch_size=8)


class TestData:
    def test_no_meta_split(self) -> None:
        refused(build("almkd-paper"), r"expected a meta split for ALMKD, found 0 rows.*meta=0\.1", Blobs(meta=0))

    def test_data_without_indices(self) -> None:
        match = r"ALMKD needs sample indices.*in lit_kd\.data\.DistillationDataModule\(inner\); found none"
        refused(build("almkd-robust"), match, train_dataloaders=loader(), val_dataloaders=loader())
        inner = LightningDataModule.from_datasets(loader().dataset, loader().dataset, batch_size=8)
        refused(build("almkd-robust"), r"DistillationDataModule\(inner\); found LightningDataModule", inner)

    @pytest.mark.parametrize("wrong", [CLASSES, -2])
    def test_labels_out_of_range(self, wrong: int) -> None:
        class Wrong(Blobs):
            def load(self) -> Any:
                source = super().load()
                source.labels[5] = wrong
                return source

        refused(build("almkd-robust"), rf"expected training labels in \[0, 3\).*found {wrong} in row 5", Wrong())
        y = blobs()[1]
        y[2] = wrong
        match = rf"expected labels in \[0, 3\), found {min(wrong, 0)} to {max(wrong, 2)}: correct the labels"
        refused(build("kd"), match, train_dataloaders=loader(y), val_dataloaders=loader())
        y = y.roll(-3)  # in the last batch
        with pytest.raises(ValueError, match=match):
            trainer().fit(build("kd"), loader(y))

    def test_missing_labels_in_validation(self) -> None:
        y = blobs()[1]
        y[0] = -1
        match = r"expected labels in \[0, 3\), found -1 to 2"
        refused(build("kd"), match, train_dataloaders=loader(), val_dataloaders=loader(y))

    def test_fewer_meta_rows_than_classes(self) -> None:
        match = r"expected in meta at least one row a class \(3\), found 2.*Give a larger size"
        refused(build("almkd-paper"), match, Blobs(meta=2))
        inner = LightningDataModule.from_datasets(loader().dataset, val_dataset=loader().dataset, batch_size=8)
        refused(build("almkd-paper"), match, DistillationDataModule(inner, meta=2))

    def test_no_meta_row_outside_of_the_batch(self) -> None:
        match = r"expected batches smaller than the 72 rows that are trained on, found 72 rows: a meta row speaks"

        class Both(Paper):
            trains_on_meta = True

        refused(ALMKD("mlp-8", trained_teachers()[0], rule=Both(), **SHAPED), match, Blobs(batch_size=72))
        for other in ("almkd-robust", "almkd-paper"):  # which do not look ahead, or not train on meta rows
            trainer(max_epochs=1).fit(build(other), Blobs(batch_size=72))

    def test_batches_that_are_no_pairs(self) -> None:
        match = r"expected a batch \(x, y\).*found list of \['Tensor'\].*collate_fn"
        alone = DataLoader(TensorDataset(blobs()[0]), batch_size=8)
        refused(build("kd"), match, error=TypeError, train_dataloaders=alone)

    @pytest.mark.parametrize("method", SOME)
    def test_a_last_batch_of_one_row_for_batch_norm(self, method: str) -> None:
        data = Blobs(batch_size=47 if method != "almkd-robust" else 71)  # of 48 rows, or with the meta rows 72
        with pytest.raises(ValueError, match=r"leave out a batch of one row, drop_last=True, .*batch_size$"):
            trainer().fit(build(method, "cnn-2"), data)
        trainer().fit(build(method, "cnn-2"), Blobs(batch_size=data.batch_size, drop_last=True))

    def test_checkpoint_of_other_data_or_another_rule(self, tmp_path: Path) -> None:
        noise = {"noise": "symmetric", "noise_rate": 0.4, "seed": 0}
        fitted = trainer(max_steps=1)
        fitted.fit(build("almkd-paper"), Blobs(**noise))
        fitted.save_checkpoint(tmp_path / "c.ckpt")
        match = r"the sample table belongs to another data set: expected \d+ rows.*found.*Use the data, split"
        for other in ({"seed": 1}, {"noise_rate": 0.2}, {"meta": 12}):
            with pytest.raises(ValueError, match=match):
                trainer().fit(build("almkd-paper"), Blobs(**(noise | other)), ckpt_path=tmp_path / "c.ckpt")
        match = "expected the rule that made the checkpoint's sample table, Paper, found Amal: pass the same"
        with pytest.raises(ValueError, match=match):
            trainer().fit(build("almkd-amal"), Blobs(**noise), ckpt_path=tmp_path / "c.ckpt")


class TestTeacher:
    @pytest.mark.parametrize("none", [None, []])
    def test_none_at_all(self, none: Any) -> None:
        refused(KD("mlp-8", none, **SHAPED), r"KD needs a teacher, found none: pass teacher=", Blobs())

    @pytest.mark.parametrize("method", SOME)
    def test_the_student_itself(self, method: str) -> None:
        student = build_model("mlp-8", CLASSES, SHAPE)
        match = r"expected a teacher that shares no layers with the student: pass a copy"
        refused(build(method, student, [student, student]), match, Blobs())

    @pytest.mark.parametrize("method", SOME)
    def test_of_other_classes(self, method: str, teacher_file: Path) -> None:
        model = build(method, teachers=[build_model("mlp-8", 5, SHAPE)])
        refused(model, r"expected teacher 0's logits of shape \(\d+, 3\).*found \(\d+, 5\).*must agree", Blobs())
        model = build(method, teachers=[str(teacher_file)], num_classes=4)
        refused(model, rf"{teacher_file}: expected a network for 4 classes, found one for 3", Blobs())

    def test_missing_file(self, tmp_path: Path) -> None:
        gone = tmp_path / "gone.ckpt"
        model = build("kd", teachers=[str(gone)])
        refused(model, rf"No such file.*{gone}", Blobs(), FileNotFoundError)
        with pytest.warns(UserWarning, match=rf"{gone}.* not found: evaluating without the agreement"):
            [tested] = trainer().test(model, Blobs(), verbose=False)
        assert set(tested) == {"test/accuracy", "test/ece", "test/nll"}


def test_an_accelerator_reads_the_labels_of_the_first_batch_alone() -> None:
    read: list[Any] = []
    task: Any = SimpleNamespace(elements=False, check_labels=lambda *labels: read.append(labels))
    for first in (True, False):
        check_outputs(task, torch.zeros(2, device="meta"), {}, CLASSES, missing=False, first=first)
    assert len(read) == 1


def of_probabilities(model: Distiller, data: Any) -> list[str]:
    """Who is said to give them, in two epochs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer().fit(model, data)
    said = [str(one.message) for one in caught]
    return [text.removeprefix("expected logits of ").split(",")[0] for text in said if "like probabilities" in text]


class TestProbabilities:
    """Where logits are wanted; said once, at the first batch."""

    @pytest.mark.parametrize("method", ["kd", "kd-teachers", "almkd-paper"])
    def test_of_a_teacher(self, method: str) -> None:
        teachers = [nn.Sequential(trained_teachers()[1], nn.Softmax(-1)), trained_teachers()[0]]
        assert of_probabilities(build(method, teachers=teachers), Blobs()) == ["teacher 0"]

    def test_of_a_student(self) -> None:
        net = build_model("mlp-8", CLASSES, SHAPE)
        assert of_probabilities(build("kd", nn.Sequential(net, nn.Softmax(-1))), Blobs()) == ["student"]

    @pytest.mark.parametrize("last", [nn.Identity(), nn.LogSoftmax(-1), nn.ReLU(), nn.Sigmoid()])
    def test_logits_of_any_kind_are_none(self, last: nn.Module) -> None:
        student, teacher = build_model("mlp-8", CLASSES, SHAPE), trained_teachers()[0]
        model = build("kd", nn.Sequential(student, last), teachers=[nn.Sequential(teacher, last)])
        assert of_probabilities(model, Blobs()) == []

    @pytest.mark.parametrize(("last", "found"), [(nn.Sigmoid(), ["teacher 0"]), (nn.Identity(), [])])
    def test_of_several_labels(self, last: nn.Module, found: list[str]) -> None:
        """An untrained student's logits may all be small and positive."""
        x, y = blobs()
        several = DataLoader(TensorDataset(x, torch.eye(CLASSES)[y].long()), batch_size=8)
        student = build_model("mlp-8", CLASSES, SHAPE)
        with torch.no_grad():
            student[3].weight.zero_()  # type: ignore[index]
            student[3].bias.fill_(0.1)  # type: ignore[index]
        teacher = nn.Sequential(trained_teachers()[0], last)
        assert of_probabilities(KD(student, teacher, num_classes=CLASSES, task="multilabel"), several) == found


class Sick(nn.Module):
    """A network that from some batch on gives a value that is no number for its first row."""

    def __init__(self, value: float, batches: int = 0) -> None:
        super().__init__()
        self.net = trained_teachers()[1]
        self.value, self.batches = value, batches

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x).clone()
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


class Infinite(LabelTerm):
    """A loss that is no number."""

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return logits.sum(1) * torch.inf


class TestNotFinite:
    @pytest.mark.parametrize("method", SOME)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_teacher(self, method: str, value: float) -> None:
        match = r"expected finite numbers in teacher 0's logits, found nan or infinity: .*or check its weights"
        refused(build(method, teachers=[Sick(value)]), match, Blobs())

    def test_a_student(self) -> None:
        student = build_model("mlp-8", CLASSES, SHAPE)
        student[-1].bias.data[2] = torch.nan  # type: ignore[index]
        refused(build("kd", student), "expected finite numbers in student's logits, .* lower the learning", Blobs())

    @pytest.mark.parametrize("method", ["almkd-paper", "almkd-robust"])
    def test_a_teacher_in_a_later_batch(self, method: str) -> None:
        """The table is as finite as before."""
        model = build(method, teachers=[Sick(torch.nan, 8)])
        assert isinstance(model, ALMKD)
        fitted = trainer(max_epochs=3, limit_val_batches=0)
        with pytest.raises(ValueError, match=r"teacher 0's logits"):
            fitted.fit(model, Blobs())
        assert fitted.global_step == 8
        assert model.table is not None
        assert model.table["weights"].isfinite().all()

    @pytest.mark.parametrize(("method", "who"), [("supervised", "student"), ("kd", "teacher 0"), ("rad", "student")])
    def test_inputs(self, method: str, who: str) -> None:
        model = build(method)
        with pytest.raises(ValueError, match=f"expected finite numbers in {who}'s logits.*check that the inputs"):
            trainer().fit(model, Rotten("train"))
        assert all(p.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize("kind", ["last_layer", "exact"])
    def test_inputs_of_meta_rows(self, kind: str) -> None:
        model = build("almkd-paper", meta_gradient=kind)
        with pytest.raises(ValueError, match=r"expected finite numbers in student on meta rows's logits.*inputs are"):
            trainer(limit_val_batches=0, max_epochs=6).fit(model, Rotten("plain"))
        assert all(p.isfinite().all() for p in model.parameters())
        assert model.table is not None
        assert model.table["weights"].isfinite().all()

    def test_a_loss(self) -> None:
        model = build("kd", label_term=Infinite())
        refused(model, "expected a finite loss, found .*label.*: lower the learning rate", Blobs())


class TestArguments:
    def test_unknown_model_name(self) -> None:
        match = "expected a model of .*resnet20.* found unknown model 'resnet21'"
        with pytest.raises(ValueError, match=match):
            build("kd", "resnet21")
        refused(build("kd", teachers=["resnet21"]), match, Blobs())

    def test_out_of_memory_is_no_wrong_shape(self) -> None:
        class Greedy(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.empty(2**60)

        with pytest.raises(RuntimeError, match="memory"):
            Tapped(Greedy())(torch.zeros(2, 3))

    @pytest.mark.parametrize("method", SOME)
    def test_temperature(self, method: str) -> None:
        refused(build(method, temperature=float("nan")), "expected a temperature above 0, found nan", Blobs())

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"weight": float("nan")}, r"expected a weight in \[0, 1\].*found nan"),
            ({"drop": 1.5}, r"expected drop in \[0, 1\].*found 1.5"),
        ],
    )
    def test_shares(self, options: dict[str, float], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            KD("mlp-8", trained_teachers()[0], **SHAPED, **options)

    def test_student_of_other_classes(self) -> None:
        match = r"expected student's logits of shape \(\d+, 3\).*found \(\d+, 4\)"
        refused(build("kd", build_model("mlp-8", 4, SHAPE)), match, Blobs())

    def test_student_that_returns_no_logits(self) -> None:
        class Pair(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = build_model("mlp-8", CLASSES, SHAPE)

            def forward(self, x: Tensor) -> Any:
                return self.net(x), None

        match = r"expected Pair to return logits, a tensor, or an object with \.logits; found tuple"
        refused(Supervised(Pair(), num_classes=CLASSES), match, Blobs(), TypeError)
