"""The command ``lit-kd``: fit, validate, test, predict."""

from __future__ import annotations

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
from lit_kd.cli.main import main
from lit_kd.data import DigitsDataModule

TINY = (*QUIET, "--model.student=mlp-16", "--trainer.limit_train_batches=4")
ONE, TWO = "--trainer.max_epochs=1", "--trainer.max_epochs=2"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checkpoint(number: int) -> dict[str, Any]:
    """The last checkpoint of a run."""
    loaded: dict[str, Any] = torch.load(version(number) / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded


def best(number: int) -> Path:
    """The file of a run's best epoch."""
    return version(number) / "checkpoints" / "best.ckpt"


def assert_same_runs(first: int, second: int) -> None:
    """The same numbers, bit for bit."""
    assert (version(first) / "metrics.csv").read_bytes() == (version(second) / "metrics.csv").read_bytes()
    assert torch.load(best(first), weights_only=True)["epoch"] == torch.load(best(second), weights_only=True)["epoch"]
    a, b = checkpoint(first), checkpoint(second)
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)
    assert a["hyper_parameters"] == b["hyper_parameters"]
    assert ("sample_table" in a) == ("sample_table" in b)
    if "sample_table" in a:
        assert a["sample_table"].pop("fingerprint") == b["sample_table"].pop("fingerprint")
        torch.testing.assert_close(a["sample_table"], b["sample_table"], rtol=0, atol=0, equal_nan=True)


class TestRun:
    def test_from_fit_to_predictions_without_the_teacher(self, teacher: Path) -> None:
        own = Path(shutil.copy(teacher, "teacher.ckpt"))
        call("fit", *configs("almkd"), *TINY, "--model.teacher", own, TWO)
        own.unlink()
        given = ("--config", version(0) / "config.yaml", "--ckpt_path", best(0))
        with pytest.warns(UserWarning, match=r"teacher \['teacher.ckpt'\] not found: evaluating without"):
            call("test", *given)
        [tested] = read_csv(version(1) / "metrics.csv")
        assert {name for name in tested if name.startswith("test/")} >= {"test/accuracy", "test/ece", "test/nll"}
        assert "test/teacher_agreement" not in tested

        call("predict", *given)
        rows = read_csv(Path("predictions.csv"))
        assert list(rows[0]) == ["row", "class", "probability"]
        data = DigitsDataModule(seed=0)
        data.setup()
        labels = torch.cat([batch.y for batch in data.test_dataloader()])
        assert [int(row["row"]) for row in rows] == list(range(len(labels)))
        assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)  # the largest of ten
        classes = torch.tensor([int(row["class"]) for row in rows])
        assert float(tested["test/accuracy"]) == pytest.approx((classes == labels).double().mean().item(), abs=1e-6)

        first = Path("predictions.csv").read_bytes()
        Path("predictions.csv").write_bytes(b"mine")
        call("predict", *given, "--return_predictions=false")
        assert Path("predictions.csv").read_bytes() == b"mine"
        assert Path("predictions-1.csv").read_bytes() == first

    def test_validate_measures_the_best_epoch(self, teacher: Path) -> None:
        call("fit", *configs("kd"), *TINY, "--model.teacher", teacher, TWO)
        call("validate", "--config", version(0) / "config.yaml", "--ckpt_path", best(0))
        [validated] = read_csv(version(1) / "metrics.csv")
        epochs = [row for row in read_csv(version(0) / "metrics.csv") if row["val/accuracy"]]
        expected = max(epochs, key=lambda row: float(row["val/accuracy"]))
        for name in ("val/accuracy", "val/ece", "val/nll", "val/teacher_agreement"):
            assert float(validated[name]) == pytest.approx(float(expected[name]), rel=1e-6)

    def test_python_reads_what_the_command_wrote(self, teacher: Path) -> None:
        own = Path(shutil.copy(teacher, "teacher.ckpt"))
        call("fit", *configs("kd"), *TINY, "--model.teacher", own, "--model.weight=0.3", ONE)
        own.unlink()
        model = KD.load_from_checkpoint(version(0) / "checkpoints" / "last.ckpt")
        assert model.weight == 0.3
        weights = {k: v for k, v in checkpoint(0)["state_dict"].items() if k.startswith("student.")}
        assert weights
        torch.testing.assert_close(
            {f"student.{k}": v for k, v in model.student.state_dict().items()}, weights, rtol=0, atol=0
        )


class TestReproducible:
    def test_same_seed_same_numbers(self, teacher: Path) -> None:
        given = (*configs("almkd"), *TINY, "--model.teacher", teacher, TWO)
        noise = ("--data.noise=symmetric", "--data.noise_rate=0.3")
        call("fit", *given, *noise, "--seed_everything=0")
        before = files(Path.cwd())
        call("fit", *given, *noise, "--seed_everything=0")
        call("fit", *given, *noise)  # 0 is the default
        assert before.items() <= files(Path.cwd()).items()  # each run has a folder of its own
        assert_same_runs(0, 1)
        assert_same_runs(0, 2)
        call("fit", *given, *noise, "--seed_everything=1")
        assert not torch.equal(*(checkpoint(run)["state_dict"]["student.1.weight"] for run in (0, 3)))

    def test_printed_and_saved_configs_train_alike(self, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
        given = (
            *configs("kd"),
            *TINY,
            "--model.teacher",
            teacher,
            TWO,
            "--model.lr_interval=step",
        )
        with pytest.raises(SystemExit) as done:
            call("fit", *given, "--print_config")
        assert not done.value.code
        assert not list(Path.cwd().iterdir())
        Path("printed.yaml").write_text(capsys.readouterr().out)
        call("fit", *given)
        call("fit", "--config", "printed.yaml")
        call("fit", "--config", version(0) / "config.yaml")
        assert_same_runs(0, 1)
        assert_same_runs(0, 2)
        assert read_yaml(version(0) / "config.yaml") == read_yaml(version(1) / "config.yaml")


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
        call("fit", *given, "--trainer.max_epochs=4", "--ckpt_path", version(0) / "checkpoints" / "last.ckpt")
        assert [row["epoch"] for row in epochs(1)] == ["3"]
        assert (checkpoint(1)["epoch"], checkpoint(1)["global_step"]) == (3, 16)

    def test_an_explicit_option_beats_the_checkpoint(self, teacher: Path) -> None:
        given = (*configs("kd"), *TINY, "--model.teacher", teacher, "--model.lr_scheduler=null")
        call("fit", *given, ONE)
        go_on = (TWO, "--ckpt_path", version(0) / "checkpoints" / "last.ckpt")
        call("fit", *given, *go_on, "--model.init_args.weight=1.0")
        call("fit", *given, *go_on)
        label, teachers = ([[float(row[f"train/{term}"]) for row in epochs(run)] for run in (1, 2)] for term in TERMS)
        assert label[0] == [0.0]
        assert label[1] > [0.0]
        assert teachers[0] > [0.0]
        assert checkpoint(1)["hyper_parameters"]["weight"] == 1.0
        assert checkpoint(2)["hyper_parameters"]["weight"] == 0.9
        assert checkpoint(1)["global_step"] == 8

    def test_another_optimizer_is_refused(self, teacher: Path) -> None:
        sgd = ("--model.optimizer=torch.optim.SGD", "--model.optimizer.momentum=0.9", "--model.optimizer.lr")
        given = (*configs("kd"), *TINY, "--model.teacher", teacher)
        call("fit", *given, *sgd, "0.1", ONE)
        last = version(0) / "checkpoints" / "last.ckpt"
        before = files(version(0))
        for changed, name in (
            ([*sgd, "0.01"], "optimizer"),
            (["--model.optimizer=torch.optim.Adam"], "optimizer"),
            ([*sgd, "0.1", "--model.lr_scheduler=null"], "lr_scheduler"),
        ):
            with pytest.raises(ValueError, match=f"expected the {name} that the checkpoint was trained with, .* found"):
                call("fit", *given, *changed, TWO, "--ckpt_path", last)
        assert files(version(0)) == before
        call("test", *given, *sgd, "0.01", "--ckpt_path", last)  # nothing is trained
        # what the message advises
        call("fit", *configs("kd"), *TINY, "--model.teacher", teacher, *sgd, "0.01", "--model.student", last, ONE)
        [group] = checkpoint(5)["optimizer_states"][0]["param_groups"]
        assert group["initial_lr"] == 0.01

    def test_a_last_option_counts_more_than_a_config(self, teacher: Path) -> None:
        given = (*configs("kd"), *TINY, "--model.teacher", teacher, ONE)
        call("fit", *given, "--model.weight=0.25", "--data.batch_size=32")
        saved = read_yaml(version(0) / "config.yaml")
        assert saved["model"]["init_args"]["weight"] == 0.25
        assert saved["model"]["init_args"]["temperature"] == 4.0
        assert saved["data"]["init_args"]["batch_size"] == 32


TERMS = ("label", "teacher")


def epochs(number: int) -> list[dict[str, str]]:
    """The rows of a run's metrics that tell about training."""
    return [row for row in read_csv(version(number) / "metrics.csv") if row["train/loss"]]


class TestLinks:
    def test_the_data_tell_the_model(self, teacher: Path) -> None:
        call("fit", *configs("kd"), *TINY, "--model.teacher", teacher, ONE)
        told = checkpoint(0)["hyper_parameters"]
        assert (told["num_classes"], list(told["input_shape"])) == (10, [1, 8, 8])
        assert not {"num_classes", "input_shape"} & set(keys(read_yaml(version(0) / "config.yaml")))

    @pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
    def test_no_config_repeats_what_the_data_know(self, path: Path) -> None:
        assert not {"num_classes", "input_shape"} & set(keys(read_yaml(path)))

    def test_nobody_can_contradict_the_data(self) -> None:
        call("fit", *configs("supervised"), *TINY, "--model.num_classes=7", ONE)
        assert checkpoint(0)["hyper_parameters"]["num_classes"] == 10


def keys(tree: Any) -> Iterator[str]:
    """The keys of nested mappings."""
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield key
        yield from keys(value)


class TestHelp:
    def test_help_of_a_method(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as done:
            call("fit", "--model.help", "ALMKD")
        assert not done.value.code
        text = capsys.readouterr().out
        assert "lit_kd.ALMKD" in text
        assert "--model.student" in text

    def test_version_answers_without_torch(self) -> None:
        check = "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
        script = f"import sys; sys.argv[0] = 'lit-kd'; from lit_kd.cli.main import main; main(); {check}"
        assert shell(sys.executable, "-c", script, "--version") == (0, f"lit-kd {__version__}\n", "")
        assert shell(sys.executable, "-m", "lit_kd", "--version") == (0, f"lit-kd {__version__}\n", "")
        assert shell(COMMAND, "--version") == (0, f"lit-kd {__version__}\n", "")


COMMAND = Path(sys.executable).with_name("lit-kd")


def shell(*args: object) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    done = subprocess.run([str(arg) for arg in args], capture_output=True, text=True, timeout=100)
    return done.returncode, done.stdout, done.stderr


KD_CONFIGS, SUPERVISED = configs("kd"), configs("supervised")


class TestErrors:
    """On the command line: one message, no traceback, an exit code."""

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ([*SUPERVISED, "--model.student=resnet21"], "unknown model 'resnet21'; did you mean resnet20"),
            ([*KD_CONFIGS, *QUIET], "KD needs a teacher, found none: pass teacher="),
            ([*SUPERVISED, "--data.noise=symmetric", "--data.noise_rate=1.4"], "expected noise_rate in [0, 1], found"),
            (["--config=gone.yaml"], "no config at gone.yaml: expected a YAML file"),
            ([*SUPERVISED, *QUIET, "--model.student=mlp-8", "--ckpt_path=gone.ckpt"], "gone.ckpt"),
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
            ([*KD_CONFIGS, "--model.wieght=0.3"], "Option 'wieght' is not accepted"),
            (["--model=Nope", "--data=DigitsDataModule"], "Nope"),
        ],
    )
    def test_the_parser_speaks_for_itself(
        self, args: list[object], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as done:
            call("fit", *args)
        assert done.value.code == 2
        assert message in capsys.readouterr().err

    def test_the_traceback_on_request(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "argv", ["lit-kd", "nonsense"])
        monkeypatch.setenv("LIT_KD_TRACEBACK", "1")
        with pytest.raises(ValueError, match="expected a command, found nonsense"):
            main()

    def test_in_python_errors_are_errors(self) -> None:
        with pytest.raises(ValueError, match="expected noise_rate in"):
            call("fit", *SUPERVISED, *QUIET, "--model.student=mlp-8", "--data.noise_rate=1.4")

    def test_the_real_command(self) -> None:
        Path("recipe.yaml").write_text("methods: {KD: {}}\nmetods: {}")
        code, out, err = shell(COMMAND, "compare", "recipe.yaml")
        assert (code, out) == (1, "")
        assert err.startswith("lit-kd: error: recipe.yaml: expected a mapping with the keys defaults, methods, name")
        assert "metods" in err
        assert len(err.splitlines()) == 2


def test_works_without_wandb() -> None:
    script = (
        "import sys; sys.modules['wandb'] = None; import lit_kd; lit_kd.KD; from lit_kd.cli.main import main; main()"
    )
    given = ("fit", *configs("supervised"), *TINY, ONE)
    code, _, err = shell(sys.executable, "-c", script, *given)
    assert code == 0, err
    assert best(0).is_file()
