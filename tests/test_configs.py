"""Every shipped config runs, through the command and in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import CONFIGS, QUIET, call, read_csv, read_yaml, train_teacher, version
from PIL import Image
from test_data_vision import write_cifar, write_folder, write_mnist

import lit_kd
import lit_kd.data
from lit_kd.data import CIFAR10DataModule, CIFAR100DataModule

DIGITS, SUPERVISED = CONFIGS / "data" / "digits.yaml", CONFIGS / "methods" / "supervised.yaml"
SHORT = (*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1")


def every(kind: str) -> pytest.MarkDecorator:
    """Once for each file, found by its ending: a new one is tested as well."""
    return pytest.mark.parametrize("path", sorted((CONFIGS / kind).glob("*.yaml")), ids=lambda path: path.stem)


def stretches(config: Any) -> int:
    """How many epochs a training has at least: one, and one for each round of queries."""
    rounds: int = config["model"].get("init_args", {}).get("rounds", 0)
    return rounds + 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_teacher(tmp_path_factory.mktemp("teacher"), "cnn-2")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_there_are_configs() -> None:
    assert all(list((CONFIGS / kind).glob("*.yaml")) for kind in ("methods", "data", "recipes"))
    others = [path for path in CONFIGS.rglob("*") if path.is_file() and path.suffix != ".yaml"]
    assert all(path.is_relative_to(CONFIGS / "recipes" / "results") for path in others)  # what recipes gave


@every("methods")
def test_methods(path: Path, teacher: Path) -> None:
    method = getattr(lit_kd, read_yaml(path)["model"]["class_path"])
    several = path.stem == "kd_multilabel"  # whose teacher has other labels: a random one will do
    taught = ("--model.teacher", "mlp-8" if several else teacher) if method.needs_teacher else ()
    data = CONFIGS / "data" / "digit_attributes.yaml" if several else DIGITS
    epochs = stretches(read_yaml(path))
    few = ("--data.labeled=100", f"--trainer.max_epochs={epochs}") if epochs > 1 else ()
    call("fit", "--config", path, "--config", data, *SHORT, *taught, *few)
    metrics = read_csv(version(0) / "metrics.csv")
    assert [float(row["train/loss"]) > 0 for row in metrics if row["train/loss"]] == [True] * epochs
    assert (version(0) / "checkpoints" / "last.ckpt").is_file()


# As the comments of the configs say where the files are.
WRITE: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {
    **dict.fromkeys(("digits", "digit_attributes", "gmm", "spiral", "blobs"), lambda root, patch: None),
    "mnist": lambda root, patch: write_mnist(root, "MNIST"),
    "fashion_mnist": lambda root, patch: write_mnist(root, "FashionMNIST"),
    "cifar10": lambda root, patch: write_cifar(root, CIFAR10DataModule, patch, 10),
    "cifar100": lambda root, patch: write_cifar(root, CIFAR100DataModule, patch, 100),
    "image_folder": lambda root, patch: write_folder(
        root / "images", {split: ["ant", "bee", "cat"] for split in ("train", "test")}
    ),
}


@every("data")
def test_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITE[path.stem](Path("data"), monkeypatch)
    enough = ("--data.val=100", "--data.meta=100") if path.stem == "cifar100" else ()  # our files are small
    task = ("--model.task=multilabel",) if path.stem == "digit_attributes" else ()
    given = ("--config", SUPERVISED, "--config", path, *task, *SHORT, "--model.student=mlp-8", *enough)
    call("fit", *given)
    metrics = read_csv(version(0) / "metrics.csv")
    assert [0 <= float(row["val/accuracy"]) <= 1 for row in metrics if row["val/accuracy"]] == [True]
    call("test", *given, "--ckpt_path", version(0) / "checkpoints" / "last.ckpt")
    [tested] = read_csv(version(1) / "metrics.csv")
    assert 0 <= float(tested["test/accuracy"]) <= 1


@every("recipes")
def test_recipes(path: Path, tmp_path: Path) -> None:
    recipe, folder = read_yaml(path), tmp_path / path.stem
    teachers = {f"teacher {name}": own for name, own in recipe.get("teachers", {}).items()}
    parts = (teachers or {"teacher": recipe["teacher"]}) | recipe["methods"]
    recipe["defaults"]["trainer"]["limit_train_batches"] = 3
    if "root" in recipe["defaults"]["data"].get("init_args", {}):  # a large data set, of which we write a few rows
        write_mnist(Path("data"), "FashionMNIST", train=400)
        recipe["defaults"]["data"]["init_args"]["labeled"] = 40
        for part in recipe["methods"].values():
            if "budget" in part["model"].get("init_args", {}):
                part["model"]["init_args"]["budget"] = 20
    (tmp_path / path.name).write_text(yaml.safe_dump(recipe, sort_keys=False))
    epochs = max(stretches(part) for part in parts.values())
    call("compare", path.name, "--max_epochs", epochs, "--seeds", 0, "--jobs", 1, "--root", tmp_path)
    results = read_csv(folder / "results.csv")
    assert [(row["method"], row["seed"]) for row in results] == [(part, "0") for part in parts]
    assert list(results[0])[:7] == [
        *("method", "seed", "test_accuracy", "test_accuracy_last", "ece", "teacher_agreement", "seconds")
    ]
    for row in results:
        assert all(0 <= float(row[name]) <= 1 for name in ("test_accuracy", "test_accuracy_last", "ece"))
        assert float(row["seconds"]) > 0
        method = parts[row["method"]]["model"]["class_path"]
        if getattr(lit_kd, method).needs_teacher:
            assert 0 <= float(row["teacher_agreement"]) <= 1
        else:
            assert not row["teacher_agreement"]
    assert len((folder / "table.md").read_text().splitlines()) == 2 + len(results)
    weighted = [own for own in parts.values() if getattr(lit_kd, own["model"]["class_path"]).needs_table]
    several = [own for own in weighted if teachers and not isinstance(own.get("teacher", []), str)]
    pictures = sorted(folder.glob("*.png"))
    planar = getattr(lit_kd.data, recipe["defaults"]["data"]["class_path"]).input_shape == (2,)
    asked = any(stretches(own) > 1 for own in parts.values())
    assert len(pictures) == 1 + len(weighted) + len(several) + planar + asked
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.format == "PNG"
            assert min(image.size) > 300
            assert len(set(image.convert("L").tobytes())) > 20  # something is drawn
        assert picture.stat().st_size > 5_000
