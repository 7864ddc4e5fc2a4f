"""Data sets and kinds of untrusted supervision for the study of trust."""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mlps import fit
from torch import Tensor

from lit_kd.data.seeds import derive_seed

NOISES = ("sym20", "sym40", "sym60", "pair30", "inst30", "sym75", "clean")
"""Labels redrawn from all classes, of each class by another, by a weak model's second guess; %, of training rows."""
TEACHERS = ("same labels", "weak", "strong", "wrong on a quarter")
"""Perceptrons with 256 hidden units: a strong one learned clean labels of three times as many rows as the student."""
SHIFTS = {
    "meta imbalanced": "classes have shares in the trusted rows that fall to a hundredth of the largest",
    "classes absent": "half of the classes have no trusted row",
    "easy meta": "trusted rows are of the half that a weak model is surest of",
    "10 meta rows": "",
    "50 meta rows": "",
    "1 row a class": "trusted rows",
    "noisy meta": "15% of the trusted labels are redrawn",
    "noisy validation": "40% of the validation labels are redrawn",
    "long tail": "training rows of the classes fall to a fiftieth",
    "duplicates": "each training row is there twice, with the same label",
    "second domain": "half of the training rows are lighter and noisy; no trusted, validation or test row is",
}
PAIRS = torch.tensor([6, 7, 3, 2, 9, 8, 0, 1, 5, 4])
"""What pair noise makes of digits; of other classes the next."""


class Scenario(NamedTuple):
    """What is wrong with labels, teacher, and trusted or training rows."""

    noise: str
    teacher: str = TEACHERS[0]
    shift: str = ""

    def __str__(self) -> str:
        return f"{self.noise}, {self.shift or self.teacher}"


SCENARIOS = [Scenario(noise, teacher) for noise in NOISES for teacher in TEACHERS]
SCENARIOS += [Scenario(noise, shift=shift) for shift in SHIFTS for noise in ("sym40", "clean")]
SCENARIOS += [Scenario("pair30", shift="50 meta rows")]


class Data(NamedTuple):
    """Rows to draw from, and test rows."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def classes(self) -> int:
        """C."""
        return int(self.y.max()) + 1


@dataclass
class Experiment:
    """Of one scenario and seed: the training rows, then the trusted ones, and what a teacher says of them."""

    scenario: Scenario
    seed: int
    x: Tensor
    y: Tensor
    true: Tensor
    rows: int  # of training
    teacher: Tensor
    val: tuple[Tensor, Tensor]
    teacher_val: Tensor

    @property
    def trusted(self) -> Tensor:
        """Which rows are trusted, ``(N + M,)``."""
        return torch.arange(len(self.y)) >= self.rows


def load(name: str, path: Path | None = None) -> Data:
    """A data set by name; a quarter of it, up to 4000 rows, is for testing, up to 6000 others are drawn from."""
    if path is None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    elif name == "mnist":  # 28 x 28, averaged to 14 x 14
        with gzip.open(path) if path.suffix == ".gz" else path.open() as file:
            table = torch.from_numpy(np.loadtxt(file, delimiter=","))
        x = F.avg_pool2d(table[:, :-1].float().view(-1, 1, 28, 28) / 255, 2).flatten(1)
        y = table[:, -1].long()
    else:
        with path.open(newline="") as file:
            head, *rows = csv.reader(file)
        label = next(i for i in (0, len(head) - 1) if head[i].lower() in ("letter", "class", "label", "target"))
        columns = [i for i in range(len(head)) if i != label and head[i]]  # a column without a name counts the rows
        x = torch.tensor([[float(row[i]) for i in columns] for row in rows])
        x = (x - x.mean(0)) / x.std(0)
        y = torch.from_numpy(np.unique([row[label] for row in rows], return_inverse=True)[1])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    test = min(len(y) // 4, 4000)
    pool = order[test : test + 6000]
    return Data(name, x[pool], y[pool], x[order[:test]], y[order[:test]])


def redrawn(y: Tensor, rate: float, classes: int, g: torch.Generator) -> Tensor:
    """Labels of which a share is drawn anew."""
    return torch.where(torch.rand(len(y), generator=g) < rate, torch.randint(classes, y.shape, generator=g), y)


def mistaken(y: Tensor, classes: int) -> Tensor:
    """The class that each is taken for."""
    return PAIRS[y] if classes == len(PAIRS) else (y + 1) % classes


def noisy(noise: str, x: Tensor, y: Tensor, classes: int, g: torch.Generator, seed: int) -> Tensor:
    """Labels that are partly wrong."""
    kind, rate = noise.rstrip("0123456789"), int(noise[-2:]) / 100 if noise[-1].isdigit() else 0.0
    if kind == "sym":
        return redrawn(y, rate, classes, g)
    wrong = mistaken(y, classes)
    chance = torch.full(y.shape, rate)
    if kind == "inst":
        guess = fit(x, y, 8, 5, classes, seed).forward(x.unsqueeze(0))[1][0].softmax(-1)
        doubt, wrong = guess.scatter(1, y.unsqueeze(1), 0).max(1)
        chance = (rate * doubt.sqrt() / doubt.sqrt().mean()).clamp(max=0.9)
    return torch.where(torch.rand(len(y), generator=g) < chance, wrong, y)


def trusted_rows(shift: str, data: Data, rows: Tensor, size: int, g: torch.Generator, seed: int) -> Tensor:
    """Which of the rows are trusted."""
    y, classes = data.y[rows], data.classes
    chance = torch.ones(len(rows))
    if shift == "1 row a class":
        return torch.stack([rows[y == c][0] for c in range(classes)])
    if shift.endswith("meta rows"):
        size = int(shift.split()[0])
    elif shift == "meta imbalanced":
        chance = (0.01 ** (torch.arange(classes) / (classes - 1)))[torch.randperm(classes, generator=g)][y]
    elif shift == "classes absent":
        chance = (~torch.isin(y, torch.randperm(classes, generator=g)[: classes // 2])).float()
    elif shift == "easy meta":
        said = fit(data.x[rows], y, 8, 6, classes, seed).forward(data.x[rows].unsqueeze(0))[1][0].softmax(-1)
        sure = said.gather(1, y.unsqueeze(1)).squeeze(1)
        chance = (sure >= sure.median()).float()
    return rows[torch.multinomial(chance, size, generator=g)]


def long_tail(y: Tensor, rows: Tensor, classes: int, g: torch.Generator) -> Tensor:
    """Rows of which the classes, in a random order, have fewer and fewer."""
    largest, kept = int(torch.bincount(y[rows], minlength=classes).min()), []
    for place, c in enumerate(torch.randperm(classes, generator=g)):
        kept.append(rows[y[rows] == c][: max(2, int(largest * 50 ** (-place / (classes - 1))))])
    return torch.cat(kept)


def build(data: Data, scenario: Scenario, seed: int) -> Experiment:
    """Draw the rows, spoil the labels, train the teacher."""
    noise, kind, shift = scenario
    g, seed_of = torch.Generator().manual_seed(derive_seed(seed, data.name)), derive_seed(seed, f"{data.name} nets")
    classes, tenth = data.classes, len(data.y) // 10
    val, rest = torch.randperm(len(data.y), generator=g).tensor_split([tenth])
    meta = trusted_rows(shift, data, rest, tenth, g, seed_of)
    pool = rest[~torch.isin(rest, meta)][: len(data.y) - 2 * tenth]  # as many rows with few trusted ones
    rows = pool
    if shift == "long tail":
        rows = long_tail(data.y, pool, classes, g)
    elif shift == "duplicates":
        rows = pool[: len(pool) // 2]
    elif kind == "strong":
        rows = pool[: len(pool) // 3]
    x, true = data.x[rows], data.y[rows]
    if shift == "second domain":
        other = torch.rand(len(x), 1, generator=g) < 0.5
        x = torch.where(other, x + 0.35 * x.std() * torch.randn(x.shape, generator=g) + 0.15, x)
    y = noisy(noise, x, true, classes, g, seed_of + 1)
    if shift == "duplicates":
        x, y, true = x.repeat(2, 1), y.repeat(2), true.repeat(2)
    meta_y, val_y = data.y[meta], data.y[val]
    if shift == "noisy meta":
        meta_y = redrawn(meta_y, 0.15, classes, g)
    elif shift == "noisy validation":
        val_y = redrawn(val_y, 0.4, classes, g)
    lesson, answers, hidden, epochs = x, y, 256, 30
    if kind == "weak":
        lesson, answers, hidden, epochs = x[: len(x) // 5], true[: len(x) // 5], 8, 10
    elif kind == "strong":
        lesson, answers = data.x[pool], data.y[pool]
    elif kind == "wrong on a quarter":
        wrong = torch.isin(true, torch.randperm(classes, generator=g)[: max(2, classes // 4)])
        answers = torch.where(wrong, mistaken(true, classes), true)
    teacher = fit(lesson, answers, hidden, epochs, classes, seed_of + 2)
    all_x = torch.cat([x, data.x[meta]])
    said, said_val = (teacher.forward(part.unsqueeze(0))[1][0] for part in (all_x, data.x[val]))
    whole = torch.cat([y, meta_y]), torch.cat([true, data.y[meta]])
    return Experiment(scenario, seed, all_x, *whole, len(x), said, (data.x[val], val_y), said_val)
