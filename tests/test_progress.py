"""The progress bar of the command."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from methods import Blobs, build, trainer

from lit_kd.report.callbacks import REDRAWS, Bar


@pytest.mark.parametrize(("tick", "expected"), [(0.0, 4), (2 / REDRAWS, 18)])
def test_up_to_date_some_times_a_second_and_at_the_end(
    tick: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs of six batches, at a clock that stands still, and at one that is faster than the bar."""
    shown: list[float] = []
    update, ticks = Bar._update, itertools.count(1)

    def seen(self: Bar, bar: Any, current: int, visible: bool = True) -> None:
        shown.append(current)
        update(self, bar, current, visible)

    monkeypatch.setattr(Bar, "_update", seen)
    monkeypatch.setattr("lit_kd.report.callbacks.time", SimpleNamespace(monotonic=lambda: tick * next(ticks)))
    bar = Bar(console_kwargs={"force_terminal": True})
    trainer(max_epochs=3, enable_progress_bar=True, callbacks=bar, limit_val_batches=0).fit(build("kd"), Blobs())
    assert len(shown) == expected
    assert shown.count(6) == 3  # each epoch ends complete
