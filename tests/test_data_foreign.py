"""The wrapper for other people's data modules."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from methods import trainer
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lit_kd.data import Batch, DistillationDataModule
from lit_kd.data.item_labels import read_labels
from lit_kd.data.rows import ItemRows


def rows(n: int, first: int = 0) -> TensorDataset:
    """Row i holds the number i and has the label i % 3."""
    numbers = torch.arange(first, first + n)
    return TensorDataset(numbers.float().unsqueeze(1), numbers % 3)


class Inner(LightningDataModule):
    """A data module as others write them."""

    def __init__(self, train: Any = None, val: Any = None, **loader: Any) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.given = train, val
        self.loader = {"batch_size": 5} | loader

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)
        if stage == "fit":
            train, val = self.given
            self.train_set = rows(40) if train is None else train
            self.val_set = rows(20, 100) if val is None else val
        if stage == "test":
            self.test_set = rows(10, 200)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train_set, shuffle=True, **self.loader)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val_set, **self.loader)

    def test_dataloader(self) -> Any:
        return DataLoader(self.test_set, batch_size=4)

    def teardown(self, stage: str) -> None:
        self.calls.append(f"teardown {stage}")


def wrap(*args: Any, **arguments: Any) -> DistillationDataModule:
    inner = args[0] if args and isinstance(args[0], LightningDataModule) else Inner(*args)
    data = DistillationDataModule(inner, **({"seed": 0} | arguments))
    data.setup()
    return data


def gather(loader: Any) -> Batch:
    batches = list(loader)
    index = None if batches[0].index is None else torch.cat([b.index for b in batches])
    return Batch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]), index)


class TestWrapping:
    def test_rows_labels_indices(self) -> None:
        data = wrap()
        assert (data.batch_size, data.num_classes, data.input_shape) == (5, 3, None)
        assert (data.train_size, data.meta_size, len(data.parts.val)) == (40, 10, 10)
        x, y, index = gather(data.train_dataloader())
        assert index is not None
        assert index.tolist() != list(range(40))
        assert torch.equal(x[:, 0].long(), index)
        assert torch.equal(y, index % 3)
        val = gather(data.val_dataloader())
        meta = data.parts.meta_rows().__getitems__(list(range(10)))
        numbers = torch.cat([val.x, meta.x])[:, 0].long()
        assert numbers.sort().values.tolist() == list(range(100, 120))
        assert torch.equal(torch.cat([val.y, meta.y]), numbers % 3)
        assert meta.index is not None
        assert meta.index.tolist() == list(range(40, 50))

    def test_what_inner_knows_and_what_the_wrapper_says(self) -> None:
        inner = Inner()
        inner.input_shape, inner.class_names = (1,), np.array(["a", "b\n c", "d"])  # type: ignore[attr-defined]
        data = wrap(inner, batch_size=7, meta=6, noise="asymmetric", noise_rate=1.0)
        assert (data.num_classes, data.input_shape, data.class_names) == (3, (1,), ["a", "b c", "d"])
        assert (data.batch_size, data.meta_size) == (7, 6)
        x, y, _ = gather(data.train_dataloader())
        assert torch.equal(y, (x[:, 0].long() + 1) % 3)
        assert wrap(num_classes=5).num_classes == 5

    def test_inner_is_set_up_as_needed(self) -> None:
        inner = Inner()
        data = wrap(inner)
        assert inner.calls == ["prepare", "fit"]
        x, _ = next(iter(data.test_dataloader()))
        assert x[:, 0].tolist() == [200, 201, 202, 203]
        assert len(list(data.predict_dataloader())) == 3
        data.setup("test")
        assert inner.calls == ["prepare", "fit", "test"]
        data.teardown("test")
        data.setup("test")
        assert inner.calls[3:] == ["teardown test", "test"]

    def test_mapping_of_padded_tokens(self) -> None:
        class Texts(Dataset[Any]):
            def __init__(self, lengths: list[int]) -> None:
                self.lengths = lengths
                self.labels = [n % 2 for n in lengths]

            def __len__(self) -> int:
                return len(self.lengths)

            def __getitem__(self, i: int) -> Any:
                return {"input_ids": [self.lengths[i]] * self.lengths[i]}, self.labels[i]

        def collate(items: list[Any]) -> Any:
            texts = [torch.tensor(x["input_ids"]) for x, _ in items]
            ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
            return UserDict({"input_ids": ids, "attention_mask": (ids > 0).long()}), torch.tensor([y for _, y in items])

        inner = Inner(Texts(list(range(1, 21))), Texts(list(range(30, 40))), collate_fn=collate)
        data = wrap(inner, train_on_meta=True)
        mixed = 0  # batches with meta rows, longer than any training row
        for x, y, index in data.train_dataloader():
            lengths = x["attention_mask"].sum(dim=1)
            assert torch.equal(x["input_ids"][:, 0], lengths)
            assert torch.equal(lengths % 2, y)
            assert torch.equal(lengths >= 30, index >= 20)
            mixed += int(0 < (index >= 20).sum() < len(index))
        assert mixed
        assert data.parts.train_rows(False)[4].x["input_ids"].tolist() == [5] * 5

    def test_hooks_see_pairs(self) -> None:
        class Scaling(Inner):
            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                x, y = batch
                return x * 10, y

        class Probe(LightningModule):
            needs_meta = True

            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(1, 3)
                self.seen: list[Any] = []

            def training_step(self, batch: Any) -> Tensor:
                self.seen.append(batch)
                return self.layer(batch["train"].x).sum()

            def test_step(self, batch: Any) -> None:
                self.seen.append(batch)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=1e-6)

        inner, model = Scaling(), Probe()
        data = DistillationDataModule(inner, seed=0)
        run = trainer(max_epochs=1)
        run.fit(model, datamodule=data)
        assert len(model.seen) == 8
        for batch in model.seen:
            train, meta = batch["train"], batch["meta"]
            assert torch.equal(train.x[:, 0], train.index * 10.0)
            assert (meta.x >= 1000).all()
            assert (meta.index >= 40).all()
        model.seen.clear()
        run.test(model, datamodule=data, verbose=False)
        assert model.seen[0][0][:, 0].tolist() == [2000, 2010, 2020, 2030]
        assert inner.trainer is run
        # Not overridden by inner, so not ours either: a model's own hook stays in force.
        assert "transfer_batch_to_device" not in vars(data)

    def test_no_validation_rows(self) -> None:
        class NoVal(Inner):
            val_dataloader = LightningDataModule.val_dataloader

        for inner in (NoVal(), LightningDataModule.from_datasets(rows(9), batch_size=2)):
            with pytest.raises(ValueError, match=r"expected a val_dataloader .* found none. Give it .* or set meta=0"):
                wrap(inner)
            data = wrap(inner, meta=0)
            assert (data.meta_size, data.val_dataloader()) == (0, [])


class Plain(Dataset[Any]):
    """Counts how often it is read; augments at random."""

    def __init__(self, n: int = 12, **attributes: Any) -> None:
        self.n = n
        self.reads = 0
        vars(self).update(attributes)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        if not 0 <= i < self.n:
            raise IndexError(i)
        self.reads += 1
        return torch.rand(2), i % 3


def labels_of(dataset: Any, name: str = "train") -> Any:
    return read_labels(ItemRows(dataset), name).tolist()


class TestLabels:
    @pytest.mark.parametrize(("name", "kind"), [("targets", list), ("labels", torch.tensor)])
    def test_from_attributes(self, name: str, kind: Any) -> None:
        dataset = Plain(1000, **{name: kind([i % 3 for i in range(1000)])})
        assert labels_of(dataset) == [i % 3 for i in range(1000)]
        assert dataset.reads == 256

    def test_through_subset_and_concat(self) -> None:
        dataset = Plain(100, targets=[i % 3 for i in range(100)])
        nested = ConcatDataset([Subset(Subset(dataset, range(10, 60)), [4, 0, 7]), Subset(dataset, [1]), rows(4)])
        assert labels_of(nested) == [14 % 3, 10 % 3, 17 % 3, 1, 0, 1, 2, 0]

    @pytest.mark.parametrize("targets", [[0] * 12, list("abc") * 4, [[0], [1, 2]] * 6, [0, 1, 2]])
    def test_attributes_that_lie(self, targets: Any) -> None:
        # e.g. a target_transform: what the items say counts
        assert labels_of(Plain(targets=targets)) == [0, 1, 2] * 4

    def test_a_walk_leaves_random_numbers_alone(self) -> None:
        dataset, state = Plain(300), torch.get_rng_state()
        assert labels_of(dataset) == [i % 3 for i in range(300)]
        assert dataset.reads == 300
        assert torch.equal(torch.get_rng_state(), state)

    def test_items_without_a_label(self) -> None:
        for item, found in (({"x": 1, "z": 0}, "dict of {'x'"), ((1, 2, 3, 4), "list of"), (1, "Tensor")):
            with pytest.raises(TypeError, match=rf"expected a batch \(x, y\) or .*; found {found}"):
                labels_of([item])
        for label in (0.5, torch.tensor([1, 2]), torch.tensor([0.5, 0.5])):
            with pytest.raises(TypeError, match=r"expected class numbers as labels of the val data set, .* in row 0"):
                labels_of([(0, label)], "val")


class TestErrors:
    def test_loaders(self) -> None:
        class Given(Inner):
            train: Any = None
            val: Any = None

            def train_dataloader(self) -> Any:
                return super().train_dataloader() if self.train is None else self.train

            def val_dataloader(self) -> Any:
                return super().val_dataloader() if self.val is None else self.val

        inner = Given()
        inner.val = [DataLoader(rows(20))] * 2
        with pytest.raises(ValueError, match=r"expected meta_from, which of the validation loaders \[0, 1\]"):
            wrap(inner)
        inner.val = inner.val[:1]
        assert wrap(inner).meta_size == 10
        inner.train = DataLoader(rows(3), batch_size=None)
        with pytest.raises(TypeError, match="found one whose data set gives whole batches"):
            wrap(inner)
