"""What must not make the robust rule see noise where there is none, and other silent mistakes."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping
from methods import CLASSES, SHAPE, Blobs, blobs, build, trainer
from test_every_method import Each
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lit_kd import ALMKD, KD, Supervised
from lit_kd.data import UNLABELED, DistillationDataModule, Source, TensorRows
from lit_kd.models import load_student

N = 300


class Augmented(Dataset):
    """Rows with a transform, as torchvision's data sets have it."""

    def __init__(self, x: Tensor, y: Tensor, transform: Any = None) -> None:
        self.x, self.targets, self.transform = x, y, transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x = self.x[i]
        return (x if self.transform is None else self.transform(x)), int(self.targets[i])


class Jittered(Augmented):
    """The same, with the augmentation out of reach."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        x, y = super().__getitem__(i)
        return jitter(x), y


def jitter(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


def rows(seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping classes: to fit every row is to memorise it."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % 3
    centers = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    return centers[y] + torch.randn(N, 16, generator=generator), y


class Foreign(LightningDataModule):
    def __init__(self, train: Dataset, val: Dataset, **loader: Any) -> None:
        super().__init__()
        self.train, self.val, self.loader = train, val, loader

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 32, shuffle=True, **self.loader)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 32)


def almkd(**options: Any) -> ALMKD:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    return ALMKD(student, nn.Linear(16, 3), num_classes=3, **options)


def estimated_rate(data: Any, epochs: int = 12) -> float:
    model = almkd()
    trainer(max_epochs=epochs).fit(model, datamodule=data)
    return float(model.table.shared["noise_rate"])


class TestAugmentation:
    @pytest.mark.parametrize("subset", [False, True])
    def test_meta_rows_get_the_transform_of_training_rows(self, subset: bool) -> None:
        train, val = Augmented(*rows(1), transform=jitter), Augmented(*rows(2))
        if subset:
            train, val = Subset(train, range(N)), Subset(val, range(0, N))
        data = DistillationDataModule(Foreign(train, val))
        assert estimated_rate(data) < 0.15
        plain = (val.dataset if subset else val).transform
        assert plain is None  # theirs is not changed

    def test_val_train_is_used(self) -> None:
        data = DistillationDataModule(Foreign(Jittered(*rows(1)), Augmented(*rows(2))), val_train=Jittered(*rows(2)))
        assert estimated_rate(data) < 0.15

    def test_refused_where_meta_rows_would_differ(self) -> None:
        data = DistillationDataModule(Foreign(Jittered(*rows(1)), Augmented(*rows(2))))
        with pytest.raises(ValueError, match=r"expected meta rows with the training's augmentation.*Pass val_train"):
            trainer().fit(almkd(), datamodule=data)
        trainer().fit(almkd(rule="paper"), datamodule=data)  # does not train on them


def test_drop_last_of_the_wrapped_loader() -> None:
    x, y = rows(1)
    inner = Foreign(TensorDataset(x[:65], y[:65]), TensorDataset(*rows(2)), drop_last=True)
    data = DistillationDataModule(inner)
    data.setup()
    assert [len(batch.y) for batch in data.train_dataloader()] == [32, 32]
    assert sum(len(batch.y) for batch in data.val_dataloader()) == N - data.meta_size


class Missing(Blobs):
    """Labels of every third row are missing."""

    def load(self) -> Source:
        x, y = blobs()
        y = y.clone()
        y[::3] = UNLABELED
        return Source(TensorRows(x), TensorRows(x), y.numpy(), test_size=12, identity=b"missing")


def test_rows_without_a_label_are_no_noise() -> None:
    data = Missing(meta=18, val=6)
    model = build("almkd-robust")
    trainer(max_epochs=8).fit(model, data)
    labelled = data.labels != UNLABELED
    assert (~labelled).any()
    assert model.table.shared["noise_rate"] < 0.1
    assert (model.table["weights"][~labelled, 0] == 0).all()
    assert model.table["weights"].isfinite().all()


def test_a_training_that_is_all_warm_up_says_so() -> None:
    model = build("weighted")
    model.warmup_epochs = 2
    with pytest.warns(UserWarning, match="all 2 epochs are warm-up .*smaller warmup_epochs"):
        trainer(max_epochs=2).fit(model, Blobs())


def test_a_rule_that_never_acts_says_so() -> None:
    model = build("almkd-amal")
    model.rule.warmup_epochs = 10
    with pytest.warns(UserWarning, match="Amal learns nothing in 2 epochs.*warmup_epochs"):
        trainer(max_epochs=2).fit(model, Blobs())


def test_unknown_length_needs_early_epochs() -> None:
    with pytest.raises(ValueError, match=r"expected to know how long the training is.*early_epochs"):
        trainer(max_epochs=-1).fit(build("almkd-robust"), Blobs())


def stops(after: int) -> EarlyStopping:
    """Nothing is ever good enough for it."""
    return EarlyStopping("train/loss", min_delta=99.0, patience=after - 1, check_on_train_epoch_end=True)


@pytest.mark.parametrize(("epochs", "early"), [(1000, 10), (-1, 10), (40, 4)])
def test_a_training_that_may_stop_early_has_few_early_epochs(epochs: int, early: int) -> None:
    """A tenth of 100 epochs, not of those that nobody expects to see."""
    for watch in {"callbacks": stops(2)}, {"max_time": {"seconds": 0}}:
        model = build("almkd-robust")
        trainer(max_epochs=epochs, **watch).fit(model, Blobs())
        assert model.rule.early == early


@pytest.mark.parametrize("method", ["almkd-amal", "weighted"])
def test_a_training_that_stops_within_the_warm_up_says_so(method: str) -> None:
    model = build(method)
    (model.rule if isinstance(model, ALMKD) else model).warmup_epochs = 3
    planned: list[str] = []
    for stop, said in (3, True), (4, False):
        watch = Each(lambda *_: planned.extend(str(one.message) for one in caught), "on_train_start")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(max_epochs=9, callbacks=[stops(stop), watch]).fit(copy.deepcopy(model), Blobs())
        found = [one for one in caught if re.search("learns nothing in 3 epochs|all 3 epochs", str(one.message))]
        assert len(found) == said
    assert not any("epochs" in text for text in planned)  # it was not to be foreseen


@pytest.mark.parametrize("method", ["almkd-paper", "weighted", "glc"])
def test_a_class_without_a_meta_row_is_named(method: str) -> None:
    x, y = blobs(150)
    lacks = [(x[:90], y[:90]), (x[90:][y[90:] != 2], y[90:][y[90:] != 2])]
    whole = [(x[:90], y[:90]), (x[90:], y[90:])]
    for parts, said in (lacks, True), (whole, False):
        train, val = (TensorDataset(*part) for part in parts)
        inner = LightningDataModule.from_datasets(train, val, batch_size=8)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer().fit(build(method), DistillationDataModule(inner, num_classes=CLASSES))
        found = [one for one in caught if "no meta row has a class of [2]" in str(one.message)]
        assert len(found) == said


def test_teacher_that_shares_layers_with_the_student() -> None:
    trunk = nn.Linear(16, 8)
    student = nn.Sequential(trunk, nn.ReLU(), nn.Linear(8, 3))
    teacher = nn.Sequential(trunk, nn.Tanh(), nn.Linear(8, 3))
    loader = DataLoader(TensorDataset(*rows(1)), 32)
    with pytest.raises(ValueError, match="expected a teacher that shares no layers with the student"):
        trainer().fit(KD(student, teacher, num_classes=3), loader)
    trainer().fit(KD(student, copy.deepcopy(teacher).requires_grad_(True), num_classes=3), loader)


def test_frozen_student() -> None:
    student = nn.Linear(16, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="expected a student with trainable parameters"):
        trainer().fit(Supervised(student, num_classes=3), DataLoader(TensorDataset(*rows(1)), 32))


def test_labels_that_are_no_class_numbers() -> None:
    x, y = rows(1)
    trainer().fit(Supervised(nn.Linear(16, 3), num_classes=3), DataLoader(TensorDataset(x, y.to(torch.uint8)), 32))
    with pytest.raises(ValueError, match=r"expected labels of shape \(batch,\) and an integer type, found \(32, 2\)"):
        trainer().fit(
            Supervised(nn.Linear(16, 3), num_classes=3), DataLoader(TensorDataset(x, y[:, None].expand(-1, 2)), 32)
        )


def test_student_continued_from_a_checkpoint_stands_by_itself(teacher_file: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.ckpt"
    start.write_bytes(teacher_file.read_bytes())
    fitted = trainer(max_steps=1)
    fitted.fit(Supervised(str(start), num_classes=CLASSES, input_shape=list(SHAPE)), Blobs())
    fitted.save_checkpoint(tmp_path / "next.ckpt")
    start.unlink()
    student = load_student(tmp_path / "next.ckpt")
    for name, value in fitted.lightning_module.student.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)
