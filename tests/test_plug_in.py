"""A foreign Lightning project takes up distillation by a few changed lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from methods import CLASSES, blobs, trained_teachers, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_kd import ALMKD, KD

PROJECT = """
import torch
from lightning import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import multiclass_accuracy


class Clouds(LightningDataModule):
    def __init__(self, rows=240):
        super().__init__()
        self.rows = rows

    def setup(self, stage):
        draw = torch.Generator().manual_seed(0)
        y = torch.arange(self.rows) % 3
        x = torch.randn(3, 5, generator=draw)[y] * 2 + torch.randn(self.rows, 5, generator=draw)
        order = torch.randperm(self.rows, generator=draw)
        self.train, self.val, self.test = (TensorDataset(x[i], y[i]) for i in order.split([120, 60, 60]))

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=10, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=20)

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=20)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Classifier(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test/accuracy", multiclass_accuracy(self.net(x), y, 3, average="micro"))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(trainer, teacher):
    model = Classifier(Net(8))
    data = Clouds()
    trainer.fit(model, data)
    return model, trainer.test(model, data, verbose=False)
"""

# Each replaces one line, or adds one to it.
TO_KD = {
    "import torch": "import torch\nfrom lit_kd import KD",
    "    model = Classifier(Net(8))": "    model = KD(student=Net(8), teacher=teacher, num_classes=3)",
}
TO_ALMKD = {
    "import torch": "import torch\nfrom lit_kd import ALMKD, data as lit_data",
    "    model = Classifier(Net(8))": "    model = ALMKD(student=Net(8), teacher=teacher, num_classes=3)",
    "    data = Clouds()": "    data = lit_data.DistillationDataModule(Clouds())",
}
TO_MIXIN = {
    "import torch": "import torch\nfrom lit_kd import ALMKD, Distilled, data as lit_data",
    "class Classifier(LightningModule):": """class Classifier(Distilled, LightningModule):
    def configure_distillation(self):
        return ALMKD(self.net, TEACHER, num_classes=3)
""",
    "        return nn.functional.cross_entropy(self.net(x), y)": (
        "        return self.distillation(self.net(x), batch).mean() + 0.01 * self.net(x).square().mean()"
    ),
    "    data = Clouds()": "    data = lit_data.DistillationDataModule(Clouds())",
}


def run(changes: dict[str, str], teacher: nn.Module | None = None) -> tuple[LightningModule, Trainer, float]:
    """The project with some of its lines changed."""
    lines = PROJECT.splitlines()
    assert all(lines.count(line) == 1 for line in changes)
    space: dict[str, Any] = {"TEACHER": teacher}
    exec("\n".join(changes.get(line, line) for line in lines), space)
    fitted = trainer(max_epochs=5)
    model, [tested] = space["main"](fitted, teacher)
    return model, fitted, tested["test/accuracy"]


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """What the project trained before."""
    torch.manual_seed(0)
    model, _, accuracy = run({})
    assert accuracy > 0.9
    net: nn.Module = model.net
    return net


@pytest.mark.parametrize(("changes", "method"), [(TO_KD, KD), (TO_ALMKD, ALMKD)], ids=["kd", "almkd"])
def test_a_few_changed_lines(changes: dict[str, str], method: type, teacher: nn.Module) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model, fitted, accuracy = run(changes, teacher)
    assert isinstance(model, method)
    assert accuracy > 0.9
    assert set(fitted.callback_metrics) >= {"test/accuracy", "test/teacher_agreement"}
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    if isinstance(model, ALMKD):
        assert model.table is not None
        assert model.table.size == 120 + 30  # training rows, and half of the validation rows to be trusted


def test_a_module_of_your_own_keeps_its_losses_and_metrics(teacher: nn.Module) -> None:
    new = "\n".join(TO_MIXIN.values()).splitlines()
    assert len([line for line in new if line and line not in PROJECT.splitlines()]) == 6
    model, _, accuracy = run(TO_MIXIN, teacher)
    assert accuracy > 0.9
    assert model.distiller.table.size == 120 + 30  # type: ignore[union-attr]


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    x, y = blobs()
    train, val = TensorDataset(x[:90], y[:90]), TensorDataset(x[90:], y[90:])
    return DataLoader(train, batch_size=10, shuffle=True), DataLoader(val, batch_size=10)


def test_plain_loaders() -> None:
    train, val = loaders()
    model = KD(student="mlp-8", teacher=trained_teachers()[0], num_classes=CLASSES, input_shape=[1, 4, 4])
    fitted = trainer(max_epochs=4)
    fitted.fit(model, train_dataloaders=train, val_dataloaders=val)
    assert fitted.callback_metrics["val/accuracy"] > 0.9
    [tested] = fitted.test(model, dataloaders=val, verbose=False)
    assert tested["test/accuracy"] > 0.9
    predicted = fitted.predict(model, dataloaders=val)
    assert predicted is not None
    assert len(predicted) == 3


def test_inputs_alone_can_be_predicted() -> None:
    x = blobs()[0]
    model = KD(student="mlp-8", teacher=trained_teachers()[0], num_classes=CLASSES, input_shape=[1, 4, 4])
    [found] = trainer().predict(model, DataLoader(x, batch_size=len(x)))  # type: ignore[misc, arg-type]
    expected: Tensor = model(x).argmax(1)
    assert torch.equal(found["class"], expected)  # type: ignore[call-overload, index]
