"""The command ``lit-kd audit``: which training labels are wrong, by a run or by one training."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import CONFIGS, QUIET, call, configs, files, read_csv, version
from PIL import Image
from sklearn.metrics import average_precision_score

from lit_kd.cli.main import main
from lit_kd.cli.samples import run_config
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


def on_page(path: Path) -> dict[str, Any]:
    """What a page of the audit knows."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


@pytest.fixture
def _again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it as the current directory."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_again")
class TestRanking:
    def test_every_labelled_sample_the_most_distrusted_first(self, capsys: pytest.CaptureFixture[str]) -> None:
        call("audit", RUN)
        assert f"decide: {RUN / 'label_issues.html'}, in a browser" in capsys.readouterr().out
        rows = read_csv(RUN / "label_issues.csv")
        data = DigitsDataModule(seed=3, noise="symmetric", noise_rate=0.3)
        data.setup()
        last = RUN / "checkpoints" / "last.ckpt"
        weights = torch.load(last, weights_only=True)["sample_table"]["columns"]["weights"].numpy()
        assert sorted(int(row["index"]) for row in rows) == list(range(data.train_size))
        found = [float(row["label_score"]) for row in rows]
        assert found == sorted(found)
        assert found[0] < 0.1 < 0.9 < found[-1] == 1
        x = data.parts.plain.fetch(data.parts.positions["train"].tolist())
        assert isinstance(x, torch.Tensor)
        with torch.no_grad():
            logits = load_student(last)(x)
        assert not read_csv(RUN / "labels.csv")
        for row in rows:
            i = int(row["index"])
            given = int(data.labels[i])
            assert row["id"] == data.parts.ids[i]
            assert (int(row["given_label"]), row["given_label_name"]) == (given, row["given_label"])
            assert float(row["label_weight"]) == pytest.approx(weights[i, 0])
            assert float(row["teacher_weight"]) == pytest.approx(weights[i, 1])
            assert row["is_label_issue"] == "False"  # the rule's weights are no probabilities
            assert int(row["predicted_label"]) == int(logits[i].argmax())
            assert (int(row["clean_label"]), row["is_noisy"]) == (data.clean_labels[i], str(bool(data.noisy[i])))

    def test_the_page_shows_the_same_rows(self) -> None:
        call("audit", RUN)
        rows, shown = read_csv(RUN / "label_issues.csv"), on_page(RUN / "label_issues.html")
        assert shown["ids"] == [row["id"] for row in rows]
        assert shown["suggested"] == [int(row["predicted_label"]) for row in rows]
        assert shown["pictured"] == len(rows)
        # the first tile of the first sheet is the first row's picture
        address = re.search(r"data:image/\w+;base64,([\w+/=]+)", (RUN / "label_issues.html").read_text())
        assert address is not None
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(address[1]))).convert("L")).astype(float)
        data = DigitsDataModule(seed=3, noise="symmetric", noise_rate=0.3)
        data.setup()
        picture = data.parts.plain.fetch([int(data.parts.positions["train"][int(rows[0]["index"])])])
        assert isinstance(picture, torch.Tensor)
        pixels = picture[0, 0].numpy()
        assert (
            np.abs(sheet[:8, :8] - 255 * (pixels - pixels.min()) / np.ptp(pixels)).max() < 16
        )  # the sheet is compressed

    def test_wherever_its_files_lie(self) -> None:
        call("audit", RUN)
        expected = (RUN / "label_issues.csv").read_bytes()
        call("audit", ".")  # with one run below it
        last = RUN / "checkpoints" / "last.ckpt"
        call("audit", "lightning_logs", "--config", RUN / "config.yaml", "--ckpt_path", last, "--output", "new")
        shutil.move(last, "best.ckpt")
        (RUN / "config.yaml").rename("config.yaml")
        call("audit", ".", "--overwrite")
        assert Path("label_issues.csv").read_bytes() == Path("new/label_issues.csv").read_bytes() == expected
        assert Path("new/label_issues.html").is_file()

    def test_nothing_is_overwritten_unasked(self) -> None:
        for name in ("label_issues.csv", "labels.csv", "label_issues.html"):
            (RUN / name).write_text("mine")
            before = files(RUN)
            with pytest.raises(FileExistsError, match=rf"{name} is there already: give another"):
                call("audit", RUN)
            assert files(RUN) == before
            (RUN / name).unlink()

    def test_a_second_run_s_checkpoints_are_not_passed_over(self) -> None:
        for name in ("last-v1", "last-v10"):
            shutil.copy(RUN / "checkpoints" / "last.ckpt", RUN / "checkpoints" / f"{name}.ckpt")
        with pytest.raises(ValueError, match=r"found last.ckpt and last-v\d+.ckpt, .* --ckpt_path"):
            call("audit", RUN)
        call("audit", RUN, "--ckpt_path", RUN / "checkpoints" / "last-v1.ckpt")

    def test_a_run_of_wandb_and_many_versions(self) -> None:
        for name in ("version_9", "version_10"):
            shutil.copytree(RUN, Path("many") / name)
        with pytest.raises(ValueError, match=r"found 2: give one of them, e.g. many/version_"):
            call("audit", "many")
        shutil.rmtree("many")
        RUN.rename(RUN.with_name("x4f9k2"))
        assert run_config(Path()) == Path("lightning_logs/x4f9k2/config.yaml")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["empty"], "no config.yaml in empty: expected the directory of a lit_kd run, or give --config"),
            (["several"], "several: expected one run, found 2: give one of them"),
            (["bare"], "expected last.ckpt or best.ckpt in one of bare, bare/checkpoints; found none: give"),
        ],
    )
    def test_mistakes(self, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for folder in ("empty", "bare", "several/version_0", "several/version_1"):
            Path(folder).mkdir(parents=True)
        for folder in ("bare", "several/version_0", "several/version_1"):
            shutil.copy(RUN / "config.yaml", folder)
        monkeypatch.setattr(sys, "argv", ["lit-kd", "audit", *args])
        with pytest.raises(SystemExit) as done:
            main()
        assert str(done.value.code).startswith(f"lit-kd: error: {message}")

    @pytest.mark.parametrize(
        "args", [[], ["--data", "DigitsDataModule"], ["--output", "x"], [str(RUN), "--samples", "3"]]
    )
    def test_options(self, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as done:
            call("audit", *args)
        assert done.value.code == 2
        assert capsys.readouterr().err.startswith("usage: lit-kd audit")


class TestOtherRuns:
    def test_checkpoints_sent_elsewhere_and_a_test_since(self) -> None:
        sent = ("--checkpoint.dirpath=runs/student", "--checkpoint.filename=best")
        saved = "--trainer.logger.save_dir=runs/student"
        call("fit", "--config", CONFIGS / "data" / "digits.yaml", *ALMKD, *sent, saved)
        config = Path("runs/student/lightning_logs/version_0/config.yaml")
        call("test", "--config", config, "--ckpt_path", "runs/student/best.ckpt")
        assert list(Path().rglob("config.yaml")) == [config]
        for where in ("runs/student", "runs/student/lightning_logs/version_0"):
            call("audit", where)
            assert len(read_csv(Path(where) / "label_issues.csv")) > 1000

    def test_a_method_without_weights(self) -> None:
        call("fit", *configs("supervised"), *SHORT, "--model.student=mlp-8")
        with pytest.raises(ValueError, match=r"expected a checkpoint with weights of samples, found none"):
            call("audit", RUN)

    def test_vectors_have_no_pictures(self) -> None:
        call("fit", "--config", CONFIGS / "data" / "blobs.yaml", *ALMKD)
        call("audit", RUN)
        assert on_page(RUN / "label_issues.html")["pictured"] == 0

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
        call("audit", RUN)
        rows = read_csv(RUN / "label_issues.csv")
        assert len({row["id"] for row in rows}) == len(rows) == 48
        for row in rows:
            kind = Path(row["id"]).parent.name
            assert ["cat", "dog"][int(row["clean_label"])] == kind
            assert row["given_label_name"] == ["cat", "dog"][int(row["given_label"])]


TRAINED = (*QUIET[:3], "--data=DigitsDataModule", *NOISE, "--seed_everything=3", "--student=mlp-16", "--output=found")


class TestByOneTraining:
    @pytest.mark.parametrize("trusted", [(), ("--trusted", "0.05"), ("--trusted", "0")])
    def test_a_training_then_the_same_as_of_its_run(
        self, trusted: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        call("audit", *TRAINED, *trusted, "--trainer.max_epochs=4")
        told = capsys.readouterr().out
        rows = read_csv(Path("found/label_issues.csv"))
        wrong = [row for row in rows if row["is_label_issue"] == "True"]
        expected = sum(1 - float(row["label_score"]) for row in wrong)
        assert f"{len(wrong)} of {len(rows)} labels are taken for wrong" in told
        assert f"of these {expected:.0f} are expected to be wrong, of all labels" in told
        meta = {(): 180, ("--trusted", "0.05"): 90, ("--trusted", "0"): 0}[trusted]
        assert len(rows) == 1797 - 359 - 180 - meta
        assert f"not audited: {f'{meta} trusted, ' if meta else ''}180 validation, 359 test rows" in told
        assert {row["id"]: row["predicted_label_name"] for row in wrong} == {
            row["id"]: row["label"] for row in read_csv(Path("found/labels.csv"))
        }
        before = Path("found/label_issues.csv").read_bytes()
        call("audit", "found", "--overwrite")
        assert Path("found/label_issues.csv").read_bytes() == before

    def test_against_cleanlab(self, capsys: pytest.CaptureFixture[str]) -> None:
        call("audit", *TRAINED, "--trainer.max_epochs=2", "--against", "cleanlab")
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("  ")[0] for line in lines[-4:-1]] == [
            "lit_kd",
            "cleanlab, self_confidence",
            "cleanlab, normalized_margin",
        ]
        rows = read_csv(Path("found/label_issues.csv"))
        wrong = [row["is_noisy"] == "True" for row in rows]
        assert float(lines[-4].split()[-2]) == pytest.approx(
            average_precision_score(wrong, [1 - float(row["label_score"]) for row in rows]), abs=6e-4
        )
        assert float(lines[-4].split()[-3]) == pytest.approx(np.mean(wrong[: sum(wrong)]), abs=6e-4)

    def test_no_warnings_of_our_own_making(
        self, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """And of a student that has learned nothing it is told so."""
        still = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=1e-12")
        line = [*TRAINED, "--trusted=0", "--data.val=0", "--trainer.max_epochs=1", *still]
        monkeypatch.setattr(sys, "argv", ["lit-kd", "audit", *line])
        main()
        assert sys.argv == ["lit-kd", "audit", *line]
        shown = [str(one.message) for one in recwarn if not issubclass(one.category, DeprecationWarning)]
        others = [one for one in shown if "LeafSpec" not in one and "does not have many workers" not in one]
        assert [one[:17] for one in others] == ["no row is trusted"]
        found = re.search(r"note: (the student seems to have learned nothing.*)", capsys.readouterr().out)
        assert found is not None
        assert f"<b>Note:</b> {found[1]}." in Path("found/label_issues.html").read_text()

    def test_cleanlab_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cleanlab", None)
        message = r"--against cleanlab needs cleanlab, which is not installed: pip install 'lit_kd\[cleanlab\]'"
        with pytest.raises(ImportError, match=message):
            call("audit", *TRAINED, "--against", "cleanlab")
        assert not Path("found").exists()

    def test_a_mistake_leaves_room_for_the_next_try(self) -> None:
        with pytest.raises(ValueError, match=r"fraction|rows"):
            call("audit", *TRAINED, "--trusted", "1.5")
        call("audit", *TRAINED, "--trainer.max_epochs=1")
        with pytest.raises(FileExistsError, match=r"found/label_issues.csv is there already"):
            call("audit", *TRAINED)
        with pytest.raises(FileExistsError, match=r"found/config.yaml is there already"):
            call("audit", *TRAINED, "--overwrite")
