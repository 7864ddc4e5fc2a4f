"""Every shipped config runs, through the command and in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import CONFIGS, QUIET, call, read_csv, read_yaml, train_teacher, version
from datasets import Dataset
from jsonargparse import ArgumentParser
from test_data_vision import write_cifar, write_folder, write_mnist

import lit_kd
import lit_kd.methods
from lit_kd import Distiller
from lit_kd.cli.recipe import read_recipe
from lit_kd.data import CIFAR10DataModule, CIFAR100DataModule, DataModule
from lit_kd.models.files import write_columns

SUPERVISED = CONFIGS / "methods" / "supervised.yaml"
SEQUENCES = ("sequence_kd", "gkd", "speculative_kd", "online_kd", "step_by_step")
SHORT = (*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1")


def every(kind: str) -> pytest.MarkDecorator:
    """Once for each file, found by its ending: a new one is tested as well."""
    return pytest.mark.parametrize("path", sorted((CONFIGS / kind).glob("*.yaml")), ids=lambda path: path.stem)


def stretches(config: Any) -> int:
    """How many epochs a training has at least: one, and one for each time that it begins anew."""
    anew: int = config["model"].get("init_args", {}).get("rounds", config["model"]["class_path"] == "GLC")
    return anew + 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_teacher(tmp_path_factory.mktemp("teacher"), "cnn-8")  # wide enough for LELP


def test_there_are_configs() -> None:
    assert all(list((CONFIGS / kind).glob("*.yaml")) for kind in ("methods", "data", "recipes"))
    others = [path for path in CONFIGS.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    others = [path for path in others if not path.is_relative_to(CONFIGS / "recipes" / "results")]  # what recipes gave
    assert {path.name for path in others} == {"fit.schema.json", "recipe.schema.json"}


OTHER = {
    "kd_multilabel": ("mlp-8", "digit_attributes"),
    "element_trust": ("seg-8", "shapes"),
    **dict.fromkeys(SEQUENCES, ("gru-8", "sums")),
}
"""A random teacher, and data, for methods of other tasks."""


@every("methods")
def test_methods(path: Path, teacher: Path) -> None:
    method = getattr(lit_kd, read_yaml(path)["model"]["class_path"])
    random, named = OTHER.get(path.stem, (teacher, "digits"))
    taught = ("--model.teacher", random) if method.needs_teacher else ()
    own = ("--config", CONFIGS / "data" / f"{named}.yaml") if "data" not in read_yaml(path) else ()
    epochs = stretches(read_yaml(path))
    few = ("--data.labeled=100", f"--trainer.max_epochs={epochs}") if epochs > 1 else ()
    call("fit", "--config", path, *own, *SHORT, *taught, *few)
    metrics = read_csv(version(0) / "metrics.csv")
    assert [float(row["train/loss"]) > 0 for row in metrics if row["train/loss"]] == [True] * epochs
    assert (version(0) / "checkpoints" / "last.ckpt").is_file()


TASKS = {
    "digit_attributes": ("multilabel", "mlp-8"),
    "shapes": ("dense", "seg-4"),
    "tags": ("tokens", "tagger-24-4"),
    "outliers": ("regression", "mlp-8"),
    "sums": ("tokens", "gru-8"),
}
"""Task and student of data whose rows have other labels than one class."""
# As the comments of the configs say where the files are.
WRITE: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    **dict.fromkeys(("digits", "gmm", "spiral", "blobs", *TASKS), lambda root, patch: None),
    "mnist": lambda root, patch: write_mnist(root, "MNIST"),
    "fashion_mnist": lambda root, patch: write_mnist(root, "FashionMNIST"),
    "cifar10": lambda root, patch: write_cifar(root, CIFAR10DataModule, patch, 10),
    "cifar100": lambda root, patch: write_cifar(root, CIFAR100DataModule, patch, 100),
    "image_folder": lambda root, patch: write_folder(
        root / "images", {split: ["ant", "bee", "cat"] for split in ("train", "test")}
    ),
    "csv": lambda root, patch: write_table(root, csv=True),
    "hf_dataset": lambda root, patch: write_table(root, csv=False),
}


def write_table(root: Path, csv: bool) -> None:
    rows = {"a": list(range(60)), "b": [i % 7 for i in range(60)], "label": [i % 3 for i in range(60)]}
    if csv:
        write_columns(root / "train.csv", rows)
    else:
        Dataset.from_dict(rows).save_to_disk(root / "dataset")


@every("data")
def test_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITE[path.stem](Path("data"), monkeypatch)
    enough = ("--data.val=100", "--data.meta=100") if path.stem == "cifar100" else ()  # our files are small
    task, student = TASKS.get(path.stem, ("classification", "mlp-8"))
    options = (f"--model.task={task}", f"--model.student={student}")
    call("fit", "--config", SUPERVISED, "--config", path, *options, *SHORT, *enough)
    metrics, score = read_csv(version(0) / "metrics.csv"), "val/r2" if task == "regression" else "val/accuracy"
    assert [float(row[score]) <= 1 for row in metrics if row[score]] == [True]
    assert (version(0) / "checkpoints" / "best.ckpt").is_file()


def test_recipes_are_understood() -> None:
    """Each part that a recipe's trainings are made of, once."""
    parser = ArgumentParser(exit_on_error=False)  # without the trainer, whose options take most of the time
    parser.add_subclass_arguments(Distiller, "model")
    parser.add_subclass_arguments(DataModule, "data")
    for name, read in (("num_classes", int), ("input_shape", list)):
        parser.link_arguments(f"data.{name}", f"model.init_args.{name}", read, apply_on="instantiate")
    known: set[str] = set()
    for path in sorted((CONFIGS / "recipes").glob("*.yaml")):
        jobs = list(read_recipe(path).jobs(Path("runs"), [0], {}))
        assert len(jobs) > 3
        for job in jobs:
            config = {name: job.config[name] for name in ("model", "data")}
            if not known >= {repr(part) for part in config.values()}:
                made = parser.instantiate(parser.parse_object(config))
                assert made.model.num_classes == made.data.num_classes, (path, job.method)
                known |= {repr(part) for part in config.values()}


@pytest.mark.parametrize(
    "name",
    ["digits_rad", *(pytest.param(path.stem, marks=pytest.mark.slow) for path in (CONFIGS / "recipes").glob("*.yaml"))],
)
def test_recipes(name: str, tmp_path: Path) -> None:
    recipe, folder = read_yaml(CONFIGS / "recipes" / f"{name}.yaml"), Path("runs") / name
    teachers = {f"teacher {key}": own for key, own in recipe.get("teachers", {}).items()}
    recipe["defaults"]["trainer"]["limit_train_batches"] = 3
    if name == "digits_rad":
        recipe["methods"] = {key: recipe["methods"][key] for key in ("RAD", "BADGE")}
    if "root" in recipe["defaults"]["data"].get("init_args", {}):  # a large data set, of which we write a few rows
        write_mnist(Path("data"), "FashionMNIST", train=400)
        recipe["defaults"]["data"]["init_args"]["labeled"] = 40
        for part in recipe["methods"].values():
            if "budget" in part["model"].get("init_args", {}):
                part["model"]["init_args"]["budget"] = 20
    parts = (teachers or {"teacher": recipe["teacher"]}) | recipe["methods"]
    Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    epochs = max(stretches(part) for part in parts.values())
    call("compare", f"{name}.yaml", "--max_epochs", epochs, "--seeds", 0, "--jobs", 1)
    results = read_csv(folder / "results.csv")
    assert [(row["method"], row["seed"]) for row in results] == [(part, "0") for part in parts]
    for row in results:
        scores = [float(value) for key, value in row.items() if key.startswith("test_")]
        assert len(scores) == 2
        assert max(scores) <= 1
        assert not row["ece"] or 0 <= float(row["ece"]) <= 1
        method = parts[row["method"]]["model"]["class_path"]
        assert bool(row["teacher_agreement"]) == getattr(lit_kd, method).needs_teacher
    asked = any(stretches(own) > 1 for own in parts.values())
    pictures = {picture.name for picture in folder.glob("*.png")}
    assert pictures >= {*(["queries.png"] if asked else []), "r2.png" if name == "numbers_outliers" else "accuracy.png"}
