"""The command ``lit-kd``: fit, validate, test, predict."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import CONFIGS, QUIET, call, configs, files, read_csv, read_yaml, train_teacher, version

from lit_kd import KD, __version__
from lit_kd.cli.main import main, sentence
from lit_kd.data import DigitAttributesDataModule, DigitsDataModule

TINY = (*QUIET, "--model.student=mlp-16", "--trainer.limit_train_batches=4")
ONE, TWO = "--trainer.max_epochs=1", "--trainer.max_epochs=2"
TERMS = ("label", "teacher")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def trained(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a run of KD, one epoch long."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        given = ("--model.teacher", teacher, "--model.lr_scheduler=null", "--model.num_classes=7")
        call("fit", *configs("kd"), *TINY, *given, "--model.weight=0.3", ONE)
    return folder


@pytest.fixture
def _trained(trained: Path) -> None:
    shutil.copytree(trained, Path.cwd(), dirs_exist_ok=True)


def checkpoint(number: int) -> dict[str, Any]:
    """The last checkpoint of a run."""
    loaded: dict[str, Any] = torch.load(last(number), weights_only=True)
    return loaded


def last(number: int) -> Path:
    return version(number) / "checkpoints" / "last.ckpt"


def best(number: int) -> Path:
    return version(number) / "checkpoints" / "best.ckpt"


def epochs(number: int) -> list[dict[str, str]]:
    """The rows of a run's metrics that tell about training."""
    return [row for row in read_csv(version(number) / "metrics.csv") if row["train/loss"]]


def assert_same_runs(first: int, second: int) -> None:
    """The same numbers, bit for bit."""
    assert (version(first) / "metrics.csv").read_bytes() == (version(second) / "metrics.csv").read_bytes()
    assert torch.load(best(first), weights_only=True)["epoch"] == torch.load(best(second), weights_only=True)["epoch"]
    a, b = checkpoint(first), checkpoint(second)
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert a["hyper_parameters"] == b["hyper_parameters"]
    if "sample_table" in a:
        columns = [each["sample_table"]["columns"] for each in (a, b)]
        torch.testing.assert_close(*columns, rtol=0, atol=0, equal_nan=True)


def test_from_fit_to_predictions_without_the_teacher(teacher: Path) -> None:
    own = Path(shutil.copy(teacher, "teacher.ckpt"))
    call("fit", *configs("almkd"), *TINY, "--model.teacher", own, TWO)
    given = ("--config", version(0) / "config.yaml", "--ckpt_path", best(0))
    call("validate", *given)
    [validated] = read_csv(version(1) / "metrics.csv")
    measured = [row for row in read_csv(version(0) / "metrics.csv") if row["val/accuracy"]]
    expected = max(measured, key=lambda row: float(row["val/accuracy"]))
    for name in ("val/accuracy", "val/ece", "val/nll", "val/teacher_agreement"):
        assert float(validated[name]) == pytest.approx(float(expected[name]), rel=1e-6)

    own.unlink()
    with pytest.warns(UserWarning, match=r"teacher \['teacher.ckpt'\] not found: evaluating without"):
        call("test", *given)
    [tested] = read_csv(version(2) / "metrics.csv")
    assert {name for name in tested if name.startswith("test/")} >= {"test/accuracy", "test/ece", "test/nll"}
    assert "test/teacher_agreement" not in tested

    Path("predictions.csv").write_bytes(b"mine")
    call("predict", *given)
    assert Path("predictions.csv").read_bytes() == b"mine"
    rows = read_csv(Path("predictions-1.csv"))
    assert list(rows[0]) == ["row", "class", "probability"]
    data = DigitsDataModule(seed=0)
    data.setup()
    labels = torch.cat([batch.y for batch in data.test_dataloader()])
    assert [int(row["row"]) for row in rows] == list(range(len(labels)))
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)  # the largest of ten
    classes = torch.tensor([int(row["class"]) for row in rows])
    assert float(tested["test/accuracy"]) == pytest.approx((classes == labels).double().mean().item(), abs=1e-6)


def test_predictions_of_several_labels() -> None:
    call("fit", *configs("supervised", "digit_attributes"), *TINY, ONE, "--model.task=multilabel")
    call("predict", "--config", version(0) / "config.yaml", "--ckpt_path", best(0))
    call("test", "--config", version(0) / "config.yaml", "--ckpt_path", best(0))
    [tested] = read_csv(version(2) / "metrics.csv")
    rows = read_csv(Path("predictions.csv"))
    assert list(rows[0]) == ["row", *(f"{name}_{c}" for name in ("labels", "probability") for c in range(5))]
    data = DigitAttributesDataModule(seed=0)
    data.setup()
    truth = torch.cat([batch.y for batch in data.test_dataloader()])
    assert [int(row["row"]) for row in rows] == list(range(len(truth)))
    labels = torch.tensor([[int(row[f"labels_{c}"]) for c in range(5)] for row in rows])
    probabilities = torch.tensor([[float(row[f"probability_{c}"]) for c in range(5)] for row in rows])
    assert torch.equal(labels, (probabilities > 0.5).long())
    assert float(tested["test/accuracy"]) == pytest.approx((labels == truth).double().mean().item(), abs=1e-6)


@pytest.mark.usefixtures("_trained")
def test_what_a_run_keeps() -> None:
    model = KD.load_from_checkpoint(last(0))
    assert model.weight == 0.3
    weights = {k: v for k, v in checkpoint(0)["state_dict"].items() if k.startswith("student.")}
    read = {f"student.{k}": v for k, v in model.student.state_dict().items()}
    torch.testing.assert_close(read, weights, rtol=0, atol=0)
    told = checkpoint(0)["hyper_parameters"]  # what the data tell, whatever the command line says
    assert (told["num_classes"], list(told["input_shape"])) == (10, [1, 8, 8])
    saved = read_yaml(version(0) / "config.yaml")
    assert not {"num_classes", "input_shape"} & set(keys(saved))
    # options count more than configs
    assert (saved["model"]["init_args"]["weight"], saved["model"]["init_args"]["temperature"]) == (0.3, 4.0)


def test_no_config_repeats_what_the_data_know() -> None:
    assert not [p for p in CONFIGS.rglob("*.yaml") if {"num_classes", "input_shape"} & set(keys(read_yaml(p)))]


def keys(tree: Any) -> Iterator[str]:
    """The keys of nested mappings."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield key
        yield from keys(value)


def test_same_seed_and_saved_or_printed_configs_same_numbers(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = ("--data.noise=symmetric", "--data.noise_rate=0.3", "--model.lr_interval=step")
    given = (*configs("almkd"), *TINY, "--model.teacher", teacher, ONE, *noise)
    with pytest.raises(SystemExit) as done:
        call("fit", *given, "--print_config")
    assert not done.value.code
    assert not list(Path.cwd().iterdir())
    printed = capsys.readouterr().out
    call("fit", *given)
    before = files(Path.cwd())
    Path("printed.yaml").write_text(printed)
    call("fit", "--config", "printed.yaml")
    call("fit", "--config", version(0) / "config.yaml", "--seed_everything=0")  # the default
    assert before.items() <= files(Path.cwd()).items()  # each run has a folder of its own
    assert_same_runs(0, 1)
    assert_same_runs(0, 2)
    assert read_yaml(version(0) / "config.yaml") == read_yaml(version(1) / "config.yaml")
    call("fit", *given, "--seed_everything=1")
    assert not torch.equal(*(checkpoint(run)["state_dict"]["student.1.weight"] for run in (0, 3)))


class TestResume:
    @pytest.mark.parametrize("method", ["supervised", "almkd"])
    def test_the_last_epoch_is_kept_though_it_is_not_the_best(self, method: str, teacher: Path) -> None:
        taught = ("--model.teacher", teacher) if method == "almkd" else ()
        # called best: the epoch of the lowest accuracy
        given = (*configs(method), *TINY, *taught, "--model.lr_scheduler=null", "--checkpoint.mode=min")
        call("fit", *given, "--trainer.max_epochs=3")
        measured = [float(row["val/accuracy"]) for row in read_csv(version(0) / "metrics.csv") if row["val/accuracy"]]
        assert torch.load(best(0), weights_only=True)["epoch"] == measured.index(min(measured)) < 2
        assert (checkpoint(0)["epoch"], checkpoint(0)["global_step"]) == (2, 12)
        call("fit", *given, "--trainer.max_epochs=4", "--ckpt_path", last(0))
        assert [row["epoch"] for row in epochs(1)] == ["3"]
        assert (checkpoint(1)["epoch"], checkpoint(1)["global_step"]) == (3, 16)

    @pytest.mark.usefixtures("_trained")
    def test_an_explicit_option_beats_the_checkpoint(self) -> None:
        given = ("--config", version(0) / "config.yaml", TWO, "--ckpt_path", last(0))
        call("fit", *given, "--model.init_args.weight=1.0")
        call("fit", *given)
        label, teachers = ([[float(row[f"train/{term}"]) for row in epochs(run)] for run in (1, 2)] for term in TERMS)
        assert label[0] == [0.0]
        assert label[1] > [0.0]
        assert teachers[0] > [0.0]
        assert [checkpoint(run)["hyper_parameters"]["weight"] for run in (1, 2)] == [1.0, 0.3]
        assert checkpoint(1)["global_step"] == 8

    @pytest.mark.usefixtures("_trained")
    def test_another_optimizer_is_refused(self) -> None:
        before, config = files(version(0)), ("--config", version(0) / "config.yaml")
        sgd = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.01")
        for changed, name in ((sgd, "optimizer"), (["--model.lr_scheduler=cosine"], "lr_scheduler")):
            with pytest.raises(ValueError, match=f"expected the {name} that the checkpoint was trained with, .* found"):
                call("fit", *config, *changed, TWO, "--ckpt_path", last(0))
        assert files(version(0)) == before
        call("test", *config, *sgd, "--ckpt_path", last(0))  # nothing is trained
        call("fit", *config, *sgd, "--model.student", last(0), ONE)  # what the message advises
        newest = max(Path().rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
        [group] = torch.load(newest, weights_only=True)["optimizer_states"][0]["param_groups"]
        assert group["lr"] == 0.01


COMMAND = Path(sys.executable).with_name("lit-kd")


def shell(*args: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    done = subprocess.run([str(arg) for arg in args], capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


class TestHelp:
    def test_help_of_a_method(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as done:
            call("fit", "--model.help", "ALMKD")
        assert not done.value.code
        text = capsys.readouterr().out
        assert "lit_kd.ALMKD" in text
        assert "--model.student" in text

    def test_nobody_reads_on(self) -> None:
        """As in ``lit-kd schema | head``."""
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([COMMAND, "--help"], stdout=writer, stderr=subprocess.PIPE, check=False)
        assert (done.returncode, done.stderr) == (1, b"")

    def test_version_answers_without_torch(self) -> None:
        check = "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
        script = f"import sys; sys.argv[0] = 'lit-kd'; from lit_kd.cli.main import main; main(); {check}"
        assert shell(sys.executable, "-c", script, "--version") == (0, f"lit-kd {__version__}\n", "")
        assert shell(sys.executable, "-m", "lit_kd", "--version") == (0, f"lit-kd {__version__}\n", "")
        assert shell(COMMAND, "--version") == (0, f"lit-kd {__version__}\n", "")


class TestErrors:
    """On the command line: one message, no traceback, an exit code."""

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([*configs("supervised"), "--model.student=resnet21"], "found unknown model 'resnet21'"),
            ([*configs("kd"), *QUIET], "KD needs a teacher, found none: pass teacher="),
            (["--config=gone.yaml"], "no config at gone.yaml: expected a YAML file"),
            ([*configs("almkd"), *QUIET, "--trainer.gradient_clip_val=0.1"], "Remove `Trainer(gradient_clip_val=0.1)`"),
            ([*configs("supervised"), *QUIET, "--model.student=mlp-8", "--ckpt_path=gone.ckpt"], "gone.ckpt"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_fit(
        self, args: list[object], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["lit-kd", "fit", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            main()
        assert str(done.value.code).startswith("lit-kd: error: ")  # what Python prints, before it exits with 1
        assert message in str(done.value.code)
        assert "LIT_KD_TRACEBACK=1" in str(done.value.code)
        assert "Traceback" not in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--model.weight=2"], "expected a weight in [0, 1], the teacher's share of the loss; found 2.0"),
            (["--model.term=KL", "--model.term.temperature=-1"], "expected a temperature above 0, found -1.0"),
        ],
    )
    def test_the_parser_keeps_what_it_tried_in_vain_to_itself(
        self, args: list[object], message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["lit-kd", "fit", *map(str, [*configs("kd"), "--model.teacher=mlp-8", *args])])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == f"lit-kd: error: {message}\n(LIT_KD_TRACEBACK=1 shows where this was raised)"

    def test_causes_that_no_parser_listed_are_not_the_message(self) -> None:
        error = ValueError("expected files, found none (gone)")
        error.__cause__ = OSError("gone")
        assert sentence(error) == "expected files, found none (gone)"

    def test_the_parser_speaks_for_itself(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as done:
            call("fit", *configs("kd"), "--model.wieght=0.3")
        assert done.value.code == 2
        assert "Option 'wieght' is not accepted" in capsys.readouterr().err

    def test_the_traceback_on_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["lit-kd", "nonsense"])
        monkeypatch.setenv("LIT_KD_TRACEBACK", "1")
        with pytest.raises(ValueError, match="expected a command, found nonsense"):
            main()
