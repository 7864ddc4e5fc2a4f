"""The command ``lit-kd inspect``: which training labels a run distrusts."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import CONFIGS, QUIET, call, configs, files, read_csv, version
from PIL import Image

from lit_kd.cli.main import main
from lit_kd.cli.samples import find_config
from lit_kd.data import DigitsDataModule
from lit_kd.models import load_student

NOISE = ("--data.noise=symmetric", "--data.noise_rate=0.3")
SHORT = (*QUIET, "--trainer.limit_train_batches=4", "--trainer.max_epochs=1", *NOISE)
ALMKD = (
    *("--config", CONFIGS / "methods" / "almkd.yaml", *SHORT, "--seed_everything=3"),
    *("--model.student=mlp-8", "--model.teacher=mlp-8"),
    *("--model.rule", "{class_path: lit_kd.weightings.Paper, init_args: {warmup_epochs: 0, every: 1}}"),
)
RUN = version(0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of ALM-KD."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call("fit", "--config", CONFIGS / "data" / "digits.yaml", *ALMKD)
    return folder


@pytest.fixture
def _again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it as the current directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_again")
class TestRanking:
    def test_every_labelled_sample_the_most_distrusted_first(self, capsys: pytest.CaptureFixture[str]) -> None:
        call("inspect", RUN)
        assert f"the first 48 are shown in {RUN / 'inspect.png'}" in capsys.readouterr().out
        rows = read_csv(RUN / "inspect.csv")
        data = DigitsDataModule(seed=3, noise="symmetric", noise_rate=0.3)
        data.setup()
        last = RUN / "checkpoints" / "last.ckpt"
        weights = torch.load(last, weights_only=True)["sample_table"]["columns"]["weights"].numpy()
        assert sorted(int(row["index"]) for row in rows) == list(range(data.train_size))
        found = [float(row["label_weight"]) for row in rows]
        assert found == sorted(found)
        assert float(rows[0]["distrust"]) > 0.9 > 0.1 > float(rows[-1]["distrust"]) == 0
        x = data.parts.plain.fetch(data.parts.positions["train"].tolist())
        assert isinstance(x, torch.Tensor)
        with torch.no_grad():
            probability, said = load_student(last)(x).softmax(1).max(1)
        for row in rows:
            i = int(row["index"])
            assert int(row["label"]) == data.labels[i]
            assert row["label_name"] == row["label"]
            assert float(row["label_weight"]) == pytest.approx(weights[i, 0])
            assert float(row["teacher_weight"]) == pytest.approx(weights[i, 1])
            assert int(row["student_class"]) == said[i]
            assert float(row["student_probability"]) == pytest.approx(probability[i].item(), abs=1e-5)
            assert (int(row["clean_label"]), row["is_noisy"]) == (data.clean_labels[i], str(bool(data.noisy[i])))

    def test_the_sheet_shows_the_first_ones(self) -> None:
        call("inspect", RUN, "--samples", 3)
        sheet = np.asarray(Image.open(RUN / "inspect.png"))
        data = DigitsDataModule(seed=3, noise="symmetric", noise_rate=0.3)
        data.setup()
        for number, row in enumerate(read_csv(RUN / "inspect.csv")[:3]):
            picture = data.parts.plain.fetch([int(data.parts.positions["train"][int(row["index"])])])
            assert isinstance(picture, torch.Tensor)
            pixels = picture[0, 0].numpy()
            expected = np.round(255 * (pixels - pixels.min()) / np.ptp(pixels)).repeat(12, 0).repeat(12, 1)
            left = 12 + number * (102 + 12) + 3
            assert np.abs(sheet[37 : 37 + 96, left : left + 96, 0] - expected).max() <= 1
            frame = sheet[34, left].tolist()
            assert frame == ([0xD1, 0x49, 0x5B] if row["is_noisy"] == "True" else [0x2A, 0x78, 0xB5])

    def test_wherever_its_files_lie(self) -> None:
        call("inspect", RUN)
        expected = (RUN / "inspect.csv").read_bytes()
        call("inspect", ".")  # with one run below it
        last = RUN / "checkpoints" / "last.ckpt"
        given = ("--config", RUN / "config.yaml", "--ckpt_path", last, "--output", "new/other.csv")
        call("inspect", *given)
        shutil.move(last, "best.ckpt")
        (RUN / "config.yaml").rename("config.yaml")
        call("inspect", ".", "--overwrite")
        assert Path("inspect.csv").read_bytes() == Path("new/other.csv").read_bytes() == expected
        assert Path("new/other.png").is_file()

    def test_nothing_is_overwritten_unasked(self) -> None:
        for name in ("inspect.csv", "inspect.png"):
            (RUN / name).write_text("mine")
            before = files(RUN)
            with pytest.raises(FileExistsError, match=rf"{name} is there already: give another"):
                call("inspect", RUN)
            assert files(RUN) == before
            (RUN / name).unlink()

    def test_a_second_run_s_checkpoints_are_not_passed_over(self) -> None:
        for name in ("last-v1", "last-v10"):
            shutil.copy(RUN / "checkpoints" / "last.ckpt", RUN / "checkpoints" / f"{name}.ckpt")
        with pytest.raises(ValueError, match=r"found last.ckpt and last-v\d+.ckpt, .* --ckpt_path"):
            call("inspect", RUN)
        call("inspect", RUN, "--ckpt_path", RUN / "checkpoints" / "last-v1.ckpt")

    def test_a_run_of_wandb_and_many_versions(self) -> None:
        for name in ("version_9", "version_10"):
            shutil.copytree(RUN, Path("many") / name)
        with pytest.raises(ValueError, match=r"found 2: give one of them, e.g. many/version_"):
            call("inspect", "many")
        shutil.rmtree("many")
        RUN.rename(RUN.with_name("x4f9k2"))
        assert find_config(Path()) == Path("lightning_logs/x4f9k2/config.yaml")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["empty"], "no config.yaml in empty: expected the directory of a lit_kd run, or give --config"),
            (["several"], "several: expected one run, found 2: give one of them"),
            (["bare"], "expected last.ckpt or best.ckpt in one of bare, bare/checkpoints; found none: give"),
            ([str(RUN), "--output", "ranking.txt"], "expected a path that ends in .csv or .parquet"),
        ],
    )
    def test_mistakes(self, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for folder in ("empty", "bare", "several/version_0", "several/version_1"):
            Path(folder).mkdir(parents=True)
        for folder in ("bare", "several/version_0", "several/version_1"):
            shutil.copy(RUN / "config.yaml", folder)
        monkeypatch.setattr(sys, "argv", ["lit-kd", "inspect", *args])
        with pytest.raises(SystemExit) as done:
            main()
        assert str(done.value.code).startswith(f"lit-kd: error: {message}")

    @pytest.mark.parametrize("args", [[], ["--config", "config.yaml"], [str(RUN), "--samples", "0"]])
    def test_options(self, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as done:
            call("inspect", *args)
        assert done.value.code == 2
        assert capsys.readouterr().err.startswith("usage: lit-kd inspect")


class TestOtherRuns:
    def test_checkpoints_sent_elsewhere_and_a_test_since(self) -> None:
        sent = ("--checkpoint.dirpath=runs/student", "--checkpoint.filename=best")
        saved = "--trainer.logger.save_dir=runs/student"
        call("fit", "--config", CONFIGS / "data" / "digits.yaml", *ALMKD, *sent, saved)
        config = Path("runs/student/lightning_logs/version_0/config.yaml")
        call("test", "--config", config, "--ckpt_path", "runs/student/best.ckpt")
        assert list(Path().rglob("config.yaml")) == [config]
        for where in ("runs/student", "runs/student/lightning_logs/version_0"):
            call("inspect", where)
            assert len(read_csv(Path(where) / "inspect.csv")) > 1000

    def test_a_method_without_weights(self) -> None:
        call("fit", *configs("supervised"), *SHORT, "--model.student=mlp-8")
        with pytest.raises(ValueError, match=r"expected a checkpoint with weights of samples, found none"):
            call("inspect", RUN)

    def test_vectors_have_no_sheet(self, capsys: pytest.CaptureFixture[str]) -> None:
        call("fit", "--config", CONFIGS / "data" / "blobs.yaml", *ALMKD)
        call("inspect", RUN)
        assert "no contact sheet: the samples are no pictures" in capsys.readouterr().out
        assert (RUN / "inspect.csv").is_file()
        assert not (RUN / "inspect.png").exists()

    def test_files_are_named(self) -> None:
        draw = np.random.default_rng(0)
        for part, count in (("train", 30), ("test", 4)):
            for name in ("cat", "dog"):
                Path(f"images/{part}/{name}").mkdir(parents=True)
                for i in range(count):
                    pixels = draw.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(f"images/{part}/{name}/{i}.png")
        folder: Any = (
            "--data=ImageFolderDataModule",
            "--data.root=images",
            "--data.image_size=8",
            "--data.batch_size=8",
        )
        call("fit", *folder, *ALMKD)
        call("inspect", RUN)
        rows = read_csv(RUN / "inspect.csv")
        assert len({row["file"] for row in rows}) == len(rows) == 48
        for row in rows:
            kind = Path(row["file"]).parent.name
            assert ["cat", "dog"][int(row["clean_label"])] == kind
            assert row["label_name"] == ["cat", "dog"][int(row["label"])]
