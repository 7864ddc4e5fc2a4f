"""Other people's data of every task: wrapped, or as plain loaders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import seed_everything
from lightning.pytorch import LightningDataModule
from methods import trainer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lit_kd import ALMKD, KD, LossDivider, Supervised
from lit_kd.data import DistillationDataModule
from lit_kd.models import adapt
from lit_kd.types import IGNORED, Batch
from lit_kd.weightings import Amal, Paper

CLASSES = {"multilabel": 4, "dense": 3, "tokens": 3, "regression": 1}


class Texts(Dataset[Any]):
    """Row i has a text of 2 to 6 tokens; the first counts for nothing, as in Hugging Face's tagging."""

    def __init__(self, n: int, longest: int = 6) -> None:
        draw = torch.Generator().manual_seed(n)
        self.texts = [torch.randint(1, 9, (2 + i % (longest - 1),), generator=draw) for i in range(n)]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        labels = self.texts[i] % 3
        labels[0] = IGNORED
        return {"input_ids": self.texts[i], "labels": labels}


def collate(rows: list[dict[str, Tensor]], side: str = "right") -> dict[str, Tensor]:
    """What transformers' DataCollatorForTokenClassification gives."""
    each: dict[str, Any] = {"batch_first": True, "padding_side": side}
    ids = pad_sequence([row["input_ids"] for row in rows], **each)
    labels = pad_sequence([row["labels"] for row in rows], padding_value=IGNORED, **each)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def left(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return collate(rows, "left")


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.layers(input_ids)
        return out


class Segmenter(nn.Module):
    """As torchvision's: a mapping of the logits and more."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.layers(x), "aux": x}


class Crops(Dataset[Any]):
    """Images with masks, cropped at random together."""

    def __init__(self, n: int) -> None:
        self.x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        down, right = torch.randint(3, (2,)).tolist()
        x = self.x[i, :, down : down + 6, right : right + 6]
        mask = (x[0] > 0).to(torch.uint8)
        mask[0] = 255
        return x, mask


def datasets(task: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """24 and 16 rows."""
    if task == "tokens":
        return Texts(24), Texts(16, longest=9)
    if task == "dense":
        return Crops(24), Crops(16)
    x = [torch.randn(n, 5, generator=torch.Generator().manual_seed(n)) for n in (24, 16)]
    # as the losses of torch want them
    y = [(part[:, :4] > 0).float() if task == "multilabel" else 3 * part[:, 0] for part in x]
    return TensorDataset(x[0], y[0]), TensorDataset(x[1], y[1])


def loaders(task: str) -> list[DataLoader[Any]]:
    own: dict[str, Any] = {"collate_fn": collate} if task == "tokens" else {}
    train, val = datasets(task)
    return [DataLoader(train, batch_size=8, shuffle=True, **own), DataLoader(val, batch_size=8, **own)]


def wrapped(kind: str, **options: Any) -> DistillationDataModule:
    train, val = loaders(kind)
    if kind == "dense":
        options = {"ignore_index": 255, "num_classes": 3} | options
    return DistillationDataModule.from_loaders(train, val, val, **({"task": kind, "seed": 0} | options))


def net(task: str) -> nn.Module:
    if task == "tokens":
        return Tagger()
    return adapt(Segmenter(), logits="out") if task == "dense" else nn.Linear(5, CLASSES[task])


def method(kind: Any, task: str, **options: Any) -> Any:
    seed_everything(1, verbose=False)
    teacher = {} if kind is Supervised else {"teacher": net(task)}
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.05)  # noqa: E731
    return kind(net(task), **teacher, num_classes=CLASSES[task], task=task, optimizer=adam, **options)


every_task = pytest.mark.parametrize("task", CLASSES)


@every_task
def test_wrapped(task: str) -> None:
    data, fitted = wrapped(task), trainer(max_epochs=12)
    model = method(Supervised, task)
    fitted.fit(model, data)
    assert fitted.callback_metrics[f"val/{model.task.score}"] > 0.6
    assert data.num_classes == CLASSES[task]
    assert not data.noisy.any()
    (found,) = fitted.test(model, data, verbose=False)
    assert found[f"test/{model.task.score}"] > 0.6


@every_task
@pytest.mark.parametrize("rule", [Paper(warmup_epochs=1, every=1), Amal(warmup_epochs=1, every=1)])
def test_learned_weights(task: str, rule: Any) -> None:
    """With meta rows beside the training rows; `Amal` trains on them too, so crops are refused there."""
    data, fitted = wrapped(task), trainer(max_epochs=2)
    model = method(ALMKD, task, rule=rule, meta_gradient="exact")
    if task == "dense" and rule.trains_on_meta:
        data = wrapped(task, val_train=Crops(16))
    fitted.fit(model, data)
    assert model.table is not None
    assert len(model.table["weights"].unique(dim=0)) > 2


@every_task
@pytest.mark.parametrize("kind", [KD, Supervised])
def test_plain_loaders(task: str, kind: Any) -> None:
    train, val = loaders(task)
    if task == "dense":
        with pytest.raises(ValueError, match="expected -100 for what counts for nothing, found 255: set ignore_index"):
            trainer(max_epochs=1).fit(method(kind, task), train)
        return
    fitted, model = trainer(max_epochs=2), method(kind, task)
    fitted.fit(model, train, val)
    assert fitted.callback_metrics["train/loss"].isfinite()
    fitted.test(model, val, verbose=False)


class TestTokens:
    @pytest.mark.parametrize("joined", [collate, left])
    def test_a_batch_is_padded_as_its_rows_are(self, joined: Any) -> None:
        train, val = Texts(20), Texts(10, longest=9)
        options: dict[str, Any] = {"batch_size": 4, "collate_fn": joined}
        given = DataLoader(train, shuffle=True, **options), DataLoader(val, **options)
        data = DistillationDataModule.from_loaders(*given, task="tokens", meta=5, train_on_meta=True, seed=0)
        data.setup()
        assert data.labels.shape == (25, 9)
        lengths, seen = set(), 0
        for x, y, index in data.train_dataloader():
            assert y.shape == x["input_ids"].shape
            counts = y != IGNORED
            assert torch.equal(y[counts], x["input_ids"][counts] % 3)
            table = data.labels[index]
            assert [row[row >= 0].tolist() for row in y] == [row[row >= 0].tolist() for row in table]
            lengths.add(y.shape[1])
            seen += len(y)
        assert len(lengths) > 1
        assert seen == 25

    def test_labels_that_change_are_refused(self) -> None:
        class Changing(Texts):
            def __getitem__(self, i: int) -> dict[str, Tensor]:
                row = super().__getitem__(i)
                row["labels"][1:] = torch.randint(3, (len(row["labels"]) - 1,))
                return row

        inner = LightningDataModule()
        inner.train_dataloader = lambda: DataLoader(Changing(30), batch_size=5, collate_fn=collate)
        data = DistillationDataModule(inner, task="tokens", meta=0, seed=0)
        data.setup()
        with pytest.raises(ValueError, match="expected in a batch the label that row"):
            list(data.train_dataloader())

    def test_rows_of_other_lengths_together(self) -> None:
        """A pass over all rows pads them; a cache of a teacher's outputs cannot."""
        data, model = wrapped("tokens"), method(LossDivider, "tokens", warmup_epochs=1)
        trainer(max_epochs=3).fit(model, data)
        weights = model.table["weights"][:, 0]
        assert ((weights >= 0) & (weights <= 1)).all()
        assert len(weights.unique()) > 2
        with pytest.raises(ValueError, match="logits of teacher 0 of one shape for all rows with teacher_cache, found"):
            trainer(max_epochs=1).fit(method(KD, "tokens", teacher_cache="memory"), wrapped("tokens"))


def test_what_inner_says() -> None:
    inner = LightningDataModule()
    inner.train_dataloader, inner.val_dataloader = (lambda loader=loader: loader for loader in loaders("tokens"))
    inner.task = "tokens"  # type: ignore[attr-defined]
    data = DistillationDataModule(inner, seed=0)
    data.setup()
    assert (data.task, data.num_classes) == ("tokens", 3)
    inner.task = "ner"  # type: ignore[attr-defined]  # means something else to them
    assert DistillationDataModule(inner).task == "classification"
    assert DistillationDataModule(inner, task="tokens").task == "tokens"


def test_masks_are_read_while_training_only() -> None:
    data = wrapped("dense")
    data.setup()
    assert data.labels.shape == (32, 1, 1)
    batch: Batch = next(iter(data.train_dataloader()))
    assert batch.y.shape == (8, 6, 6)
    assert (batch.y[:, 0] == IGNORED).all()
    assert torch.equal(batch.y[:, 1:], (batch.x[:, 0, 1:] > 0).long())  # type: ignore[index, call-overload]


@pytest.mark.parametrize(
    ("task", "options", "match"),
    [
        (
            "tokens",
            {"task": "dense", "num_classes": 3},
            r"of the task dense .* \(H, W\), a class for each pixel, found",
        ),
        ("regression", {"task": "multilabel"}, r"of the task multilabel .*, found \(1,\) and torch.float32 in row 0"),
        ("multilabel", {"task": "classification"}, "expected class numbers as labels of the train data set"),
        ("dense", {"num_classes": None}, "expected num_classes of pixels, found none: give it"),
        ("tokens", {"task": "ner"}, "expected as task one of .*, found 'ner'"),
        ("tokens", {"noise": "symmetric", "noise_rate": 0.1}, "no noise and no labeled with the task tokens"),
    ],
)
def test_refused(task: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        wrapped(task, **options).setup()
