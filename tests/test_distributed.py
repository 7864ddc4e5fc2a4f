"""Two, three and four processes learn what one process learns with the same global batch."""

from __future__ import annotations

import contextlib
import copy
import functools
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import QUIET, configs
from lightning import LightningDataModule, LightningModule, seed_everything
from methods import CLASSES, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from test_methods_tasks import Net
from test_mixin import Mine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_kd import KD
from lit_kd.data import DataModule, DistillationDataModule, Source, TensorRows
from lit_kd.data.rows import Indexed
from lit_kd.data.table import all_rows
from lit_kd.models import build_model
from lit_kd.teachers.cache import TeacherCache
from lit_kd.types import IGNORED

ROWS = 12
"""The global batch; 48 training rows, or 72 with the meta rows, are a multiple of it, 50 and 74 are not."""
CASES: dict[str, dict[str, Any]] = {
    "kd-teachers": {},
    "weighted, few": {"labeled": 0.5},
    "slam, few": {"labeled": 0.5},
    "kd-revised": {},
    "almkd-robust": {},
    "almkd-paper": {},
    "almkd-paper, exact": {},
    "l2rw": {},
    "meta-weight-net": {},
    "loss-divider": {},
    "rad": {},
    "almkd-robust, few": {"labeled": 0.5},
    "dkd": {},
    "ctkd": {},
    "dot": {},
    "group-distil": {},
    "adversarial": {},
    "mcmi": {},
    "fitnet": {},
    "crd": {},
    "vid": {},
    "srrl": {},
    "sdd": {},
    "lelp": {},
    "mutual": {},
    "simkd": {},
    "elr": {},
    "sop": {},
    "glc": {},
    "kd, multilabel": {},
    "kd, tokens": {},
    "kd, balanced": {"row_weights": "balanced"},
    "mixin, kd": {},
    "mixin, robust": {},
    "dicts, almkd-paper": {},
    "dicts, almkd-robust": {},
    "loaders, almkd-paper": {},
    "loaders, almkd-robust": {},
    "kd, uneven": {"val": 22},  # the processes repeat rows, to have equally many
    # of a row that two processes have, the table holds the mean: with one process there is no such row
    "almkd-robust, uneven": {"val": 22, "drop_last": True},
    "almkd-paper, uneven": {"val": 22, "drop_last": True},
    "weighted, uneven": {"val": 22, "labeled": 0.5},
}
SIZES = {
    2: [name for name in CASES if "uneven" not in name],
    3: ["kd, uneven", "almkd-robust, uneven", "almkd-paper, uneven"],
    4: ["kd, uneven", "almkd-robust, uneven", "weighted, uneven"],
}
PADDED = {case for case, options in CASES.items() if "uneven" in case and "drop_last" not in options}
TIMEOUT = 300.0


class Padded(Blobs):
    """One process that repeats the rows which so many processes repeat."""

    def __init__(self, processes: int, **options: Any) -> None:
        super().__init__(**options)
        self.processes = processes

    def _shuffled(self, *args: Any, **drawing: Any) -> Any:
        loader = super()._shuffled(*args, **drawing)
        sampler: Any = loader.sampler
        sampler.total_size += -sampler.total_size % self.processes
        sampler.num_samples = sampler.total_size // sampler.num_replicas
        return loader


class Several(Padded):
    """Three labels a sample."""

    task = "multilabel"

    def load(self) -> Source:
        source = super().load()
        source.labels = np.stack([source.labels == 0, source.labels < 2, source.labels > 0], axis=1).astype(int)
        return source


class Words(Padded):
    """Six tokens a row, of which some count for nothing, and of one row all."""

    task = "tokens"

    def load(self) -> Source:
        draw = torch.Generator().manual_seed(0)
        x = torch.randint(5, (120, 6), generator=draw)
        y = (x % 3).masked_fill(torch.rand(120, 6, generator=draw) < 0.4, IGNORED)
        y[7] = IGNORED
        return Source(TensorRows(x), TensorRows(x), y.numpy(), test_size=24)


class Reader(nn.Module):
    """Takes keywords and gives an object with logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, width), nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> SimpleNamespace:
        read = (self.embed(tokens) * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.head(read))


class Sentences(LightningDataModule):
    """Six tokens a row, more or less, which say its class; a batch is a dict."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def rows(self, n: int, seed: int) -> DataLoader[Any]:
        draw = torch.Generator().manual_seed(seed)
        y = torch.arange(n) % CLASSES
        tokens = 6 * y[:, None] + torch.randint(8, (n, 6), generator=draw)
        mask = (torch.arange(6) < torch.randint(2, 7, (n, 1), generator=draw)).long()
        rows: Any = [{"tokens": t, "mask": m, "labels": c} for t, m, c in zip(tokens, mask, y, strict=True)]
        return DataLoader(rows, self.batch_size, shuffle=seed == 0)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.rows(120, 0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.rows(48, 1)


def mixin(method: str, batch_size: int) -> tuple[LightningModule, DataModule]:
    return Mine(method), Blobs(batch_size=batch_size, **NOISE)


def dicts(method: str, batch_size: int) -> tuple[LightningModule, DataModule]:
    teacher = Reader(16)
    with torch.no_grad():  # words know their class
        teacher.embed.weight[:, :CLASSES] = 3.0 * nn.functional.one_hot((torch.arange(20) // 6).clamp(max=2), CLASSES)
        teacher.head.weight[:, :CLASSES] = 3.0 * torch.eye(CLASSES)
    return build(method, Reader(8), [teacher]), DistillationDataModule(Sentences(batch_size), meta=24, **NOISE)


def loaders(method: str, batch_size: int) -> tuple[LightningModule, DataModule]:
    x, y = blobs(168)
    train, val = (DataLoader(TensorDataset(*rows), batch_size) for rows in ((x[:120], y[:120]), (x[120:], y[120:])))
    return build(method), DistillationDataModule.from_loaders(train, val, meta=24, **NOISE)


NOISE: dict[str, Any] = {"noise": "symmetric", "noise_rate": 0.4}
PROJECTS: dict[str, Callable[[str, int], tuple[LightningModule, DataModule]]]
PROJECTS = {"mixin": mixin, "dicts": dicts, "loaders": loaders}
"""Other people's ways to train, by name."""


def prepare(case: str, devices: int, padding: int) -> tuple[LightningModule, DataModule]:
    """What is trained on what."""
    name, _, variant = case.partition(", ")
    if name in PROJECTS:
        return PROJECTS[name](variant, ROWS // devices)
    if variant == "tokens":
        taggers = Net("tokens"), Net("tokens")
        return KD(*taggers, num_classes=3, task="tokens"), Words(padding, batch_size=ROWS // devices)
    # those that take several teachers take three
    teachers = [*trained_teachers(), build_model("mlp-8", CLASSES, SHAPE)]
    own = {"exact": {"meta_gradient": "exact"}, "multilabel": {"task": "multilabel"}}.get(variant, {})
    if name in ("fitnet", "simkd"):
        teachers = teachers[1:]  # of vectors: each process's adapter of maps would have its own batch statistics
    several = Several if variant == "multilabel" else Padded
    data = several(padding, batch_size=ROWS // devices, **NOISE, **CASES[case])
    return build(name, teachers=teachers, **own), data


@functools.cache
def learn(case: str, devices: int, padding: int = 1) -> dict[str, Any] | None:
    """What the training leaves, on the first process."""
    seed_everything(0, verbose=False)
    model, data = prepare(case, devices, padding)
    fitted = trainer(devices=devices, strategy="ddp" if devices > 1 else "auto")
    fitted.fit(model, data)
    method = getattr(model, "distiller", model)  # within somebody's module
    table = getattr(method, "table", None)
    measured = {name: value.cpu() for name, value in fitted.callback_metrics.items()}
    if "val" in CASES[case]:  # validation rows are padded too
        measured = {name: value for name, value in measured.items() if not name.startswith("val/")}
    if not fitted.is_global_zero:
        return None
    kept = {} if table is None else table.state_dict()
    return {"student": method.student.state_dict(), "table": kept, "steps": fitted.global_step, "measured": measured}


def one_of_several(rank: int, processes: int, directory: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    if processes == 2:
        refuse_other_rows(processes)
        choose_alike(processes)
        for method in ("mixkd", "co-teaching", "jocor", "rkd", "review-kd"):
            choose_apart(method, processes)
        torch.save(measure_padded(processes), Path(directory) / f"{processes} padded {rank}.pt")
        torch.save(share_a_cache(processes, directory), Path(directory) / f"{processes} cache {rank}.pt")
    for case in SIZES[processes]:
        learned = learn(case, processes)
        if learned is not None:
            torch.save(learned, Path(directory) / f"{processes} {case}.pt")


def start(directory: Path, ports: list[str], log: Path) -> None:
    """Start the processes of each size, in a group of their own; if one fails, the others are stopped."""
    os.setsid()
    os.environ["MASTER_ADDR"] = "localhost"
    with log.open("w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        for processes, port in zip(SIZES, ports, strict=True):
            os.environ["MASTER_PORT"] = port
            torch.multiprocessing.start_processes(
                one_of_several, args=(processes, str(directory)), nprocs=processes, start_method="fork"
            )


@pytest.fixture(scope="module")
def by_command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Two processes that the command line starts, which mostly wait, and the directory they write to."""
    directory = tmp_path_factory.mktemp("command")
    ddp = ("--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    args = [*configs("kd"), *QUIET, *ddp, "--model.student=mlp-8", "--model.teacher=mlp-8"]
    command = [sys.executable, "-m", "lit_kd", "fit", *map(str, args)]
    with (directory / "log").open("w") as out:
        group = subprocess.Popen(command, cwd=directory, stdout=out, stderr=out, start_new_session=True)
    yield group, directory
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group.pid, signal.SIGKILL)
    group.wait()


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, by_command: Any) -> dict[tuple[int, str], dict[str, Any]]:
    """By number of processes and case, what they learn; those of the command line run at the same time."""
    directory = tmp_path_factory.mktemp("several")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in SIZES]
        for free in sockets:
            free.bind(("localhost", 0))
        ports = [str(free.getsockname()[1]) for free in sockets]
    log = directory / "log"
    for case in SIZES[2]:
        learn(case, 1)
    # forked, which spares the seconds that imports take, those of the trainings too
    group = multiprocessing.get_context("fork").Process(target=start, args=(directory, ports, log))
    group.start()
    assert group.pid is not None
    try:
        group.join(TIMEOUT)
        assert group.exitcode == 0, log.read_text()[-3000:]
    finally:  # all of them, should they be stuck
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)
    cached = [(2, f"{kind} {rank}") for kind in ("cache", "padded") for rank in (0, 1)]
    return {(n, case): torch.load(directory / f"{n} {case}.pt", weights_only=True) for n, case in [*RUNS, *cached]}


RUNS = [(processes, case) for processes, cases in SIZES.items() for case in cases]


@pytest.mark.parametrize(("processes", "case"), RUNS)
def test_several_processes_equal_one(processes: int, case: str, several: dict[tuple[int, str], dict[str, Any]]) -> None:
    one = learn(case, 1, processes if case in PADDED else 1)
    assert one is not None
    found = several[processes, case]
    assert found["steps"] == one["steps"]
    assert found["table"].keys() == one["table"].keys()
    assert found["table"].get("fingerprint") == one["table"].get("fingerprint")
    for name in ("student", "measured"):
        torch.testing.assert_close(found[name], one[name], rtol=1e-5, atol=1e-5)
    for name in ("columns", "shared"):
        expected = one["table"].get(name, {})
        torch.testing.assert_close(found["table"].get(name, {}), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    learned = [one["table"].get("columns", {}).get(name) for name in ("weights", "memory")]
    found_out = [len(column.unique(dim=0)) for column in learned if column is not None]
    assert not found_out or max(found_out) > 10


class Seven(Blobs):
    """Seven test rows whose inputs are the student's logits; the first alone is right."""

    def load(self) -> Source:
        source = super().load()
        x = torch.eye(CLASSES)[torch.tensor([0, 1, 1, 2, 2, 1, 2])] * torch.arange(1, 8).unsqueeze(1)
        source.test, source.test_labels, source.test_size = TensorRows(x), np.zeros(7, dtype=int), 0
        return source


def measure_padded(processes: int) -> dict[str, dict[str, float]]:
    """What the test rows say, of which two processes repeat the first."""
    found = {}
    for method, foreign in (("kd", False), ("kd", True), ("almkd-robust", False), ("almkd-robust", True)):
        same = nn.Linear(3, 3)
        same.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
        model, data = build(method, same, [copy.deepcopy(same)]), Seven(batch_size=2)
        fitted = trainer(devices=processes, strategy="ddp" if processes > 1 else "auto")
        rows = data.load()
        pairs = TensorDataset(rows.test.x, torch.from_numpy(rows.test_labels))  # type: ignore[union-attr, arg-type]
        given: Any = {"dataloaders": DataLoader(pairs, batch_size=2)} if foreign else {"datamodule": data}
        [found[f"{method} {foreign}"]] = fitted.test(model, **given, verbose=False)
    return found


def test_repeated_rows_are_not_counted(several: dict[tuple[int, str], dict[str, Any]]) -> None:
    one = measure_padded(1)
    for both in (several[2, "padded 0"], several[2, "padded 1"]):
        assert set(both) == set(one)
        for name, found in both.items():
            assert found["test/accuracy"] == pytest.approx(1 / 7)
            assert found == pytest.approx({k: v for k, v in one[name].items() if k in found}, abs=1e-6)
            assert {"test/accuracy", "test/ece", "test/nll"} <= set(found)


def choose_apart(method: str, processes: int) -> None:
    """Rows are mixed, chosen or compared in each process's own batch: they learn the same, if not what one learns."""
    seed_everything(0, verbose=False)
    model = build(method)
    trainer(devices=processes, strategy="ddp").fit(model, Blobs(batch_size=ROWS // processes))
    weights = torch.cat([p.detach().flatten() for p in model.student.parameters()])
    assert torch.equal(*all_rows(weights.unsqueeze(0)).chunk(processes))


class Choosing(KD):
    """Trains on the rows that the student is least sure of, which all processes must choose alike."""

    def prepare_epoch(self) -> None:
        parts = self.data.parts
        rows = Indexed(parts.plain, parts.positions["train"], parts.given[: self.data.train_size], None)
        self.logits = self.predict_rows(rows).student.logits

    def training_rows(self) -> Tensor:
        return self.logits.softmax(-1).amax(-1).argsort()[:20]


class Unordered(Blobs):
    """Its files are listed in another order in one process, which changes what an index means there."""

    def load(self) -> Source:
        source = super().load()
        if self.trainer is not None and self.trainer.global_rank == 1:
            source.labels = source.labels[::-1].copy()
        return source


def refuse_other_rows(processes: int) -> None:
    """Each process refuses them, so that none waits for another."""
    with pytest.raises(ValueError, match="expected the same rows, labels and split in each process"):
        trainer(devices=processes, strategy="ddp").fit(build("kd"), Unordered())


def choose_alike(processes: int) -> None:
    """BatchNorm's running statistics are each process's own from a step to the next pass; here, none comes between."""
    seed_everything(0, verbose=False)
    model = Choosing("cnn-2", trained_teachers()[0], num_classes=CLASSES, input_shape=list(SHAPE))
    trainer(devices=processes, strategy="ddp", limit_val_batches=0).fit(model, Blobs(batch_size=ROWS // processes))
    mean = all_rows(model.student.get_buffer(next(n for n, _ in model.student.named_buffers() if "mean" in n)))
    assert not torch.equal(*mean.chunk(processes))
    for logits in all_rows(model.logits).chunk(processes):
        assert torch.equal(logits, model.logits)
    assert torch.equal(*all_rows(model.training_rows()).chunk(processes))


def share_a_cache(processes: int, directory: str) -> dict[str, Any]:
    """What this process asks the teacher, and what it then knows; the last teacher fails in one process alone."""
    found: dict[str, Any] = {}
    inputs = Blobs()
    inputs.setup()
    row = inputs.parts.plain.fetch([int(inputs.parts.positions["train"][40])])
    steps: Any = (("memory", "float16", False), ("files", "float32", False), ("sick", "float32", True))
    for where, dtype, sick in steps:
        seed_everything(0, verbose=False)
        asked: list[int] = []
        teacher = Sick(row) if sick else trained_teachers()[1]  # no convolutions: each row is asked about once
        teacher.register_forward_pre_hook(lambda _, x, asked=asked: asked.append(len(x[0])))
        place = where if where == "memory" else f"{directory}/{where}"
        model = KD(
            "mlp-8", teacher, num_classes=CLASSES, input_shape=list(SHAPE), teacher_cache=TeacherCache(place, dtype)
        )
        fitted = trainer(
            devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=1, limit_val_batches=0
        )
        try:
            fitted.fit(model, Blobs(batch_size=ROWS // processes))
        except (RuntimeError, ValueError) as error:
            found[where] = str(error)
        else:
            found[where] = {"asked": sum(asked), "student": model.student.state_dict()}
    return found


class Sick(nn.Module):
    """Gives no numbers for one of the rows."""

    def __init__(self, row: Any) -> None:
        super().__init__()
        self.net, self.row = trained_teachers()[1], row

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x).masked_fill((x == self.row).flatten(1).all(1, keepdim=True), torch.nan)
        return out


def test_processes_share_a_cache(several: dict[tuple[int, str], dict[str, Any]], tmp_path: Path) -> None:
    one = share_a_cache(1, str(tmp_path))
    both = [several[2, f"cache {rank}"] for rank in (0, 1)]
    for where, rows in (("memory", 72), ("files", 72)):
        assert one[where]["asked"] == rows
        for found in both:
            assert found[where]["asked"] == rows // 2
            torch.testing.assert_close(found[where]["student"], one[where]["student"], rtol=1e-5, atol=1e-5)
    assert "nan or infinity in row 40" in one["sick"]
    assert all("nan or infinity in row 40" in found["sick"] for found in both)


def test_processes_of_the_command_line_end_by_themselves(
    by_command: tuple[subprocess.Popen[bytes], Path],
) -> None:
    group, directory = by_command
    log = directory / "log"
    assert group.wait(100) == 0, log.read_text()[-3000:]
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in log.read_text()
    assert [path.name for path in directory.rglob("best.ckpt")] == ["best.ckpt"]
