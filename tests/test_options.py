"""What is refused before the imports is what the parser and the constructors refuse, and nothing else."""

from __future__ import annotations

import importlib
import sys
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import lightning
import pytest
from commands import CONFIGS
from jsonargparse import ArgumentParser

from lit_kd import Distiller
from lit_kd.cli.configs import check_line
from lit_kd.cli.lightning import Cli, make_cli
from lit_kd.cli.options import CHOSEN, FIXED, _fits, _options, check_options, in_config
from lit_kd.cli.recipe import read_recipe
from lit_kd.cli.source import accepted, exported, find, objection, options_of
from lit_kd.data import DataModule

OURS = [f"{m}.{name}" for _, m, ending in CHOSEN.values() for name in exported(m) if name.endswith(ending)]
STEP = "torch.optim.lr_scheduler.StepLR"
OTHERS = ["torch.optim.SGD", STEP, "lightning.pytorch.callbacks.EarlyStopping", "lit_kd.KD", "lit_kd.weightings.Paper"]
VALUES = ["abc", "1", "1.5", "true", "null", "[1]", "kl", "1e-3", "1_000", "0x10", "yes", ".inf", "auto", "1:30"]
SOME = ["lit_kd.methods.RobustActiveDistillation", "lit_kd.data.CIFAR10DataModule"]
BOTH = ["fit", "--config=methods/kd.yaml", "--config=data/digits.yaml"]


@pytest.fixture(autouse=True)
def _before_the_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lightning")
    monkeypatch.chdir(tmp_path)


def parser_of(name: str) -> ArgumentParser:
    module, _, last = name.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(importlib.import_module(module), last), "x", fail_untyped=False)
    return parser


@pytest.mark.parametrize("name", [*OURS, *FIXED.values(), *OTHERS])
def test_the_options_are_those_of_the_parser(name: str) -> None:
    options = _options(name)
    assert options is not None
    assert set(options) == set(vars(parser_of(name).get_defaults().x))


def test_the_classes_are_those_of_the_parser() -> None:
    bases = {"Distiller", "TableDistiller", "_SyntheticDataModule", "_TorchvisionDataModule"}
    found = {c.__name__ for c in _below(Distiller) | _below(DataModule) if c.__module__.startswith("lit_kd.")}
    assert found - bases == {name.rpartition(".")[2] for name in OURS}


def _below(base: type) -> set[type]:
    return {base}.union(*map(_below, base.__subclasses__()))


@pytest.mark.parametrize("name", [*SOME, *FIXED.values()])
def test_no_value_is_refused_that_the_parser_takes(name: str) -> None:
    parser, options = parser_of(name), _options(name)
    assert options is not None
    usual = {"student": "mlp-2", "num_classes": "3", "budget": "5", "rounds": "1"}
    needed = {name: value for name, value in usual.items() if name in options}
    parser.parse_args([f"--x.{name}={value}" for name, value in needed.items()])
    refused = 0
    for option, annotation in options.items():
        kinds = accepted(annotation)
        for value in VALUES if kinds is not None else ():
            if not any(_fits(value, kind) for kind in kinds or ()):
                refused += 1
                with pytest.raises(ArgumentError, match=option):
                    parser.parse_args([f"--x.{name}={given}" for name, given in (needed | {option: value}).items()])
    assert refused > 5


EARLY = "lightning.pytorch.callbacks.EarlyStopping"
MONITOR = "lightning.pytorch.callbacks.LearningRateMonitor"
STOPS = f"{{class_path: {EARLY}, init_args: {{monitor: val/loss}}}}"
FILES = {
    "stops.yaml": f"trainer: {{callbacks: [{STOPS}], logger: false}}",
    "more.yaml": f"trainer: {{callbacks+: {STOPS}}}",
    "dotted.yaml": "trainer.max_epochs: 3\nmodel.init_args.label_loss: superloss\nmodel: {init_args.weight: 0.5}",
    "classes.yaml": "model.class_path: lit_kd.KD\nmodel.init_args.student: mlp-2\ndata.class_path: DigitsDataModule",
    "reset.yaml": "data: {class_path: DigitsDataModule, init_args: {noise: symmetric, noise_rate: 0.3}}",
    "unset.yaml": "data: null",
    "again.yaml": "data: {class_path: DigitsDataModule, init_args: {noise: null}}",
    "silent.yaml": "trainer: {callbacks: null, max_epochs: 1}",
    "submodel": "{class_path: lit_kd.KD, init_args: {student: mlp-2}}",
    "adam.yaml": "{class_path: lit_kd.KD, init_args: {student: mlp-2, optimizer: {class_path: torch.optim.Adam}}}",
    "sgd.yaml": "model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}}}",
    "all.yaml": "config: classes.yaml",
    "mine.py": """
from lit_kd import KD
from lit_kd.data import DigitsDataModule
class MyData(DigitsDataModule): ...
class MyMethod(KD):
    def __init__(self, student, own: int = 1, **rest):
        super().__init__(student, **rest)
""",
}


@pytest.mark.parametrize(
    "line",
    [
        [*BOTH, "--model=ALMKD"],  # the weight that kd.yaml tells is dropped
        ["fit", "--model=KD", "--model.weight=2", *BOTH[1:]],  # the later one counts
        [*BOTH, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"],
        [*BOTH, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
        [*BOTH, f"--trainer.callbacks+={STOPS}"],
        [*BOTH, "--config=stops.yaml", f"--trainer.callbacks+={MONITOR}"],
        [
            *BOTH,
            f"--trainer.callbacks+={EARLY}",
            "--trainer.callbacks.monitor=val/loss",
            f"--trainer.callbacks+={MONITOR}",
        ],
        [
            *BOTH,
            f"--trainer.callbacks={EARLY}",
            "--trainer.callbacks.monitor=a",
            "--trainer.callbacks=[RichModelSummary]",
        ],
        [*BOTH, "--config=more.yaml"],
        [*BOTH, "--config=dotted.yaml"],
        ["fit", "--config=classes.yaml"],
        ["fit", "-cclasses.yaml"],
        ["fit", "-c", "methods/kd.yaml", "-c=data/digits.yaml"],
        ["fit", "--config=all.yaml"],
        [*BOTH, "--config=stops.yaml", "--config=silent.yaml"],
        [*BOTH, "--config=reset.yaml", "--config=unset.yaml", "--config=again.yaml"],
        [*BOTH, "--data=null", "--data=DigitsDataModule"],
        ["fit", "--model=submodel", "--data=DigitsDataModule"],
        [*BOTH, "--config=sgd.yaml", "--model=adam.yaml", "--model.optimizer.betas=[0.9,0.99]"],
        [*BOTH, "--data=mine.MyData", "--model=MyMethod", "--model.student=mlp-4", "--model.own=3"],
        [*BOTH, "--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.lr_scheduler=cosine"],
        [*BOTH, "--model={class_path: KD, init_args: {weight: 0.3}}"],
        [*BOTH, "--config={trainer: {max_epochs: 3}}"],
        [*BOTH, "--config=trainer: {max_epochs: 3}"],
        [*BOTH, "--trainer.precision=32", "--trainer.devices=auto", "--trainer.max_epochs", "-1"],
        [*BOTH, "--model.weight=1e-1", "--data.meta=50", "--data.noise_rate=.3", "--data.noise=symmetric"],
        [*BOTH, "--model.class_path=lit_kd.KD", "--model.init_args.weight", "0.3"],
        [*BOTH, "--show.samples=3", "--checkpoint.save_last=false", "--seed_everything=true", "--ckpt_path=null"],
    ],
)
def test_what_the_parser_takes_passes(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in FILES.items():
        Path(name).write_text(content)
    monkeypatch.syspath_prepend(".")
    sys.modules.pop("mine", None)
    checked = check_line(line)
    monkeypatch.setitem(sys.modules, "lightning", lightning)
    monkeypatch.setattr(Cli, "_run_subcommand", lambda *_: None)
    make_cli(checked)


@pytest.mark.parametrize(
    "line",
    [
        ["--model=mine.Method", "--model.anything=1"],  # a module that is not there
        ["--model.dict_kwargs.x=1"],
        ["--config={model: {dict_kwargs: {x: 1}}}"],
        ["--trainer.callbacks=" + 900 * "[" + 900 * "]"],
        ["--model.student=a: b: {", "--trainer.default_root_dir={", "--", "--=3", ""],
        ["--config={trainer: &a {x: *a}}"],
    ],
)
def test_what_the_parser_has_to_tell_passes(line: list[str]) -> None:
    check_line([*BOTH, *line])


def test_what_the_environment_tells_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    check_line(["fit"])


@pytest.mark.parametrize("path", sorted((CONFIGS / "recipes").glob("*.yaml")), ids=lambda path: str(path.stem))
def test_recipes_pass(path: Path) -> None:
    for job in read_recipe(path).jobs(Path("x"), [0], {}):
        check_options("fit", in_config(job.config, ""), whole=True)


def test_what_a_run_saves_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lightning", lightning)
        cli = make_cli([f"--config={CONFIGS}/methods/slam.yaml", f"--config={CONFIGS}/data/digits.yaml"], run=False)
    Path("config.yaml").write_text(cli.parser.dump(cli.config))
    for command in "fit", "validate", "test", "predict":
        check_line([command, "--config=config.yaml"])


@pytest.mark.parametrize(
    "line", [["fit", "--help"], ["fit", "--model.help=KD"], ["fit", "--print_config"], ["--config=x"]]
)
def test_where_nothing_runs_nothing_is_missing(line: list[str]) -> None:
    if line[0].startswith("--config"):
        Path("x").write_text("fit: {}")
    check_line(line)


def test_classes_of_a_script_go_by_their_short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning", sys)
    check_line([*BOTH, "--model=Mine", "--model.own=1"])


@pytest.mark.parametrize(
    "source",
    [
        "class A(B): ...",  # whose base is not there
        "class A:\n    def __init__(self, **rest): rest.pop('x')",
        "class A:\n    def __new__(cls, x): ...",
        "@dataclass\nclass A:\n    x: int",
        "class A(B, C): ...",
        "A = 3",
        "class A(A): ...",
        "from .away import A",
        "from typing import *\nclass A:\n    def __init__(self, y): ...",
        "class A:\n    def __init__(self, y): ...\nA = print",
        "class A:\n    @decorated\n    def __init__(self, y): ...",
        "class A(B):\n def __init__(self, y, **rest): super().__init__(y, **rest)\nclass B:\n def __init__(self): ...",
        "from own import A",  # from itself
        "x = (",
    ],
)
def test_a_source_that_tells_nothing_for_certain(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = tmp_path.name
    (tmp_path / f"{name}.py").write_text(source.replace("own", name))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert options_of(find(f"{name}.A")) is None
    assert objection(find(f"{name}.A"), {"x": 1}) is None


def test_what_a_source_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "telling").mkdir()
    (tmp_path / "telling" / "__init__.py").write_text("try:\n    from .inner import B as A\nexcept ImportError: ...")
    (tmp_path / "telling" / "inner.py").write_text(
        """
from typing import Literal, Optional
Kind = Literal["a", "b"]
class Base:
    def __init__(self, x: float = 0.5, y: "int" = 1, *, kind: Optional[Kind] = None):
        if x > limit(): raise ValueError("never told: it needs a function")
        if not x < 1: raise ValueError(f"expected x below 1, found {x}")
        if kind is None and y == 1: raise ValueError("told of what was left out")
class B(Base):
    def __init__(self, z: bool = True, **rest):
        super().__init__(y=2, **rest)
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = find("telling.A")
    options = options_of(found)
    assert options is not None
    assert list(options) == ["x", "kind", "z"]
    assert [accepted(each) for each in options.values()] == [[float], ["a", "b"], [bool]]
    assert objection(found, {"x": 3}) == "expected x below 1, found 3"
    told: list[Any] = [objection(found, {"x": 0.5}), objection(found, {}, {"x"}), objection(found, {"z": False})]
    assert told == [None, None, None]  # y is not known
    assert objection(find("telling.inner.Base"), {}) == "told of what was left out"
    assert find("telling.inner.Nothing") is None
    assert find("nowhere.at.all") is None
