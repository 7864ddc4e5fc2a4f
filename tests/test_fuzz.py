"""Generated configs and batches: either they train and give finite numbers, or a check of ours says what is wrong.

A longer search: ``FUZZ=2000 pytest tests/test_fuzz.py -n 0 -p no:randomly`` (examples a test; other ones each time).
"""

from __future__ import annotations

import inspect
import math
import os
import traceback
import types
import typing
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union

import pytest
import torch
from commands import QUIET, call, configs
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from lightning import Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lit_kd.distiller.tabled import TableDistiller
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lit_kd
from lit_kd import KD, Distiller
from lit_kd.data import DataModule
from lit_kd.data.rows import as_is
from lit_kd.data.table import SampleTable
from lit_kd.models import build_model

LONGER = int(os.environ.get("FUZZ", "0"))


def examples(number: int) -> Callable[[Any], Any]:
    """So many examples, always the same ones; with FUZZ more and others."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
    return settings(
        max_examples=LONGER or number, derandomize=not LONGER, database=None, deadline=None, suppress_health_check=quiet
    )


# what is drawn

METHODS: list[type[Distiller]] = [
    found for name in lit_kd.__all__ if inspect.isclass(found := getattr(lit_kd, name)) and issubclass(found, Distiller)
]
METHODS.remove(Distiller)
POOLS: dict[Any, list[Any]] = {
    float: [-1.0, 0.0, 1e-30, 0.1, 0.5, 0.9, 1.0, 1.5, 4.0, 1e30, math.inf, -math.inf, math.nan],
    int: [-1, 0, 1, 2, 3, 7, 24, 72, 10**6],
    bool: [False, True],
    str: ["", "other", "gone.ckpt", "gone.csv"],
    type(None): [None],
}
OWN: dict[str, list[Any]] = {
    "pairs": [None, {}, {0: 1}, {0: 1, 1: 0}, {0: 9}, {-1: 0}, {1: 1}],
    "transition": [
        None,
        [],
        [[1.0]],
        [[1.0, 0.0], [0.0, 1.0]],
        [[1.0, 0.0, 0.0], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]],
        [[1.0, 0.0, 0.0], [0.5, 0.6, 0.1], [0.0, 0.0, 1.0]],
        [[1.0, 0.0, 0.0], [math.nan, 0.8, 0.1], [0.0, 0.0, 1.0]],
        [[1.0, 0.0], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]],
    ],
    "batch_size": [-1, 0, 1, 2, 7, 8, 24, 48, 71, 72, 10**6],
    "labeled": [None, 0, 1, 3, 12, 24, 48, 49, 0.01, 0.5, 1.0, -0.5, math.nan],
    "meta": [0, 1, 3, 12, 24, 96, 0.05, 0.3, 1.0, -1, math.nan, math.inf],
    "val": [0, 1, 3, 24, 96, 0.3, 0.99, -1, math.nan],
    "num_workers": [0, 0, 0, -1],
    "rounds": [-1, 0, 1, 2, 10**6],
}
SKIPPED = {"self", "student", "teacher", "num_classes", "input_shape", "optimizer", "lr_scheduler", "base", "shared"}


def pool(name: str, kind: Any) -> list[Any]:
    """Values to try for an argument of a type, right ones and wrong ones."""
    if name in OWN:
        return OWN[name]
    if typing.get_origin(kind) is Literal:
        return [*typing.get_args(kind), "other"]
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is Union:
        return [value for one in typing.get_args(kind) for value in pool("", one)]
    return POOLS.get(kind, [])


def arguments(kind: type) -> dict[str, list[Any]]:
    """The arguments of a class and of its bases, each with values to try."""
    found: dict[str, list[Any]] = {}
    for base in kind.__mro__:
        init = base.__dict__.get("__init__")
        if init is not None and base.__module__.startswith("lit_kd"):
            hints = typing.get_type_hints(init)
            found |= {name: pool(name, hints[name]) for name in hints if name not in {*SKIPPED, "return"}}
    return {name: values for name, values in found.items() if values}


@st.composite
def options(draw: st.DrawFn, kind: type, most: int) -> dict[str, Any]:
    """A few of the arguments of a class."""
    known = arguments(kind)
    needed = [name for name in ("budget", "rounds") if name in known]
    chosen = draw(st.lists(st.sampled_from(sorted(known)), max_size=most, unique=True))
    usual = {name: draw(st.sampled_from([1, 2, *known[name]])) for name in needed}
    return usual | {name: draw(st.sampled_from(known[name])) for name in chosen}


class Broken(nn.Module):
    """A teacher or student with something wrong."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = build_model("mlp-8", CLASSES, SHAPE)
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.net(x))


BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
MODELS: dict[str, Callable[[], Any]] = {
    "right": lambda: build_model("cnn-2", CLASSES, SHAPE),
    "fewer classes": lambda: build_model("mlp-8", CLASSES - 1, SHAPE),
    "other inputs": lambda: build_model("mlp-8", CLASSES, (1, 8, 8)),
    "other channels": lambda: build_model("cnn-2", CLASSES, (3, 4, 4)),
    "nan": lambda: Broken(lambda z: z * math.nan),
    "infinity": lambda: Broken(lambda z: z.masked_fill(torch.ones_like(z).bool().triu(), -math.inf)),
    "huge": lambda: Broken(lambda z: z * 1e30),
    "a pair": lambda: Broken(lambda z: (z, z)),
    "no batch": lambda: Broken(lambda z: z[0]),
    "one row": lambda: Broken(lambda z: z[:1]),
    "integers": lambda: Broken(lambda z: z.argmax(-1)),
    "double": lambda: Broken(lambda z: z.double()),
    "frozen": lambda: build_model("mlp-8", CLASSES, SHAPE).requires_grad_(False),
    "detached": lambda: Broken(lambda z: z.detach()),
    "no linear": lambda: nn.Flatten(),
    "no name": lambda: "mlp-x",
    "no file": lambda: "gone.ckpt",
    "none": lambda: None,
}
LENGTHS: list[dict[str, Any]] = [
    {"max_epochs": 2},
    {"max_epochs": 6, "limit_train_batches": 2},
    {"max_steps": 3},
    {"max_epochs": -1, "max_steps": 3},
    {"max_epochs": 0},
    {"max_epochs": 2, "precision": "bf16-mixed"},
    {"max_epochs": 2, "gradient_clip_val": 0.5},
    {"max_epochs": 2, "accumulate_grad_batches": 2},
    {"max_epochs": 2, "limit_val_batches": 0},
    {"max_epochs": 2, "overfit_batches": 1},
    {"max_epochs": 2, "check_val_every_n_epoch": 2},
]


# what must be true


def told(error: BaseException | None) -> bool:
    """Whether an error, or its cause, says what was expected: a check of ours, of the parser or of Lightning's."""
    if isinstance(error, (MisconfigurationException, ArgumentError)):
        return True
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        ours = bool(frames) and frames[-1][0].f_globals["__name__"].startswith("lit_kd.")
        if ours and any(word in str(error) for word in ("expected", "needs", "unknown", "no ")):
            return True
        error = error.__cause__
    return False


def trained_or_told(make: Callable[[], tuple[Distiller, Trainer, dict[str, Any]]]) -> None:
    """The property."""
    seed_everything(0, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, fitted, fit = make()
            before = [p.detach().clone() for p in model.student.parameters()]
            fitted.fit(model, **fit)
        except Exception as error:
            note(f"{type(error).__name__}: {error}")
            if not told(error):
                raise
            return
    assert all(part.isfinite().all() for part in model.student.state_dict().values())
    for name, value in fitted.callback_metrics.items():
        assert value.isfinite(), name
    if isinstance(model, TableDistiller) and model.table is not None:
        weights = model.table["weights"]
        assert weights.isfinite().all()
        assert (weights >= 0).all()
    if fitted.max_epochs != 0:
        assert fitted.global_step > 0
        assert any((old != new).any() for old, new in zip(before, model.student.parameters(), strict=True))


INPUTS: dict[str, Callable[[int], Any]] = {
    "right": lambda n: torch.randn(n, *SHAPE),
    "double": lambda n: torch.randn(n, *SHAPE).double(),
    "half": lambda n: torch.randn(n, *SHAPE).half(),
    "bytes": lambda n: torch.ones(n, *SHAPE, dtype=torch.uint8),
    "integers": lambda n: torch.ones(n, *SHAPE, dtype=torch.int64),
    "flat": lambda n: torch.randn(n, 16),
    "larger": lambda n: torch.randn(n, 1, 8, 8),
    "channels": lambda n: torch.randn(n, 3, 4, 4),
    "one number": lambda n: torch.randn(n),
    "a scalar": lambda n: torch.tensor(1.0),
    "nan": lambda n: torch.full((n, *SHAPE), math.nan),
    "infinity": lambda n: torch.randn(n, *SHAPE) * math.inf,
    "huge": lambda n: torch.full((n, *SHAPE), 3e38),
    "mapping": lambda n: {"x": torch.randn(n, *SHAPE)},
    "other mapping": lambda n: {"pixels": torch.randn(n, *SHAPE)},
    "empty mapping": lambda n: {},
    "mapping of none": lambda n: {"x": None},
    "list": lambda n: [torch.randn(n, *SHAPE)],
    "complex": lambda n: torch.randn(n, *SHAPE).to(torch.complex64),
    "sparse": lambda n: torch.randn(n, 16).to_sparse(),
    "none": lambda n: None,
}
LABELS: dict[str, Callable[[int], Any]] = {
    "right": lambda n: torch.arange(n) % CLASSES,
    "int32": lambda n: torch.arange(n, dtype=torch.int32) % CLASSES,
    "bytes": lambda n: torch.arange(n, dtype=torch.uint8) % CLASSES,
    "bool": lambda n: torch.arange(n) % 2 == 0,
    "float": lambda n: (torch.arange(n) % CLASSES).float(),
    "too high": lambda n: torch.full((n,), CLASSES),
    "missing": lambda n: torch.full((n,), -1),
    "below": lambda n: torch.full((n,), -100),
    "column": lambda n: torch.zeros(n, 1, dtype=torch.int64),
    "one-hot": lambda n: torch.eye(CLASSES)[torch.arange(n) % CLASSES],
    "one less": lambda n: torch.zeros(max(0, n - 1), dtype=torch.int64),
    "one": lambda n: torch.zeros(1, dtype=torch.int64),
    "a scalar": lambda n: torch.tensor(1),
    "number": lambda n: 1,
    "names": lambda n: ["a"] * n,
    "none": lambda n: None,
}
SHAPES: dict[str, Callable[[Any, Any, int], Any]] = {
    "pair": lambda x, y, n: (x, y),
    "list": lambda x, y, n: [x, y],
    "triple": lambda x, y, n: (x, y, torch.arange(n)),
    "float index": lambda x, y, n: (x, y, torch.rand(n)),
    "far index": lambda x, y, n: (x, y, torch.arange(n) + 10**9),
    "alone": lambda x, y, n: x,
    "dict": lambda x, y, n: {"x": x, "y": y},
    "four": lambda x, y, n: (x, y, y, y),
}


def often(first: str, others: dict[str, Any]) -> st.SearchStrategy[str]:
    """One of the names, half of the time the first."""
    return st.one_of(st.just(first), st.sampled_from(sorted(others)))


class Keyword(nn.Module):
    """A network that takes a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_model("mlp-8", CLASSES, SHAPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TestBatches:
    @examples(40)
    @given(
        x=often("right", INPUTS),
        y=often("right", LABELS),
        shape=often("pair", SHAPES),
        rows=st.sampled_from([8, 8, 2, 1, 0]),
        norm=st.booleans(),
        where=st.sampled_from(["train", "val", "both"]),
    )
    def test_plain_loaders(self, x: str, y: str, shape: str, rows: int, norm: bool, where: str) -> None:
        def make() -> tuple[Distiller, Trainer, dict[str, Any]]:
            right = (INPUTS["right"](8), LABELS["right"](8))
            drawn = SHAPES[shape](INPUTS[x](rows), LABELS[y](rows), rows)
            train, val = drawn if where != "val" else right, drawn if where != "train" else right
            student = build_model("cnn-2", CLASSES, SHAPE) if norm else Keyword()
            model = KD(student, trained_teachers()[0] if norm else Keyword(), num_classes=CLASSES)
            loaders = [DataLoader([part] * 2, batch_size=None, collate_fn=as_is) for part in (train, val)]
            return model, trainer(max_epochs=2), {"train_dataloaders": loaders[0], "val_dataloaders": loaders[1]}

        trained_or_told(make)


COMMANDS = st.sampled_from(["almkd", "kd", "label_revision", "posterior", "slam", "supervised", "weighted"])
WRONG = [
    "abc",
    "-1",
    "0",
    "0.5",
    "1.0",
    "7",
    "1e400",
    "nan",
    "null",
    "true",
    "[]",
    "[1, 2]",
    "{}",
    "{a: 1}",
    "'",
    "[",
    "é",
]
OPTIONS = (
    *("model.temperature", "model.weight", "model.student", "model.teacher", "model.optimizer", "model.lr_scheduler"),
    *("model.optimizer.lr", "model.lr_interval", "model.rule", "model.revise", "model.num_classes", "model.unknown"),
    *("data.batch_size", "data.labeled", "data.meta", "data.noise", "data.noise_rate", "data.pairs", "data.transition"),
    *("data.val", "data.test", "data.seed", "data.drop_last", "data.num_workers", "data.unknown", "data", "model"),
    *("trainer.max_epochs", "trainer.precision", "trainer.limit_train_batches", "trainer.unknown", "seed_everything"),
    *("checkpoint.monitor", "checkpoint.save_top_k", "config", "ckpt_path", "unknown"),
)


@given(
    method=COMMANDS,
    options=st.dictionaries(st.sampled_from(OPTIONS), st.sampled_from(WRONG), min_size=1, max_size=2),
)
@examples(6)
def test_command_line(method: str, options: dict[str, str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(tmp_path)
        short = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
        teacher = [] if method == "supervised" else ["--model.teacher=mlp-8"]
        wrong = [f"--{name}={value}" for name, value in options.items()]
        try:
            call("fit", *configs(method), *QUIET, *short, "--model.student=mlp-8", *teacher, *wrong)
        except Exception as error:
            note(f"{type(error).__name__}: {error}")
            if not told(error):
                raise
        except SystemExit as done:
            assert done.code == 2  # the parser's  # noqa: PT017


class TestOptions:
    @pytest.mark.parametrize("method", METHODS)
    @examples(9)
    @given(st.data())
    def test_methods_and_data(self, method: type[Distiller], data: st.DataObject) -> None:
        given_to_method = data.draw(options(method, 2))
        given_to_data = data.draw(options(DataModule, 3))
        length = data.draw(st.sampled_from(LENGTHS))

        def make() -> tuple[Distiller, Trainer, dict[str, Any]]:
            base = {"num_classes": CLASSES, "input_shape": list(SHAPE), **given_to_method}
            teacher = [] if method is lit_kd.Supervised else [trained_teachers()[0]]
            model = method("mlp-8", *teacher, **base)
            return model, trainer(**length), {"datamodule": Blobs(**given_to_data)}

        trained_or_told(make)

    @pytest.mark.parametrize("method", METHODS)
    @examples(6)
    @given(st.data())
    def test_models(self, method: type[Distiller], data: st.DataObject) -> None:
        student = data.draw(st.sampled_from(["right", "right", *MODELS]))
        teachers = data.draw(st.lists(st.sampled_from(["right", *MODELS]), max_size=2))

        def make() -> tuple[Distiller, Trainer, dict[str, Any]]:
            needed = {"budget": 2, "rounds": 1} if method is lit_kd.RobustActiveDistillation else {}
            given = [] if method is lit_kd.Supervised else [[MODELS[name]() for name in teachers]]
            model = method(MODELS[student](), *given, num_classes=CLASSES, input_shape=list(SHAPE), **needed)
            return model, trainer(max_epochs=2), {"datamodule": Blobs(labeled=24)}

        trained_or_told(make)


class TestFound:
    """What the search has found, mended since."""

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (
                {"labeled": math.nan},
                r"expected for labeled a fraction in \[0, 1\) or a whole number of rows, found nan",
            ),
            ({"num_workers": -1}, "expected num_workers of at least 0, found -1"),
            (
                {"batch_size": 49, "drop_last": True},
                r"drop_last at least one full batch .*, found 48 training rows for",
            ),
        ],
    )
    def test_data(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            trainer(max_epochs=1).fit(KD("mlp-8", trained_teachers()[0], **BASE), Blobs(**options))

    @pytest.mark.parametrize("method", [lit_kd.KD, lit_kd.ALMKD])
    def test_a_detached_student_and_none_as_teacher(self, method: type[Distiller]) -> None:
        with pytest.raises(ValueError, match="expected a student whose logits have gradients"):
            trainer().fit(method(MODELS["detached"](), trained_teachers()[0], **BASE), Blobs())
        with pytest.raises(ValueError, match=r"expected a network: an nn.Module, .*; found None"):
            trainer().fit(method("mlp-8", [None], **BASE), Blobs())  # type: ignore[list-item]

    @pytest.mark.parametrize(
        ("x", "rows", "match"),
        [
            ("right", 0, "expected batches of at least one row, found an empty one"),
            ("larger", 8, r"expected Sequential to take inputs of shape \(8, 1, 8, 8\) torch.float32, found that it"),
            ("mapping of none", 8, "expected Sequential to take inputs of shape x: NoneType, found that it does not"),
        ],
    )
    def test_batches(self, x: str, rows: int, match: str) -> None:
        batch = (INPUTS[x](rows), LABELS["right"](rows))
        loader = DataLoader([batch], batch_size=None, collate_fn=as_is)
        with pytest.raises(ValueError, match=match):
            trainer().fit(KD("mlp-8", trained_teachers()[1], **BASE), loader)
