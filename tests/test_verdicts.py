"""The study of verdicts goes on where it stopped, and its tables hold what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lit_kd.trust.teachers import Interval
from lit_kd.trust.verdict import Rehearsal, clues


@pytest.fixture(autouse=True)
def _studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "studies"))


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import students
    import verdicts

    monkeypatch.setattr(students, "EPOCHS", 1)
    monkeypatch.setattr(verdicts, "CHOSEN", [s for s in verdicts.CHOSEN if str(s) in ("clean, weak", "sym40, strong")])
    built = []
    monkeypatch.setattr(verdicts, "build", lambda *args, own=verdicts.build: built.append(args) or own(*args))
    options = ["--fit", "digits", "--fit_seeds", "0", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="found none: run without --only"):
        verdicts.main([*options, "--only"])
    verdicts.main(options)
    verdicts.main(options)
    assert len(built) == 2
    known = json.loads((tmp_path / "verdicts_digits.json").read_text())["0"]
    assert known["told"]["sym40, strong"]["truly wrong"] == pytest.approx(0.36, abs=0.06)
    assert set(known["realised"]["clean, weak"]) == {"labels", "distil", "learned weights", "trusted rows"}
    assert "| distil | digits | 2 |" in (tmp_path / "verdicts.md").read_text()


def test_law_is_found_again() -> None:
    """Gains drawn around a line: the median and both ends."""
    import verdicts

    draw = np.random.default_rng(0)
    cells = []
    for _ in range(2000):
        told = Rehearsal(0.9, float(draw.uniform(-0.2, 0.2)), 0.01, 0.0, 0.01, Interval(0.1, 0.0, 0.2), 100)
        gain = 0.01 + 2 * clues("distil", told)[0][0] + draw.normal(0, 0.02)
        cells.append(verdicts.Cell("x", "0", "s", told, {}, {"distil": gain}))
    median, low, high = verdicts.law("distil", cells)
    assert median == pytest.approx((0.01, 2.0), abs=0.01)
    assert low[0] == pytest.approx(0.01 - 1.645 * 0.02, abs=0.005)
    assert high[0] == pytest.approx(0.01 + 1.645 * 0.02, abs=0.005)


def test_shipped_laws_are_those_of_the_results() -> None:
    import verdicts

    cells = verdicts.read(["digits", "pendigits"], [400, 401, 402], Path(__file__).parent / "studies" / "results")
    for way, law in verdicts.LAWS.items():
        for ours, found in zip(law, verdicts.law(way, cells), strict=True):
            assert ours == pytest.approx(found, abs=2e-3)
