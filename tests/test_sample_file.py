"""What was learned about samples goes into a file, and starts another training."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUIET, call, configs, files, read_csv, version
from methods import CLASSES, SHAPE, Blobs, build, trained_teachers, trainer
from torch import Tensor

from lit_kd import ALMKD
from lit_kd.cli.main import main
from lit_kd.data import DigitsDataModule
from lit_kd.data.table import SampleTable
from lit_kd.report.samples import write_samples
from lit_kd.weightings import Amal, Paper, Robust
from lit_kd.weightings.sample_file import starting_weights

ROWS = 48
ONES = [1.0] * ROWS
NOISE: dict[str, Any] = {"noise": "symmetric", "noise_rate": 0.4}
# no update within the few steps of these tests
OWN = {"robust": Robust(), "paper": Paper(), "amal": Amal()}


def almkd(start: Any = None, rule: Any = "paper", teachers: int = 1, **options: Any) -> ALMKD:
    rule = OWN.get(rule, rule)
    shape: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
    return ALMKD("mlp-8", trained_teachers()[:teachers], rule=rule, start_weights=start, **(shape | options))


def started(model: ALMKD, data: Any = None, **options: Any) -> Tensor:
    """The weights after a training that is too short to renew them."""
    trainer(**({"max_steps": 2} | options)).fit(model, Blobs() if data is None else data)
    assert model.table is not None
    return model.table["weights"]


def learned(teachers: int = 1, data: Any = None, **options: Any) -> tuple[ALMKD, Any]:
    """A model whose weights differ from sample to sample, and its data."""
    data = Blobs(**NOISE) if data is None else data
    model = almkd(None, Paper(warmup_epochs=0, every=1), teachers)
    trainer(max_epochs=2, **options).fit(model, data)
    assert model.table is not None
    assert len(model.table["weights"].unique(dim=0)) > 20
    return model, data


def write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """As another program would."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
    return path


def index(**other: list[Any]) -> dict[str, list[Any]]:
    return {"index": list(range(ROWS)), **other}


class TestStart:
    @pytest.mark.parametrize(
        ("rule", "teachers", "share"),
        [("robust", 2, 0.25), ("paper", 1, 0), ("amal", 1, 1.0)],
    )
    def test_a_share(self, rule: str, teachers: int, share: float) -> None:
        weights = started(almkd(share, rule, teachers))
        expected = torch.tensor([[1 - share] + [share / teachers] * teachers])
        assert torch.equal(weights[:ROWS], expected.expand(ROWS, -1))
        assert torch.equal(weights[ROWS:], started(almkd(None, rule, teachers))[ROWS:])  # the rule's own

    @pytest.mark.parametrize(("rule", "suffix"), [("robust", ".csv"), ("paper", ".parquet")])
    def test_a_noise_prior(self, rule: str, suffix: str, tmp_path: Path) -> None:
        noise = torch.rand(ROWS, dtype=torch.float64)
        noise[:2] = torch.tensor([0.0, 1.0])
        order = torch.randperm(ROWS)
        columns: dict[str, list[Any]] = {"index": order.tolist(), "noise": noise[order].tolist()}
        path = write(tmp_path / f"prior{suffix}", columns | {"name": ["a"] * ROWS})
        weights = started(almkd(str(path), rule, teachers=2))
        expected = torch.stack([1 - noise, noise / 2, noise / 2], dim=1).float()
        assert torch.equal(weights[:ROWS], expected)
        assert torch.equal(weights[ROWS:], started(almkd(None, rule, 2))[ROWS:])

    @pytest.mark.parametrize(("suffix", "teachers"), [(".csv", 1), (".parquet", 2)])
    def test_round_trip(self, suffix: str, teachers: int, tmp_path: Path) -> None:
        model, data = learned(teachers)
        assert model.table is not None
        path = tmp_path / f"samples{suffix}"
        write_samples(path, model.table, data)
        weights = started(almkd(str(path), "amal", teachers))
        assert torch.equal(weights[:ROWS], model.table["weights"][:ROWS])
        assert torch.equal(weights[ROWS:], started(almkd(None, "amal", teachers))[ROWS:])

    def test_a_checkpoint(self, tmp_path: Path) -> None:
        model, _ = learned()
        model.trainer.save_checkpoint(tmp_path / "c.ckpt")
        weights = started(almkd(str(tmp_path / "c.ckpt"), "robust"), Blobs(**NOISE))
        assert model.table is not None
        assert torch.equal(weights[:ROWS], model.table["weights"][:ROWS])
        assert torch.equal(weights[ROWS:], torch.tensor([[1.0, 0.0]]).repeat(24, 1))

    @pytest.mark.parametrize("rule", ["paper", "amal"])
    def test_holds_until_the_first_update(self, rule: str) -> None:
        class Watched(ALMKD):
            def on_train_epoch_start(self) -> None:
                super().on_train_epoch_start()
                assert self.table is not None
                held.append(self.table["weights"][:ROWS].clone())

        held: list[Tensor] = []
        late: Any = {"paper": Paper(warmup_epochs=1), "amal": Amal(warmup_epochs=1)}[rule]
        model = Watched(
            "mlp-8", trained_teachers()[0], rule=late, start_weights=0.25, num_classes=CLASSES, input_shape=list(SHAPE)
        )
        trainer(max_epochs=3).fit(model, Blobs(**NOISE))
        assert [torch.equal(w, held[0]) for w in held] == [True, True, False]
        assert torch.equal(held[0], torch.tensor([[0.75, 0.25]]).expand(ROWS, 2))

    def test_the_student_learns_with_them(self, tmp_path: Path) -> None:
        """With the label's weight alone, no teacher matters; with the teacher's alone, no label."""

        def student(start: float, data: Blobs, teacher: int) -> dict[str, Tensor]:
            torch.manual_seed(0)
            model = ALMKD("mlp-8", trained_teachers()[teacher], rule=Paper(), start_weights=start, **shape)
            trainer(max_epochs=1).fit(model, data)
            return model.student.state_dict()

        shape: Any = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
        clean, noisy = Blobs(seed=0), Blobs(seed=0, **NOISE)
        for name, value in student(0, clean, 0).items():
            assert torch.equal(value, student(0, clean, 1)[name]), name
        for name, value in student(1, clean, 0).items():
            assert torch.equal(value, student(1, noisy, 0)[name]), name

    def test_a_resumed_run_goes_on(self, tmp_path: Path) -> None:
        def run(epochs: int, **options: Any) -> ALMKD:
            torch.manual_seed(0)
            model = almkd(str(path), Paper(warmup_epochs=0, every=1))
            fitted = trainer(max_epochs=epochs)
            fitted.fit(model, Blobs(**NOISE), **options)
            fitted.save_checkpoint(tmp_path / f"{epochs}.ckpt")
            return model

        path = write(tmp_path / "prior.csv", index(noise=[0.5] * ROWS))
        whole = run(3).table
        run(2)
        path.unlink()  # a resumed run does not need it, and neither does a prediction
        again = run(3, ckpt_path=tmp_path / "2.ckpt").table
        assert whole is not None
        assert again is not None
        assert torch.equal(again["weights"], whole["weights"])
        loaded = ALMKD.load_from_checkpoint(tmp_path / "2.ckpt", weights_only=True)
        assert loaded.hparams["start_weights"] == str(path)
        trainer().predict(loaded, Blobs(**NOISE))


class TestRefused:
    @staticmethod
    def refused(start: str, match: str, teachers: int = 1, error: type[Exception] = ValueError) -> None:
        data = Blobs()
        data.setup()
        with pytest.raises(error, match=match):
            starting_weights(start, teachers, data)

    def test_before_anything_is_trained(self, tmp_path: Path) -> None:
        model, fitted = almkd(str(tmp_path / "gone.csv")), trainer(num_sanity_val_steps=2)
        for _ in range(2):  # nor does a second try begin without them
            with pytest.raises(FileNotFoundError, match=r"No such file.*gone\.csv"):
                fitted.fit(model, Blobs())
            assert fitted.global_step == 0

    @pytest.mark.parametrize("start", [-0.1, float("nan"), "0.3", "weights.txt"])
    def test_no_share_and_no_path(self, start: Any) -> None:
        self.refused(start, r"expected as start_weights the teachers' share in \[0, 1\], or the path")

    @pytest.mark.parametrize("name", ["gone.csv", "gone.ckpt"])
    def test_no_file(self, name: str, tmp_path: Path) -> None:
        match = f"No such file.*{name}"
        self.refused(str(tmp_path / name), match, error=FileNotFoundError)

    @pytest.mark.parametrize(
        ("columns", "teachers", "match"),
        [
            ({}, 1, "expected the columns index and either noise or label_weight, teacher_weight .*found none"),
            ({"noise": [0.5]}, 1, "for 1 teacher.*found noise"),
            (index(label_weight=ONES, teacher_weight=ONES), 2, "teacher_weight_0, teacher_weight_1 .*2 teachers"),
            (index(noise=ONES, label_weight=ONES, teacher_weight=ONES), 1, "found index, noise"),
            (
                index(label_weight=ONES) | {f"teacher_weight_{k}": ONES for k in range(3)},
                2,
                "for 2 teachers.*found index, label_weight, teacher_weight_0, .*teacher_weight_2",
            ),
        ],
    )
    def test_columns(self, columns: dict[str, list[Any]], teachers: int, match: str, tmp_path: Path) -> None:
        self.refused(str(write(tmp_path / "w.csv", columns)), match, teachers)

    @pytest.mark.parametrize(
        ("row", "found", "match"),
        [
            (5, {"index": 48}, r"0 to 47, once; found 48 rows, 1 indices missing \[5\], 1 unknown \[48.0\]"),
            (5, {"index": 31}, r"1 indices missing \[5\], 0 unknown \[\]"),
            (5, {"index": ""}, r"expected a finite number of at least 0 as index, found '' in row 6"),
            (7, {"noise": "nan"}, r"expected a number in \[0, 1\] as noise, found 'nan' in row 8"),
            (7, {"noise": "wrong"}, r"expected a number in \[0, 1\] as noise, found 'wrong' in row 8"),
            (7, {"noise": -0.01}, r"expected a number in \[0, 1\] as noise, found '-0\.01' in row 8"),
            (7, {"noise": 1.01}, r"expected a number in \[0, 1\] as noise, found '1\.01' in row 8"),
        ],
    )
    def test_a_row(self, row: int, found: dict[str, Any], match: str, tmp_path: Path) -> None:
        columns = index(noise=[0.5] * ROWS)
        for name, value in found.items():
            columns[name][row] = value
        self.refused(str(write(tmp_path / "w.csv", columns)), match)

    @pytest.mark.parametrize(
        ("value", "match"), [(-1e-9, "at least 0 as .*, found '-1e-09'"), ("inf", "finite .* 'inf'")]
    )
    def test_a_weight(self, value: Any, match: str, tmp_path: Path) -> None:
        columns = index(label_weight=[1.0] * ROWS, teacher_weight=[30.0] * ROWS)
        columns["teacher_weight"][2] = value
        self.refused(str(write(tmp_path / "w.csv", columns)), f"{match}.* in row 3")

    @pytest.mark.parametrize("suffix", [".csv", ".parquet"])
    def test_a_missing_row(self, suffix: str, tmp_path: Path) -> None:
        columns = {name: column[:9] + column[11:] for name, column in index(noise=[0.5] * ROWS).items()}
        self.refused(str(write(tmp_path / f"w{suffix}", columns)), r"once; found 46 rows, 2 indices missing \[9, 10\]")

    def test_a_short_line(self, tmp_path: Path) -> None:
        rows = [f"{i},0.5" for i in range(ROWS)]
        rows[1] = "1"
        (tmp_path / "w.csv").write_text("\n".join(["index,noise", *rows]))
        self.refused(str(tmp_path / "w.csv"), r"expected 2 columns, each with a name of its own, found 1 in row 2")

    @pytest.mark.parametrize(("name", "message"), [("w.csv", "can't decode byte"), ("w.parquet", "[Pp]arquet")])
    def test_another_kind_of_file(self, name: str, message: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"PK\x03\x04\xff\xfe\x00")
        self.refused(str(tmp_path / name), message)

    def test_checkpoints(self, teacher_file: Path, tmp_path: Path) -> None:
        self.refused(str(teacher_file), "expected a checkpoint with weights of samples, found none")
        model, _ = learned(2)
        model.trainer.save_checkpoint(tmp_path / "two.ckpt")
        self.refused(str(tmp_path / "two.ckpt"), "the sample table belongs to another data set: expected 72 rows")
        data = Blobs(**NOISE)
        data.setup()
        with pytest.raises(ValueError, match="expected the weights of 1 teachers, found those of 2"):
            starting_weights(str(tmp_path / "two.ckpt"), 1, data)


class TestWrite:
    @pytest.mark.parametrize("suffix", [".csv", ".parquet"])
    def test_columns(self, suffix: str, tmp_path: Path) -> None:
        data = Blobs(**NOISE)
        model = build("almkd-robust")
        assert isinstance(model, ALMKD)
        trainer(max_epochs=6).fit(model, data)
        assert model.table is not None
        path = tmp_path / "new" / f"samples{suffix}"
        write_samples(path, model.table, data)
        if suffix == ".csv":
            rows: list[dict[str, Any]] = list(read_csv(path))  # type: ignore[arg-type]
        else:
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        names = ["index", "label", "label_weight", "teacher_weight", "clean_probability", "clean_label", "is_noisy"]
        assert list(rows[0]) == names
        assert len(rows) == ROWS
        assert len(model.table["weights"][:ROWS].unique(dim=0)) > 10
        for i, row in enumerate(rows):
            label, clean = int(data.labels[i]), int(data.clean_labels[i])
            weights = [float(row["label_weight"]), float(row["teacher_weight"])]
            assert int(row["index"]) == i
            assert weights == model.table["weights"][i].tolist()  # exactly
            assert float(row["clean_probability"]) == model.table["clean_probability"][i].item()
            assert (int(row["label"]), int(row["clean_label"])) == (label, clean)
            assert str(row["is_noisy"]) == str(label != clean)
        assert [path.name for path in path.parent.iterdir()] == [path.name]

    def test_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model, data = learned()
        table = model.table
        assert table is not None
        path = tmp_path / "samples.csv"
        path.write_text("mine")
        with pytest.raises(FileExistsError, match=r"samples\.csv is there already: give another path"):
            write_samples(path, table, data)
        with pytest.raises(ValueError, match=r"expected a path that ends in \.csv or \.parquet, found .*samples\.txt"):
            write_samples(tmp_path / "samples.txt", table, data)
        with pytest.raises(ValueError, match="the sample table belongs to another data set"):
            write_samples(tmp_path / "other.csv", SampleTable(72, "other"), data)
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        match = r"a \.parquet file needs pyarrow, .*pip install .lit_kd\[parquet\]"
        with pytest.raises(ImportError, match=match):
            write_samples(tmp_path / "samples.parquet", table, data)
        assert [p.name for p in tmp_path.iterdir()] == ["samples.csv"]
        assert path.read_text() == "mine"
        write_samples(path, table, data, overwrite=True)
        assert len(read_csv(path)) == ROWS


class TestCommand:
    """``lit-kd samples``, from a fit to the next."""

    def test_from_fit_to_fit(self) -> None:
        rule = "{class_path: lit_kd.weightings.Paper, init_args: {warmup_epochs: 0, every: 1}}"
        tiny = (*QUIET, "--model.student=mlp-16", "--trainer.limit_train_batches=4", "--trainer.max_epochs=1")
        data_options = ("--data.noise=symmetric", "--data.noise_rate=0.3", "--seed_everything=3")
        given = (*configs("almkd"), *tiny, "--model.teacher=mlp-8", *data_options)
        call("fit", *given, "--model.rule", rule)
        [best] = (p for p in (version(0) / "checkpoints").iterdir() if p.name != "last.ckpt")
        run = ("--config", version(0) / "config.yaml", "--ckpt_path", best)
        call("samples", *run, "--output", "samples.csv")
        call("samples", version(0), "--ckpt_path", best)
        assert (version(0) / "samples.csv").read_bytes() == Path("samples.csv").read_bytes()

        rows = read_csv(Path("samples.csv"))
        saved = torch.load(best, weights_only=True)["sample_table"]["columns"]["weights"]
        found = torch.tensor([[float(row["label_weight"]), float(row["teacher_weight"])] for row in rows])
        data = DigitsDataModule(seed=3, noise="symmetric", noise_rate=0.3)
        data.setup()
        assert len(rows) == data.train_size
        assert torch.equal(found, saved[: len(rows)])
        assert len(found.unique(dim=0)) > 20
        assert [row["is_noisy"] == "True" for row in rows] == (data.labels != data.clean_labels)[: len(rows)].tolist()

        call("fit", *given, "--model.rule=paper", "--model.start_weights=samples.csv")
        again = torch.load(version(1) / "checkpoints" / "last.ckpt", weights_only=True)["sample_table"]["columns"]
        assert torch.equal(again["weights"][: len(rows)], found)
        call("fit", *given, "--model.rule=paper", "--model.start_weights=0.25")
        again = torch.load(version(2) / "checkpoints" / "last.ckpt", weights_only=True)["sample_table"]["columns"]
        assert again["weights"][0].tolist() == [0.75, 0.25]

        before = files(Path.cwd())
        with pytest.raises(FileExistsError, match="is there already"):
            call("samples", *run, "--output", "samples.csv")
        with pytest.raises(ValueError, match="the sample table belongs to another data set"):
            call("samples", "--config", other_seed(version(0)), "--ckpt_path", best, "--output", "other.csv")
        assert before.items() <= files(Path.cwd()).items()
        assert not Path("other.csv").exists()
        Path("samples.csv").write_text("old")
        call("samples", *run, "--output", "samples.csv", "--overwrite")
        assert read_csv(Path("samples.csv")) == rows

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (None, "run.yaml"),
            ("data: [", "run.yaml: expected YAML"),
            ("model: KD", "found one without data"),
            ("data: {class_path: DigitsDataModule}", "No such file or directory: 'gone.ckpt'"),
        ],
    )
    def test_mistakes(self, config: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if config is not None:
            Path("run.yaml").write_text(config)
        given = ["--config", "run.yaml", "--ckpt_path", "gone.ckpt", "--output", "samples.csv"]
        monkeypatch.setattr(sys, "argv", ["lit-kd", "samples", *given])
        with pytest.raises(SystemExit) as done:
            main()
        assert str(done.value.code).startswith("lit-kd: error: ")
        assert message in str(done.value.code)
        assert not Path("samples.csv").exists()


def other_seed(run: Path) -> Path:
    """The run's config, with another seed."""
    path = Path("other.yaml")
    path.write_text((run / "config.yaml").read_text().replace("seed_everything: 3", "seed_everything: 4"))
    return path
