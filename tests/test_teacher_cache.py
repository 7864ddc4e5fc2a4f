"""Teachers' outputs, computed once: the oracle is the teacher itself. Several processes: see test_distributed.py."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import QUIET, call, configs, version
from lightning import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from methods import CLASSES, METHODS, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from test_every_method import NOISE, Augmented, Each, Keyword, assert_same, module, saved
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lit_kd import KD, Distiller
from lit_kd.data import DataModule, DistillationDataModule, Source, TensorRows
from lit_kd.teachers.cache import PROBED, TeacherCache
from lit_kd.teachers.fingerprint import of_teacher
from lit_kd.teachers.row_store import RowFiles
from lit_kd.types import Outputs

ROWS = 72
"""48 training and 24 meta rows."""
ASKING = [name for name in METHODS if name not in ("supervised", "rad")]
kinds = pytest.mark.parametrize("dtype", ["float32", "float16"])
places = pytest.mark.parametrize("where", ["memory", "directory"])


class Watched:
    """A teacher, and how many rows it was asked about: an MLP, as one with convolutions is run twice to begin with."""

    def __init__(self, k: int = 0, ask: Callable[[int], Any] = lambda rows: None) -> None:
        self.model, self.rows = trained_teachers()[1], 0
        for parameter in self.model.parameters():
            parameter.data += 0.1 * k  # another one

        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.rows += len(inputs[0])
            ask(self.rows)

        self.model.register_forward_pre_hook(note)


def fit(model: Distiller, data: DataModule | None = None, **options: Any) -> Any:
    """A short training without validation, where each method asks its teachers."""
    fitted = trainer(**({"limit_val_batches": 0} | options))
    fitted.fit(model, data or Blobs(**NOISE))
    return fitted


def kd(teacher: nn.Module, where: Any = "memory", **options: Any) -> KD:
    cache = TeacherCache(where, **options) if options else where
    return KD("mlp-8", teacher, num_classes=CLASSES, input_shape=list(SHAPE), teacher_cache=cache)


def held(model: Distiller, data: DataModule | None = None) -> list[Outputs]:
    """What the cache holds, of all rows, while the model is trained."""
    found: list[list[Outputs]] = []
    watch = Each(lambda *_: found.append(model.teachers.cache.rows(torch.arange(ROWS))), "on_train_start")  # type: ignore[union-attr]
    fit(model, data, callbacks=watch, max_steps=1)
    return found[0]


def said(teacher: nn.Module, data: DataModule) -> Tensor:
    """What a teacher gives for each row without augmentation."""
    data.setup()
    positions = np.concatenate([data.parts.positions["train"], data.parts.positions["meta"]])
    with torch.no_grad():
        logits: Tensor = teacher.eval()(data.parts.plain.fetch(positions.tolist()))
    return logits


def folders(where: Path) -> list[Path]:
    return sorted(where.iterdir()) if where.is_dir() else []


class TestRowFiles:
    shapes = {"logits": (3,), "features.a": (2, 2)}  # noqa: RUF012

    def values(self, index: np.ndarray[Any, Any]) -> dict[str, Any]:
        return {"logits": np.add.outer(index, np.arange(3.0)), "features.a": np.ones((len(index), 2, 2)) * 7}

    def store(self, folder: Path, rows: int = 20, dtype: Any = "float32") -> RowFiles:
        return RowFiles(folder / "deep" / "store", rows, self.shapes, dtype, {"teacher": "mlp"})

    @kinds
    def test_written_once_read_by_anyone(self, dtype: Any, tmp_path: Path) -> None:
        index = np.array([2, 3, 4, 9, 17])
        self.store(tmp_path, dtype=dtype).write(index, self.values(index))
        again = self.store(tmp_path, dtype=dtype)
        assert again.written(np.arange(20)).nonzero()[0].tolist() == index.tolist()
        found = again.finished()
        assert {array.dtype.name for array in found.values()} == {dtype}
        np.testing.assert_array_equal(found["logits"][index], self.values(index)["logits"])
        np.testing.assert_array_equal(np.load(tmp_path / "deep/store/features.a.npy")[index], 7)
        assert again.missing_bytes(20) == 20 * (7 * np.dtype(dtype).itemsize + 4)
        found["logits"][:] = 5  # stays in memory
        assert self.store(tmp_path, dtype=dtype).written(index).all()

    def test_a_torn_row_is_not_there(self, tmp_path: Path) -> None:
        store, index = self.store(tmp_path), np.arange(20)
        store.write(index, self.values(index))
        with (tmp_path / "deep/store/features.a.npy").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"torn")
        store.write(np.array([], dtype=np.int64), {name: rows[:0] for name, rows in self.values(index).items()})
        assert store.written(index).tolist() == [True] * 19 + [False]
        assert store.begun(index).all()

    def test_killed_while_it_writes(self, tmp_path: Path) -> None:
        store, index = self.store(tmp_path, 5000), np.arange(5000)
        child = os.fork()
        if not child:
            while True:
                for part in np.array_split(index, 500):
                    store.write(part, self.values(part))
        while not store.begun(index).any():
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        there = self.store(tmp_path, 5000).written(index)
        assert there.any()
        for name, array in store.finished().items():
            np.testing.assert_array_equal(array[there], self.values(index[there])[name])

    @pytest.mark.parametrize(
        ("file", "content", "match"),
        [
            ("logits.npy", b"", "expected an array, found none or a damaged one"),
            ("logits.npy", None, "expected an array, found none or a damaged one"),
            ("logits.npy", b"cut", "expected an array, found none or a damaged one"),
            ("checksums.npy", np.zeros((20, 3), np.float32), r"expected uint32 of shape \(20,\), found float32"),
            ("features.a.npy", np.array([os.getcwd], dtype=object), "expected an array, found none or a damaged one"),
            ("about.json", b"{", "expected what the folder holds, found no such file"),
            ("about.json", None, "expected what the folder holds, found no such file"),
            ("about.json", b'{"format": 2}', 'expected rows of {"format": 1.*found {"format": 2}'),
        ],
    )
    def test_damaged_or_foreign_files_are_refused(self, file: str, content: Any, match: str, tmp_path: Path) -> None:
        self.store(tmp_path)
        path = tmp_path / "deep" / "store" / file
        if content is None:
            path.unlink()
        elif isinstance(content, np.ndarray):
            np.save(path, content)
        else:
            path.write_bytes(path.read_bytes()[:-9] if content == b"cut" else content)
        with pytest.raises(ValueError, match=f"{match}.*or remove the folder"):
            self.store(tmp_path)

    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with full_disk(100), pytest.raises(OSError, match=r"could not be made .*: take another directory"):
            self.store(tmp_path)
        assert folders(tmp_path / "deep") == []
        store, index = self.store(tmp_path, 20000), np.arange(20000)
        store.write(index[:10], self.values(index[:10]))
        with full_disk(100000), pytest.raises(OSError, match=r"could not be written .* its 10 of 20000 rows stay"):
            store.write(index[10:], self.values(index[10:]))
        assert self.store(tmp_path, 20000).written(index).nonzero()[0].tolist() == list(range(10))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(2**20))
        store.check_room(1000)
        with pytest.raises(OSError, match="expected 30 MiB of free disk space for 1000000 rows, found 1"):
            store.check_room(10**6)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the kernel itself refuses."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestFill:
    @places
    @kinds
    def test_holds_what_the_teacher_gives(self, where: str, dtype: Any, tmp_path: Path) -> None:
        teachers = trained_teachers()
        place = where if where == "memory" else str(tmp_path / "cache")
        found = held(build("kd-teachers", teachers=teachers, teacher_cache=TeacherCache(place, dtype)))
        close = {"rtol": 2**-11, "atol": 1e-6} if dtype == "float16" else {"rtol": 1e-6, "atol": 1e-6}
        for outputs, teacher in zip(found, teachers, strict=True):
            torch.testing.assert_close(outputs.logits, said(teacher, Blobs(**NOISE)), **close)
            assert outputs.logits.dtype == torch.float32
        assert len(folders(tmp_path / "cache")) == (where != "memory") * 2

    @pytest.mark.parametrize("method", ASKING)
    def test_every_method_learns_the_same_and_asks_once(self, method: str) -> None:
        def run(**options: Any) -> tuple[dict[str, Tensor], Any, list[int]]:
            seed_everything(0, verbose=False)
            watched = [Watched(k) for k in (0, 1)]
            model = build(method, module("dropout"), [w.model for w in watched], **options)
            fitted = fit(model)
            assert model.teachers.cache is None  # its memory is free again
            used = [w.rows for w in watched][: len(model.teachers)]
            return model.student.state_dict(), dict(fitted.callback_metrics), used

        student, measured, _ = run()
        cached, measured_cached, asked = run(teacher_cache="memory")
        selects = method in ("kd-revised", "label-revision-selected", "almkd-revised")  # by the last layer's features
        assert set(asked) == {PROBED + ROWS * (1 + selects)}
        torch.testing.assert_close(cached, student, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(measured_cached, measured, rtol=1e-5, atol=1e-5)

    def test_a_second_training_asks_nothing(self, tmp_path: Path) -> None:
        first, second = Watched(), Watched()
        fit(kd(first.model, tmp_path))
        fit(build("almkd-robust", teachers=[second.model], teacher_cache=tmp_path), Blobs(labeled=0.5))
        assert (first.rows, second.rows) == (PROBED + ROWS, PROBED)
        assert len(folders(tmp_path)) == 1

    def test_interrupted_and_taken_up(self, tmp_path: Path) -> None:
        class Killed(BaseException):
            pass

        def stop(rows: int) -> None:
            if rows > PROBED + 40:
                raise Killed

        with pytest.raises(Killed):
            fit(kd(Watched(ask=stop).model, tmp_path / "again"))
        [folder] = folders(tmp_path / "again")
        marks = np.load(folder / "checksums.npy") != 0
        assert marks.tolist() == [True] * 40 + [False] * 32
        rest, whole = Watched(), Watched()
        again = kd(rest.model, tmp_path / "again")
        fit(again)
        assert rest.rows == PROBED + 32
        seed_everything(0, verbose=False)
        model = kd(whole.model, tmp_path / "whole")
        fit(model)
        assert whole.rows == PROBED + ROWS
        for file in folders(folder):
            assert file.read_bytes() == (tmp_path / "whole" / folder.name / file.name).read_bytes()

    def test_damaged_rows_are_asked_again(self, tmp_path: Path) -> None:
        fit(kd(Watched().model, tmp_path))
        [folder] = folders(tmp_path)
        values = np.load(folder / "logits.npy", mmap_mode="r+")
        values[[0, 5, 60]] += 1
        values.flush()
        watched = Watched()
        with pytest.warns(UserWarning, match=r"3 of 72 rows are damaged: they are filled again"):
            [found] = held(kd(watched.model, tmp_path))
        assert watched.rows == PROBED + 3
        torch.testing.assert_close(found.logits, said(watched.model, Blobs(**NOISE)), rtol=1e-6, atol=1e-6)

    def test_features_of_tapped_layers(self, tmp_path: Path) -> None:
        class Tapping(KD):
            teacher_taps = ("1", "penultimate")

        teacher, data = trained_teachers()[1], Blobs(**NOISE)
        [found] = held(Tapping("mlp-8", teacher, num_classes=CLASSES, input_shape=list(SHAPE), teacher_cache=tmp_path))
        said(teacher, data)
        x = data.parts.plain.fetch(data.parts.positions["train"].tolist())
        hidden = teacher[1](teacher[0](x))  # type: ignore[index]
        assert set(found.features) == {"1", "penultimate"}
        torch.testing.assert_close(found.features["1"][:48], hidden)
        torch.testing.assert_close(found.features["penultimate"][:48], hidden.relu())
        assert folders(folders(tmp_path)[0])[2].name == "features.1.npy"

    @pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
    def test_precisions(self, precision: Any, tmp_path: Path) -> None:
        """The dtype is the teacher's; float32 holds bfloat16 exactly."""

        def run(**options: Any) -> dict[str, Tensor]:
            seed_everything(0, verbose=False)
            model = build("kd", teachers=trained_teachers(), **options)
            fit(model, precision=precision)
            return model.student.state_dict()

        limit = 1e-6 if precision == "64-true" else 0.02
        torch.testing.assert_close(run(teacher_cache=tmp_path), run(), rtol=limit, atol=limit)
        fit(kd(trained_teachers()[0], tmp_path))
        assert len(folders(tmp_path)) == 2  # computed in other numbers

    def test_mappings(self) -> None:
        class DictRows(TensorRows):
            def fetch(self, positions: list[int]) -> Any:
                return {"pixels": self.x[positions], "mask": torch.ones_like(self.x[positions])}

        class DictBlobs(Blobs):
            def load(self) -> Source:
                x, y = blobs()
                return Source(DictRows(x), DictRows(x), y.numpy(), test_size=24)

        teacher = trained_teachers()[0]
        model = build("kd", Keyword(module("mlp-8")), [Keyword(teacher)], teacher_cache="memory")
        [found] = held(model, DictBlobs())
        torch.testing.assert_close(found.logits, said(teacher, Blobs()), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("method", "where"), [("kd", "memory"), ("almkd-robust", "directory"), ("posterior", "memory")]
    )
    def test_resume_equals_uninterrupted(self, method: str, where: str, tmp_path: Path) -> None:
        def run(directory: Path, **options: Any) -> dict[str, Any]:
            place = "memory" if where == "memory" else str(tmp_path / "cache")
            keep = ModelCheckpoint(directory, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
            model = build(method, module("dropout"), teacher_cache=TeacherCache(place, plain_view=True))
            resumed = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[keep])
            resumed.fit(model, Augmented(**NOISE), **options)
            return saved(resumed, directory / "last.ckpt")

        whole = run(tmp_path / "whole")
        torch.rand(7)
        again = run(tmp_path / "again", ckpt_path=tmp_path / "whole" / "epoch=1.ckpt", weights_only=True)
        for name in {"state_dict", "optimizer_states", "sample_table", "global_step"} & set(whole):
            assert_same(again[name], whole[name])
        assert not any("teacher" in key for key in whole["state_dict"])

    def test_workers_and_a_progress_bar(self, capsys: pytest.CaptureFixture[str]) -> None:
        fit(kd(trained_teachers()[0]), Blobs(num_workers=1), enable_progress_bar=True)
        assert "Cache of teacher 0" in capsys.readouterr().out

    def test_command_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        short = ("--model.student=mlp-8", "--model.teacher=mlp-8", "--trainer.max_steps=1")
        call("fit", *configs("kd"), *QUIET, *short, "--model.teacher_cache=cache")
        nested = "--model.teacher_cache={where: half, dtype: float16}"
        call("fit", *configs("kd"), *QUIET, *short, nested)
        assert len(folders(tmp_path / "cache")) == len(folders(tmp_path / "half")) == 1
        [path] = (version(1) / "checkpoints").glob("last.ckpt")
        assert KD.load_from_checkpoint(path, weights_only=True).teacher_cache == TeacherCache("half", "float16")


class Scaled(nn.Sequential):
    """A network whose code, not whose parts, can change."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * super().forward(x)
        return out


class OnePixel(Blobs):
    def load(self) -> Source:
        x, y = blobs()
        x[self.position, 0, 0, 0] += 1e-3
        return Source(TensorRows(x), TensorRows(x), y.numpy(), test_size=24, identity=b"blobs")

    position = 0


class Shifted(Blobs):
    def load(self) -> Source:
        source = super().load()
        source.train = source.plain = TensorRows(blobs()[0], lambda x: x + 0.01)
        return source


class TestFingerprint:
    @pytest.mark.parametrize("change", ["weight", "buffer", "setting", "layer"])
    def test_another_teacher(self, change: str, tmp_path: Path) -> None:
        def teacher() -> nn.Module:
            torch.manual_seed(0)
            parts = [nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Linear(8, CLASSES)]
            return nn.Sequential(*parts)

        other: Any = teacher()
        if change == "weight":
            other[1].weight.data[0, 0] += 1e-7
        elif change == "buffer":
            other[2].running_mean[3] += 1e-6
        elif change == "setting":
            other[3].negative_slope = 0.02
        else:
            other[3] = nn.ReLU()
        for one in (teacher(), teacher(), other, other):
            fit(kd(one, tmp_path), max_steps=1)
        assert len(folders(tmp_path)) == 2

    def test_other_inputs(self, tmp_path: Path) -> None:
        data = Blobs()
        data.setup()
        OnePixel.position = int(data.parts.positions["meta"][5])
        same = [Blobs(), Blobs(**NOISE), Blobs(labeled=0.5), Blobs(batch_size=5), Blobs(train_on_meta=True)]
        for number, given in enumerate([*same, OnePixel(), Shifted(), Blobs(seed=7), Blobs(meta=12)]):
            fit(kd(trained_teachers()[0], tmp_path), given, max_steps=1)
            assert len(folders(tmp_path)) == max(1, number - len(same) + 2)

    def test_one_other_row_of_data_of_your_own(self, tmp_path: Path) -> None:
        """Which is read from its data set, as no tensor of it is at hand."""

        class Drawn(Dataset[Any]):
            def __init__(self, shift: float) -> None:
                self.shift = shift

            def __len__(self) -> int:
                return 1200

            def __getitem__(self, item: int) -> tuple[Tensor, int]:
                return torch.full(SHAPE, item / 1200) + (item == 333) * self.shift, item % CLASSES

        for shift in (0.0, 0.0, 1e-3):
            fit(kd(trained_teachers()[1], tmp_path), foreign(Drawn(shift)), max_steps=1)
        assert len(folders(tmp_path)) == 2

    def test_attributes_that_are_no_buffers(self) -> None:
        class Layer(nn.Module):
            def __init__(self, scale: Tensor, act: Any, power: float) -> None:
                super().__init__()
                self.scale, self.act, self._power = scale, act, power

        one = Layer(torch.ones(3), torch.relu, 2.0)
        same = Layer(torch.ones(3), torch.relu, 2.0)
        same.train().compile()
        assert of_teacher(one) == of_teacher(same)
        others = [
            Layer(2 * torch.ones(3), torch.relu, 2.0),
            Layer(torch.ones(3), torch.tanh, 2.0),
            Layer(torch.ones(3), nn.functional.gelu, 2.0),
            Layer(torch.ones(3), torch.relu, 3.0),
        ]
        assert len({of_teacher(layer) for layer in (one, *others)}) == 5

    def test_other_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        teacher = Scaled(*trained_teachers()[1])  # type: ignore[misc]
        fit(kd(teacher, tmp_path))
        monkeypatch.setattr(Scaled, "scale", 1.02)
        with pytest.raises(ValueError, match=r"expected what teacher 0 gives now, found other logits.*code of teacher"):
            fit(kd(teacher, tmp_path))


class Random(Dataset[Any]):
    """Items in which few inputs, now and then, are another."""

    def __init__(self, chance: float) -> None:
        self.x, self.y = blobs()
        self.chance = chance

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        return self.x[item].flip(-1) if torch.rand(()) < self.chance else self.x[item], int(self.y[item])


def foreign(train: Dataset[Any]) -> DistillationDataModule:
    inner = LightningDataModule.from_datasets(train, TensorDataset(*blobs()), batch_size=8)
    return DistillationDataModule(inner, num_classes=CLASSES, meta=24)


class InHook(Blobs):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch._replace(x=batch.x + 0.1 * torch.randn_like(batch.x))


class TestViews:
    @pytest.mark.parametrize("data", [Augmented, lambda: foreign(Random(0.1)), InHook])
    def test_augmentation_is_refused(self, data: Any) -> None:
        watched = Watched()
        with pytest.raises(ValueError, match=r"expected .*inputs .*leave teacher_cache unset"):
            fit(kd(watched.model), data())
        assert watched.rows == 0

    def test_another_fixed_view_is_refused(self) -> None:
        class Training(Blobs):
            def load(self) -> Source:
                source = super().load()
                source.train = TensorRows(blobs()[0], lambda x: 2 * x)
                return source

        with pytest.raises(ValueError, match=r"expected training inputs without augmentation.*plain_view to true"):
            fit(kd(trained_teachers()[0]), Training())

    def test_the_teacher_may_see_the_plain_view(self) -> None:
        teacher, inputs = trained_teachers()[0], []
        model = kd(teacher, plain_view=True)
        model.student.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        [found] = held(model, Augmented(**NOISE))
        torch.testing.assert_close(found.logits, said(teacher, Blobs(**NOISE)), rtol=1e-6, atol=1e-6)
        assert not torch.isin(inputs[0], blobs()[0]).any()  # the student's are augmented

    @pytest.mark.parametrize("data", [lambda: foreign(Random(0.1)), InHook])
    def test_where_there_is_no_plain_view(self, data: Any) -> None:
        with pytest.raises(ValueError, match="found random ones, and no view of the data without augmentation"):
            fit(kd(trained_teachers()[0], plain_view=True), data())

    @pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
    def test_a_callback_that_changes_the_inputs(self, precision: Any) -> None:
        class Mixing(Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                batch.x[-1] += batch.x[0]

        fit(kd(trained_teachers()[0]), precision=precision)
        for options in ({}, {"plain_view": True}):
            refused = pytest.raises(
                ValueError, match=r"expected training batches that hold the data's inputs.*callback"
            )
            with contextlib.nullcontext() if options else refused:
                fit(kd(trained_teachers()[0], **options), callbacks=Mixing(), precision=precision)

    def test_foreign_data(self) -> None:
        data, watched = foreign(Random(0.0)), Watched()
        fit(kd(watched.model), data)
        assert watched.rows == PROBED + len(data.labels) == PROBED + 144

    def test_global_random_numbers_stay(self) -> None:
        draws = []
        for where in (None, "memory"):
            seed_everything(0, verbose=False)
            model = kd(trained_teachers()[0], where)
            draw = Each(lambda *_: draws.append((torch.rand(3), np.random.rand())), "on_train_start")  # noqa: NPY002
            fit(model, Shifted(), callbacks=draw, max_steps=1)
        assert_same(draws[0], draws[1])


class Sick(nn.Module):
    """Gives some value for one of the rows."""

    def __init__(self, row: Tensor, value: float) -> None:
        super().__init__()
        self.net, self.row, self.value = trained_teachers()[0], row, value

    def forward(self, x: Tensor) -> Tensor:
        sick = (x == self.row).flatten(1).all(1, keepdim=True)
        out: Tensor = self.net(x).masked_fill(sick, self.value)
        return out


class TestLife:
    def test_a_later_fit_of_another_module(self) -> None:
        class Plain(LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(16, CLASSES)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                out: Tensor = self.layer(batch.x.flatten(1)).sum()
                return out

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), 0.1)

        fitted = fit(kd(trained_teachers()[1]), max_epochs=1)
        fitted.fit_loop.max_epochs = 2
        fitted.fit(Plain(), Blobs())
        assert fitted.current_epoch == 2

    def test_callbacks_without_it_are_refused(self) -> None:
        class Own(KD):
            def configure_callbacks(self) -> Any:
                return []

        model = Own(
            "mlp-8", trained_teachers()[1], num_classes=CLASSES, input_shape=list(SHAPE), teacher_cache="memory"
        )
        with pytest.raises(ValueError, match=r"expected a filled teacher_cache, found none: let Own's configure_callb"):
            fit(model)

    def test_freed_after_an_error(self) -> None:
        def stop(*_: Any) -> None:
            raise OSError("no space")

        model = kd(trained_teachers()[1])
        with pytest.raises(OSError, match="no space"):
            fit(model, callbacks=Each(stop, "on_train_start"))
        assert model.teachers.cache is None

    def test_fast_dev_run_fills_nothing(self, tmp_path: Path) -> None:
        watched = Watched()
        fit(kd(watched.model, tmp_path), fast_dev_run=True)
        assert watched.rows == 8 + 8  # a training and a validation batch
        assert folders(tmp_path) == []

    def test_checkpoints_know_it(self, tmp_path: Path) -> None:
        options = TeacherCache("memory", "float16", plain_view=True)
        model = KD("mlp-8", trained_teachers()[1], num_classes=3, input_shape=list(SHAPE), teacher_cache=options)
        fit(model, max_steps=1).save_checkpoint(tmp_path / "a.ckpt")
        assert KD.load_from_checkpoint(tmp_path / "a.ckpt").teacher_cache == options


class TestRefused:
    def test_a_tapped_layer_that_gives_no_tensor(self) -> None:
        class Two(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x, x

        class First(nn.Module):
            def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
                return x[0]

        class Tapping(KD):
            teacher_taps = ("0",)

        teacher = nn.Sequential(Two(), First(), trained_teachers()[1])
        with pytest.raises(ValueError, match=r"expected tensors as teacher 0's features.*found a tuple at the layer"):
            fit(Tapping("mlp-8", teacher, num_classes=CLASSES, input_shape=list(SHAPE), teacher_cache="memory"))

    @pytest.mark.parametrize(
        ("value", "dtype", "match"),
        [
            (
                torch.nan,
                "float32",
                r"expected finite numbers in teacher 1's logits, found nan or infinity in row 33 of",
            ),
            (7e4, "float16", "in row 33 of the training data: .* the dtype float32, as float16 ends at 65504"),
        ],
    )
    def test_no_numbers(self, value: float, dtype: Any, match: str, tmp_path: Path) -> None:
        data = Blobs()
        data.setup()
        row = data.parts.plain.fetch([int(data.parts.positions["train"][33])])
        teachers = [trained_teachers()[0], Sick(row, value)]  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=match):
            fit(build("kd-teachers", teachers=teachers, teacher_cache=TeacherCache(tmp_path, dtype)), Blobs())
        counts = sorted(int((np.load(folder / "checksums.npy") != 0).sum()) for folder in folders(tmp_path))
        assert counts == [32, ROWS]  # of the sick one, the batches before

    def test_a_teacher_of_other_classes(self) -> None:
        watched = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES + 1))
        with pytest.raises(ValueError, match=r"expected teacher 0's logits of shape \(8, 3\)"):
            fit(kd(watched))

    def test_plain_batches(self) -> None:
        loader = DataLoader(TensorDataset(*blobs()), 8)
        trainer(max_steps=1).fit(kd(trained_teachers()[0], "none"), loader)
        with pytest.raises(ValueError, match=r"expected a data module of lit_kd.data for teacher_cache.*found none"):
            trainer().fit(kd(trained_teachers()[0]), loader)

    def test_a_hook_that_drops_the_index(self) -> None:
        class Dropping(Blobs):
            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return tuple(batch)[:2] if self.trainer.global_step else batch  # type: ignore[union-attr]

        with pytest.raises(ValueError, match=r"expected batches with sample indices.*must keep the index"):
            fit(kd(trained_teachers()[0]), Dropping())

    @pytest.mark.parametrize(
        ("method", "match"),
        [
            ("supervised", "expected a teacher for teacher_cache, found that Supervised has none"),
            ("rad", "expected no teacher_cache, which asks about all rows, found 'memory'"),
        ],
    )
    def test_methods_that_do_not_ask_about_all_rows(self, method: str, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            fit(build(method, teacher_cache="memory"))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"where": ""}, "expected a teacher_cache 'memory', a directory or 'none', found an empty string"),
            ({"dtype": "bfloat16"}, r"expected a teacher_cache's dtype of \['float32', 'float16'\], found 'bfloat16'"),
        ],
    )
    def test_options(self, options: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            kd(trained_teachers()[0], **options)
