"""Every method with every task: it trains, or is refused in a sentence before the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from methods import METHODS, trainer
from torch import nn

from lit_kd import ALMKD, KD, CoTeaching
from lit_kd.data import DataModule, Source, TensorRows
from lit_kd.types import IGNORED, Batch
from lit_kd.weightings import Paper

SIZES = {"multilabel": 3, "dense": 3, "tokens": 3, "regression": 2}


class Few(DataModule):
    """16 training rows, 8 meta, 8 validation and 8 test rows."""

    def __init__(self, task: str) -> None:
        super().__init__(batch_size=8, meta=8, val=8, seed=0)
        self.task, self.num_classes = task, SIZES[task]

    def load(self) -> Source:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(40, 1, 4, 4, generator=draw)
        if self.task == "tokens":
            x = torch.randint(5, (40, 6), generator=draw)
            y = x % 3
        elif self.task == "dense":
            y = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
        else:
            y = x.flatten(1)[:, :2] if self.task == "regression" else (x.flatten(1)[:, :3] > 0).long()
        if self.task in ("tokens", "dense"):
            y[:, -1] = IGNORED
        return Source(TensorRows(x), TensorRows(x), y.numpy(), test_size=8)


class Net(nn.Module):
    """A first layer and a head."""

    def __init__(self, task: str) -> None:
        super().__init__()
        if task == "tokens":
            self.layer1: nn.Module = nn.Embedding(5, 8)
            self.head: nn.Module = nn.Linear(8, 3)
        elif task == "dense":
            self.layer1, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 3, 1)
        else:
            self.layer1, self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), nn.Linear(8, SIZES[task])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.layer1(x).relu())
        return out


EVERY = "multilabel dense tokens regression"
RUNS = {
    **dict.fromkeys(["supervised", "kd", "l2rw", "co-teaching", "jocor", "loss-divider", "dot", "mutual"], EVERY),
    **dict.fromkeys(["almkd-paper", "almkd-amal"], EVERY),
    **dict.fromkeys(["dkd", "nkd", "ctkd", "teacher-free", "almkd-decoupled"], "dense tokens"),
    "attention-transfer": "dense",
    # what reads the last linear layer; our dense network has none
    **dict.fromkeys(["fitnet", "similarity-preserving", "pkt", "rkd", "almkd-hint"], "multilabel regression"),
    **dict.fromkeys(["vid", "srrl", "review-kd", "cat-kd", "simkd", "comparative-kd"], "multilabel regression"),
}
"""Which methods train for which tasks; all others are refused."""


@pytest.mark.parametrize("task", SIZES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_trains_or_is_refused(method: str, task: str) -> None:
    seed_everything(0, verbose=False)
    student, fitted = Net(task), trainer(max_epochs=2, limit_train_batches=1)
    before = [p.detach().clone() for p in student.parameters()]
    base: dict[str, Any] = {"num_classes": SIZES[task], "input_shape": [1, 4, 4], "task": task}
    if method in ("co-teaching", "jocor", "mutual"):
        base["peers"] = [Net(task)]
    if method in ("almkd-paper", "almkd-amal", "almkd-decoupled") and task in ("dense", "tokens"):
        base["meta_gradient"] = "exact"
    said = ""
    try:
        fitted.fit(METHODS[method](student, [Net(task), Net(task)], **base), Few(task))
    except ValueError as error:
        said = str(error)
    moved = any((p != was).any() for p, was in zip(student.parameters(), before, strict=True))
    if task in RUNS.get(method, "").split():
        assert not said
        assert moved
        assert all(value.isfinite() for value in fitted.callback_metrics.values())
    else:
        assert said
        assert not moved
        assert fitted.global_step == 0
        assert "\n" not in said


def test_resume_equals_uninterrupted(tmp_path: Path) -> None:
    """Of pixels, with the exact meta-gradient."""

    def run(folder: Path, **options: Any) -> ALMKD:
        seed_everything(0, verbose=False)
        rule = Paper(warmup_epochs=1, every=1)
        model = ALMKD(Net("dense"), Net("dense"), num_classes=3, task="dense", rule=rule, meta_gradient="exact")
        keep = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
        trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep]).fit(model, Few("dense"), **options)
        return model

    whole = run(tmp_path / "whole")
    again = run(tmp_path / "again", ckpt_path=tmp_path / "whole" / "epoch=1.ckpt", weights_only=True)
    torch.testing.assert_close(again.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert whole.table is not None
    assert again.table is not None
    assert len(whole.table["weights"].unique(dim=0)) > 2
    torch.testing.assert_close(again.table["weights"], whole.table["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("task", SIZES)
def test_several_teachers(task: str) -> None:
    model = KD(Net(task), [Net(task), Net(task)], num_classes=SIZES[task], task=task)
    fitted = trainer(max_epochs=1)
    fitted.fit(model, Few(task))
    assert model.num_sources == 2
    assert fitted.callback_metrics["train/loss"].isfinite()


def test_targets_of_zero_are_no_missing_ones() -> None:
    """Zeros for all classes mean that there is no label where labels are probabilities, not where they are numbers."""
    seed_everything(0, verbose=False)
    model = CoTeaching(Net("regression"), peers=[Net("regression")], noise_rate=0.0, num_classes=2, task="regression")
    trainer(max_epochs=1).fit(model, Few("regression"))
    y = torch.tensor([[0.0, 0.0], [torch.nan, torch.nan], [1.0, 2.0]])
    kept = model.small(torch.tensor([1.0, 0.0, 2.0]), Batch(y, y))
    assert kept.tolist() == [1.5, 0.0, 1.5]
