"""Few labels: which are kept, which rows an epoch draws, and passes over chosen rows that leave no trace."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from methods import CLASSES, SHAPE, Blobs, blobs, build, trained_teachers, trainer, weighted_terms
from PIL import Image
from test_data_vision import write_mnist
from test_every_method import Augmented, assert_same, module
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lit_kd import ALMKD, KD, Supervised
from lit_kd.data import (
    UNLABELED,
    BlobsDataModule,
    DataModule,
    DigitsDataModule,
    DistillationDataModule,
    EpochSampler,
    GMMDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
    SpiralDataModule,
)
from lit_kd.report.charts import noise_auc, to_png, weights_chart

NOISE: dict[str, Any] = {"noise": "symmetric", "noise_rate": 0.3}


def folder_of_images(root: Path) -> Path:
    for part, rows in (("train", 20), ("test", 2)):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for i in range(rows):
                Image.fromarray(np.full((8, 8, 3), 5 * i, dtype=np.uint8)).save(root / part / name / f"{i}.png")
    return root


def foreign(**options: Any) -> DistillationDataModule:
    x, y = blobs()
    inner = LightningDataModule.from_datasets(TensorDataset(x, y), TensorDataset(x, y), batch_size=8)
    return DistillationDataModule(inner, **options)


def every_data_module(name: str, root: Path, **options: Any) -> DataModule:
    """One of each kind."""
    if name == "mnist":
        write_mnist(root, "MNIST")
        return MNISTDataModule(root=str(root), **options)
    if name == "folder":
        return ImageFolderDataModule(root=str(folder_of_images(root)), image_size=8, meta=6, val=6, **options)
    kinds: dict[str, Any] = {"digits": DigitsDataModule, "gmm": GMMDataModule, "spiral": SpiralDataModule}
    return (kinds | {"blobs": BlobsDataModule, "foreign": foreign, "own": Blobs})[name](**options)


class TestLabeled:
    @pytest.mark.parametrize("name", ["foreign", "own", "mnist", "folder"])
    def test_every_data_module(self, name: str, tmp_path: Path) -> None:
        """Batches hold the labels that are kept and no others; the truth is that of all labels."""
        (tmp_path / "few").mkdir()
        (tmp_path / "all").mkdir()
        few = every_data_module(name, tmp_path / "few", labeled=0.5, seed=3, **NOISE)
        whole = every_data_module(name, tmp_path / "all", seed=3, **NOISE)
        few.setup()
        whole.setup()
        n, kept = few.train_size, few.labels != UNLABELED
        assert int(kept[:n].sum()) == round(n / 2)
        assert kept[n:].all()
        assert torch.equal(few.labels[kept], whole.labels[kept])  # noise included, which is the same
        assert torch.equal(few.clean_labels, whole.clean_labels)
        assert (few.clean_labels >= 0).all()
        assert torch.equal(few.noisy, whole.noisy & kept)
        assert few.noisy.any()
        assert few.fingerprint != whole.fingerprint
        batches = list(few.train_dataloader())
        index, y = (torch.cat([getattr(batch, part) for batch in batches]) for part in ("index", "y"))
        assert torch.equal(y, few.labels[index])
        assert y.eq(UNLABELED).sum() == n - round(n / 2)
        assert torch.cat([batch.y for batch in few.val_dataloader()]).ge(0).all()

    def test_stratified_by_the_given_label(self) -> None:
        data = DigitsDataModule(labeled=200, seed=0, noise="asymmetric", noise_rate=0.5)
        data.setup()
        whole = DigitsDataModule(seed=0, noise="asymmetric", noise_rate=0.5)
        whole.setup()
        n = data.train_size
        kept = data.labels[:n][data.labels[:n] != UNLABELED]
        expected = 200 * torch.bincount(whole.labels[:n], minlength=10) / n
        assert len(kept) == 200
        assert (torch.bincount(kept, minlength=10) - expected).abs().max() < 1

    def test_the_truth_has_no_part_in_it(self) -> None:
        """Other true labels, the same given ones: the same rows keep theirs."""

        class Relabeled(Blobs):
            def load(self) -> Any:
                source = super().load()
                source.labels = (source.labels + shift) % CLASSES
                return source

        found = []
        for shift in (0, 1):
            back = np.roll(np.eye(CLASSES), -shift, axis=1).tolist()  # the given label is the same
            data = Relabeled(labeled=0.4, transition=back, seed=0, meta=0, val=0)
            data.setup()
            found.append((data.labels, data.clean_labels))
        assert torch.equal(found[0][0], found[1][0])
        assert not torch.equal(found[0][1], found[1][1])

    def test_by_the_seed(self) -> None:
        prints = []
        for seed, labeled in [(0, 9), (0, 9), (1, 9), (0, 12), (0, None), (0, 48)]:
            data = Blobs(labeled=labeled, seed=seed)
            data.setup()
            prints.append(data.fingerprint)
        assert prints[0] == prints[1]
        assert len(set(prints[1:])) == 4
        assert prints[4] == prints[5]  # all labels are all labels

    def test_rows_without_a_label_of_their_own(self) -> None:
        class Missing(Blobs):
            def load(self) -> Any:
                source = super().load()
                source.labels[:30] = UNLABELED
                return source

        data, whole = Missing(labeled=9, seed=0, meta=12, val=12, **NOISE), Missing(seed=0, meta=12, val=12, **NOISE)
        data.setup()
        whole.setup()
        kept = data.labels[: data.train_size] != UNLABELED
        assert kept.sum() == 9
        assert (whole.labels[: data.train_size][kept] != UNLABELED).all()
        assert (data.clean_labels[: data.train_size] == UNLABELED).sum() == 30

    @pytest.mark.parametrize(("labeled", "found"), [(0, "0, 0"), (0.0, "0.0, 0"), (2, "2, 2"), (49, "49, 49")])
    def test_refused(self, labeled: float, found: str) -> None:
        match = (
            rf"at least one training label a class \(3\) and at most all \(48\), found {found} labels. .* None to keep"
        )
        with pytest.raises(ValueError, match=match):
            Blobs(labeled=labeled).setup()
        for wrong in (1.0, -3):
            with pytest.raises(ValueError, match=r"for labeled a fraction in \[0, 1\) or a whole number of rows"):
                Blobs(labeled=wrong).setup()


class TestSampler:
    CHOSEN = np.array([40, 3, 17, 11, 3, 99])
    """Of 48 rows; one is named twice, and one is in another stream."""

    def draws(self, length: int, ranks: int = 1, epoch: int = 2) -> list[list[int]]:
        samplers = [EpochSampler(48, length, ranks, rank, 5, lambda: self.CHOSEN) for rank in range(ranks)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return [list(sampler) for sampler in samplers]

    @pytest.mark.parametrize("length", [48, 50, 4, 3])
    def test_equally_often(self, length: int) -> None:
        [drawn] = self.draws(length)
        assert len(drawn) == length
        counts = Counter(drawn)
        assert set(counts) <= {3, 11, 17, 40}
        assert {counts[row] for row in (3, 11, 17, 40)} <= {length // 4, -(-length // 4)}
        for first in range(0, length - 3, 4):  # permutation after permutation
            assert len(set(drawn[first : first + 4])) == 4

    @pytest.mark.parametrize("ranks", [2, 3])
    def test_ranks_together_are_one(self, ranks: int) -> None:
        [one], several = self.draws(50), self.draws(50, ranks)
        assert len({len(drawn) for drawn in several}) == 1
        together = [row for step in zip(*several, strict=True) for row in step]
        assert together[:50] == one
        assert together[50:] == one[: len(together) - 50]

    def test_another_order_each_epoch(self) -> None:
        assert self.draws(48, epoch=0) == self.draws(48, epoch=0) != self.draws(48, epoch=1)

    def test_all_rows_are_as_none(self) -> None:
        orders = [EpochSampler(9, 20, seed=1, rows=rows).order() for rows in (None, lambda: None, lambda: np.arange(9))]
        assert all((order == orders[0]).all() for order in orders)

    @pytest.mark.parametrize(
        "rows", [np.array([-1, 2]), np.array([0.5]), np.ones(9, dtype=bool), np.zeros((2, 2), int)]
    )
    def test_no_rows(self, rows: Any) -> None:
        with pytest.raises(ValueError, match="expected rows to draw from as integers of at least 0, found"):
            EpochSampler(9, rows=lambda: rows).order()

    @pytest.mark.parametrize("rows", [[], [9, 10]])
    def test_none_chosen(self, rows: list[int]) -> None:
        with pytest.raises(ValueError, match=r"found none of the 9 training rows chosen: give the data more labels"):
            EpochSampler(9, rows=lambda: np.array(rows, dtype=np.int64)).order()


class Watch(Callback):
    """Keeps the training batches of each epoch, as rows and labels."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[tuple[int, int]]] = {}

    def on_train_batch_start(self, t: Trainer, model: Any, batch: Any, batch_idx: int) -> None:
        train = batch["train"] if isinstance(batch, dict) else batch
        self.epochs.setdefault(t.current_epoch, []).extend(zip(train.index.tolist(), train.y.tolist(), strict=True))


class Choosing(Supervised):
    """Trains on other rows each epoch."""

    def prepare_epoch(self) -> None:
        self.prepared = [*getattr(self, "prepared", []), self.current_epoch]

    def training_rows(self) -> Tensor:
        return 5 * self.prepared[-1] + torch.arange(5)


class TestTraining:
    @pytest.mark.parametrize("method", ["supervised", "kd", "weighted", "rad", "almkd-robust", "almkd-paper"])
    def test_what_is_drawn(self, method: str) -> None:
        watch = Watch()
        fitted, data = trainer(max_epochs=6, callbacks=watch), Blobs(labeled=0.3, **NOISE)
        fitted.fit(build(method), data)
        assert fitted.callback_metrics["val/accuracy"] > 0.7
        for epoch, drawn in watch.epochs.items():
            missing = [row for row, y in drawn if y == UNLABELED]
            assert all(y == data.labels[row] for row, y in drawn)
            if method == "supervised":
                counts = Counter(row for row, _ in drawn)
                assert not missing
                assert len(drawn) == 48
                assert len(counts) == 14
                assert set(counts.values()) == {3, 4}
            elif method == "rad":  # asks in its second half
                assert len(set(missing)) == (0 if epoch < 3 else 12)
            else:
                assert len(missing) == (0 if method == "weighted" and epoch == 0 else 34)  # it warms up on labels

    @pytest.mark.parametrize("workers", [0, 1])
    def test_rows_chosen_anew_each_epoch(self, workers: int) -> None:
        watch, model = Watch(), Choosing("mlp-8", num_classes=CLASSES, input_shape=list(SHAPE))
        trainer(max_epochs=3, callbacks=watch).fit(model, Blobs(num_workers=workers))
        assert model.prepared == [0, 1, 2]
        for epoch, drawn in watch.epochs.items():
            assert set(Counter(row for row, _ in drawn)) == set(range(5 * epoch, 5 * epoch + 5))
            assert len(drawn) == 48

    @pytest.mark.parametrize(("step", "first"), [(9, 1), (6, 1), (12, 2)])
    def test_resumed_within_and_between_epochs(self, step: int, first: int, tmp_path: Path) -> None:
        """An epoch of 6 batches that is gone on with has no start of Lightning's."""
        options: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
        trainer(max_epochs=2, callbacks=keep, enable_checkpointing=True).fit(Choosing("mlp-8", **options), Blobs())
        watch, model = Watch(), Choosing("mlp-8", **options)
        trainer(max_epochs=3, callbacks=watch).fit(model, Blobs(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert model.prepared == list(watch.epochs) == list(range(first, 3))
        for epoch, drawn in watch.epochs.items():
            assert {row for row, _ in drawn} == set(range(5 * epoch, 5 * epoch + 5))

    def test_foreign_data_are_not_asked(self) -> None:
        x, y = blobs()
        model = Supervised("mlp-8", num_classes=CLASSES, input_shape=list(SHAPE))
        trainer(max_epochs=1).fit(model, DataLoader(TensorDataset(x, y), batch_size=8))  # type: ignore[arg-type]
        match = r"Supervised needs sample indices: pass a data module of lit_kd\.data, or wrap .*\(inner\); found none"
        with pytest.raises(ValueError, match=match):
            model.data  # noqa: B018

    def test_joined_meta_rows_have_labels(self) -> None:
        watch = Watch()
        data = Blobs(labeled=9, train_on_meta=True)
        trainer(max_epochs=1, callbacks=watch).fit(build("supervised"), data)
        counts = Counter(row for row, _ in watch.epochs[0])
        assert sum(counts.values()) == 72
        assert len(counts) == 9 + 24
        assert {row for row in counts if row >= 48} == set(range(48, 72))

    def test_a_row_one_vote(self) -> None:
        """In KD's mean, a row without label counts with 0."""
        model = build("kd", weight=0.5)
        data, fitted = Blobs(labeled=0.5, seed=0), trainer(max_epochs=1, limit_train_batches=1, callbacks=Watch())
        fitted.fit(model, data)
        batch = data.parts.train_rows(meta=False).__getitems__(list(range(48)))
        terms = weighted_terms(model, model.tapped_student(batch.x), model.teachers(batch), batch)
        logits = model.student(batch.x)
        known = batch.y >= 0
        expected = 0.5 * torch.nn.functional.cross_entropy(logits[known], batch.y[known], reduction="sum") / 48
        assert terms["label"].mean().item() == pytest.approx(expected.item(), rel=1e-5)
        assert terms["teacher"][~known].min() > 0


class TestALMKD:
    @pytest.mark.parametrize(("method", "start"), [("almkd-paper", None), ("almkd-amal", None), ("almkd-paper", 0.4)])
    def test_no_weight_for_missing_labels(self, method: str, start: float | None) -> None:
        data, model = Blobs(labeled=0.3, **NOISE), build(method, start_weights=start)
        trainer(max_epochs=6).fit(model, data)
        assert isinstance(model, ALMKD)
        assert model.table is not None
        weights, missing = model.table["weights"], data.labels == UNLABELED
        assert missing.sum() == 34
        assert not weights[missing, 0].any()
        assert weights[~missing, 0].any()
        assert weights[missing, 1:].mean() > 0.3  # the teachers are perfect
        assert weights.isfinite().all()

    def test_figures_are_of_rows_with_a_label(self, tmp_path: Path) -> None:
        weights = np.array([[0.9, 0], [0.2, 0], [0.5, 0], [0.0, 1], [0.0, 1]], dtype=np.float32)
        label, noisy = np.array([0, 1, 1, -1, -1]), np.array([0, 1, 0, 0, 0], dtype=bool)
        assert noise_auc(weights[:, 0], label, noisy) == 1
        assert noise_auc(weights[:, 0], label, noisy & False) is None
        assert noise_auc(weights[:, 0], np.full(5, -1), noisy & False) is None
        for given in (label, np.full(5, -1)):
            seed = {"weights": weights, "label": given, "noisy": noisy & (given >= 0)}
            assert len(to_png(weights_chart([seed, seed]))) > 1000


class Looking(KD):
    """Looks at all meta rows and at augmented training rows, in vain."""

    where = ""

    def look(self, where: str) -> None:
        if where == self.where:
            for rows in (self.data.parts.meta_rows(), self.data.parts.train_rows(meta=False)):
                self.seen = self.predict_rows(rows)

    def prepare_epoch(self) -> None:
        self.look("epoch")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        self.look("step")
        return super().training_step(batch, batch_idx)


class TestPredictRows:
    @pytest.mark.parametrize(
        ("student", "where", "precision"),
        [("cnn-2", "epoch", "32-true"), ("cnn-2", "step", "bf16-mixed"), ("dropout", "step", "32-true")],
    )
    def test_leaves_no_trace(self, student: str, where: str, precision: Any) -> None:
        def run(where: str) -> list[Any]:
            seed_everything(0, verbose=False)
            trace: list[Any] = []

            class Note(Callback):
                def on_train_batch_end(self, t: Trainer, model: Any, *_: Any) -> None:
                    gradients = [p.grad for p in model.parameters()]
                    modes = [part.training for part in model.student.modules()]
                    random = (torch.get_rng_state(), np.random.get_state()[1].tolist())  # type: ignore[index]  # noqa: NPY002
                    trace.append(copy.deepcopy((model.state_dict(), gradients, modes, random)))

            model = Looking(module(student), trained_teachers()[0], num_classes=CLASSES)
            list(model.student.modules())[-1].eval()  # a part of it has a mode of its own
            model.where = where
            fitted = trainer(precision=precision, callbacks=Note())
            fitted.fit(model, Augmented(**NOISE))
            assert hasattr(model, "seen") == bool(where)
            return trace

        assert_same(run(where), run(""))

    @pytest.mark.parametrize("student", ["cnn-2", "mlp-8"])
    def test_equals_a_loop_by_hand(self, student: str) -> None:
        data, model = Blobs(labeled=0.5), build("kd-teachers", module(student))
        trainer(max_epochs=1).fit(model, data)
        model.student.train()
        for rows, positions in (
            (data.parts.meta_rows(), data.parts.positions["meta"]),
            (data.parts.val, data.parts.positions["val"]),
        ):
            found = model.predict_rows(rows)
            x = blobs()[0][positions]
            by_hand = copy.deepcopy(model.student).eval()
            with torch.no_grad():
                torch.testing.assert_close(found.student.logits, by_hand(x), rtol=1e-5, atol=1e-5)
                for one, teacher in zip(found.teachers, trained_teachers(), strict=True):
                    torch.testing.assert_close(one.logits, teacher.eval()(x), rtol=1e-5, atol=1e-5)
            assert torch.equal(found.y, blobs()[1][positions])
            assert not found.student.logits.requires_grad

    def test_features_and_hooks_of_a_wrapped_module(self) -> None:
        x, y = blobs()

        class Inner(LightningDataModule):
            batch_size = 7

            def train_dataloader(self) -> Any:
                return DataLoader(TensorDataset(x, y), batch_size=7)

            def val_dataloader(self) -> Any:
                return DataLoader(TensorDataset(x, y), batch_size=7)

            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return 10 * batch[0], batch[1]

        class Tapping(KD):
            student_taps = ("1", "penultimate")

            def prepare_epoch(self) -> None:
                self.seen = self.predict_rows(self.data.parts.meta_rows())
                self.kept = copy.deepcopy(self.student).eval()

        model = Tapping(module("mlp-8"), trained_teachers()[0], num_classes=CLASSES, input_shape=list(SHAPE))
        data = DistillationDataModule(Inner(), num_classes=CLASSES, meta=0.5, seed=0)
        trainer(max_epochs=1, limit_train_batches=1).fit(model, data)
        meta = 10 * x[data.parts.positions["meta"] - 120]
        with torch.no_grad():
            torch.testing.assert_close(model.seen.student.logits, model.kept(meta), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                model.seen.student.features["1"],
                model.kept[:2](meta),
                rtol=1e-5,
                atol=1e-5,  # type: ignore[index]
            )
        assert set(model.seen.student.features) == {"1", "penultimate"}

    def test_no_rows(self) -> None:
        data, model = Blobs(meta=0), build("kd")
        trainer(max_epochs=1).fit(model, data)
        with pytest.raises(ValueError, match="expected rows to predict, found none"):
            model.predict_rows(data.parts.meta_rows())
