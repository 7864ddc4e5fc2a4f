"""A student and a teacher of which each of two processes has a half learn what one process learns.

Run as a script, this file starts them: ``python test_sharded.py DIRECTORY``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lit_kd import KD
from lit_kd.distiller.optimisation import check_start
from lit_kd.models import build_model

ROWS = 12
"""The global batch."""


class ShardedKD(KD):
    def configure_model(self) -> None:
        """Shard the student's layers and the teachers, which each process has whole until here."""
        if self.device_mesh is None:  # one process
            return
        mesh = self.device_mesh["data_parallel"]
        for network in (self.student, *self.teachers.models):
            if isinstance(network, FSDPModule):
                continue  # this hook runs before each fit, test and prediction
            for layer in network.modules():
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh)
            fully_shard(network, mesh=mesh)


def learn(folder: Path, devices: int, epochs: int = 2, resume: Path | None = None) -> dict[str, Any] | None:
    """What the training leaves, on the first process."""
    seed_everything(0, verbose=False)
    options: dict[str, Any] = {}
    if devices > 1:
        sizes = {"data_parallel_size": devices, "tensor_parallel_size": 1}  # the default is the other way round
        options["strategy"] = ModelParallelStrategy(**sizes, save_distributed_checkpoint=False)
    teacher = trained_teachers()[1]
    kept = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731
    model = ShardedKD("mlp-8", teacher, num_classes=CLASSES, input_shape=list(SHAPE), optimizer=adam)
    fitted = trainer(devices=devices, max_epochs=epochs, enable_checkpointing=True, callbacks=[kept], **options)
    data = Blobs(batch_size=ROWS // devices, noise="symmetric", noise_rate=0.4)
    fitted.fit(model, data, ckpt_path=resume)
    shards = [isinstance(p, DTensor) for network in (model.student, teacher) for p in network.parameters()]
    assert all(shards) if devices > 1 else not any(shards)
    measured = {name: value.cpu() for name, value in fitted.callback_metrics.items()}
    measured |= {name: torch.tensor(value) for name, value in fitted.test(model, data, verbose=False)[0].items()}
    said = fitted.predict(model, data)
    assert said
    student = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.student.state_dict().items()}
    return {"student": student, "measured": measured} if fitted.is_global_zero else None


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("sharded")
    log = folder / "log"
    with log.open("w") as out:
        command = [sys.executable, __file__, str(folder)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        group = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        assert group.wait(400) == 0, log.read_text()[-3000:]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)
    return torch.load(folder / "found.pt", weights_only=True), folder


def test_two_halves_equal_one(sharded: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    one, (two, _) = learn(tmp_path, 1), sharded
    assert one is not None
    for name in ("student", "measured"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)


def test_checkpoints_are_whole(sharded: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """They resume a training of one process, and are a teacher."""
    two, folder = sharded
    again = learn(tmp_path, 1, epochs=2, resume=folder / "epoch=0.ckpt")
    assert again is not None
    torch.testing.assert_close(again["student"], two["student"], rtol=1e-5, atol=1e-5)
    model = KD("mlp-4", str(folder / "epoch=1.ckpt"), num_classes=CLASSES, input_shape=list(SHAPE))
    trainer(max_steps=1).fit(model, Blobs())
    torch.testing.assert_close(model.teachers.models[0].state_dict(), two["student"])
    assert build_model("mlp-8", CLASSES, SHAPE).state_dict().keys() == two["student"].keys()


def test_processes_that_share_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensor parallelism, two processes compute one batch together."""
    data, fitted = Blobs(), trainer()
    share = {"num_replicas": 3, "rank": 1}
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", property(lambda _: share))
    monkeypatch.setattr(Trainer, "world_size", property(lambda _: 6))
    data.setup()
    data.trainer = fitted
    sampler = data.train_dataloader().sampler
    assert (sampler.num_replicas, sampler.rank) == (3, 1)


def test_parts_that_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would train an adapter of its own."""
    model, fitted = KD("mlp-4", trained_teachers()[1], num_classes=CLASSES, input_shape=list(SHAPE)), trainer()
    model.trainer = fitted
    strategy = ModelParallelStrategy.__new__(ModelParallelStrategy)
    monkeypatch.setattr(Trainer, "strategy", property(lambda _: strategy))
    share = property(lambda _: {"num_replicas": 2, "rank": 0})
    monkeypatch.setattr(ModelParallelStrategy, "distributed_sampler_kwargs", share)
    with pytest.raises(ValueError, match=r"that configure_model has sharded .*, found student\.\S+ whole, of which"):
        check_start(model)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = learn(folder, 2)
    again = learn(folder / "again", 2, resume=folder / "epoch=0.ckpt")
    if found is not None and again is not None:
        torch.testing.assert_close(again["student"], found["student"], rtol=0, atol=0)
        torch.save(found, folder / "found.pt")
