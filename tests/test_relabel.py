"""Labels that a file corrects: those of training rows, after all noise, and of no others."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUIET, call, configs
from methods import build, trainer
from test_data_vision import write_folder

from lit_kd.data import (
    UNLABELED,
    CIFAR10DataModule,
    DigitAttributesDataModule,
    DigitsDataModule,
    DistillationDataModule,
    ImageFolderDataModule,
)
from lit_kd.models import build_model

TEN: dict[str, Any] = {"student": "mlp-8", "num_classes": 10, "input_shape": [1, 8, 8]}
NOISY: dict[str, Any] = {"noise": "symmetric", "noise_rate": 0.4, "seed": 0}


def digits(**options: Any) -> DigitsDataModule:
    data = DigitsDataModule(**({"seed": 0} | options))
    data.setup()
    return data


def write(path: Path, rows: dict[str, Any], **others: str) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", *others])
        writer.writerows([name, label, *others.values()] for name, label in rows.items())
    return str(path)


def test_right_labels_in_the_place_of_noisy_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("lit_kd.data.relabel.rank_zero_info", told.append)
    before = digits(**NOISY)
    wrong = before.noisy.nonzero().flatten().tolist()
    right = {before.parts.ids[i]: int(before.clean_labels[i]) for i in wrong}
    path = write(tmp_path / "labels.csv", right, is_label_issue="True")
    after = digits(**NOISY, labels=path)
    assert torch.equal(after.labels, before.clean_labels)
    assert torch.equal(after.clean_labels, before.clean_labels)
    assert not after.noisy.any()
    assert after.knows_truth
    assert after.fingerprint != before.fingerprint
    assert after.parts.rows_fingerprint == before.parts.rows_fingerprint
    assert after.fingerprint == digits(**NOISY, labels=path).fingerprint
    assert told[0] == f"{path}: {len(wrong)} labels changed and 0 taken away, of 1258 rows"
    assert len(told) == 2  # once each
    half = write(tmp_path / "half.csv", dict(list(right.items())[::2]))
    assert digits(**NOISY, labels=half).noisy.nonzero().flatten().tolist() == wrong[1::2]


@pytest.mark.parametrize("none", ["", "-1", "drop"])
def test_taken_away(none: str, tmp_path: Path) -> None:
    before = digits()
    path = write(tmp_path / "labels.csv", {before.parts.ids[i]: none for i in (0, 7)})
    after = digits(labels=path)
    expected = before.labels.clone()
    expected[[0, 7]] = UNLABELED
    assert torch.equal(after.labels, expected)
    assert not after.knows_truth
    for method in ("supervised", "kd", "almkd-robust"):
        trainer(max_epochs=1).fit(
            build(method, teachers=[build_model("mlp-8", 10, [1, 8, 8])], **TEN), DigitsDataModule(labels=path)
        )


def test_the_last_word_after_hiding(tmp_path: Path) -> None:
    before = digits(labeled=100)
    hidden = int((before.labels == UNLABELED).nonzero()[0])
    after = digits(labeled=100, labels=write(tmp_path / "labels.csv", {before.parts.ids[hidden]: 3}))
    assert after.labels[hidden] == 3
    assert (after.labels != before.labels).sum() == 1


def test_nobody_knows_the_truth(tmp_path: Path) -> None:
    """Without noise of ours, a corrected label is no noise."""
    before = digits()
    name, trusted = before.parts.ids[0], before.parts.ids[before.train_size]
    after = digits(labels=write(tmp_path / "labels.csv", {name: (int(before.labels[0]) + 1) % 10, trusted: 5}))
    assert after.labels[0] == after.clean_labels[0] == (before.labels[0] + 1) % 10
    assert after.labels[before.train_size] == 5
    assert not after.knows_truth
    assert not after.noisy.any()
    nothing = digits(labels=write(tmp_path / "nothing.csv", {}))
    assert nothing.fingerprint == before.fingerprint


def test_names_of_classes_and_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "root", {split: ["ant", "bee", "cat"] for split in ("train", "test")})
    plain = ImageFolderDataModule(str(tmp_path / "root"), seed=0, meta=3, val=3)
    plain.setup()
    name = plain.parts.ids[0]
    other = "cat" if plain.labels[0] == 0 else "ant"
    path = write(tmp_path / "labels.csv", {name: other, plain.parts.ids[1]: 1})
    data = ImageFolderDataModule(str(tmp_path / "root"), seed=0, meta=3, val=3, labels=path)
    data.setup()
    assert name.startswith("train/")
    assert data.labels[:2].tolist() == [["ant", "bee", "cat"].index(other), 1]


@pytest.mark.parametrize("names", [["1", "2", "3"], ["1.0", "2.0", "3.0"]])
def test_names_that_are_numbers_are_names(names: list[str], tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", dict.fromkeys(("train", "test"), names))
    folder: dict[str, Any] = {"root": str(tmp_path / "photos"), "image_size": 8, "seed": 0}
    data = ImageFolderDataModule(**folder)
    data.setup()
    first = data.parts.ids[0]
    for name in names:
        again = ImageFolderDataModule(**folder, labels=write(tmp_path / "labels.csv", {first: name}))
        again.setup()
        assert again.class_names[int(again.labels[0])] == name
    with pytest.raises(ValueError, match=r"a class \(.*\) or none as label, found '0'"):
        ImageFolderDataModule(**folder, labels=write(tmp_path / "labels.csv", {first: "0"})).setup()


def test_a_wrapped_data_module(tmp_path: Path) -> None:
    rows = torch.utils.data.TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    held = torch.utils.data.TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    path = write(tmp_path / "labels.csv", {"3": 0})
    data = DistillationDataModule.from_datasets(rows, held, None, 4, labels=path)
    data.setup()
    assert data.labels[:12].tolist() == [0, 1, 0, 0, *[0, 1] * 4]


def in_part(part: str) -> str:
    data = digits()
    start = {
        "first": 0,
        "meta": data.train_size,
        "val": len(data.labels),
        "test": len(data.labels) + len(data.parts.val),
    }[part]
    return data.parts.ids[start]


@pytest.mark.parametrize(
    ("name", "label", "match"),
    [
        ("9999", 1, "expected ids of training rows, found '9999', which no row has: are they of other data"),
        ("val", 1, r"expected ids of training rows, found '\d+' of a validation or test row, whose label stays"),
        ("test", 1, r"expected ids of training rows, found '\d+' of a validation or test row, whose label stays"),
        ("meta", "", r"expected a label for each trusted row, found none for '\d+'"),
        ("first", "dog", r"expected a class \(0, 1, .* 9\) or none as label, found 'dog' for '\d+': correct it"),
        ("first", 10, r"expected a class \(0, 1, .* 9\) or none as label, found '10' for '\d+': correct it"),
        ("first", 1.5, r"expected a class \(0, 1, .* 9\) or none as label, found '1.5' for '\d+': correct it"),
    ],
)
def test_bad_rows(name: str, label: Any, match: str, tmp_path: Path) -> None:
    name = name if name.isdigit() else in_part(name)
    with pytest.raises(ValueError, match=match):
        digits(labels=write(tmp_path / "labels.csv", {name: label}))


def test_bad_files(tmp_path: Path) -> None:
    path, name = tmp_path / "labels.csv", digits().parts.ids[0]
    path.write_text(f"id,label\n{name},1\n{name},1\n")
    with pytest.raises(ValueError, match=f"expected each id once, found '{name}' again: keep one"):
        digits(labels=str(path))
    path.write_text("")
    with pytest.raises(ValueError, match="expected the names of columns, and rows, found an empty file"):
        digits(labels=str(path))
    path.write_text("row,label\n1,1\n")
    with pytest.raises(ValueError, match="expected the column 'id', found row, label"):
        digits(labels=str(path))
    data = DigitAttributesDataModule(labels=write(path, {"0": 1}))
    with pytest.raises(ValueError, match="expected one class a sample, found several or soft labels: remove labels"):
        data.setup()


def test_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.csv", {digits().parts.ids[0]: 1})
    short = ("--trainer.max_epochs=1", "--model.student=mlp-8", f"--data.labels={path}", "--data.seed=0")
    call("fit", *configs("supervised"), *QUIET, *short)
    assert CIFAR10DataModule(labels=path).labels_file == path
