"""The command ``lit-kd trust``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import CONFIGS, call, train_teacher
from sklearn.metrics import accuracy_score

from lit_kd.cli.trust import ask, inputs
from lit_kd.data import CSVDataModule, DataModule, DigitsDataModule
from lit_kd.data.partition import Source
from lit_kd.data.rows import Indexed, TensorRows
from lit_kd.models import load_student
from lit_kd.report.trust import EXIT

NOISE = ("--data.noise=symmetric", "--data.noise_rate=0.4")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of them."""
    return tuple(train_teacher(tmp_path_factory.mktemp(student), student) for student in ("mlp-64", "mlp-8"))  # type: ignore[return-value]


def trust(*args: object) -> int:
    """Its exit code."""
    with pytest.raises(SystemExit) as ended:
        call("trust", *args)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_numbers_and_page(teachers: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    code = trust(*teachers, "--config", CONFIGS / "data" / "digits.yaml", *NOISE, "--output", output)
    told = json.loads((output / "trust.json").read_text())
    assert code == told["exit_code"] == EXIT[told["verdict"]]
    data = DigitsDataModule(noise="symmetric", noise_rate=0.4, seed=0)
    data.setup()
    n, m = data.train_size, data.meta_size + len(data.parts.val)
    assert (told["training_rows"], told["trusted_rows"]) == (n, m)
    meta, val = (part.__getitems__(list(range(len(part)))) for part in (data.parts.meta_rows(), data.parts.val))
    train = data.parts.rows(torch.arange(n)).__getitems__(list(range(n)))
    for path, one in zip(teachers, told["teachers"], strict=True):
        network = load_student(path)
        with torch.no_grad():
            said = network(torch.cat([meta.x, val.x])).argmax(1)
            on_train = network(train.x).argmax(1)
        truth = torch.cat([meta.y, val.y])
        assert one["accuracy"]["estimate"] == pytest.approx(accuracy_score(truth, said))
        assert one["by_class"][3]["estimate"] == pytest.approx(float((said[truth == 3] == 3).float().mean()))
        assert one["agrees_with_labels"] == pytest.approx(accuracy_score(train.y, on_train))
        assert one["by_margin"]["accuracy"] == sorted(one["by_margin"]["accuracy"])
    assert told["wrong_labels"]["low"] <= 0.36 <= told["wrong_labels"]["high"]
    assert told["agreement"][0][2] == pytest.approx(told["teachers"][0]["agrees_with_labels"])
    assert any("trained on another split, or on other labels" in note for note in told["notes"])
    html = (output / "trust.html").read_text()
    assert told["words"] in html
    assert not re.search(r"(src|href)=\"(?!#|data:)", html)  # nothing from elsewhere
    assert f"{m} rows, whose labels are taken to be right, and {n} training rows" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="--overwrite"):
        call("trust", teachers[0], "--data", "DigitsDataModule", "--output", output)


def test_a_file_is_judged_by_the_rows_that_it_speaks_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = DigitsDataModule(seed=0)
    data.setup()
    said = [*data.labels.tolist(), *data.parts.val.labels.tolist()]
    told = [
        (name, y if row % 6 else (y + 1) % 10) for row, (name, y) in enumerate(zip(data.parts.ids, said, strict=False))
    ]
    half = [each for row, each in enumerate(told) if row % 2]  # it is right about all of these
    (tmp_path / "gpt.csv").write_text("id,label\n" + "".join(f"{name},{y}\n" for name, y in half))
    trust(tmp_path / "gpt.csv", "--data", "DigitsDataModule", "--json")
    (one,) = json.loads(capsys.readouterr().out)["teachers"]
    assert (one["answers"], one["accuracy"]["estimate"], one["agrees_with_labels"]) == (
        pytest.approx(0.5, abs=0.01),
        1,
        1,
    )
    some = [(name, y) for name, y in told if name in data.parts.ids[: data.train_size]]
    (tmp_path / "gpt.csv").write_text("id,label\n" + "".join(f"{name},{y}\n" for name, y in some))
    with pytest.raises(
        ValueError, match=r"expected answers of .*gpt\.csv about trusted and about training rows, found none"
    ):
        call("trust", tmp_path / "gpt.csv", "--data", "DigitsDataModule")


def test_json_alone_is_printed(teachers: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    trust(teachers[0], "--data", "DigitsDataModule", "--json")
    told = json.loads(capsys.readouterr().out)
    assert not told["notes"]  # the same rows and labels as in its training


def test_same_seed_same_numbers(teachers: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        trust(teachers[0], "--data", "DigitsDataModule", "--json", "--seed_everything=3")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


class TestValidationRows:
    """Rows 0 to 39 are marked as trusted, all others may be wrong."""

    @staticmethod
    def asked(tmp_path: Path, **options: object) -> tuple[int, list[str]]:
        lines = [f"{i % 2},{i % 7},{i % 5},{int(i < 40)}" for i in range(200)]
        for name, some in (("train", lines), ("val", lines[:50])):
            (tmp_path / f"{name}.csv").write_text("\n".join(["label,a,b,checked", *some]) + "\n")
        (tmp_path / "labels.csv").write_text("id,label\n")
        data = CSVDataModule(str(tmp_path / "train.csv"), seed=0, **options)  # type: ignore[arg-type]
        data.setup()
        found, _ = ask(["mlp-8"], data)
        return int(found.trusted.sum()), found.notes

    def test_rows_that_nobody_marked_are_left_out(self, tmp_path: Path) -> None:
        rows, notes = self.asked(tmp_path, trusted="checked", val=30)
        assert rows == 40
        told = (
            "30 validation rows are left out: they are cut from the training rows, and nothing says that their labels "
        )
        assert notes == [f"{told}are right"]
        assert self.asked(tmp_path, trusted="checked", val=0) == (40, [])

    def test_so_are_rows_beside_those_that_were_corrected(self, tmp_path: Path) -> None:
        rows, notes = self.asked(tmp_path, meta=20, val=30, labels=str(tmp_path / "labels.csv"))
        assert (rows, len(notes)) == (20, 1)

    def test_rows_like_the_meta_rows_count(self, tmp_path: Path) -> None:
        """Those of a table of their own; those that are drawn as the meta rows are, which never get noise."""
        table = str(tmp_path / "val.csv")
        assert self.asked(tmp_path, trusted="checked", val=table) == (90, [])
        assert self.asked(tmp_path, meta=20, val=30) == (50, [])
        assert self.asked(tmp_path, meta=20, val=30, noise="symmetric", noise_rate=0.4) == (50, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.meta=0", "--data.val=0"], "expected trusted rows, found 0: give the data a meta or a val split"),
    ],
)
def test_data_that_tell_nothing(teachers: tuple[Path, Path], options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call("trust", teachers[0], "--data=DigitsDataModule", *options)


def test_teachers_of_other_classes(teachers: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="expected a network for 20 classes, found one for 10"):
        call("trust", teachers[0], "--config", "data/gmm")


def test_no_data(teachers: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="expected data, found none: give --data CLASS, or --config"):
        call("trust", teachers[0])


def test_a_teacher_that_is_not_there() -> None:
    with pytest.raises((ValueError, OSError), match=r"nowhere\.ckpt"):
        call("trust", "nowhere.ckpt", "--data=DigitsDataModule")


@pytest.mark.parametrize(("y", "message"), [([-1] * 20, "expected training rows with labels, found none in 20 rows")])
def test_no_labels(y: list[int], message: str) -> None:
    class Unlabelled(DataModule):
        num_classes, input_shape = 2, (3,)

        def load(self) -> Source:
            rows, val = TensorRows(torch.randn(20, 3)), TensorRows(torch.randn(6, 3))
            return Source(rows, rows, np.array(y), val=val, val_labels=np.array([0, 1] * 3))

    data = Unlabelled(meta=2)
    data.setup()
    with pytest.raises(ValueError, match=message):
        ask(["mlp-8"], data)


def test_inputs_that_are_no_tensor() -> None:
    class Words:
        def __len__(self) -> int:
            return 4

        def fetch(self, positions: list[int]) -> dict[str, torch.Tensor]:
            return {"tokens": torch.zeros(len(positions), 2)}

    rows = Indexed(Words(), np.arange(4), torch.zeros(4).long(), None)
    with pytest.raises(ValueError, match=r"expected inputs that are one tensor, found \['tokens'\]"):
        inputs(rows, 2)
