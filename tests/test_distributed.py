"""Two processes learn what one process learns with the same global batch.

Run as a script, this file starts the two: ``python test_distributed.py DIRECTORY``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import seed_everything
from methods import CLASSES, SHAPE, Blobs, build, trained_teachers, trainer

from lit_kd.models import build_model

METHODS = ["kd", "kd-teachers", "almkd-robust", "almkd-paper", "almkd-amal"]
ROWS = 8
"""The global batch; 48 training rows, or 72 with the meta rows, are a multiple of it."""
TIMEOUT = 90.0


def learn(method: str, devices: int) -> dict[str, Any] | None:
    """What the training leaves, on the first process."""
    seed_everything(0, verbose=False)
    # those that take several teachers take three
    model = build(method, teachers=[*trained_teachers(), build_model("mlp-8", CLASSES, SHAPE)])
    data = Blobs(noise="symmetric", noise_rate=0.4, batch_size=ROWS // devices)
    fitted = trainer(devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=4)
    fitted.fit(model, data)
    table = getattr(model, "table", None)
    measured = {name: value.cpu() for name, value in fitted.callback_metrics.items()}
    if not fitted.is_global_zero:
        return None
    kept = {} if table is None else table.state_dict()
    return {"student": model.student.state_dict(), "table": kept, "steps": fitted.global_step, "measured": measured}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By method, what two processes learn."""
    directory = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command, log = [sys.executable, __file__, str(directory)], directory / "log"
    with log.open("w") as out:
        group = subprocess.Popen(command, env=os.environ | address, stdout=out, stderr=out, start_new_session=True)
    try:
        assert group.wait(TIMEOUT) == 0, log.read_text()[-3000:]
    finally:  # the two, should they be stuck
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)
    return {method: torch.load(directory / f"{method}.pt", weights_only=True) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method: str, two: dict[str, dict[str, Any]]) -> None:
    one = learn(method, devices=1)
    assert one is not None
    found = two[method]
    assert found["steps"] == one["steps"]
    assert found["table"].keys() == one["table"].keys()
    assert found["table"].get("fingerprint") == one["table"].get("fingerprint")
    for name in ("student", "measured"):
        torch.testing.assert_close(found[name], one[name], rtol=1e-5, atol=1e-5)
    for name in ("columns", "shared"):
        expected = one["table"].get(name, {})
        torch.testing.assert_close(found["table"].get(name, {}), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    if one["table"]:
        weights = one["table"]["columns"]["weights"]
        assert len(weights.unique(dim=0)) > 10  # they were learned


def one_of_two(rank: int, directory: str) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    for method in METHODS:
        learned = learn(method, devices=2)
        if learned is not None:
            torch.save(learned, Path(directory) / f"{method}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # forked, so that Lightning is imported once; if one process fails, the other is stopped
    torch.multiprocessing.start_processes(one_of_two, args=(sys.argv[1],), nprocs=2, start_method="fork")
