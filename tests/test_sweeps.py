"""The sweeps of ``docs/sweeps.md``, without a server."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import call, train_teacher

PAGE = (Path(__file__).parents[1] / "docs" / "sweeps.md").read_text()


def test_the_command_of_a_wandb_agent() -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    [sweep] = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
    values = {"model.weight": 0.3, "model.temperature": 2.0, "model.optimizer.lr": 0.02}
    assert sweep["parameters"].keys() == values.keys()
    made = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    program, *line = [word for part in sweep["command"] for word in (made["args"] if part == "${args}" else [part])]
    assert program == "lit-kd"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        call(*line, "--print_config")
    options = yaml.safe_load(printed.getvalue())["model"]["init_args"]
    assert [options["weight"], options["temperature"], options["optimizer"]["init_args"]["lr"]] == [0.3, 2.0, 0.02]


def test_optuna() -> None:
    pytest.importorskip("optuna")
    train_teacher(Path("runs/teacher"))
    given = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    there: dict[str, Any] = {}
    exec(given.replace("max_epochs=30", "max_epochs=1, accelerator='cpu'").replace("n_trials=20", "n_trials=2"), there)
    assert [0 < trial.value < 1 for trial in there["study"].trials] == [True, True]
    assert Path("sweep.db").is_file()
