"""What is left when a training is cut off, the disk is full, or a file is damaged."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUIET, call, configs, train_teacher
from lightning import Callback, seed_everything
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from methods import Blobs, blobs, build, trained_teachers, trainer
from PIL import Image
from test_every_method import Augmented, Each, assert_same, module
from torch import Tensor, nn

from lit_kd import KD
from lit_kd.cli.lightning import make_cli
from lit_kd.cli.main import main
from lit_kd.data import CIFAR10DataModule, DistillationDataModule, ImageFolderDataModule, MNISTDataModule
from lit_kd.models.files import write_columns
from lit_kd.report.callbacks import Last, WholeCheckpoints, WritePredictions
from lit_kd.report.evidence import KeepEvidence


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: the system fails a write half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class At(Callback):
    """Does something at the start of a training batch."""

    def __init__(self, epoch: int, batch: int, act: Callable[[], None]) -> None:
        self.at = (epoch, batch)
        self.act = act

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            self.act()


def keep(folder: Path) -> list[Callback]:
    """What the command line keeps: the best and the last epoch."""
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True)
    return [ModelCheckpoint(folder, "best", monitor="val/nll"), last]


class Stop(At):
    """Ends this process's training, as another program or the user's Ctrl-C would."""

    def __init__(self, how: str) -> None:
        super().__init__(1, 3, lambda: os.kill(os.getpid(), getattr(signal, how)))


class TestFullDisk:
    @pytest.mark.parametrize("before", [None, b"as it was"])
    @pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
    def test_a_table(self, name: str, before: bytes | None, tmp_path: Path) -> None:
        path = tmp_path / name
        if before is not None:
            path.write_bytes(before)
        kept = "no file was left" if before is None else "the file that is there is as it was"
        with small_files(1000), pytest.raises(OSError, match=rf"cannot write {path}: File too large; {kept}"):
            write_columns(path, {"index": list(range(5000))}, overwrite=True)
        assert content(tmp_path) == ({} if before is None else {name: before})

    @pytest.mark.parametrize("before", [False, True])
    def test_evidence(self, before: bool, tmp_path: Path) -> None:
        kept, path = KeepEvidence(), tmp_path / "evidence.npz"
        kept.parts = [{"confidence": torch.rand(5000)}]
        if before:
            kept.save(path)
        old = content(tmp_path)
        with small_files(1000), pytest.raises(OSError, match=r"evidence\.npz: File too large.*; make room, and run it"):
            kept.save(path)
        assert content(tmp_path) == old

    def test_a_cache(self, tmp_path: Path) -> None:
        """What was written is no cache; with room it is made anew, and the training is as without the accident."""

        def run(where: str) -> dict[str, Tensor]:
            model = build("kd", teacher_cache=where)
            trainer().fit(model, Blobs())
            return model.student.state_dict()

        with small_files(500), pytest.raises(OSError, match=r"cannot write .*\.npy: File too large; no file was left"):
            run(str(tmp_path))
        assert not [name for name in content(tmp_path) if name.endswith((".part", "logits.npy"))]
        seed_everything(0, verbose=False)
        found = run(str(tmp_path))
        assert [name for name in content(tmp_path) if name.endswith("logits.npy")]
        seed_everything(0, verbose=False)
        assert_same(found, run("memory"))

    def test_predictions(self, tmp_path: Path) -> None:
        writer = WritePredictions()
        fitted = trainer(default_root_dir=tmp_path, callbacks=writer)
        with small_files(50), pytest.raises(OSError, match=r"cannot write .*predictions\.csv: File too large"):
            fitted.predict(build("supervised"), Blobs())
        assert not content(tmp_path)

    @pytest.mark.parametrize("method", ["kd", "almkd-robust"])
    def test_a_checkpoint(self, method: str, tmp_path: Path) -> None:
        kept: dict[str, bytes] = {}

        def fill() -> None:
            kept.update(content(tmp_path))
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        callbacks = [*keep(tmp_path), At(2, 1, fill)]
        fitted = trainer(max_epochs=4, enable_checkpointing=True, callbacks=callbacks, plugins=WholeCheckpoints())
        with (
            small_files(10**9),
            pytest.raises(OSError, match=r"cannot write .*\.ckpt: File too large; the file that is there is as it was"),
        ):
            fitted.fit(build(method), Blobs())
        assert content(tmp_path) == kept
        assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 1
        again = trainer(max_epochs=4)
        again.fit(build(method), Blobs(), ckpt_path=tmp_path / "last.ckpt")
        assert again.current_epoch == 4

    def test_the_command_says_so_without_a_traceback(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        short = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--model.student=mlp-2048"]
        args = ["fit", *configs("supervised"), *QUIET, *short, "--checkpoint.dirpath=."]
        monkeypatch.setattr(sys, "argv", ["lit-kd", *map(str, args)])
        with small_files(200_000), pytest.raises(SystemExit) as done:
            main()
        assert str(done.value.code).startswith(f"lit-kd: error: [Errno 27] cannot write {tmp_path}/")
        assert not list(Path().rglob("*.ckpt*"))

    def test_the_command_line_s_way_and_the_users_own(self) -> None:
        given = [str(word) for word in (*configs("supervised"), *QUIET)]
        assert type(make_cli(given, run=False).trainer.strategy.checkpoint_io) is WholeCheckpoints
        own = make_cli([*given, "--trainer.plugins=lightning.fabric.plugins.io.TorchCheckpointIO"], run=False)
        assert type(own.trainer.strategy.checkpoint_io) is TorchCheckpointIO


class Sick(nn.Module):
    """A teacher that after some batches gives no numbers any more."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.net = trained_teachers()[1]
        self.batches = batches

    def forward(self, x: Tensor) -> Tensor:
        self.batches -= 1
        return self.net(x) * (1.0 if self.batches >= 0 else torch.nan)


class Exploding(KD):
    """A loss that becomes infinite."""

    def weigh(self, *args: Any) -> Any:
        return (torch.inf, 0.0) if self.current_epoch == 2 else super().weigh(*args)


@pytest.mark.parametrize("who", ["teacher", "loss", "almkd teacher"])
def test_no_number_leaves_the_last_good_checkpoint(who: str, tmp_path: Path) -> None:
    kept: dict[str, bytes] = {}
    copied = At(2, 0, lambda: kept.update(content(tmp_path)))
    fitted = trainer(max_epochs=4, enable_checkpointing=True, callbacks=[*keep(tmp_path), copied])
    if who == "loss":
        model = Exploding("mlp-8", trained_teachers()[0], num_classes=3, input_shape=[1, 4, 4])
        match, data = "expected a finite loss", Blobs()
    else:  # 6 training and 3 validation batches an epoch, 9 of the former with the meta rows
        almkd = who == "almkd teacher"
        model = build("almkd-robust" if almkd else "kd", teachers=[Sick(26 if almkd else 20)])
        match, data = "expected finite numbers in teacher 0's logits", Blobs()
    with pytest.raises(ValueError, match=match):
        fitted.fit(model, data)
    assert fitted.current_epoch == 2
    assert {"best.ckpt", "last.ckpt"} == set(kept)
    assert content(tmp_path) == kept
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(part.isfinite().all() for part in state.values())


# interrupted, and taken up again


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher and, by method, uninterrupted trainings."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_teacher(folder)
        shutil.move("last.ckpt", "teacher.ckpt")
        for method in ("almkd", "kd"):
            fit(method, folder, method)
    return folder


def fit(method: str, whole: Path, folder: str, *args: object) -> None:
    """Three epochs of noisy digits."""
    noise = ("--data.noise=symmetric", "--data.noise_rate=0.3", "--trainer.max_epochs=3")
    models = ("--checkpoint.filename=best", "--model.student=mlp-8", f"--model.teacher={whole / 'teacher.ckpt'}")
    call("fit", *configs(method), *QUIET, *noise, *models, f"--checkpoint.dirpath={folder}", *args)


def state(path: Path) -> dict[str, Any]:
    """What a training has come to."""
    found = torch.load(path, weights_only=True)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "sample_table", "epoch", "global_step")
    return {name: found[name] for name in names if name in found}


@pytest.mark.parametrize(
    ("method", "how", "workers"), [("almkd", "SIGTERM", 2), ("kd", "SIGTERM", 0), ("kd", "SIGINT", 0)]
)
def test_stopped_in_an_epoch_and_resumed(
    method: str, how: str, workers: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM leaves what the training has come to, Ctrl-C the last epoch; both are no success."""
    monkeypatch.chdir(tmp_path)
    options = [f"--data.num_workers={workers}"]
    stop = ["--trainer.callbacks=test_survival.Stop", f"--trainer.callbacks.how={how}"]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what runs in the background without it
        with pytest.raises(SystemExit) as done:
            fit(method, whole, "cut", *options, *stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    middle = how == "SIGTERM"
    assert done.value.code == (143 if middle else 1)
    cut, whole_run = (state(path) for path in (Path("cut/last.ckpt"), whole / method / "last.ckpt"))
    steps = whole_run["global_step"] // 3
    assert (cut["epoch"], cut["global_step"]) == ((1, steps + 4) if middle else (0, steps))
    fit(method, whole, "cut", *options, "--ckpt_path=last")
    for name in ("last.ckpt", "best.ckpt"):
        assert_same(state(Path("cut") / name), state(whole / method / name))
    assert {path.name for path in Path("cut").glob("*.ckpt")} == {"last.ckpt", "best.ckpt"}


@pytest.mark.parametrize("method", ["kd", "almkd-robust"])
def test_stopped_in_the_validation_after_an_epoch(method: str, tmp_path: Path) -> None:
    """The epoch is not lost, and resumed, it is validated anew, from the first batch."""

    def run(folder: Path, stop: bool = False, **resumed: Any) -> list[tuple[int, Tensor]]:
        seen: list[tuple[int, Tensor]] = []

        def note(hook: str, trainer: Any, module: Any, *batch: Any) -> None:
            if hook == "on_validation_epoch_end":
                seen.append((trainer.current_epoch, trainer.callback_metrics["val/nll"]))
            elif stop and trainer.current_epoch == 1 and batch[1] == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        last = Last(folder, "last", save_on_train_epoch_end=True)
        watch = Each(note, "on_validation_batch_start", "on_validation_epoch_end")
        fitted = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[last, watch])
        fitted.fit(build(method, module("dropout")), Augmented(), **resumed)
        return seen

    whole = run(tmp_path / "whole")
    with pytest.raises(SystemExit) as done:
        run(tmp_path / "cut", stop=True)
    assert done.value.code == 143
    steps = [state(tmp_path / name / "last.ckpt")["global_step"] for name in ("cut", "whole")]
    assert 3 * steps[0] == 2 * steps[1]
    again = run(tmp_path / "cut", ckpt_path=tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert [epoch for epoch, _ in again] == [1, 2]
    assert_same(again, whole[1:])
    assert_same(state(tmp_path / "cut" / "last.ckpt"), state(tmp_path / "whole" / "last.ckpt"))


def test_stopped_in_a_validation_of_its_own(tmp_path: Path) -> None:
    """After a fit; the checkpoint stays that of the fit."""
    stop: list[bool] = []

    def note(hook: str, trainer: Any, module: Any, *batch: Any) -> None:
        if stop:
            raise SIGTERMException

    last, watch = Last(tmp_path, "last", save_on_train_epoch_end=True), Each(note, "on_validation_batch_end")
    fitted, model, data = (
        trainer(max_epochs=1, enable_checkpointing=True, callbacks=[last, watch]),
        build("kd", module("dropout")),
        Augmented(),
    )
    fitted.fit(model, data)
    before = (tmp_path / "last.ckpt").read_bytes()
    stop.append(True)
    with pytest.raises(SystemExit):
        fitted.validate(model, data)
    assert (tmp_path / "last.ckpt").read_bytes() == before


class Requeued(Callback):
    """Inside a step of the second epoch, SLURM says that time is up; two batches later it ends the job."""

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        at = trainer.current_epoch, trainer.fit_loop.batch_idx
        if not trainer.ckpt_path and at in ((1, 2), (1, 4)):
            os.kill(os.getpid(), signal.SIGUSR1 if at[1] == 2 else signal.SIGTERM)


def test_a_slurm_job_is_queued_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command again goes on by itself from what was saved at the end of a batch, not within a step."""
    monkeypatch.chdir(tmp_path)
    stub = tmp_path / "bin" / "scontrol"
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:{os.environ['PATH']}")
    numbers = {"JOB_ID": 1234, "NTASKS": 1, "NTASKS_PER_NODE": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in (numbers | {"JOB_NAME": "distil", "NODELIST": "localhost"}).items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    line = ("--trainer.default_root_dir=.", "--trainer.callbacks=test_survival.Requeued")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(SystemExit) as done:
        fit("almkd", whole, "job", *line)
    assert done.value.code == 143
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert Path("asked").read_text() == "requeue 1234\n"
    assert state(Path("hpc_ckpt_1.ckpt"))["global_step"] == state(whole / "almkd" / "last.ckpt")["global_step"] // 3 + 3
    fit("almkd", whole, "job", *line)
    assert_same(state(Path("job/last.ckpt")), state(whole / "almkd" / "last.ckpt"))


MIDDLE = [
    *[
        (name, workers, "own")
        for name, workers in {"kd": 1, "almkd-robust": 0, "kd-teachers": 0, "loss-divider": 0}.items()
    ],
    ("almkd-paper", 1, "validation"),
    ("kd", 0, "wrapped"),
]


def wrapped() -> DistillationDataModule:
    x, y = blobs()
    held = torch.utils.data.TensorDataset(x[:24], y[:24])
    return DistillationDataModule.from_datasets(torch.utils.data.TensorDataset(x[24:], y[24:]), held, batch_size=8)


@pytest.mark.parametrize(("method", "workers", "kind"), MIDDLE)
def test_resumed_in_mid_epoch(method: str, workers: int, kind: str, tmp_path: Path) -> None:
    """With dropout and augmentation: from the fourth batch of the second epoch as if it had not been cut.

    Of our data and of wrapped ones; where a batch's end wrote the checkpoint, or a validation did.
    """

    def run(folder: Path, **resumed: Any) -> tuple[dict[str, Any], list[list[int]]]:
        seen: list[list[int]] = []

        def note(_: str, trainer: Any, module: Any, batch: Any, *__: Any) -> None:
            if trainer.current_epoch == 1 and trainer.fit_loop.batch_idx > 3:
                seen.append((batch["train"] if isinstance(batch, dict) else batch).index.tolist())

        validates = kind == "validation"
        often: dict[str, Any] = {"save_on_train_epoch_end": False} if validates else {"every_n_train_steps": 1}
        kept = ModelCheckpoint(folder, "{epoch}-{step}", save_top_k=-1, **often)
        model = build(method, module("dropout"), lr_scheduler="cosine", lr_interval="step")
        options: dict[str, Any] = {"val_check_interval": 1, "limit_val_batches": 1} if validates else {}
        watch = Each(note, "on_train_batch_start")
        fitted = trainer(max_epochs=3, enable_checkpointing=True, callbacks=[kept, watch], **options)
        data = wrapped() if kind == "wrapped" else Augmented(noise="symmetric", noise_rate=0.3, num_workers=workers)
        fitted.fit(model, data, **resumed)
        fitted.save_checkpoint(folder / "last.ckpt")
        return state(folder / "last.ckpt"), seen

    expected, rows = run(tmp_path / "whole")
    torch.rand(7)
    middle = sorted((tmp_path / "whole").glob("epoch=1-*.ckpt"), key=lambda path: int(path.stem.split("=")[-1]))[3]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable")
        found, again = run(tmp_path / "again", ckpt_path=middle, weights_only=True)
    assert len(rows) >= 2
    assert again == rows
    assert_same(found, expected)


# damaged data


def idx(path: Path, shape: tuple[int, ...], high: int) -> None:
    """A file in MNIST's format."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(high, shape, dtype=torch.uint8, generator=draw)
    head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    path.write_bytes(head + values.numpy().tobytes())


class TestDamagedData:
    files = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))

    @pytest.mark.parametrize(("number", "length"), [(0, 40), (3, 0)])
    def test_mnist(self, number: int, length: int, tmp_path: Path) -> None:
        folder = tmp_path / MNISTDataModule.folder
        folder.mkdir(parents=True)
        for name, shape in zip(self.files, [(100, 28, 28), (100,)] * 2, strict=True):
            idx(folder / name, shape, 10)
        MNISTDataModule(str(tmp_path), meta=20, val=20).setup()
        broken = folder / self.files[number]
        broken.write_bytes(broken.read_bytes()[:length])
        match = rf"expected in {folder} the files of MNIST, found some missing or damaged.*Set download=true"
        with pytest.raises(ValueError, match=match):
            MNISTDataModule(str(tmp_path)).setup()

    def test_cifar_runs_no_code_from_a_file(self, tmp_path: Path) -> None:
        folder = tmp_path / CIFAR10DataModule.folder
        folder.mkdir()
        for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
            (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "code-was-run")))
        with pytest.raises(FileNotFoundError, match="found some missing or damaged"):
            CIFAR10DataModule(root=str(tmp_path)).setup()
        assert not (tmp_path / "code-was-run").exists()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_image(self, workers: int, tmp_path: Path) -> None:
        draw = torch.Generator().manual_seed(0)
        for split in ("train", "test"):
            for name in "ab":
                (tmp_path / split / name).mkdir(parents=True)
                for i in range(10):
                    pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8, generator=draw).numpy()
                    Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
        data = ImageFolderDataModule(str(tmp_path), 32, batch_size=4, meta=2, val=2, num_workers=workers)
        data.setup()
        broken = tmp_path / "train" / "b" / "3.png"
        for damaged in (broken.read_bytes()[:600], b"no image", b"")[workers:][: 3 - 2 * workers]:
            broken.write_bytes(damaged)
            loaders = chain(data.train_dataloader(), data.val_dataloader())
            with pytest.raises(ValueError, match=rf"expected an image in {broken}, found another file"):
                list(loaders)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
