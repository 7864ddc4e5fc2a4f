"""Tables: what is read is what is in the file, and what cannot be read is told in one sentence."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import QUIET, call, configs
from PIL import Image
from sklearn.preprocessing import StandardScaler
from test_data_modules import gather

from lit_kd.cli.main import main
from lit_kd.data import UNLABELED, CSVDataModule, ImageFolderDataModule

NAMES = ["ant", "bee", "cat"]
DRAWN = np.random.default_rng(0).normal(3, 2, (90, 2))


def columns(rows: int = 90, **others: Sequence[Any]) -> dict[str, Any]:
    """A small table, some columns replaced, or left out by None."""
    own: dict[str, Any] = {
        "key": [f"r{i}" for i in range(rows)],
        "a": DRAWN[:rows, 0].tolist(),
        "b": (100 * DRAWN[:rows, 1]).tolist(),
        "label": [NAMES[i % 3] for i in range(rows)],
    }
    return {name: cells for name, cells in (own | others).items() if cells is not None}


def write(path: Path, table: Mapping[str, Sequence[Any]]) -> str:
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(dict(table)), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*table.values(), strict=True))
    return str(path)


def ready(path: str, **options: Any) -> CSVDataModule:
    data = CSVDataModule(path, **({"seed": 0} | options))
    data.setup()
    return data


def changed(cells: Sequence[Any], **others: Any) -> list[Any]:
    """The cells, some replaced: r3="x" is that of row 3."""
    return [others.get(f"r{row}", cell) for row, cell in enumerate(cells)]


class TestFeatures:
    @pytest.mark.parametrize("suffix", [".csv", ".parquet"])
    def test_rows_with_their_labels_and_ids(self, tmp_path: Path, suffix: str) -> None:
        data = ready(write(tmp_path / f"t{suffix}", columns()), id="key")
        assert (data.class_names, data.num_classes, data.input_shape) == (NAMES, 3, (2,))
        assert data.columns == ["a", "b"]
        assert sorted(data.parts.ids) == sorted(columns()["key"])
        held = [int(name[1:]) for name in data.parts.ids[-len(data.parts.test) :]]
        assert len(held) == 18
        raw = np.stack([columns()["a"], columns()["b"]], axis=1)
        scaled = StandardScaler().fit(np.delete(raw, held, axis=0)).transform(raw)
        parts = (data.train_dataloader(), data.loader(data.parts.meta_rows()), data.val_dataloader())
        for loader in (*parts, data.test_dataloader()):
            x, y, index = gather(loader)
            rows = [int(data.parts.ids[i][1:]) for i in index]
            np.testing.assert_allclose(x, scaled[rows], rtol=1e-5, atol=1e-6)
            assert y.tolist() == [row % 3 for row in rows]
        other = ready(str(tmp_path / f"t{suffix}"), id="key", seed=1)
        np.testing.assert_array_equal(other.mean, data.mean)  # whatever the seed, so that teachers fit
        assert other.parts.ids[-18:] == data.parts.ids[-18:]

    def test_tables_of_their_own(self, tmp_path: Path) -> None:
        train = write(tmp_path / "train.csv", columns(60))
        paths = {part: write(tmp_path / f"{part}.csv", columns(30)) for part in ("val", "test")}
        data = ready(train, **paths, meta=6)
        assert (data.train_size, data.meta_size, len(data.parts.val), len(data.parts.test)) == (60, 6, 24, 30)
        scale = StandardScaler().fit(np.stack([columns(60)["a"], columns(60)["b"]], axis=1))
        own = scale.transform(np.stack([columns(30)["a"], columns(30)["b"]], axis=1))
        np.testing.assert_allclose(gather(data.test_dataloader()).x, own, rtol=1e-5, atol=1e-6)
        assert data.parts.ids[-30:] == [f"test/{i}" for i in range(30)]

    def test_numbers_as_classes(self, tmp_path: Path) -> None:
        data = ready(write(tmp_path / "t.csv", columns(label=[2 + 8 * (i % 2) for i in range(90)])))
        assert data.class_names == ["2", "10"]
        floats = [None if i == 1 else float(i % 3) for i in range(90)]
        data = ready(write(tmp_path / "f.parquet", columns(label=floats)))
        assert data.class_names == ["0", "1", "2"]
        assert (data.labels == UNLABELED).sum() == 1

    def test_missing_labels(self, tmp_path: Path) -> None:
        data = ready(write(tmp_path / "t.csv", columns(label=changed(columns()["label"], r4="", r9="-1"))), id="key")
        bare = [data.parts.ids[i] for i in np.flatnonzero(data.labels == UNLABELED)]
        assert bare == ["r4", "r9"]
        assert not data.knows_truth

    def test_which_features(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, told = write(tmp_path / "t.csv", columns(p1=[1.0] * 90, note=["x"] * 90)), []
        monkeypatch.setattr("lit_kd.data.tables.rank_zero_info", told.append)
        data = ready(path, id="key")
        assert data.columns == ["a", "b", "p1"]
        left = "left out, as they hold no numbers: note"
        assert told == [f"{path}: the features are a, b, p1, standardised by 72 rows; {left}"]
        assert (gather(data.test_dataloader()).x[:, 2] == 0).all()  # a constant
        assert CSVDataModule(path, features=["p*", "b"]).columns == ["b", "p1"]

    def test_trusted_rows_are_the_meta_split(self, tmp_path: Path) -> None:
        marks = [["no", "yes"][i % 10 == 0] for i in range(90)]
        path = write(tmp_path / "t.csv", columns(good=marks))
        val = write(tmp_path / "val.csv", columns(30))
        for options, total in (({"id": "key"}, 90), ({"val": val}, 90)):
            data = ready(path, trusted="good", noise="symmetric", noise_rate=0.9, **options)
            n, m = data.train_size, data.meta_size
            assert [name.removeprefix("r") for name in data.parts.ids[n : n + m]] == [str(i) for i in range(0, 90, 10)]
            assert torch.equal(data.labels[n:], torch.arange(0, 90, 10) % 3)
            assert len(data.parts.ids) == total + len(options.get("val", "")) // len(val) * 30
        with pytest.raises(ValueError, match="expected either trusted or meta, found 'good' and 9: remove one"):
            CSVDataModule(path, trusted="good", meta=9)

    def test_as_one_knows_it_from_other_data(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.csv", columns())
        clean, noisy = ready(path), ready(path, noise="symmetric", noise_rate=0.5, labeled=20)
        assert noisy.noisy.any()
        assert clean.fingerprint == ready(path).fingerprint != noisy.fingerprint
        write(tmp_path / "t.csv", columns(a=changed(columns()["a"], r0=7.0)))
        assert ready(path).fingerprint != clean.fingerprint


class TestImages:
    def test_the_same_as_a_folder(self, tmp_path: Path) -> None:
        files, labels = [], []
        for row in range(12):
            file = tmp_path / "root" / ("train" if row < 9 else "test") / NAMES[row % 3] / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(row).integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
            files.append(file.relative_to(tmp_path).as_posix())
            labels.append(NAMES[row % 3])
        train = write(tmp_path / "train.csv", {"file": files[:9], "kind": labels[:9]})
        test = write(tmp_path / "test.csv", {"file": files[9:], "kind": labels[9:]})
        shared: dict[str, Any] = {"image_size": 8, "val": 0, "meta": 0, "seed": 0, "batch_size": 12}
        data = ready(train, test=test, label="kind", images="file", id="file", **shared)
        folder = ImageFolderDataModule(str(tmp_path / "root"), **shared)
        folder.setup()
        assert (data.image_input, data.input_shape) == (folder.image_input, (3, 8, 8))
        ours, theirs = gather(data.test_dataloader()), gather(folder.test_dataloader())
        assert torch.equal(ours.x, theirs.x)
        assert torch.equal(ours.y, theirs.y)
        x, y, index = gather(data.train_dataloader())
        assert x.shape == (9, 3, 8, 8)
        assert [data.parts.ids[i] for i in index] == [files[i] for i in index]
        assert y.tolist() == [int(i) % 3 for i in index]
        plain = data.parts.rows(torch.arange(9)).rows.fetch([0])
        assert not torch.equal(plain, data.parts.train_rows(False).rows.fetch([0]))  # type: ignore[arg-type]


ROW = r"row 4 \(1 such rows\)"
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no rows": ({"rows": 0}, {}, r"t.csv: expected rows, found none below the columns key, a, b, label"),
    "no label": ({"label": None}, {}, r"t.csv: expected the column 'label', found key, a, b: set label to one of them"),
    "one class": ({"label": ["ant"] * 90}, {}, r"expected two or more classes in the column 'label', found \['ant'\]"),
    "no id": ({}, {"id": "name"}, r"expected the column 'name', found key, a, b, label: set id to one of them"),
    "an empty id": (
        {"key": changed(columns()["key"], r3="")},
        {},
        r"expected an id in each row of 'key', found none in",
    ),
    "ids twice": ({"key": changed(columns()["key"], r3="r5")}, {}, r"expected an id of its own .* 'r5' more than once"),
    "a text": ({"a": changed(columns()["a"], r3="x")}, {}, rf"a finite number in each row of 'a', found 'x' in {ROW}"),
    "a hole": ({"a": changed(columns()["a"], r3="")}, {}, rf"a finite number in each row of 'a', found '' in {ROW}"),
    "NaN": ({"a": changed(columns()["a"], r3="nan")}, {}, rf"a finite number in each row of 'a', found 'nan' in {ROW}"),
    "no such feature": (
        {},
        {"features": ["c*"]},
        r"a column of the name 'c\*', found key, a, b, label: correct features",
    ),
    "a label as feature": (
        {},
        {"features": ["*"]},
        r"features other than label, id and trusted, found \['key', 'label'\]",
    ),
    "no numbers": ({"a": None, "b": None}, {}, r"expected columns of numbers, found key, label: set images"),
    "both": ({}, {"features": ["a"], "images": "key"}, r"expected either features or images, found .*: remove one"),
    "no file": (
        {},
        {"images": "key"},
        r"paths of images, .* in 'key', found 'r0' in row 1 \(90 such rows\), which is no",
    ),
    "a mark": ({"ok": ["maybe"] * 90}, {"trusted": "ok"}, r"true or false in 'ok', found 'maybe' in row 1"),
    "no mark": ({"ok": [0] * 90}, {"trusted": "ok"}, r"expected trusted rows marked in 'ok', found none"),
    "trusted without a label": (
        {"ok": [1] * 9 + [0] * 81, "label": changed(columns()["label"], r3="")},
        {"trusted": "ok"},
        rf"expected a label in each trusted row, found none in {ROW}",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables(name: str, tmp_path: Path) -> None:
    others, options, match = BAD[name]
    path = write(tmp_path / "t.csv", columns(**others))
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        ready(path, **({"id": "key"} | options))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "expected the names of columns, and rows, found an empty file"),
        (b"a,label\n1,x\n2,y,z\n", "expected 2 columns, each with a name of its own, found 3 in row 2"),
        (b"a,a,label\n1,2,x\n", "expected 3 columns, each with a name of its own, found the names a, a, label"),
        (b"\x93\xff,\x00", "expected a table in UTF-8, found another file"),
    ],
)
def test_bad_files(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        CSVDataModule(str(tmp_path / "t.csv"))


def test_bad_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a table's path that ends in \.csv or \.parquet, found data\.xlsx"):
        CSVDataModule("data.xlsx")
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        CSVDataModule(str(tmp_path / "none.csv"))


@pytest.mark.parametrize(
    ("label", "found"), [("dog", "'dog' in row 4"), ("", "none in row 4"), ("-1", "none in row 4")]
)
@pytest.mark.parametrize("part", ["val", "test"])
def test_labels_of_another_table(part: str, label: str, found: str, tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", columns(60))
    other = write(tmp_path / "other.csv", columns(30, label=changed(columns(30)["label"], r3=label)))
    with pytest.raises(ValueError, match=rf"a class of the training data \(ant, bee, cat\), found {found} \(1 such"):
        ready(train, **{part: other})


def test_a_row_in_two_tables(tmp_path: Path) -> None:
    train, test = (write(tmp_path / f"{part}.csv", columns(60)) for part in ("train", "test"))
    with pytest.raises(ValueError, match=r"expected ids that differ from those of .*train\.csv .*found 'r0' in both"):
        ready(train, test=test, id="key")
    lacking = write(tmp_path / "lacking.csv", columns(60, b=None))
    with pytest.raises(ValueError, match=r"lacking\.csv: expected the column 'b', found key, a, label: set features"):
        ready(train, test=lacking)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.csv", columns())
    options = ("--data.train", path, "--data.id=key", "--trainer.max_epochs=1", "--model.student=mlp-8")
    call("fit", *configs("supervised", "csv"), *options, "--data.val=0.2", *QUIET)
    [checkpoint] = Path().rglob("last.ckpt")
    call("test", *configs("supervised", "csv"), *options, *QUIET, "--ckpt_path", checkpoint)
    assert "test/accuracy" in capsys.readouterr().out
    given = (*configs("supervised", "csv"), "--data.train", path, "--data.label=class")
    monkeypatch.setattr("sys.argv", ["lit-kd", "fit", *map(str, given)])
    with pytest.raises(SystemExit) as told:
        main()
    first, _ = str(told.value).split("\n")
    assert (
        first == f"lit-kd: error: {path}: expected the column 'class', found key, a, b, label: set label to one of them"
    )
