"""What the tests of the command line share."""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning import Callback

from lit_kd.cli.main import main

CONFIGS = Path(__file__).parents[1] / "configs"
QUIET = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.logger=CSVLogger",
    "--trainer.logger.save_dir=.",
)


def call(*args: object) -> None:
    """``lit-kd ARGS``, in this process."""
    with pytest.MonkeyPatch.context() as patch:  # whose own arguments and environment are none of its business
        patch.setattr(sys, "argv", ["lit-kd"])
        patch.setenv("PYTHONWARNINGS", os.environ.get("PYTHONWARNINGS", ""))
        main([str(arg) for arg in args])


def configs(method: str, data: str = "digits") -> list[object]:
    """The options for a shipped method on shipped data."""
    return ["--config", CONFIGS / "methods" / f"{method}.yaml", "--config", CONFIGS / "data" / f"{data}.yaml"]


def version(number: int) -> Path:
    """The folder of a run in the current directory."""
    return Path("lightning_logs") / f"version_{number}"


def train_teacher(folder: Path, student: str = "mlp-16") -> Path:
    """A checkpoint of a small network that has seen the digits."""
    tiny = (f"--model.student={student}", "--trainer.max_epochs=2", f"--checkpoint.dirpath={folder}")
    call("fit", *configs("supervised"), *QUIET, *tiny, f"--trainer.logger.save_dir={folder}")
    return folder / "last.ckpt"


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_yaml(path: Path) -> Any:
    """The content of a file."""
    return yaml.safe_load(path.read_text())


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file below a folder, with its time of change and its content."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


class Hold(Callback):
    """Holds a training up as long as the file ``hold`` is in the current directory."""

    def on_train_start(self, *_: Any) -> None:
        while Path("hold").exists():
            time.sleep(0.01)
