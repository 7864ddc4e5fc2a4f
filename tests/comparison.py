"""Comparisons that several test files look at: each is trained once in a process."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import call, files

NASTY = 'KD <b>&amp; $x_1$ "it\'s"'
ALMKD = {
    "class_path": "ALMKD",
    "init_args": {"rule": {"class_path": "lit_kd.weightings.Paper", "init_args": {"warmup_epochs": 0, "every": 1}}},
}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "seeds": [0, 1],
    "defaults": {
        "trainer": {"max_epochs": 2, "limit_train_batches": 6, "accelerator": "cpu"},
        "data": {"class_path": "DigitsDataModule", "init_args": {"noise": "symmetric", "noise_rate": 0.3}},
        "model": {
            "init_args": {
                "student": "mlp-8",
                # so high a learning rate that the last epoch is seldom the best
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 2.0, "momentum": 0.9}},
            }
        },
    },
    "teacher": {"model": {"class_path": "Supervised", "init_args": {"student": "mlp-16"}}},
    "methods": {NASTY: {"model": {"class_path": "KD", "init_args": {"weight": 0.5}}}, "ALM-KD": {"model": ALMKD}},
}
FOLDERS = {"teacher": "teacher", NASTY: "kd-b-amp-x-1-it-s", "ALM-KD": "alm-kd"}
TINY = Path("runs") / "tiny"


def changed(**methods: Any) -> dict[str, Any]:
    """The recipe with methods more."""
    recipe = copy.deepcopy(RECIPE)
    recipe["methods"].update(methods)
    return recipe


def compare(recipe: dict[str, Any] = RECIPE, *args: object) -> None:
    """Run a recipe; results go to runs/NAME."""
    path = Path(f"{recipe['name']}.yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    call("compare", path, "--jobs", 1, *args)


def trained(before: dict[Path, tuple[int, bytes]]) -> set[str]:
    """The trainings, as METHOD/SEED, whose files differ from those of before."""
    now = files(TINY)
    differ = {path for path in {*before, *now} if before.get(path) != now.get(path)}
    return {"/".join(path.relative_to(TINY).parts[:2]) for path in differ if len(path.relative_to(TINY).parts) > 2}


DONE: dict[str, Path] = {}


def finished(factory: pytest.TempPathFactory, recipe: dict[str, Any] = RECIPE) -> Path:
    """A directory in which a recipe was run; not to be changed."""
    name = recipe["name"]
    if name not in DONE:
        folder = factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            compare(recipe)
        DONE[name] = folder
    return DONE[name]


def again(factory: pytest.TempPathFactory, recipe: dict[str, Any] = RECIPE) -> None:
    """Copy it into the current directory, times of change included."""
    shutil.copytree(finished(factory, recipe), Path.cwd(), dirs_exist_ok=True)


def training(row: dict[str, str]) -> Path:
    """Where a row of results.csv was trained."""
    return TINY / FOLDERS[row["method"]] / f"seed-{row['seed']}"
