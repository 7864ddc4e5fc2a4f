"""What is refused before the imports is what the parser and the constructors refuse, and nothing else."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lit_kd import Distiller
from lit_kd.command_line import check_line
from lit_kd.data import DataModule
from lit_kd.options import CHOSEN, FIXED, _fits, _options
from lit_kd.source import accepted, exported, find, objection, options_of

OURS = [f"{m}.{name}" for _, m, ending in CHOSEN.values() for name in exported(m) if name.endswith(ending)]
OTHERS = [
    "torch.optim.SGD",
    "torch.optim.lr_scheduler.StepLR",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lit_kd.KD",
]
VALUES = [
    "abc",
    "1",
    "1.5",
    "true",
    "null",
    "[1]",
    "kl",
    "1e-3",
    "1_000",
    "0x10",
    "yes",
    ".inf",
    "auto",
    "None",
    "1:30",
]
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


@pytest.mark.parametrize("name", [*OURS, *FIXED.values(), *OTHERS, "lit_kd.rules.Paper"])
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


@pytest.mark.parametrize(
    "name", ["lit_kd.methods.RobustActiveDistillation", "lit_kd.data.CIFAR10DataModule", *FIXED.values()]
)
def test_no_value_is_refused_that_the_parser_takes(name: str) -> None:
    parser, options = parser_of(name), _options(name)
    refused = 0
    for option, annotation in (options or {}).items():
        kinds = accepted(annotation)
        needed = {"student": "mlp-2", "num_classes": "3"}
        line = [f"--x.{k}={v}" for k, v in needed.items() if k in (options or {}) and k != option]
        for value in VALUES if kinds is not None else ():
            if not any(_fits(value, kind) for kind in kinds or ()):
                refused += 1
                with pytest.raises(Exception, match=f"x.{option}|{option}"):
                    parser.parse_args([*line, f"--x.{option}={value}"])
    assert refused > 5


@pytest.mark.parametrize(
    "line",
    [
        ["--model=ALMKD"],  # the weight that kd.yaml tells is dropped
        ["--model.weight=2", "--config=methods/kd.yaml"],  # the later one counts
        ["--model=mine.Method", "--model.anything=1"],
        ["--trainer.logger=WandbLogger", "--trainer.logger.project=x"],
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
        ["--trainer.callbacks+={class_path: EarlyStopping, init_args: {monitor: val/loss}}"],
        ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=1e-3", "--model.lr_scheduler=cosine"],
        ["--model.dict_kwargs.x=1"],
        ["--model={class_path: KD, init_args: {weight: 0.3}}"],
        ["--config={trainer: {max_epochs: 3}}"],
        [
            "--trainer.precision=32",
            "--trainer.devices=auto",
            "--trainer.max_epochs",
            "-1",
            "--trainer.fast_dev_run=true",
        ],
        ["--model.weight=1e-1", "--data.meta=50", "--data.noise_rate=.3", "--data.noise=symmetric"],
        ["--model.student=a: b: {", "--trainer.default_root_dir={"],
        ["--model.class_path=lit_kd.KD", "--model.init_args.weight", "0.3"],
        ["--show.samples=3", "--checkpoint.save_last=false", "--seed_everything=true", "--ckpt_path=null"],
    ],
)
def test_what_is_right_passes(line: list[str]) -> None:
    check_line([*BOTH, *line])


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
