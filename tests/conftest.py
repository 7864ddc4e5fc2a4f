"""What all tests share: one thread, fixed seeds, a quiet Lightning."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning import seed_everything

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def pytest_configure(config: pytest.Config) -> None:
    for message in ("does not have many workers", "number of training batches", "LeafSpec"):
        config.addinivalue_line("filterwarnings", f"ignore:.*{message}")


@pytest.fixture(autouse=True)
def _seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # taken back after the test
    seed_everything(0, verbose=False)
