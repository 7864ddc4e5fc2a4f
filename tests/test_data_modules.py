"""The base data module, through the digits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from methods import trainer
from sklearn.datasets import load_digits
from torch import Tensor

from lit_kd.data import UNLABELED, Batch, DataModule, DigitAttributesDataModule, DigitsDataModule, Source, TensorRows
from lit_kd.data.rows import Indexed, ItemRows, on_device
from lit_kd.data.vision import ImageTransform

RAW = load_digits()
# No two rows are the same image, so a row's bytes tell which one it is.
WHERE = {(image / 16).astype(np.float32).tobytes(): i for i, image in enumerate(RAW.images)}


def positions(x: Any) -> np.ndarray:
    """Which raw rows these are."""
    return np.array([WHERE[image.numpy().tobytes()] for image in x.squeeze(1)])


def ready(data: Any, world_size: int = 1, rank: int = 0, device: str = "cpu", **asked: bool) -> Any:
    """The data, set up; with a trainer if their method asks for something."""
    data.setup()
    if asked or world_size > 1 or device != "cpu":
        strategy = SimpleNamespace(root_device=torch.device(device))
        data.trainer = SimpleNamespace(
            lightning_module=SimpleNamespace(**asked),
            world_size=world_size,
            distributed_sampler_kwargs={"num_replicas": world_size, "rank": rank},
            strategy=strategy,
        )
    return data


def digits(**arguments: Any) -> DigitsDataModule:
    return ready(DigitsDataModule(**({"seed": 0} | arguments)))


def gather(loader: Any) -> Batch:
    """All batches as one."""
    batches = list(loader)
    index = None if batches[0].index is None else torch.cat([b.index for b in batches])
    return Batch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]), index)


def pairs(loader: Any) -> list[dict[str, Batch]]:
    """The batches of a loader that gives train and meta rows."""
    return [batch for batch, _, _ in loader]


class TestSplits:
    def test_disjoint_covering_with_their_labels(self) -> None:
        data = digits()
        found = []
        for loader in (data.train_dataloader(), data.loader(data.parts.meta_rows()), data.val_dataloader()):
            x, y, _ = gather(loader)
            found.append(positions(x))
            np.testing.assert_array_equal(y, RAW.target[found[-1]])
            assert x.shape[1:] == data.input_shape
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        tested, y, index = gather(data.test_dataloader())
        found.append(positions(tested))
        np.testing.assert_array_equal(y, RAW.target[found[-1]])
        assert torch.equal(gather(data.predict_dataloader()).x, tested)
        assert [len(p) for p in found] == [1078, 180, 180, 359]
        np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(1797))
        assert index.tolist() == list(range(1438, 1797))
        assert data.parts.ids == [str(p) for p in np.concatenate([np.sort(found[0]), *found[1:]])]
        assert gather(data.val_dataloader()).index.tolist() == list(range(1258, 1438))

    def test_one_split_for_every_stage(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = digits(seed=5)
        parts = data.parts
        data.setup("test")
        assert data.parts is parts
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")  # set by seed_everything
        other = DigitsDataModule()
        with pytest.raises(AttributeError, match=r"Call setup\(\) first"):
            _ = other.train_size
        other.setup("predict")
        assert other.fingerprint == data.fingerprint

    def test_counts_and_nothing(self) -> None:
        data = digits(meta=50, val=40, test=300)
        assert (data.train_size, data.meta_size, len(data.parts.val), len(data.parts.test)) == (1407, 50, 40, 300)
        data = digits(meta=0, val=0, test=0)
        assert data.train_size == 1797
        with pytest.warns(UserWarning, match="no validation rows"):
            assert data.val_dataloader() == []
        with pytest.raises(ValueError, match="expected test rows, found 0"):
            data.test_dataloader()


class TestNoise:
    def test_only_training_labels_are_corrupted(self) -> None:
        data = digits(noise="symmetric", noise_rate=0.5)
        n = data.train_size
        x, y, index = gather(data.train_dataloader())
        true = torch.from_numpy(RAW.target[positions(x)])
        assert torch.equal(data.clean_labels[index], true)
        assert torch.equal(data.labels[index], y)
        assert torch.equal(data.noisy[index], y != true)
        assert 0.38 < (y != true).float().mean() < 0.52  # 0.45 expected: one label in ten is redrawn as it was
        assert torch.equal(data.labels[n:], data.clean_labels[n:])
        for loader in (data.val_dataloader, data.test_dataloader):
            batch = gather(loader())
            np.testing.assert_array_equal(batch.y, RAW.target[positions(batch.x)])
        assert data.trusted.sum() == data.meta_size == 180
        assert not data.trusted[:n].any()
        assert torch.equal(data.clean_labels, digits().clean_labels)  # the noise leaves the split

    def test_confusable_pairs(self) -> None:
        data = digits(noise="asymmetric", noise_rate=1.0)
        become = torch.tensor([6, 7, 3, 2, 9, 8, 0, 1, 5, 4])
        n = data.train_size
        assert torch.equal(data.labels[:n], become[data.clean_labels[:n]])
        own = digits(noise="asymmetric", noise_rate=1.0, pairs={3: 5})
        clean = own.clean_labels[:n]
        assert torch.equal(own.labels[:n], torch.where(clean == 3, 5, clean))
        turned = digits(transition=np.eye(10)[::-1].tolist())
        assert torch.equal(turned.labels[:n], 9 - turned.clean_labels[:n])
        assert turned.knows_truth
        assert digits(labeled=100).knows_truth
        assert not digits().knows_truth


class TestIndices:
    def test_stable_under_shuffling(self) -> None:
        loader = digits().train_dataloader()
        epochs = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            epochs.append(gather(loader))
        (x, _, index), (other, _, shuffled) = epochs
        assert not torch.equal(index, shuffled)
        assert index.sort().values.tolist() == list(range(1078))
        a, b = positions(x[index.argsort()]), positions(other[shuffled.argsort()])
        np.testing.assert_array_equal(a, b)
        assert (np.diff(a) > 0).all()  # the order of the sorted split

    def test_meta_rows_follow(self) -> None:
        data = digits(train_on_meta=True, noise="symmetric", noise_rate=0.4)
        x, y, index = gather(data.train_dataloader())
        assert index.sort().values.tolist() == list(range(data.train_size + data.meta_size))
        assert torch.equal(y, data.labels[index])
        meta = index >= data.train_size
        np.testing.assert_array_equal(y[meta], RAW.target[positions(x[meta])])
        where = dict(zip(index.tolist(), positions(x), strict=True))
        streamed = gather(b["meta"] for b in pairs(ready(data, needs_meta=True).train_dataloader()))
        assert [where[i] for i in streamed.index.tolist()] == positions(streamed.x).tolist()


class TestMeta:
    @pytest.mark.parametrize(("meta", "val", "joined"), [(0.1, 0.1, False), (20, 0, True)])
    def test_as_many_batches_as_train(self, meta: float, val: float, joined: bool) -> None:
        data = ready(
            DigitsDataModule(meta=meta, val=val, batch_size=50, seed=0), needs_meta=True, trains_on_meta=joined
        )
        loader = data.train_dataloader()
        batches = pairs(loader)
        assert len(loader) == len(batches) == -(-(data.train_size + joined * data.meta_size) // 50)
        for batch in batches:
            assert len(batch["train"].y) == len(batch["meta"].y)
            assert torch.equal(batch["meta"].y, data.clean_labels[batch["meta"].index])
        counts = torch.bincount(torch.cat([b["meta"].index for b in batches]) - data.train_size)
        assert counts.max() - counts.min() <= 1
        assert len(counts) == data.meta_size

    def test_ranks_share_the_streams(self) -> None:
        def streams(world_size: int, rank: int, batch_size: int) -> list[dict[str, Batch]]:
            data = DigitsDataModule(batch_size=batch_size, seed=0)
            return pairs(ready(data, world_size, rank, needs_meta=True).train_dataloader())

        one = streams(1, 0, 90)
        ranks = [streams(3, rank, 30) for rank in range(3)]
        assert {len(r) for r in ranks} == {len(one)}
        for k, batch in enumerate(one[:-1]):  # the last one is padded
            for name in ("train", "meta"):
                together = torch.cat([r[k][name].index for r in ranks])
                assert together.sort().values.tolist() == batch[name].index.sort().values.tolist()

    def test_refused(self) -> None:
        data = ready(DigitsDataModule(meta=0), needs_meta=True)
        with pytest.raises(ValueError, match=r"meta split for SimpleNamespace, found 0 rows. Set .* meta=0.1"):
            data.train_dataloader()
        with pytest.raises(ValueError, match="meta split for train_on_meta, found 0 rows"):
            digits(meta=0, train_on_meta=True).train_dataloader()
        data = ready(DigitsDataModule(train_on_meta=False), trains_on_meta=True)
        with pytest.raises(ValueError, match=r"SimpleNamespace trains on the meta rows, found false. Remove"):
            data.train_dataloader()
        with pytest.raises(ValueError, match=r"expected with drop_last at least one full batch.*found 1078 training"):
            digits(drop_last=True, batch_size=1079).train_dataloader()


class Blobs(DataModule):
    """A foreign author's data module: the documented way to write one."""

    num_classes = 3
    input_shape = (2,)

    def __init__(self, labels: Any = None, own_val: bool = False, scale: float = 1.0, **shared: Any) -> None:
        super().__init__(**({"seed": 0} | shared))
        self.y = np.arange(90) % 3 if labels is None else np.asarray(labels)
        self.own_val = own_val
        self.scale = scale

    def load(self) -> Source:
        n = len(self.y)
        x = torch.stack([torch.arange(float(n)), torch.from_numpy(self.y.reshape(n, -1)[:, 0]).float()], dim=1)
        plain, identity = TensorRows(x * self.scale), (x * self.scale).numpy().tobytes()
        source = Source(TensorRows(x, torch.neg), plain, self.y, plain, np.maximum(self.y, 0), identity=identity)
        if self.own_val:
            source.val, source.val_labels = TensorRows(1000 + x[:30]), self.y[:30]
            source.val_train = TensorRows(1000 + x[:30], torch.neg)
        return source


class Several(Blobs):
    task = "multilabel"


class TestSource:
    def test_fingerprint(self) -> None:
        noisy = {"noise": "symmetric", "noise_rate": 0.4}
        made = [{}, {"seed": 1}, noisy, noisy | {"noise_rate": 0.5}, {"meta": 0.2}, {"scale": 2.0}]
        prints = [ready(Blobs(**arguments)).fingerprint for arguments in made]
        assert len(set(prints)) == len(prints)
        assert prints[0] == ready(Blobs(batch_size=3, train_on_meta=True)).fingerprint

    def test_augmented_rows_in_training_only(self) -> None:
        data = ready(Blobs(train_on_meta=True), needs_meta=True)
        for batch in pairs(data.train_dataloader()):
            assert (batch["train"].x <= 0).all()
            assert (batch["meta"].x >= 0).all()
        assert (gather(data.val_dataloader()).x >= 0).all()

    @pytest.mark.parametrize("joined", [False, True])
    def test_own_validation_rows(self, joined: bool) -> None:
        data = Blobs(own_val=True, meta=0.4, val=0.5, train_on_meta=joined, batch_size=7)
        batches = pairs(ready(data, needs_meta=True).train_dataloader())
        assert (data.train_size, data.meta_size, len(data.parts.val)) == (90, 12, 18)
        train, meta = (gather(b[name] for b in batches) for name in ("train", "meta"))
        val = gather(data.val_dataloader())
        assert (meta.x >= 1000).all()
        assert not set(meta.x[:, 0].tolist()) & set(val.x[:, 0].tolist())
        assert torch.equal(meta.x[:, 1] - 1000, meta.y.float())
        from_val = -train.x[:, 0] >= 1000
        assert torch.equal(from_val, train.index >= 90)
        assert from_val.sum() == 12 * joined
        np.testing.assert_array_equal(-train.x[~from_val][:, 0], train.index[~from_val])

    @pytest.mark.parametrize("several", [False, True])
    def test_unlabeled_rows_are_training_rows(self, several: bool) -> None:
        rows = np.arange(90)
        labels = np.stack([rows % 2, rows // 2 % 2, rows * 0 + 1], axis=1) if several else rows % 3
        labels[:60] = UNLABELED
        kind = Several if several else Blobs
        data = ready(kind(labels, noise="symmetric", noise_rate=1.0, meta=0.2, val=0.2))
        assert data.meta_size == len(data.parts.val) == 6
        assert (data.labels == UNLABELED).sum() == (data.clean_labels == UNLABELED).sum() == 60 * labels[0].size
        assert (data.labels[data.train_size :] >= 0).all()
        labels[70] = 3
        with pytest.raises(ValueError, match=r"training labels in \[0, [23]\) \(or -1 .* in row 70 \(1 such"):
            ready(kind(labels))

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="one integer label for each of 3 training rows, found float64"):
            ready(Blobs([0.0, 1.0, 0.0]))

        class Wrong(Blobs):
            changes: ClassVar[dict[str, Any]] = {"test_labels": np.full(90, UNLABELED)}

            def load(self) -> Source:
                source = super().load()
                vars(source).update(self.changes)
                return source

        with pytest.raises(ValueError, match=r"test labels in \[0, 3\), found -1 in row 0 \(90 such rows\)"):
            ready(Wrong())
        Wrong.changes = {"plain": TensorRows(torch.zeros(3, 2))}
        with pytest.raises(ValueError, match="as many plain as augmented rows, found 3 and 90"):
            ready(Wrong())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transition": [[1.0]], "noise": "symmetric"}, "either transition or noise"),
        ({"on_device": True, "num_workers": 2}, "expected num_workers=0 with on_device, found 2"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits(**arguments)


class TestSeveralLabels:
    """The attributes of the digits: each row is 0 or 1 for each of five."""

    def attributes(self, **arguments: Any) -> DigitAttributesDataModule:
        return ready(DigitAttributesDataModule(**({"seed": 0} | arguments)))

    def test_labels_are_true_of_the_digit(self) -> None:
        data = self.attributes()
        assert (data.num_classes, data.input_shape, len(data.class_names)) == (5, (1, 8, 8), 5)
        n = lambda holds: [int(holds(digit)) for digit in range(10)]  # noqa: E731
        loops = n(lambda d: str(d) in "04689")
        table = np.stack([n(lambda d: d % 2 == 0), n(lambda d: d in (2, 3, 5, 7)), n(lambda d: d > 4), loops], axis=1)
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            x, y, index = gather(loader)
            digit = RAW.target[positions(x)]
            np.testing.assert_array_equal(y[:, :4], table[digit])
            np.testing.assert_array_equal(y[:, 4], digit % 3 == 0)
            assert y.dtype == torch.int64
            trained = index < len(data.labels)
            assert torch.equal(data.labels[index[trained]], y[trained])

    def test_stratified_by_combination(self) -> None:
        data = self.attributes()
        assert (data.train_size, data.meta_size, len(data.parts.val), len(data.parts.test)) == (1078, 180, 180, 359)
        for part in (data.parts.val, data.parts.test):
            x, _, _ = gather(data.loader(part))
            digit = np.where(RAW.target == 7, 5, RAW.target)  # 5 and 7 have the same attributes
            share = np.bincount(digit, minlength=10) / len(digit)
            found = np.bincount(digit[positions(x)], minlength=10)
            assert (abs(found - share * len(x)) < 2).all()

    def test_noise_flips_half_of_the_rate(self) -> None:
        data = self.attributes(noise="symmetric", noise_rate=0.4)
        n = data.train_size
        wrong = data.labels != data.clean_labels
        shares = wrong[:n].float().mean(dim=0)
        assert (abs(shares - 0.2) < 4 * (0.2 * 0.8 / n) ** 0.5).all()  # four standard errors
        rows = wrong[:n].any(dim=1).float().mean()
        assert abs(rows - (1 - 0.8**5)) < 0.06  # each entry for itself
        assert torch.equal(data.noisy, wrong.any(dim=1))
        assert not wrong[n:].any()
        few = self.attributes(labeled=100, noise="symmetric", noise_rate=0.4)
        kept = (few.labels != UNLABELED).all(dim=1)
        assert torch.equal(kept, (few.labels != UNLABELED).any(dim=1))
        assert kept.sum() == 100 + few.meta_size
        assert torch.equal(few.labels[kept], data.labels[kept])
        assert not few.noisy[~kept].any()

    @pytest.mark.parametrize("noise", [{"noise": "asymmetric", "noise_rate": 0.1}, {"transition": np.eye(5).tolist()}])
    def test_noise_of_one_class_a_sample_is_refused(self, noise: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="expected symmetric noise or none with several labels a sample"):
            self.attributes(**noise)


class Probe(LightningModule):
    """Records what the trainer hands out."""

    needs_meta = trains_on_meta = True

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
        self.seen: dict[str, list[Any]] = {"fit": [], "val": [], "test": []}

    def training_step(self, batch: Any) -> Tensor:
        self.seen["fit"].append((self.current_epoch, batch))
        return torch.nn.functional.cross_entropy(self.layer(batch["train"].x.flatten(1)), batch["train"].y)

    def validation_step(self, batch: Any) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Any) -> None:
        self.seen["test"].append(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_in_a_trainer() -> None:
    data, model, run = DigitsDataModule(seed=0, batch_size=100), Probe(), trainer(max_epochs=2)
    run.fit(model, datamodule=data)
    fits = model.seen["fit"]
    assert len(fits) == 2 * 13  # 1258 rows
    orders = [torch.cat([b["train"].index for e, b in fits if e == epoch]).tolist() for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(1258))
    assert orders[0] != orders[1]
    assert all(isinstance(b["meta"], Batch) and len(b["meta"].y) == len(b["train"].y) for _, b in fits)
    assert torch.cat([b.index for b in model.seen["val"]]).unique().tolist() == list(range(1258, 1438))
    run.test(model, datamodule=data, verbose=False)
    x, y, _ = gather(model.seen["test"])
    np.testing.assert_array_equal(y, RAW.target[positions(x)])


class TestWorkers:
    def test_same_batches(self) -> None:
        here, there = digits(), digits(num_workers=2)
        for name in ("train_dataloader", "val_dataloader"):
            a, b = gather(getattr(here, name)()), gather(getattr(there, name)())
            assert torch.equal(a.x, b.x)
            assert torch.equal(a.y, b.y)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_they_start_with_the_first_batch(self, workers: int) -> None:
        # Lightning makes the iterator before it tells the sampler the epoch of a resumed run and torch the epoch's seed
        loader = ready(Blobs(num_workers=workers)).train_dataloader()
        loader.sampler.set_epoch(3)
        torch.manual_seed(7)
        expected = gather(loader).index.tolist(), torch.rand(2).tolist()
        loader.sampler.set_epoch(0)
        batches = iter(loader)
        loader.sampler.set_epoch(3)
        torch.manual_seed(7)
        assert (gather(batches).index.tolist(), torch.rand(2).tolist()) == expected


class TestOnDevice:
    """Torch's device ``meta``, which is always there, stands for an accelerator: its tensors have shapes only."""

    def test_batches_are_cut_there_of_one_copy(self) -> None:
        data = ready(DigitsDataModule(on_device=True, batch_size=50), device="meta")
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
        for loader in loaders:
            batch = next(iter(loader))
            assert {part.device.type for part in batch if part is not None} == {"meta"}
            assert batch.x.shape == (50, 1, 8, 8)
        moved = loaders[0].dataset.rows.x
        assert all(loader.dataset.rows.x is moved for loader in loaders)
        assert data._move.cache_info().currsize == 1  # the labels' slices are not kept
        data.teardown("fit")  # frees the device
        assert data.train_dataloader().dataset.rows.x is not moved

    def test_augmented_there(self) -> None:
        rows = TensorRows(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), ImageTransform([0.5] * 3, [0.2] * 3, 2, True))
        moved = on_device(rows, lambda x: x.to("meta")).fetch([4, 0])
        assert (moved.device.type, moved.shape, moved.dtype) == ("meta", (2, 3, 8, 8), torch.float32)

    def test_same_batches_as_without(self) -> None:
        batches = [gather(ready(DigitsDataModule(on_device=on, seed=0), x=True).train_dataloader()) for on in (0, 1)]
        torch.testing.assert_close(*batches, rtol=0, atol=0)

    def test_rows_read_one_by_one_are_refused(self) -> None:
        rows = Indexed(ItemRows([(torch.zeros(2), 0)]), np.arange(1), torch.zeros(1).long(), None)
        with pytest.raises(ValueError, match="expected rows of tensors in memory with on_device, found ItemRows"):
            rows.to(torch.device("cpu"), torch.clone)


def test_cli_takes_the_shared_arguments() -> None:
    import jsonargparse
    from lightning.pytorch import LightningDataModule

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    given = {"test": 300, "meta": 100, "val": 0.2, "noise": "asymmetric", "pairs": {1: 2}, "train_on_meta": True}
    arguments = [f"--data.{k}={v}" for k, v in given.items()]
    parsed = parser.parse_args(["--data=DigitsDataModule", *arguments]).data.init_args.as_dict()
    assert {k: (type(parsed[k]), parsed[k]) for k in given} == {k: (type(v), v) for k, v in given.items()}
