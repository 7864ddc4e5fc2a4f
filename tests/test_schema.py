"""The JSON schemas of configs and recipes: current, true of all that is shipped, and of use in an editor."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import CONFIGS, call, configs, read_yaml

from lit_kd.cli.schema import fit_schema, recipe_schema

jsonschema = pytest.importorskip("jsonschema")
SCHEMAS = {"fit": fit_schema, "recipe": recipe_schema}
SHIPPED = sorted(CONFIGS.glob("*/*.yaml"))


@pytest.fixture(scope="module")
def errors() -> Any:
    """What the shipped schema finds wrong with a config."""
    from referencing import Registry, Resource

    read = {f"{kind}.schema.json": json.loads((CONFIGS / f"{kind}.schema.json").read_text()) for kind in SCHEMAS}
    registry = Registry().with_resources((name, Resource.from_contents(one)) for name, one in read.items())
    checkers = {name: jsonschema.Draft202012Validator(one, registry=registry) for name, one in read.items()}
    return lambda kind, content: [error.message for error in checkers[f"{kind}.schema.json"].iter_errors(content)]


@pytest.mark.parametrize("kind", SCHEMAS)
def test_current(kind: str) -> None:
    shipped = json.loads((CONFIGS / f"{kind}.schema.json").read_text())
    if kind == "recipe":  # which names no class
        found = json.loads(json.dumps(recipe_schema()))
    else:
        line = [sys.executable, "-m", "lit_kd", "schema", kind]  # in a process that knows no class of other tests
        found = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    assert shipped == found, "configs have other options than their schema says: run make schema"
    jsonschema.Draft202012Validator.check_schema(shipped)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_config(path: Path, errors: Any) -> None:
    kind = "recipe" if path.parent.name == "recipes" else "fit"
    first = path.read_text().splitlines()[0]
    assert first == f"# yaml-language-server: $schema=../{kind}.schema.json"  # the comment that editors read
    assert errors(kind, read_yaml(path)) == []


def test_what_the_parser_says(errors: Any) -> None:
    """What the command line prints, with all of its defaults."""
    options = ("--model.student=mlp-8", "--model.optimizer=AdamW", "--model.label_term=ELR", "--print_config")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        call("fit", *configs("supervised"), *options)
    content = yaml.safe_load(printed.getvalue())
    assert content["model"]["init_args"]["label_term"]["class_path"] == "lit_kd.terms.ELR"
    assert errors("fit", content) == []


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("fit", "model: {class_path: KD, init_args: {wieght: 0.5}}"),
        ("fit", "model: {class_path: lit_kd.KD, init_args: {weight: much}}"),
        ("fit", "model: {class_path: Supervised, init_args: {label_term: {class_path: ELR, init_args: {lambda: 3}}}}"),
        ("fit", "data: {class_path: DigitsDataModule, init_args: {noise: pairs}}"),
        ("fit", "trainer: {max_epoch: 3}"),
        ("fit", "modle: {class_path: KD}"),
        ("recipe", "methods: {}"),
        ("recipe", "seeds: [0, 1]"),
        ("recipe", "methods: {KD: {model: {class_path: KD, init_args: {wieght: 0.5}}}}"),
        ("recipe", "methods: {KD: {trainer: {max_epoch: 1}}}"),
        ("recipe", "methods: {KD: {model: {class_path: KD}, taecher: []}}"),
    ],
)
def test_mistakes(kind: str, line: str, errors: Any) -> None:
    assert errors(kind, yaml.safe_load(line))


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("fit", "{$schema: ../fit.schema.json, model: KD, data: DigitsDataModule}"),
        ("fit", "model: {class_path: my.Method, init_args: {whatever: 1}}"),
        (
            "fit",
            "model: {class_path: KD, init_args: {term: {class_path: my.Term, init_args: {a: 1}}, metrics: {f: x}}}",
        ),
        ("fit", "model: {class_path: KD, init_args: {optimizer: {class_path: AdamW, init_args: {lr: 1.0e-3}}}}"),
        ("fit", "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/nll}}], logger: false}"),
        ("recipe", "methods: {KD: {model: {class_path: KD}, teacher: []}, own: {model: {class_path: my.Method}}}"),
        ("recipe", "{defaults: {model: {init_args: {student: a.B}}}, teachers: {a: {teacher: b}}, methods: {c: {}}}"),
    ],
)
def test_what_else_is_right(kind: str, line: str, errors: Any) -> None:
    assert errors(kind, yaml.safe_load(line)) == []


def test_completion() -> None:
    shtab = pytest.importorskip("shtab")
    assert {"bash", "zsh"} <= set(shtab.SUPPORTED_SHELLS)
    for shell in "bash", "zsh":
        script = io.StringIO()
        with contextlib.redirect_stdout(script):
            call("--print_completion", shell)
        for word in ("compare", "ALMKD", "--model.weight", "--trainer.max_epochs", "--data.noise_rate", "--overwrite"):
            assert word in script.getvalue()
