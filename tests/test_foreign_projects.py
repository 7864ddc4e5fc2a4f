"""Data as other projects have them: kept, refused or warned about, and never dropped silently."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUIET, call
from lightning.pytorch import LightningDataModule
from methods import trainer
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lit_kd import ALMKD, KD, Distiller, SLaM, Supervised, WeightedDistillation
from lit_kd.data import UNLABELED, Batch, BlobsDataModule, DistillationDataModule, EpochSampler, as_batch
from lit_kd.data.labels import balanced_weights
from lit_kd.data.sampler import own_rows

N = 30


def numbered(n: int = N, first: int = 0) -> TensorDataset:
    """Row i holds the number i and has the label i % 3."""
    numbers = torch.arange(first, first + n)
    return TensorDataset(numbers.float().unsqueeze(1), numbers % 3)


class Items(Dataset[Any]):
    """Rows as a function of their number gives them."""

    def __init__(self, item: Any, n: int = N, **attributes: Any) -> None:
        self.item, self.n = item, n
        vars(self).update(attributes)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        return self.item(i)


def number(i: int) -> Tensor:
    return torch.tensor([float(i)])


def wrapped(train: Any, val: Any = None, set_up: bool = True, **options: Any) -> DistillationDataModule:
    """The wrapper around loaders, or around data sets in batches of five."""
    val = numbered(12, 100) if val is None else val
    loaders = [part if isinstance(part, (DataLoader, list, dict)) else DataLoader(part, 5) for part in (train, val)]
    data = DistillationDataModule.from_loaders(*loaders, **({"seed": 0} | options))
    if set_up:
        data.setup()
    return data


def numbers(loader: Any) -> list[int]:
    """The rows that an epoch draws, by the number in them."""
    return [int(i) for batch in loader for i in batch.x.flatten()]


class TestLabels:
    def test_a_collate_function_that_mixes_rows(self) -> None:
        def mix(items: Any) -> Any:
            x, y = default_collate(items)
            soft = nn.functional.one_hot(y, 3).float()
            return (x + x.roll(1, 0)) / 2, (soft + soft.roll(1, 0)) / 2

        data = wrapped(DataLoader(numbered(), 5, collate_fn=mix))
        with pytest.raises(ValueError, match=r"the label that row .* has, .*mix mixes rows, let the method do so"):
            next(iter(data.train_dataloader()))

    def test_trusted_rows_are_not_mixed_either(self) -> None:
        def swap(items: Any) -> Any:
            x, y = default_collate(items)
            return x, y.roll(1)

        data = wrapped(numbered(), DataLoader(numbered(12, 100), 5, collate_fn=swap))
        with pytest.raises(ValueError, match=r"the label that row .* has, .*swap mixes rows"):
            data.parts.meta_rows().__getitems__([0, 1, 2, 3])

    def test_items_speak_where_targets_say_otherwise(self) -> None:
        true = [i % 3 for i in range(400)]
        noisy = [(y + (i % 11 == 5)) % 3 for i, y in enumerate(true)]
        data = wrapped(Items(lambda i: (number(i), noisy[i]), 400, targets=true))
        assert data.labels[:400].tolist() == noisy
        # one alone, which nobody looks at beforehand
        data = wrapped(Items(lambda i: (number(i), (true[i] + (i == 2)) % 3), 400, targets=true))
        with pytest.raises(ValueError, match=r"the label that row 2 of Items has, 2, found 0.*targets or labels"):
            list(data.train_dataloader())

    def test_rows_that_are_left_out(self) -> None:
        def kept(items: Any) -> Any:
            return default_collate([item for item in items if item is not None and item[0] != 8])

        data = Items(lambda i: None if i == 7 else (number(i), i % 3))
        with pytest.raises(ValueError, match=r"expected items in rows \[7\] of Items, found None.*Subset"):
            wrapped(DataLoader(data, 5, collate_fn=kept))
        known = Items(lambda i: (number(i), i % 3), 400, targets=[i % 3 for i in range(400)])
        with pytest.raises(ValueError, match=r"expected 5 rows from the collate function .*kept, found 4: let it keep"):
            list(wrapped(DataLoader(known, 5, collate_fn=kept)).train_dataloader())

    def test_another_row_in_the_place_of_a_broken_one(self) -> None:
        calls = random.Random(0)
        data = Items(lambda i: (number(i), i % 3) if i != 8 or calls.random() < 0.5 else (number(0), 0))
        with pytest.raises(ValueError, match=r"the label that row 8 of Items has, .*let an item's label never change"):
            [list(wrapped(data).train_dataloader()) for _ in range(20)]

    def test_soft_labels_of_items(self) -> None:
        def soft(i: int) -> Tensor:
            return torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.0, 0.0, 0.0]][i % 3])

        given = Items(lambda i: (number(i), soft(i)))
        data = wrapped(given)
        assert data.num_classes == 3
        assert data.labels[:3].tolist() == [0, 1, UNLABELED]
        for x, y, _ in data.train_dataloader():
            assert torch.equal(y, torch.stack([soft(int(i)) for i in x]))
        with pytest.raises(ValueError, match="found soft labels: choose a rule that does not train on meta rows"):
            data.parts.train_rows(meta=True)
        with pytest.raises(ValueError, match="expected class numbers as labels to make noisy or hide, found soft"):
            wrapped(given, labeled=6)
        trainer().fit(KD(nn.Linear(1, 3), nn.Linear(1, 3), num_classes=3), wrapped(given, set_up=False))

    def test_each_loader_collates_its_own_rows(self) -> None:
        def plus(value: int) -> Any:
            return lambda items: [part + value * (part.dim() - 1) for part in default_collate(items)]

        data = wrapped(
            DataLoader(numbered(), 5, collate_fn=plus(1000)), DataLoader(numbered(12, 100), 4, collate_fn=plus(5000))
        )
        assert sorted(numbers(data.train_dataloader())) == list(range(1000, 1000 + N))
        val, meta = numbers(data.val_dataloader()), data.parts.meta_rows().__getitems__([0, 1, 2]).x
        assert all(5100 <= i < 5112 for i in [*val, *meta.flatten().tolist()])
        joined = wrapped(data.inner.train_dataloader(), data.inner.val_dataloader(), train_on_meta=True)
        # those that are trained on look like training rows
        assert all(1000 <= i < 1112 for i in numbers(joined.train_dataloader()))


class TestBatches:
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 1])

    @pytest.mark.parametrize("name", ["labels", "label", "y"])
    def test_mappings(self, name: str) -> None:
        x, y, index = as_batch({"input_ids": self.x, name: self.y, "attention_mask": self.x > 0})
        assert set(x) == {"input_ids", "attention_mask"}
        assert torch.equal(y, self.y)
        assert index is None
        x, y, _ = as_batch({"image": self.x, "path": ["a"] * 4, name: self.y}, input_key="image")
        assert torch.equal(x, self.x)

    def test_shapes_and_kinds_of_labels(self) -> None:
        column = self.y.unsqueeze(1).int()
        assert torch.equal(as_batch((self.x, column)).y, self.y)
        assert as_batch((self.x, column), keep_shape=True).y.shape == (4, 1)
        assert as_batch((self.x, self.x > 0)).y.shape == (4, 2)
        assert torch.equal(as_batch([self.x, self.x]).y, self.x)
        assert torch.equal(as_batch((self.x, self.y, torch.arange(4))).index, torch.arange(4))

    def test_more_parts(self) -> None:
        batch = self.x, ["a"] * 4, self.y, self.x
        assert torch.equal(as_batch(batch, label_key=2).y, self.y)
        assert torch.equal(as_batch(batch, label_key=2, input_key=3).x, self.x)

    @pytest.mark.parametrize(
        "batch",
        [
            (x, y, x),
            (x, y, y.float()),
            {"x": x},
            {"y": y},
            {"x": x, "y": y, "path": ["a"] * 4},
            {"x": x, "y": y.tolist()},
            (x, y, y, y),
            (["a"] * 4, y),
            None,
        ],
    )
    def test_what_is_refused(self, batch: Any) -> None:
        with pytest.raises(TypeError, match=r"expected a batch \(x, y\).*; found .*label_key and input_key"):
            as_batch(batch)

    def test_which_labels(self) -> None:
        batch = {"x": self.x, "y": self.y, "label": self.y + 1}
        with pytest.raises(TypeError, match=r"expected labels under one key, found \['label', 'y'\]: pass label_key"):
            as_batch(batch)
        assert torch.equal(as_batch(batch, label_key="y", input_key="x").y, self.y)

    def test_the_wrapper_reads_them_too(self) -> None:
        class Dicts(LightningDataModule):
            def __init__(self) -> None:
                super().__init__()
                self.seen: list[Any] = []

            def train_dataloader(self) -> Any:
                return DataLoader(Items(lambda i: {"image": number(i), "target": torch.tensor([i % 3]), "id": i}), 5)

            def val_dataloader(self) -> Any:
                return self.train_dataloader()

            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                self.seen.append(set(batch))
                return batch | {"image": batch["image"] + 0.5}

        inner = Dicts()
        data = DistillationDataModule(inner, label_key="target", input_key="image", seed=0)
        data.setup()
        for batch in data.train_dataloader():
            assert torch.equal(batch.y, batch.x[:, 0].long() % 3)
            after = data.on_after_batch_transfer(batch, 0)
            assert torch.equal(after.x, batch.x + 0.5)
            assert torch.equal(after.index, batch.index)
        assert inner.seen == [{"image", "target"}] * 6

    @pytest.mark.parametrize("around", [None, DistillationDataModule])
    def test_training_on_mappings(self, around: Any) -> None:
        class Keywords(nn.Linear):
            def forward(self, *, number: Tensor, scale: Tensor) -> Tensor:
                return super().forward(number * scale)

        rows, held = (
            Items(lambda i: {"number": number(i), "scale": torch.ones(1), "labels": torch.tensor([i % 3])}, n)
            for n in (N, 12)
        )
        inner = LightningDataModule.from_datasets(rows, held, batch_size=5)
        run = trainer()
        run.fit(KD(Keywords(1, 3), Keywords(1, 3), num_classes=3), datamodule=around(inner) if around else inner)
        assert 0 <= run.callback_metrics["val/accuracy"] <= 1

    def test_rows_that_a_hook_mixes_are_none_of_the_data(self) -> None:
        inner = DistillationDataModule.from_datasets(numbered(), numbered(12, 100)).inner
        inner.on_after_batch_transfer = lambda batch, _: (batch[0], nn.functional.one_hot(batch[1], 3).float())
        data = DistillationDataModule(inner)
        data.setup()
        _, y, index = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        assert y.shape == (N, 3)
        assert index is None


class Own(Sampler[Any]):
    """Somebody's sampler."""

    def __iter__(self) -> Any:
        yield from ([0, 1, 2],)

    def __len__(self) -> int:
        return 1


class TestSamplers:
    def test_rows_of_subset_samplers(self) -> None:
        whole = numbered()
        rows = torch.randperm(N).tolist()
        for sampler in (SubsetRandomSampler(rows[:20]), rows[:20]):
            data = wrapped(
                DataLoader(whole, 5, sampler=sampler), DataLoader(whole, sampler=SubsetRandomSampler(rows[20:]))
            )
            assert sorted(numbers(data.train_dataloader())) == sorted(rows[:20])
            held = (
                numbers(data.val_dataloader())
                + data.parts.meta_rows().__getitems__(list(range(5))).x.flatten().tolist()
            )
            assert sorted(held) == sorted(rows[20:])

    def test_rows_in_both_are_refused(self) -> None:
        whole = numbered()
        part = Subset(whole, range(10, 20))
        for train, val in (
            (whole, whole),
            (whole, part),
            (ConcatDataset([numbered(), part]), Subset(whole, [0, 19])),
            (DataLoader(whole, 5, sampler=SubsetRandomSampler(range(25))), DataLoader(whole, sampler=range(24, 30))),
        ):
            with pytest.raises(ValueError, match=r"not trained on, found .* rows of the same TensorDataset in both"):
                wrapped(train, val)
        wrapped(ConcatDataset([Subset(whole, range(10)), numbered()]), part)

    def test_classes_are_compared(self) -> None:
        def called(*names: str) -> TensorDataset:
            made = numbered()
            made.classes = list(names)  # type: ignore[attr-defined]
            return made

        train, other = called("a", "b", "c"), called("b", "c")
        for val in (other, Subset(other, range(9)), ConcatDataset([called("a"), other])):
            with pytest.raises(ValueError, match="class 0 is 'a' in the train data and 'b' in the val data"):
                wrapped(train, val)
        data = DistillationDataModule.from_datasets(train, called("a", "b"), other)  # the last class is missing
        data.setup()
        with pytest.raises(ValueError, match="class 0 is 'a' in the train data and 'b' in the test data"):
            data.test_dataloader()

    def test_weighted_rows(self) -> None:
        weights = [float(i < 3) for i in range(N)]
        data = wrapped(DataLoader(numbered(), 5, sampler=WeightedRandomSampler(weights, 900)))
        drawn = numbers(data.train_dataloader())
        assert len(drawn) == 900
        assert all(200 < drawn.count(i) < 400 for i in range(3))
        assert sorted(numbers(wrapped(data.inner.train_dataloader(), row_weights="uniform").train_dataloader())) == [
            *range(N)
        ]

    def test_random_sampler(self) -> None:
        few = wrapped(DataLoader(numbered(), 5, sampler=RandomSampler(numbered(), num_samples=20)))
        assert len(set(numbers(few.train_dataloader()))) == 20
        replaced = wrapped(DataLoader(numbered(), 5, sampler=RandomSampler(numbered(), replacement=True)))
        assert len(numbers(replaced.train_dataloader())) == N
        assert len(set(numbers(replaced.train_dataloader()))) < N

    def test_those_that_nobody_knows(self) -> None:
        own, batches = DataLoader(numbered(), 5, sampler=Own()), DataLoader(numbered(), batch_sampler=Own())
        with pytest.raises(ValueError, match=r"expected a train loader .* found Own: .* row_weights: 'uniform'"):
            wrapped(own)
        with pytest.raises(ValueError, match=r"found Own: .* a number a row, and batch_size"):
            wrapped(batches, batch_size=5)
        with pytest.raises(ValueError, match="found one with a batch sampler of its own: set batch_size"):
            wrapped(batches, row_weights="uniform")
        for data in (wrapped(own, row_weights="uniform"), wrapped(batches, row_weights="uniform", batch_size=5)):
            assert [len(batch.y) for batch in data.train_dataloader()] == [5] * 6
        held = numbered(12, 100)
        with pytest.raises(ValueError, match=r"expected a val loader .* found Own: give it the rows as a .*Subset$"):
            wrapped(numbered(), DataLoader(held, sampler=Own()), row_weights="uniform")

    def test_plain_batch_sampler(self) -> None:
        batches = BatchSampler(SubsetRandomSampler(range(10)), 4, drop_last=True)
        data = wrapped(DataLoader(numbered(), batch_sampler=batches))
        assert (data.train_size, data.batch_size, data.drop_last) == (10, 4, True)
        shorter = SequentialSampler(range(10))
        with pytest.raises(ValueError, match="found SequentialSampler"):
            wrapped(DataLoader(numbered(), 5, sampler=shorter))


class TestRowWeights:
    def test_balanced(self) -> None:
        weights = balanced_weights(torch.tensor([0, 0, 0, 1, UNLABELED, 0]).numpy())
        assert weights.tolist() == [0.625, 0.625, 0.625, 2.5, 1, 0.625]

    def test_of_our_own_data(self) -> None:
        data = BlobsDataModule(batch_size=50, seed=0, row_weights="balanced", labeled=40)
        data.setup()
        y = torch.cat([batch.y for batch in data.train_dataloader()])
        assert len(y) == data.train_size
        shares = y[y >= 0].bincount() / (y >= 0).sum()
        assert (shares - 1 / data.num_classes).abs().max() < 0.25

    def test_a_number_a_row(self) -> None:
        data = wrapped(numbered(), row_weights=[0.0] * 20 + [1.0] * 10, train_on_meta=True)
        drawn = numbers(data.train_dataloader())
        assert len(drawn) == 36  # with the meta rows, which count like the mean of the others
        assert not set(drawn) & set(range(20))
        for wrong in ([1.0] * 4, [0.0] * N, [-1.0] + [1.0] * (N - 1), [float("nan")] * N):
            with pytest.raises(ValueError, match=r"expected in row_weights a number .* each of 30 training rows"):
                wrapped(numbered(), row_weights=wrong).train_dataloader()

    def test_processes_draw_what_one_draws(self) -> None:
        weights = torch.rand(50, dtype=torch.float64).numpy()
        one, *several = (EpochSampler(50, 20, r, i, 3, None, weights) for r, i in ((1, 0), (2, 0), (2, 1)))
        assert [i for pair in zip(*several, strict=True) for i in pair] == list(one)


def start(worker: int) -> None:
    torch.manual_seed(worker)


class TestLoaders:
    def test_settings_of_each_loader(self) -> None:
        processes = {"num_workers": 1, "worker_init_fn": start, "timeout": 9, "prefetch_factor": 3}
        train = DataLoader(numbered(), 5, persistent_workers=True, multiprocessing_context="fork", **processes)
        val = DataLoader(numbered(12, 100), 4, drop_last=True, **(processes | {"timeout": 7, "in_order": False}))
        data = wrapped(train, val)
        ours = data.train_dataloader(), data.val_dataloader()
        for name in ("num_workers", "worker_init_fn", "timeout", "prefetch_factor", "persistent_workers", "in_order"):
            assert [getattr(loader, name) for loader in ours] == [getattr(loader, name) for loader in (train, val)], (
                name
            )
        assert ours[0].multiprocessing_context.get_start_method() == "fork"
        assert [(loader.batch_size, loader.drop_last) for loader in ours] == [(5, False), (4, True)]
        assert sorted(numbers(ours[0])) == sorted(numbers(ours[0])) == list(range(N))  # its processes persist
        again = wrapped(train, val, num_workers=0, batch_size=3)
        assert [len(list(loader)) for loader in (again.train_dataloader(), again.val_dataloader())] == [10, 2]

    def test_warnings(self) -> None:
        class Longer(DataLoader[Any]):
            def __iter__(self) -> Any:
                yield from ()

        with pytest.warns(UserWarning, match="the val loader's own __iter__ is not used"):
            wrapped(numbered(), Longer(numbered(12, 100), 5))

    def test_several_validation_loaders(self) -> None:
        loaders = {"near": DataLoader(numbered(12, 100), 4), "far": DataLoader(numbered(9, 200), 4)}
        data = wrapped(numbered(), loaders, meta_from="far", meta=3)
        assert data.parts.meta_rows().__getitems__([0, 1, 2]).x.min() >= 200
        ours = data.val_dataloader()
        assert list(ours) == ["near", "far"]
        assert ours["near"] is loaders["near"]
        assert len(numbers(ours["far"])) == 6
        data = wrapped(numbered(), list(loaders.values()), meta_from=0)
        first, second = data.val_dataloader()
        assert (len(numbers(first)), second) == (6, loaders["far"])
        assert wrapped(numbered(), loaders, meta=0).val_dataloader() == loaders
        with pytest.raises(ValueError, match=r"expected meta_from as one of \['near', 'far'\], found 'middle'"):
            wrapped(numbered(), loaders, meta_from="middle")

    @pytest.mark.parametrize("which", [0, 1])
    def test_a_fit_measures_each_validation_loader(self, which: int) -> None:
        """The rule of ALM-KD hears of the loader of the meta rows alone: the other may hold test rows."""
        near, far = numbered(12, 0), numbered(9, 200)
        data = wrapped(numbered(), [DataLoader(near, 4), DataLoader(far, 4)], meta_from=which, meta=3, num_classes=3)
        teacher = nn.Linear(1, 3)
        teacher.load_state_dict({"weight": torch.zeros(3, 1), "bias": torch.tensor([3.0, 0, -1])})  # always class 0
        model = ALMKD(nn.Linear(1, 3), teacher, num_classes=3)
        fitted = trainer(max_epochs=2)
        fitted.fit(model, datamodule=data)
        for k, loader in enumerate(data.val_dataloader()):
            batches = [model.unpack(batch) for batch in loader]
            x, y = torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches])  # type: ignore[arg-type]
            right = float((model.eval()(x).argmax(1) == y).float().mean())
            assert fitted.callback_metrics[f"val/accuracy/dataloader_idx_{k}"] == pytest.approx(right)
            if k == which:
                assert len(y) == (9, 6)[which]
                assert model.table.shared["errors"][-1, 1, 1] == (y != 0).sum()

    def test_rows_that_are_repeated_in_loaders_by_name(self) -> None:
        """Of three rows the second of two processes has one, and repeats another."""
        padded = DataLoader(numbered(3), 2, sampler=DistributedSampler(numbered(3), num_replicas=2, rank=1))
        for loaders in ({"near": DataLoader(numbered(4), 2), "far": padded}, [None, padded]):
            assert own_rows(loaders, 1, 0, 2) == 1


class Folds(LightningDataModule):
    """A data module with state, whose rows depend on it."""

    fold = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append(f"prepare {self.trainer is not None}")

    def setup(self, stage: str) -> None:
        self.held = range(10 * self.fold, 10 * self.fold + 10)

    def train_dataloader(self) -> Any:
        whole = numbered()
        return DataLoader(Subset(whole, [i for i in range(N) if i not in self.held]), 5, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Subset(numbered(), list(self.held)), 5)

    def state_dict(self) -> dict[str, Any]:
        return {"fold": self.fold}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.fold = state_dict["fold"]
        self.setup("fit")

    def on_exception(self, exception: BaseException) -> None:
        self.calls.append(str(exception))


class Watched(Supervised):
    """Notes what it trains on."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(nn.Linear(1, 3), num_classes=3)
        self.rows: set[int] = set()
        self.fails = fails

    def prepare_batch(self, batch: Batch) -> Batch:
        if self.fails:
            raise ValueError("no")
        self.rows.update(int(i) for i in batch.x)
        return batch


careful = partial(torch.optim.SGD, lr=1e-6)


class TestModules:
    def test_each_fit_sets_up_anew(self) -> None:
        inner = Folds()
        data = DistillationDataModule(inner, num_classes=3)
        for inner.fold in (0, 1):
            model = Watched()
            trainer(max_epochs=1).fit(model, data)
            assert model.rows == set(range(N)) - set(inner.held)

    def test_state_and_hooks(self, tmp_path: Path) -> None:
        first, inner = Folds(), Folds()
        first.fold = 2
        one = trainer(max_epochs=1)
        one.fit(Watched(), DistillationDataModule(first, num_classes=3))
        one.save_checkpoint(tmp_path / "one.ckpt")
        model = Watched()
        trainer().fit(model, DistillationDataModule(inner, num_classes=3), ckpt_path=tmp_path / "one.ckpt")
        assert inner.fold == 2
        assert model.rows == set(range(20))
        with pytest.raises(ValueError, match="no"):
            trainer().fit(Watched(fails=True), DistillationDataModule(inner, num_classes=3))
        assert inner.calls == ["prepare True", "prepare True", "no"]

    def test_rows_that_change_after_the_method_has_seen_some(self, tmp_path: Path) -> None:
        class Early(Watched):
            def setup(self, stage: str) -> None:
                super().setup(stage)
                self.trainer.fit_loop.setup_data()

        model = Early
        inner = Folds()
        one = trainer(max_epochs=1)
        one.fit(model(), DistillationDataModule(inner, num_classes=3))
        one.save_checkpoint(tmp_path / "one.ckpt")
        inner.fold = 1
        with pytest.raises(ValueError, match="found others by the state of the wrapped data: restore it before fit"):
            trainer().fit(model(), DistillationDataModule(inner, num_classes=3), ckpt_path=tmp_path / "one.ckpt")
        inner.load_state_dict(torch.load(tmp_path / "one.ckpt", weights_only=True)["DistillationDataModule"]["inner"])
        trainer().fit(model(), DistillationDataModule(inner, num_classes=3), ckpt_path=tmp_path / "one.ckpt")

    def test_from_datasets(self) -> None:
        data = DistillationDataModule.from_datasets(numbered(), numbered(12, 100), numbered(4, 200), meta=3, seed=0)
        data.setup()
        assert (data.train_size, data.meta_size, data.batch_size) == (N, 3, 64)
        assert len(data.test_dataloader()) == 1


class OnCommand(LightningDataModule):
    """A data module with an option."""

    def __init__(self, rows: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.rows = rows

    def train_dataloader(self) -> Any:
        return DataLoader(numbered(self.rows), 5)

    def val_dataloader(self) -> Any:
        return DataLoader(numbered(12, 100), 4)


def test_command_line() -> None:
    inner = ("--data=DistillationDataModule", f"--data.inner={__name__}.OnCommand", "--data.inner.rows=9")
    model = ("--model=Supervised", "--model.student=mlp-4", "--trainer.max_epochs=1", "--checkpoint.dirpath=run")
    call("fit", *QUIET, *inner, *model, "--data.num_classes=3", "--data.input_shape=[1]", "--data.meta=3")
    assert torch.load("run/last.ckpt", weights_only=True)["global_step"] == 2
    with pytest.raises(ValueError, match=r"expected the number of classes .* set --data.num_classes"):
        call("fit", *QUIET, *inner, *model)


class Bytes(LightningDataModule):
    """Images of bytes, which a hook makes floats."""

    def train_dataloader(self) -> Any:
        x = torch.randint(0, 255, (30, 4), dtype=torch.uint8)
        return DataLoader(TensorDataset(x, torch.arange(30) % 3), 5)

    val_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 255, batch[1]


def test_inputs_that_a_hook_makes() -> None:
    student = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    fitted = trainer(max_epochs=1)
    fitted.fit(ALMKD(student, nn.Linear(4, 3), num_classes=3, rule="paper"), DistillationDataModule(Bytes()))
    assert fitted.callback_metrics["train/loss"].isfinite()


@pytest.mark.parametrize("method", [SLaM, WeightedDistillation])
def test_soft_labels_of_some_rows(method: type[Distiller]) -> None:
    """A row whose soft label is all zeros has none: the teacher speaks."""
    weights = []

    class Watched(method):  # type: ignore[misc, valid-type]
        def weigh(self, *args: Any) -> Any:
            weights.append(super().weigh(*args))
            return weights[-1]

    x, y = torch.randn(24, 1), nn.functional.one_hot(torch.arange(24) % 3, 3).float()
    y[12:] = 0
    val = TensorDataset(torch.randn(12, 1), torch.arange(12) % 3)
    data = DistillationDataModule.from_loaders(DataLoader(TensorDataset(x, y), 6), DataLoader(val, 6), num_classes=3)
    model = Watched(nn.Linear(1, 3), nn.Linear(1, 3), num_classes=3, **({} if method is SLaM else {"warmup_epochs": 0}))
    trainer(max_epochs=1).fit(model, data)
    assert {w.shape[1:] for w in weights} == {(2,)}
    assert sum((w[:, 1] > 0).sum() for w in weights) == 12
