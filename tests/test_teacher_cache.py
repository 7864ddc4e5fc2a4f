"""Cached outputs against the teacher itself. Several processes: see test_distributed.py."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import QUIET, call, configs, version
from lightning import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from methods import CLASSES, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from test_every_method import NOISE, Augmented, Each, assert_same, module, saved
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lit_kd import KD, Distiller
from lit_kd.data import DataModule, DistillationDataModule, Source, TensorRows
from lit_kd.teachers.cache import TeacherCache
from lit_kd.terms import KL
from lit_kd.types import Batch, Outputs

ROWS, PROBED = 72, 8
"""48 training and 24 meta rows; so many are asked about where a stored cache is used again."""
ASKING = ["kd-teachers", "kd-revised", "almkd-robust"]
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
    watch = Each(lambda *_: found.append(look_up(model)), "on_train_start")
    fit(model, data, callbacks=watch, max_steps=1)
    return found[0]


@torch.no_grad()
def look_up(model: Distiller) -> list[Outputs]:
    assert model.teachers.cache is not None
    rows = torch.arange(ROWS)
    return model.teachers.cache(Batch(rows, rows, rows))


def said(teacher: nn.Module, data: DataModule) -> Tensor:
    """What a teacher gives for each row without augmentation."""
    data.setup()
    positions = np.concatenate([data.parts.positions["train"], data.parts.positions["meta"]])
    with torch.no_grad():
        logits: Tensor = teacher.eval()(data.parts.plain.fetch(positions.tolist()))
    return logits


def folders(where: Path) -> list[Path]:
    return sorted(where.iterdir()) if where.is_dir() else []


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
        selects = method == "kd-revised"  # by the last layer's features; that it is the head, four rows tell
        assert set(asked) == {2 * ROWS + 4 if selects else ROWS}
        torch.testing.assert_close(cached, student, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(measured_cached, measured, rtol=1e-5, atol=1e-5)

    def test_a_second_training_asks_nothing(self, tmp_path: Path) -> None:
        first, second = Watched(), Watched()
        fit(kd(first.model, tmp_path))
        fit(build("almkd-robust", teachers=[second.model], teacher_cache=tmp_path), Blobs(labeled=0.5))
        assert (first.rows, second.rows) == (ROWS, PROBED)
        assert len(folders(tmp_path)) == 1

    def test_a_killed_fill_starts_again(self, tmp_path: Path) -> None:
        class Killed(BaseException):
            pass

        def stop(rows: int) -> None:
            if rows > 40:
                raise Killed

        with pytest.raises(Killed):
            fit(kd(Watched(ask=stop).model, tmp_path))
        assert folders(tmp_path) == []
        with full_disk(100), pytest.raises(OSError, match=r"cannot write .*ids.npy"):
            fit(kd(Watched().model, tmp_path))
        assert not [file for file in tmp_path.rglob("*") if file.is_file()]
        for _ in range(2):
            again = Watched()
            fit(kd(again.model, tmp_path))
            assert again.rows == ROWS
            (folders(tmp_path)[0] / "logits.npy").unlink()  # as after a kill between two files

    def test_features_of_tapped_layers(self, tmp_path: Path) -> None:
        teacher, data, term = trained_teachers()[1], Blobs(**NOISE), KL(4.0)
        term.teacher_taps = ("1", "penultimate")
        [found] = held(build("kd", teachers=[teacher], term=term, teacher_cache=tmp_path))
        said(teacher, data)
        x = data.parts.plain.fetch(data.parts.positions["train"].tolist())
        hidden = teacher[1](teacher[0](x))  # type: ignore[index]
        assert set(found.features) == {"1", "penultimate"}
        torch.testing.assert_close(found.features["1"][:48], hidden)
        torch.testing.assert_close(found.features["penultimate"][:48], hidden.relu())
        names = [file.name for file in folders(folders(tmp_path)[0])]
        assert names == ["features.1.npy", "features.penultimate.npy", "ids.npy", "logits.npy"]

    def test_bfloat16(self, tmp_path: Path) -> None:
        """The dtype is the teacher's; float32 holds bfloat16 exactly."""

        def run(**options: Any) -> dict[str, Tensor]:
            seed_everything(0, verbose=False)
            model = build("kd", teachers=trained_teachers(), **options)
            fit(model, precision="bf16-mixed")
            return model.student.state_dict()

        torch.testing.assert_close(run(teacher_cache=tmp_path), run(), rtol=0.02, atol=0.02)
        fit(kd(trained_teachers()[0], tmp_path))
        assert len(folders(tmp_path)) == 2  # computed in other numbers

    def test_resume_equals_uninterrupted(self, tmp_path: Path) -> None:
        def run(directory: Path, **options: Any) -> dict[str, Any]:
            keep = ModelCheckpoint(directory, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
            cache = TeacherCache(str(tmp_path / "cache"), plain_view=True)
            model = build("almkd-robust", module("dropout"), teacher_cache=cache)
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


class TestKey:
    @pytest.mark.parametrize("change", ["weight", "buffer", "setting"])
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
        else:
            other[3] = nn.LeakyReLU(0.02)
        for one in (teacher(), teacher(), other, other):
            fit(kd(one, tmp_path), max_steps=1)
        assert len(folders(tmp_path)) == 2

    def test_other_inputs(self, tmp_path: Path) -> None:
        data = Blobs()
        data.setup()
        OnePixel.position = int(data.parts.positions["meta"][5])
        same = [Blobs(), Blobs(**NOISE), Blobs(labeled=0.5), Blobs(batch_size=5), Blobs(train_on_meta=True)]
        for number, given in enumerate([*same, OnePixel(), Blobs(seed=7), Blobs(meta=12)]):
            fit(kd(trained_teachers()[0], tmp_path), given, max_steps=1)
            assert len(folders(tmp_path)) == max(1, number - len(same) + 2)

    def test_other_code_or_files(self, tmp_path: Path) -> None:
        fit(kd(trained_teachers()[1], tmp_path))
        [folder] = folders(tmp_path)
        np.save(folder / "logits.npy", np.load(folder / "logits.npy") * 1.02)
        with pytest.raises(ValueError, match=f"teacher 0 gives other logits than stored .*: remove {folder}"):
            fit(kd(trained_teachers()[1], tmp_path))


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


class Doubled(Blobs):
    """Its training rows are another fixed view."""

    def load(self) -> Source:
        source = super().load()
        source.train = TensorRows(blobs()[0], lambda x: 2 * x)
        return source


class TestViews:
    @pytest.mark.parametrize("data", [Augmented, lambda: foreign(Random(0.1)), InHook, Doubled])
    def test_augmentation_is_refused(self, data: Any) -> None:
        watched = Watched()
        with pytest.raises(ValueError, match=r"teacher_cache needs training inputs without augmentation"):
            fit(kd(watched.model), data())
        assert watched.rows == 0
        found = foreign(Random(0.0))
        fit(kd(watched.model), found)
        assert watched.rows == len(found.labels) == 144

    def test_the_teacher_may_see_the_plain_view(self) -> None:
        teacher, inputs = trained_teachers()[0], []
        model = kd(teacher, plain_view=True)
        model.student.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        [found] = held(model, Augmented(**NOISE))
        torch.testing.assert_close(found.logits, said(teacher, Blobs(**NOISE)), rtol=1e-6, atol=1e-6)
        assert not torch.isin(inputs[0], blobs()[0]).any()  # the student's are augmented

    def test_a_callback_that_changes_the_inputs(self) -> None:
        class Mixing(Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                batch.x[-1] += batch.x[0]

        fit(kd(trained_teachers()[0]), precision="bf16-true")
        for options in ({}, {"plain_view": True}):
            refused = pytest.raises(ValueError, match=r"a hook or callback changes batch.x: set plain_view to true")
            with contextlib.nullcontext() if options else refused:
                fit(kd(trained_teachers()[0], **options), callbacks=Mixing(), precision="bf16-true")

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


class TestRefused:
    @pytest.mark.parametrize(
        ("value", "dtype", "match"),
        [
            (torch.nan, "float32", r"teacher 1 gives logits with nan or infinity in row 33"),
            (7e4, "float16", "in row 33: .* the dtype float16"),
        ],
    )
    def test_no_numbers(self, value: float, dtype: Any, match: str, tmp_path: Path) -> None:
        data = Blobs()
        data.setup()
        row = data.parts.plain.fetch([int(data.parts.positions["train"][33])])
        teachers = [trained_teachers()[0], Sick(row, value)]  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=match):
            fit(build("kd-teachers", teachers=teachers, teacher_cache=TeacherCache(tmp_path, dtype)), Blobs())
        assert len(folders(tmp_path)) == 1  # the sound teacher's

    def test_plain_batches(self) -> None:
        loader = DataLoader(TensorDataset(*blobs()), 8)
        trainer(max_steps=1).fit(kd(trained_teachers()[0], "none"), loader)
        with pytest.raises(ValueError, match=r"needs a teacher and a data module of lit_kd.data.*NoneType"):
            trainer().fit(kd(trained_teachers()[0]), loader)

    def test_a_hook_that_drops_the_index(self) -> None:
        class Dropping(Blobs):
            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return tuple(batch)[:2] if self.trainer.global_step else batch  # type: ignore[union-attr]

        with pytest.raises(ValueError, match=r"teacher_cache needs batches \(x, y, index\)"):
            fit(kd(trained_teachers()[0]), Dropping())

    @pytest.mark.parametrize(
        ("method", "match"),
        [
            ("supervised", "teacher_cache needs a teacher .*, found 0 teachers"),
            ("rad", "expected one teacher, and no teacher_cache, which asks about all rows; found 1 and"),
        ],
    )
    def test_methods_that_do_not_ask_about_all_rows(self, method: str, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            fit(build(method, teacher_cache="memory"))
