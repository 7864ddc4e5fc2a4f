"""The base data module, through the digits."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor

import lit_kd.data
from lit_kd.data import UNLABELED, Batch, DataModule, DigitsDataModule, Source, TensorRows
from lit_kd.data.rows import Indexed, ItemRows
from lit_kd.data.vision import ImageTransform

torch.set_num_threads(1)
RAW = load_digits()
# No two rows are the same image, so a row's bytes tell which one it is.
WHERE = {(image / 16).astype(np.float32).tobytes(): i for i, image in enumerate(RAW.images)}


def positions(x: Tensor) -> np.ndarray:
    """Which raw rows these are."""
    return np.array([WHERE[image.numpy().tobytes()] for image in x.squeeze(1)])


def digits(**arguments: Any) -> DigitsDataModule:
    data = DigitsDataModule(**({"seed": 0} | arguments))
    data.setup()
    return data


def attach(data: DataModule, world_size: int = 1, rank: int = 0, **attributes: bool) -> None:
    module = SimpleNamespace(**attributes)
    data.trainer = SimpleNamespace(lightning_module=module, current_epoch=0, world_size=world_size, global_rank=rank)  # type: ignore[assignment]


def gather(loader: Any) -> Batch:
    """All batches as one."""
    batches = list(loader)
    index = None if batches[0].index is None else torch.cat([b.index for b in batches])
    return Batch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]), index)


def test_raw_images_are_distinct() -> None:
    assert len(WHERE) == 1797


class TestSplits:
    def test_disjoint_covering(self) -> None:
        data = digits()
        train, val, test = (
            gather(loader()) for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader)
        )
        meta = data.parts.meta_rows().__getitems__(list(range(data.meta_size)))
        found = [positions(part.x) for part in (train, meta, val, test)]  # type: ignore[arg-type]
        assert [len(p) for p in found] == [1078, 180, 180, 359]
        np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(1797))
        assert val.index is None
        assert test.index is None

    def test_inputs_and_labels_correspond(self) -> None:
        data = digits()
        for loader in (
            data.train_dataloader,
            data.val_dataloader,
            data.test_dataloader,
            data.predict_dataloader,
        ):
            batch = gather(loader())
            assert isinstance(batch.x, Tensor)
            assert batch.x.shape[1:] == data.input_shape
            assert batch.x.dtype == torch.float32
            assert batch.y.dtype == torch.int64
            np.testing.assert_array_equal(batch.y, RAW.target[positions(batch.x)])

    def test_test_rows_are_the_same_under_every_seed(self) -> None:
        a, b = digits(seed=0), digits(seed=1)
        assert torch.equal(gather(a.test_dataloader()).x, gather(b.test_dataloader()).x)  # type: ignore[arg-type]
        assert not torch.equal(gather(a.val_dataloader()).x, gather(b.val_dataloader()).x)  # type: ignore[arg-type]

    def test_same_split_in_every_stage(self) -> None:
        prints = set()
        for stage in ("fit", "test", "predict", None):
            data = DigitsDataModule(seed=3)
            data.setup(stage)
            prints.add(data.fingerprint)
        assert len(prints) == 1

    def test_setup_once(self) -> None:
        data = digits()
        parts = data.parts
        data.setup("test")
        assert data.parts is parts

    def test_seed_of_seed_everything(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")
        assert digits(seed=None).fingerprint == digits(seed=5).fingerprint
        monkeypatch.delenv("PL_GLOBAL_SEED")
        assert digits(seed=None).fingerprint == digits(seed=0).fingerprint

    def test_counts(self) -> None:
        data = digits(meta=50, val=40, test=300)
        assert (data.train_size, data.meta_size, len(data.parts.val), len(data.parts.test)) == (
            1407,
            50,
            40,
            300,
        )

    def test_no_meta_no_val(self) -> None:
        data = digits(meta=0, val=0, test=0)
        assert data.train_size == 1797
        assert data.val_dataloader() == []
        with pytest.raises(ValueError, match="expected test rows, found 0"):
            data.test_dataloader()


class TestNoise:
    def test_only_train_is_corrupted(self) -> None:
        data = digits(noise="symmetric", noise_rate=0.5)
        n = data.train_size
        train = gather(data.train_dataloader())
        assert train.index is not None
        true = torch.from_numpy(RAW.target[positions(train.x)])  # type: ignore[arg-type]
        assert torch.equal(data.clean_labels[train.index], true)
        assert torch.equal(data.labels[train.index], train.y)
        assert 0.38 < (train.y != true).float().mean() < 0.52  # 0.45 expected
        assert torch.equal(data.labels[n:], data.clean_labels[n:])
        for loader in (data.val_dataloader, data.test_dataloader):
            batch = gather(loader())
            np.testing.assert_array_equal(batch.y, RAW.target[positions(batch.x)])  # type: ignore[arg-type]
        assert data.trusted.sum() == data.meta_size == 180
        assert not data.trusted[:n].any()

    def test_confusable_pairs(self) -> None:
        data = digits(noise="asymmetric", noise_rate=1.0)
        pairs = torch.tensor([6, 7, 3, 2, 9, 8, 0, 1, 5, 4])
        n = data.train_size
        assert torch.equal(data.labels[:n], pairs[data.clean_labels[:n]])
        own = digits(noise="asymmetric", noise_rate=1.0, pairs={3: 5})
        clean = own.clean_labels[:n]
        assert torch.equal(own.labels[:n], torch.where(clean == 3, 5, clean))

    def test_transition(self) -> None:
        swap = np.eye(10)[::-1].tolist()
        data = digits(transition=swap)
        n = data.train_size
        assert torch.equal(data.labels[:n], 9 - data.clean_labels[:n])

    def test_noise_leaves_the_split(self) -> None:
        assert torch.equal(digits().clean_labels, digits(noise="symmetric", noise_rate=0.4).clean_labels)


class TestIndices:
    def test_stable_under_shuffling(self) -> None:
        data = digits()
        loader = data.train_dataloader()
        epochs = []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            epochs.append(gather(loader))
        first, second = epochs
        assert first.index is not None
        assert second.index is not None
        assert not torch.equal(first.index, second.index)
        assert first.index.sort().values.tolist() == list(range(data.train_size))
        a = positions(first.x[first.index.argsort()])  # type: ignore[index]
        b = positions(second.x[second.index.argsort()])  # type: ignore[index]
        np.testing.assert_array_equal(a, b)
        assert (np.diff(a) > 0).all()  # the order of the sorted split

    def test_order_follows_the_seed(self) -> None:
        orders = [list(digits(seed=seed).train_dataloader().sampler) for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]

    def test_meta_rows_follow(self) -> None:
        data = digits(train_on_meta=True, noise="symmetric", noise_rate=0.4)
        joined = gather(data.train_dataloader())
        assert joined.index is not None
        total = data.train_size + data.meta_size
        assert joined.index.sort().values.tolist() == list(range(total))
        assert torch.equal(joined.y, data.labels[joined.index])
        meta = joined.index >= data.train_size
        np.testing.assert_array_equal(joined.y[meta], RAW.target[positions(joined.x[meta])])  # type: ignore[index]
        attach(data, needs_meta=True)
        streamed = gather(b["meta"] for b, _, _ in data.train_dataloader())
        where = dict(zip(joined.index.tolist(), positions(joined.x), strict=True))  # type: ignore[arg-type]
        assert streamed.index is not None
        assert [where[i] for i in streamed.index.tolist()] == positions(streamed.x).tolist()  # type: ignore[arg-type]


class TestMeta:
    @pytest.mark.parametrize(("meta", "val", "joined"), [(0.1, 0.1, False), (0.5, 0.1, False), (20, 0, True)])
    def test_as_many_batches_as_train(self, meta: float, val: float, joined: bool) -> None:
        data = digits(meta=meta, val=val, batch_size=50)
        attach(data, needs_meta=True, trains_on_meta=joined)
        loader = data.train_dataloader()
        batches = [b for b, _, _ in loader]
        rows = data.train_size + joined * data.meta_size
        assert len(loader) == len(batches) == -(-rows // 50)
        for batch in batches:
            assert set(batch) == {"train", "meta"}
            assert len(batch["train"].y) == len(batch["meta"].y)
            assert (batch["meta"].index >= data.train_size).all()
            assert torch.equal(batch["meta"].y, data.clean_labels[batch["meta"].index])
        draws = torch.cat([b["meta"].index for b in batches])
        counts = torch.bincount(draws - data.train_size, minlength=data.meta_size)
        assert counts.max() - counts.min() <= 1

    @pytest.mark.parametrize("world", [2, 3])
    def test_ranks_share_the_streams(self, world: int) -> None:
        def streams(world_size: int, rank: int, batch_size: int) -> list[dict[str, Batch]]:
            data = digits(batch_size=batch_size)
            attach(data, world_size, rank, needs_meta=True)
            return [b for b, _, _ in data.train_dataloader()]

        one = streams(1, 0, 30 * world)
        ranks = [streams(world, rank, 30) for rank in range(world)]
        assert {len(r) for r in ranks} == {len(one)}
        for k, batch in enumerate(one[:-1]):  # the last one is padded
            for name in ("train", "meta"):
                together = torch.cat([r[k][name].index for r in ranks])  # type: ignore[arg-type]
                assert together.sort().values.tolist() == batch[name].index.sort().values.tolist()  # type: ignore[union-attr]

    def test_method_asks_for_meta_rows(self) -> None:
        data = digits()
        attach(data, trains_on_meta=True)
        assert len(gather(data.train_dataloader()).y) == data.train_size + data.meta_size
        attach(data)
        assert len(gather(data.train_dataloader()).y) == data.train_size


class TestFingerprint:
    def test_stable_and_telling(self) -> None:
        prints = {
            "seed": digits(seed=1).fingerprint,
            "noise": digits(noise="symmetric", noise_rate=0.2).fingerprint,
            "rate": digits(noise="symmetric", noise_rate=0.4).fingerprint,
            "meta": digits(meta=0.2).fingerprint,
            "plain": digits().fingerprint,
        }
        assert len(set(prints.values())) == len(prints)
        assert prints["plain"] == digits(batch_size=3, train_on_meta=True).fingerprint
        assert len(bytes.fromhex(prints["plain"])) == 32

    def test_other_data_with_the_same_labels(self) -> None:
        prints = [ready(Blobs(scale=s)).fingerprint for s in (1.0, 1.0, 2.0)]
        assert prints[0] == prints[1] != prints[2]


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
        x = torch.stack([torch.arange(float(len(self.y))), torch.from_numpy(self.y).float()], dim=1) * self.scale
        plain = TensorRows(x)
        source = Source(
            TensorRows(x, torch.neg),
            plain,
            self.y,
            plain,
            np.maximum(self.y, 0),
            identity=x.numpy().tobytes(),
        )
        if self.own_val:
            source.val, source.val_labels = TensorRows(1000 + x[:30]), self.y[:30]
            source.val_train = TensorRows(1000 + x[:30], torch.neg)
        return source


def ready(data: Any) -> Any:
    data.setup()
    return data


class TestSource:
    def test_augmented_rows_in_training_only(self) -> None:
        data = ready(Blobs(train_on_meta=True))
        attach(data, needs_meta=True)
        for batch, _, _ in data.train_dataloader():
            assert (batch["train"].x <= 0).all()
            assert (batch["meta"].x >= 0).all()
        assert (gather(data.val_dataloader()).x >= 0).all()  # type: ignore[operator]

    @pytest.mark.parametrize("joined", [False, True])
    def test_own_validation_rows(self, joined: bool) -> None:
        data = ready(Blobs(own_val=True, meta=0.4, val=0.5, train_on_meta=joined, batch_size=7))
        assert (data.train_size, data.meta_size, len(data.parts.val)) == (90, 12, 18)
        attach(data, needs_meta=True)
        batches = [b for b, _, _ in data.train_dataloader()]
        train, meta = (gather(b[name] for b in batches) for name in ("train", "meta"))
        val = gather(data.val_dataloader())
        assert (meta.x >= 1000).all()  # type: ignore[operator]
        assert not set(meta.x[:, 0].tolist()) & set(val.x[:, 0].tolist())  # type: ignore[index]
        assert torch.equal(meta.x[:, 1] - 1000, meta.y.float())  # type: ignore[index]
        assert train.index is not None
        from_val = -train.x[:, 0] >= 1000  # type: ignore[index, operator]
        assert torch.equal(from_val, train.index >= 90)
        assert from_val.sum() == 12 * joined
        np.testing.assert_array_equal(-train.x[~from_val][:, 0], train.index[~from_val])  # type: ignore[index, operator]

    def test_unlabeled_rows_are_training_rows(self) -> None:
        labels = np.where(np.arange(90) < 60, UNLABELED, np.arange(90) % 3)
        data = ready(Blobs(labels, noise="symmetric", noise_rate=1.0, meta=0.2, val=0.2))
        assert data.meta_size == len(data.parts.val) == 6
        assert (data.labels == UNLABELED).sum() == (data.clean_labels == UNLABELED).sum() == 60
        assert (data.labels[data.train_size :] >= 0).all()

    def test_all_rows_unlabeled(self) -> None:
        data = ready(Blobs([UNLABELED] * 9, meta=0, val=0))
        assert data.labels.tolist() == [UNLABELED] * 9

    def test_labels_out_of_range(self) -> None:
        with pytest.raises(ValueError, match=r"training labels in \[0, 3\) \(or -1 .*found 3 in row 2 \(1 such"):
            ready(Blobs([0, 1, 3]))
        with pytest.raises(ValueError, match="one integer label for each of 3 training rows, found float64"):
            ready(Blobs([0.0, 1.0, 0.0]))

    def test_test_labels_out_of_range(self) -> None:
        class Wrong(Blobs):
            def load(self) -> Source:
                source = super().load()
                source.test_labels = np.full(90, UNLABELED)
                return source

        with pytest.raises(ValueError, match=r"test labels in \[0, 3\), found -1 in row 0 \(90 such rows\)"):
            ready(Wrong())

    def test_plain_rows_missing(self) -> None:
        class Wrong(Blobs):
            def load(self) -> Source:
                source = super().load()
                source.plain = TensorRows(torch.zeros(3, 2))
                return source

        with pytest.raises(ValueError, match="with and without augmentation, found 90 and 3"):
            ready(Wrong())


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"noise_rate": 1.5}, r"noise_rate in \[0, 1\], found 1.5"),
            ({"noise_rate": 0.5}, "expected a kind of noise with noise_rate=0.5, found none"),
            ({"transition": [[1.0]], "noise": "symmetric"}, "either transition or noise"),
            ({"transition": [[1.0]], "pairs": {0: 1}}, "either transition or noise"),
            ({"batch_size": 0}, "batch_size of at least 1, found 0"),
        ],
    )
    def test_in_init(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DigitsDataModule(**arguments)

    def test_in_setup(self) -> None:
        with pytest.raises(ValueError, match=r"10 x 10 transition matrix, found shape \(2, 2\)"):
            digits(transition=[[1.0, 0.0], [0.0, 1.0]])
        with pytest.raises(ValueError, match="expected rows left for train"):
            digits(meta=1000, val=1000)

    def test_before_setup(self) -> None:
        data = DigitsDataModule()
        with pytest.raises(AttributeError, match=r"Call setup\(\) first"):
            _ = data.train_size
        assert getattr(data, "labels", None) is None

    def test_meta(self) -> None:
        data = digits(meta=0)
        attach(data, needs_meta=True)
        with pytest.raises(ValueError, match=r"meta split for SimpleNamespace, found 0 rows. Set .* meta=0.1"):
            data.train_dataloader()
        data = digits(meta=0, train_on_meta=True)
        with pytest.raises(ValueError, match="meta split for train_on_meta, found 0 rows"):
            data.train_dataloader()
        data = digits(train_on_meta=False)
        attach(data, trains_on_meta=True)
        with pytest.raises(ValueError, match=r"SimpleNamespace trains on the meta rows, found false. Remove"):
            data.train_dataloader()


class Probe(LightningModule):
    """Records what the trainer hands out."""

    def __init__(self, needs_meta: bool = False, trains_on_meta: bool = False) -> None:
        super().__init__()
        self.needs_meta = needs_meta
        self.trains_on_meta = trains_on_meta
        self.layer = torch.nn.Linear(64, 10)
        self.seen: dict[str, list[Any]] = {"fit": [], "val": [], "test": []}

    def training_step(self, batch: Any) -> Tensor:
        self.seen["fit"].append((self.current_epoch, batch))
        batch = batch["train"] if self.needs_meta else batch
        return torch.nn.functional.cross_entropy(self.layer(batch.x.flatten(1)), batch.y)

    def validation_step(self, batch: Any) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Any) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: Any) -> Any:
        return batch.y

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"max_epochs": 2} | arguments),
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
class TestTrainer:
    def test_with_meta(self) -> None:
        data, model = DigitsDataModule(seed=0, batch_size=100), Probe(True, True)
        run = trainer()
        run.fit(model, datamodule=data)
        fits = model.seen["fit"]
        assert len(fits) == 2 * 13  # 1258 rows
        epochs = [gather(b["train"] for e, b in fits if e == epoch) for epoch in (0, 1)]
        for epoch in epochs:
            assert epoch.index is not None
            assert epoch.index.sort().values.tolist() == list(range(1258))
        assert epochs[0].index.tolist() != epochs[1].index.tolist()  # type: ignore[union-attr]
        assert all(isinstance(b["meta"], Batch) and len(b["meta"].y) == len(b["train"].y) for _, b in fits)
        assert all(b.index is None for b in model.seen["val"])
        run.test(model, datamodule=data, verbose=False)
        np.testing.assert_array_equal(
            gather(model.seen["test"]).y,
            RAW.target[positions(gather(model.seen["test"]).x)],  # type: ignore[arg-type]
        )
        predicted = torch.cat(run.predict(model, datamodule=data))  # type: ignore[arg-type]
        assert torch.equal(predicted, gather(model.seen["test"]).y)

    def test_without_validation_rows(self) -> None:
        data, model = DigitsDataModule(seed=0, val=0, batch_size=500), Probe()
        trainer(max_epochs=1).fit(model, datamodule=data)
        assert len(model.seen["fit"]) == 3
        assert model.seen["val"] == []

    def test_workers(self) -> None:
        here, there = digits(), digits(num_workers=2)
        for name in ("train_dataloader", "val_dataloader"):
            a, b = gather(getattr(here, name)()), gather(getattr(there, name)())
            assert torch.equal(a.x, b.x)  # type: ignore[arg-type]
            assert torch.equal(a.y, b.y)


class TestOnDevice:
    """Torch's device ``meta``, which is always there, stands for an accelerator: its tensors have shapes only."""

    def on(self, data: DataModule, device: str) -> None:
        attach(data)
        data.trainer.strategy = SimpleNamespace(root_device=torch.device(device))

    def test_batches_are_cut_there(self) -> None:
        data = ready(digits(on_device=True, batch_size=50))
        self.on(data, "meta")
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            batch = next(iter(loader))
            assert {part.device.type for part in batch if part is not None} == {"meta"}
            assert batch.x.shape == (50, 1, 8, 8)

    def test_augmented_there(self) -> None:
        rows = TensorRows(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), ImageTransform([0.5] * 3, [0.2] * 3, 2, True))
        moved = rows.to(torch.device("meta"), {}).fetch([4, 0])
        assert (moved.device.type, moved.shape, moved.dtype) == ("meta", (2, 3, 8, 8), torch.float32)

    def test_same_batches_as_without(self) -> None:
        batches = []
        for on_device in (False, True):
            data = ready(digits(on_device=on_device))
            self.on(data, "cpu")
            torch.manual_seed(0)
            batches.append(gather(data.train_dataloader()))
        torch.testing.assert_close(*batches, rtol=0, atol=0)

    def test_moved_once(self) -> None:
        data = ready(digits(on_device=True))
        self.on(data, "meta")
        train, val = (loader.dataset.rows for loader in (data.train_dataloader(), data.val_dataloader()))
        assert train.x is val.x

    def test_workers_are_refused(self) -> None:
        with pytest.raises(ValueError, match="expected num_workers=0 with on_device, found 2"):
            digits(on_device=True, num_workers=2)

    def test_rows_read_one_by_one_are_refused(self) -> None:
        rows = Indexed(ItemRows([(torch.zeros(2), 0)]), np.arange(1), torch.zeros(1).long(), None)
        with pytest.raises(ValueError, match="expected rows of tensors in memory with on_device, found ItemRows"):
            rows.to(torch.device("cpu"), {})

    def test_the_device_is_freed(self) -> None:
        data = ready(digits(on_device=True))
        self.on(data, "meta")
        for _ in range(3):
            data.train_dataloader()
        assert len(data._moved) == 1
        data.teardown("fit")
        assert not data._moved


def test_cli_takes_the_shared_arguments() -> None:
    import jsonargparse
    from lightning.pytorch import LightningDataModule

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    given = {
        "test": 300,
        "batch_size": 3,
        "num_workers": 1,
        "meta": 100,
        "val": 0.2,
        "noise": "asymmetric",
        "noise_rate": 0.25,
        "pairs": {1: 2},
        "transition": None,
        "train_on_meta": True,
        "drop_last": True,
        "seed": 4,
        "labeled": 500,
        "on_device": False,
    }
    arguments = [
        "--data=DigitsDataModule",
        *(f"--data.{k}={'null' if v is None else v}" for k, v in given.items()),
    ]
    parsed = parser.parse_args(arguments).data.init_args.as_dict()
    assert parsed == given
    assert {k: type(v) for k, v in parsed.items()} == {k: type(v) for k, v in given.items()}
    for wrong in ("batch_size=x", "noise=pairflip", "nonsense=1", "pairs={a: 1}"):
        with pytest.raises(jsonargparse.ArgumentError):
            parser.parse_args(["--data=DigitsDataModule", f"--data.{wrong}"])


def test_heavy_imports_are_late() -> None:
    # Read from the sources: in sys.modules one cannot tell, as Lightning may import torchvision by itself.
    for path in Path(lit_kd.data.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and id(node) not in late:
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {n.split(".")[0] for n in names} & {"torchvision", "sklearn", "scipy"}, path
