"""What all tests share: one thread, fixed seeds, a directory of their own, a quiet Lightning."""

from __future__ import annotations

import functools
import gc
import logging
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    for message in ("does not have many workers", "number of training batches", "LeafSpec", "dirpath has changed"):
        config.addinivalue_line("filterwarnings", f"ignore:.*{message}")


def pytest_collection_modifyitems() -> None:
    """Not called in the process that only starts those that test: it imports nothing heavy."""
    import lightning  # noqa: F401 - which sets the level itself
    import torch
    from lightning.fabric.utilities import registry
    from threadpoolctl import threadpool_limits

    registry.entry_points = functools.cache(registry.entry_points)  # every Trainer reads those of all packages
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    threadpool_limits(1)
    gc.freeze()  # what is imported stays: each collection need not look at it


def pytest_unconfigure() -> None:
    """Else triton tells of leaks at the end."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded_and_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning import seed_everything

    monkeypatch.chdir(tmp_path)  # nothing is left in the repository
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # taken back after the test
    seed_everything(0, verbose=False)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a finished run: today's student is tomorrow's teacher."""
    import torch
    from methods import CLASSES, SHAPE, Blobs, trainer

    from lit_kd import Supervised

    path = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    torch.manual_seed(0)
    fitted = trainer(max_epochs=5)  # until it names every class
    fitted.fit(Supervised("cnn-2", num_classes=CLASSES, input_shape=list(SHAPE)), Blobs())
    fitted.save_checkpoint(path)
    return path
