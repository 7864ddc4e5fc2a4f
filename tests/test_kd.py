"""KD with several teachers: who is heard in which batch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lightning import Trainer
from methods import weighted_terms
from scipy.special import rel_entr, softmax
from scipy.stats import chisquare
from torch import nn

from lit_kd import KD
from lit_kd.types import Batch, Outputs

TEACHERS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 5.0]])
BATCH = Batch(torch.zeros(1, 3), torch.tensor([0]))


def kd(**options: Any) -> KD:
    return KD(nn.Linear(3, 3), [nn.Linear(3, 3)] * 3, num_classes=3, weight=1.0, temperature=1.0, **options)


def heard(model: KD, batches: int) -> list[tuple[int, ...]]:
    """Which teachers a batch's loss tells of: every subset has a loss of its own, taken here from scipy."""
    p, subsets = softmax(TEACHERS.numpy(), axis=1), [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)]
    losses = torch.tensor([rel_entr(p[list(s)].mean(0), 1 / 3).sum() for s in subsets])
    assert losses.sort().values.diff().min() > 0.01
    student, teachers = Outputs(torch.zeros(1, 3), {}), [Outputs(t.unsqueeze(0), {}) for t in TEACHERS]
    found = torch.stack([weighted_terms(model, student, teachers, BATCH)["teacher"].squeeze() for _ in range(batches)])
    distance, nearest = (found.unsqueeze(1) - losses).abs().min(1)
    assert distance.max() < 1e-5
    return [subsets[i] for i in nearest]


class TestDrop:
    def test_by_default_all_are_heard(self) -> None:
        assert set(heard(kd(), 50)) == {(0, 1, 2)}

    @pytest.mark.parametrize("drop", [0.25, 1.0])
    def test_as_often_as_asked_and_never_all(self, drop: float) -> None:
        found, batches = heard(kd(drop=drop), 3000), 3000
        chances = {
            subset: (1 - drop) ** len(subset) * drop ** (3 - len(subset)) + (drop**3 / 3 if len(subset) == 1 else 0)
            for n in (1, 2, 3)
            for subset in itertools.combinations(range(3), n)
        }
        possible = {subset: chance for subset, chance in chances.items() if chance > 0}
        assert set(found) <= set(possible)
        counts = [found.count(subset) for subset in possible]
        assert chisquare(counts, [batches * chance for chance in possible.values()]).pvalue > 0.01

    def test_one_teacher_is_always_heard(self) -> None:
        model, output = kd(drop=0.9), Outputs(torch.zeros(1, 3), {})
        one = [Outputs(TEACHERS[:1], {})]
        losses = {weighted_terms(model, output, one, BATCH)["teacher"].item() for _ in range(50)}
        assert len(losses) == 1

    def test_the_same_in_all_processes_and_other_in_other_epochs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def epoch(number: int, rank: int, seed: int = 0) -> list[tuple[int, ...]]:
            monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
            monkeypatch.setattr(KD, "current_epoch", number)
            monkeypatch.setattr(KD, "global_rank", rank)
            model = kd(drop=0.5)
            model.trainer = Trainer(logger=False, accelerator="cpu")
            torch.rand(rank)  # processes need not have drawn equally much
            model.on_train_epoch_start()
            return heard(model, 40)

        first = epoch(0, rank=0)
        assert epoch(0, rank=1) == first
        assert epoch(1, rank=0) != first
        assert epoch(0, rank=0, seed=1) != first
