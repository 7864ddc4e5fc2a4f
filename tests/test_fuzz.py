"""Generated batches: either they train and give finite numbers, or they are refused.

A longer search: ``FUZZ=2000 pytest tests/test_fuzz.py -n 0`` (examples a test; other ones each time).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from commands import QUIET, call, configs
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from lightning import seed_everything
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_kd import ALMKD, KD, Distiller
from lit_kd.data.rows import as_is
from lit_kd.models import build_model

LONGER = int(os.environ.get("FUZZ", "0"))
BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def examples(number: int) -> Callable[[Any], Any]:
    """So many examples, always the same ones; with FUZZ more and others."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=LONGER or number, derandomize=not LONGER, database=None, deadline=None, suppress_health_check=quiet
    )


INPUTS: dict[str, Callable[[int], Any]] = {
    "right": lambda n: torch.randn(n, *SHAPE),
    "double": lambda n: torch.randn(n, *SHAPE).double(),
    "bytes": lambda n: torch.ones(n, *SHAPE, dtype=torch.uint8),
    "larger": lambda n: torch.randn(n, 1, 8, 8),
    "a scalar": lambda n: torch.tensor(1.0),
    "nan": lambda n: torch.full((n, *SHAPE), math.nan),
    "huge": lambda n: torch.full((n, *SHAPE), 3e38),
    "mapping": lambda n: {"x": torch.randn(n, *SHAPE)},
    "empty mapping": lambda n: {},
    "mapping of none": lambda n: {"x": None},
    "list": lambda n: [torch.randn(n, *SHAPE)],
    "none": lambda n: None,
}
LABELS: dict[str, Callable[[int], Any]] = {
    "right": lambda n: torch.arange(n) % CLASSES,
    "int32": lambda n: torch.arange(n, dtype=torch.int32) % CLASSES,
    "float": lambda n: (torch.arange(n) % CLASSES).float(),
    "too high": lambda n: torch.full((n,), CLASSES),
    "below": lambda n: torch.full((n,), -100),
    "column": lambda n: torch.zeros(n, 1, dtype=torch.int64),
    "one less": lambda n: torch.zeros(max(0, n - 1), dtype=torch.int64),
    "a scalar": lambda n: torch.tensor(1),
    "names": lambda n: ["a"] * n,
    "none": lambda n: None,
}


class Keyword(nn.Module):
    """A network that takes a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_model("mlp-8", CLASSES, SHAPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@examples(30)
@given(
    x=st.one_of(st.just("right"), st.sampled_from(sorted(INPUTS))),
    y=st.one_of(st.just("right"), st.sampled_from(sorted(LABELS))),
    rows=st.sampled_from([8, 8, 2, 1, 0]),
    norm=st.booleans(),
)
def test_batches(x: str, y: str, rows: int, norm: bool) -> None:
    seed_everything(0, verbose=False)
    student, teacher = (build_model("cnn-2", CLASSES, SHAPE) if norm else Keyword() for _ in range(2))
    model, fitted = KD(student, teacher, num_classes=CLASSES), trainer(max_epochs=2)
    loader = DataLoader([(INPUTS[x](rows), LABELS[y](rows))] * 2, batch_size=None, collate_fn=as_is)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fitted.fit(model, loader, loader)
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            note(f"{type(error).__name__}: {error}")
            return
    assert all(part.isfinite().all() for part in model.student.state_dict().values())
    assert all(value.isfinite() for value in fitted.callback_metrics.values())


class TestFound:
    """What a longer search has found, mended since."""

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"labeled": math.nan}, r"for labeled a fraction in \[0, 1\) or a whole number of rows, found nan"),
            ({"batch_size": 49, "drop_last": True}, "drop_last at least one full batch .*, found 48 training rows for"),
        ],
    )
    def test_data(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            trainer(max_epochs=1).fit(KD("mlp-8", trained_teachers()[0], **BASE), Blobs(**options))

    @pytest.mark.parametrize("method", [KD, ALMKD])
    def test_none_as_teacher(self, method: type[Distiller]) -> None:
        with pytest.raises(ValueError, match=r"expected a network: an nn.Module, .*; found None"):
            trainer().fit(method("mlp-8", [None], **BASE), Blobs())  # type: ignore[list-item]

    @pytest.mark.parametrize("options", [["--data.labeled=nan"], ["--model.weight=null"], ["--data.pairs=[1, 2]"]])
    def test_command_line(self, options: list[str]) -> None:
        with pytest.raises((ValueError, SystemExit)):
            call("fit", *configs("kd"), *QUIET, "--model.student=mlp-8", "--model.teacher=mlp-8", *options)
