"""What an installed package brings along, and what ``lit-kd`` tells before it imports anything heavy."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import CONFIGS, QUIET, call, files, version

from lit_kd.cli.configs import check_line, find_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def python(script: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, "-c", script]
    return subprocess.run(given, capture_output=True, text=True, timeout=100, env={"PYTHONPATH": str(path)})


def test_the_wheel_brings_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hatchling.build import build_wheel

    monkeypatch.chdir(ROOT)
    wheel = tmp_path / build_wheel(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall("installed")
    package = tmp_path / "installed" / "lit_kd"
    own = [path for kind in ("methods", "data", "recipes") for path in (CONFIGS / kind).glob("*.yaml")]
    expected = {path.relative_to(CONFIGS): path.read_bytes() for path in own}
    found = {
        path.relative_to(package / "configs"): content for path, (_, content) in files(package / "configs").items()
    }
    assert found == expected
    code = {path.relative_to(ROOT / "lit_kd") for path in (ROOT / "lit_kd").rglob("*.py")}
    assert {path.relative_to(package) for path in package.rglob("*.py")} == code

    script = "from lit_kd.cli.configs import find_config as f; print(f('methods/kd.yaml'), f('digits_pair', 'recipes'))"
    done = python(script, tmp_path / "installed")
    configs = package / "configs"
    assert done.stdout.split() == [str(configs / "methods/kd.yaml"), str(configs / "recipes/digits_pair.yaml")]


class TestFindConfig:
    @pytest.mark.parametrize("name", ["methods/kd.yaml", "configs/methods/kd.yaml", "methods/kd"])
    def test_shipped(self, name: str) -> None:
        assert find_config(name) == CONFIGS / "methods" / "kd.yaml"

    def test_recipes_by_name(self) -> None:
        assert find_config("digits_pair", "recipes") == CONFIGS / "recipes" / "digits_pair.yaml"
        assert find_config("digits_pair") is None

    def test_own_files_come_first(self) -> None:
        Path("methods").mkdir()
        Path("methods/kd.yaml").write_text("{}")
        assert find_config("methods/kd.yaml") == Path("methods/kd.yaml")

    def test_of_the_home_directory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(Path.cwd()))
        Path("mine.yaml").write_text("{}")
        assert find_config("~/mine.yaml") == Path.cwd() / "mine.yaml"
        assert find_config("~nobody-of-this-name/mine.yaml") is None

    @pytest.mark.parametrize("name", ["../configs/methods/kd.yaml", "/methods/kd.yaml", "methods/none.yaml", "methods"])
    def test_nothing_else(self, name: str) -> None:
        assert find_config(name) is None


def test_fit_by_shipped_names() -> None:
    short = ("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1")
    call("fit", "--config", "methods/supervised.yaml", "--config=configs/data/digits.yaml", *QUIET, *short)
    assert (version(0) / "checkpoints" / "last.ckpt").is_file()


KD = ["fit", "--config", "methods/kd.yaml", "--config=data/digits.yaml"]
QUICK = [
    (["fti"], "expected a command, found fti: did you mean fit?"),
    (["fit", "--config", "gone.yaml"], "no config at gone.yaml: expected a YAML file, or one that comes with lit_kd"),
    (
        ["fit", "--config=methods/kdd.yaml"],
        "no config at methods/kdd.yaml: expected a YAML file; did you mean methods",
    ),
    (["fit", "--config", "bad.yaml"], "bad.yaml: expected YAML, found a mistake in line 2"),
    (["fit", "--config", "methods/kd.yaml", "--ckpt_path=gone.ckpt"], "no checkpoint at gone.ckpt"),
    (["fit", "--config", "methods/kd.yaml", "--model.teacher=gone.ckpt"], "no checkpoint at gone.ckpt"),
    (["fit", "--config", "methods/kd.yaml", "--model.teacher", "gone.pt"], "no checkpoint at gone.pt"),
    (
        ["fit"],
        "expected a method, found no --model: name one, or a config that does, as in lit-kd fit --config methods/",
    ),
    (["fit", "--model=KD"], "expected a data module, found no --data"),
    ([*KD, "--model.weigth=1"], "--model.weigth: KD has no option weigth: did you mean weight?"),
    ([*KD, "--model.init_args.weigth", "1"], "--model.weigth: KD has no option weigth"),
    ([*KD, "--model", "KDD"], "--model: expected a method, found KDD: did you mean KD?"),
    ([*KD, "--data=Xyz"], "--data: expected a data module, found Xyz: there are BlobsDataModule, "),
    ([*KD, "--trainer.max_epoch=1"], "--trainer.max_epoch: Trainer has no option max_epoch: did you mean max_epochs?"),
    ([*KD, "--trainer.max_epochs=few"], "--trainer.max_epochs: expected a number; found 'few'"),
    (
        [*KD, "--model.label_loss=ce"],
        "--model.label_loss: expected cross_entropy, generalized_cross_entropy, taylor",
    ),
    ([*KD, "--model.hard", "maybe"], "--model.hard: expected true or false; found 'maybe'"),
    ([*KD, "--model.zzz=1"], "--model.zzz: KD has no option zzz: expected one of average, channels_last, "),
    ([*KD, "--seed_everythin=1"], "--seed_everythin: lit-kd fit has no option seed_everythin: did you mean seed_every"),
    ([*KD, "-c", "wrong.yaml"], "wrong.yaml: model.optimizer.lrr: SGD has no option lrr: did you mean lr?"),
    ([*KD, "--model.weight=2"], "model: expected a weight in [0, 1], the teacher's share of the loss; found 2"),
    ([*KD, "--data.batch_size=0"], "data: expected batch_size of at least 1, found 0"),
    ([*KD, "--data.noise_rate=.3"], "data: expected"),
    (["fit", "--model.help", "KDD"], "--model: expected a method, found KDD"),
    (
        ["compare", "digits_pair", "--set", "data.init_args.labelled=9"],
        "digits_pair, teacher: data.labelled: DigitsDataModule has no",
    ),
    (["compare", "digits_par"], "no recipe at digits_par: expected a YAML file; did you mean recipes/digits_pair.yaml"),
    (["compare", "recipe.yaml"], "recipe.yaml: expected name, seeds, defaults, teacher or teachers, methods; found"),
    (["export", "gone.ckpt", "--format=onnx"], "no checkpoint at gone.ckpt"),
    (["predict", "gone.ckpt", "."], "no checkpoint at gone.ckpt"),
    (["samples", "--config=recipe.yaml", "--ckpt_path=gone.ckpt", "--output=s.csv"], "no checkpoint at gone.ckpt"),
]


def test_mistakes_are_told_before_anything_heavy_is_imported() -> None:
    Path("bad.yaml").write_text("a: 1\nb: [")
    optimizer = "{class_path: torch.optim.SGD, init_args: {lrr: 1}}"
    Path("wrong.yaml").write_text(f"model: {{init_args: {{optimizer: {optimizer}}}}}")
    Path("recipe.yaml").write_text("data: {}\nmetods: {}")
    script = f"""
import sys
from lit_kd.cli.main import main
for line, message in {QUICK!r}:
    sys.argv = ["lit-kd", *line]
    try:
        main()
    except SystemExit as done:
        assert str(done.code).startswith("lit-kd: error: " + message), (line, done.code)
        assert len(str(done.code).splitlines()) == 1
    else:
        raise AssertionError(line)
for line in ["--help"], ["-h"], []:
    main(line)
assert not {{"torch", "lightning", "numpy", "matplotlib", "sklearn"}} & set(sys.modules)
"""
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: lit-kd COMMAND") == 3


@pytest.mark.parametrize("line", [["test"], ["fit", "--print_config"]])
def test_a_teacher_that_is_not_needed_may_be_gone(line: list[str]) -> None:
    assert check_line([*line, "--model.teacher=gone.ckpt"]) == [*line, "--model.teacher", "gone.ckpt"]


def test_what_few_runs_need_is_not_imported_by_all() -> None:
    few = "{'sklearn.cluster', 'sklearn.neighbors', 'wandb', 'timm', 'onnx'}"
    done = python(f"import sys, lit_kd.cli.lightning; found = {few} & set(sys.modules); assert not found, found")
    assert done.returncode == 0, done.stderr
    done = python("import sys, lit_kd.models.export, lit_kd.models.predict; assert 'lightning' not in sys.modules")
    assert done.returncode == 0, done.stderr
