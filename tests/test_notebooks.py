"""Every notebook runs from top to bottom, and none is committed with what it printed."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from IPython.core.interactiveshell import InteractiveShell

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SLOW = ("quickstart", "plug_in", "huggingface", "find_mislabelled")


@pytest.fixture(autouse=True)
def _tidy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Notebooks quieten Lightning, draw, and run where they must leave nothing."""
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("lightning.pytorch").level
    with warnings.catch_warnings(), plt.rc_context(), plt.ioff():
        plt.switch_backend("agg")
        yield
    plt.close("all")
    logging.getLogger("lightning.pytorch").setLevel(level)
    assert not list(tmp_path.iterdir())


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    """A notebook's cells of a kind."""
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {
        "quickstart",
        "plug_in",
        "huggingface",
        "new_method",
        "find_mislabelled",
    }


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in SLOW else (), id=path.stem) for path in NOTEBOOKS],
)
def test_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # in this process: a kernel would import torch and Lightning again, for each
    shell = InteractiveShell()
    for cell in cells(path, "code"):
        source = "".join(cell["source"])
        if path.stem == "new_method":  # of whose results nothing is asserted
            source = source.replace("max_epochs=30", "max_epochs=3")
        shell.run_cell(source).raise_error()
    assert capsys.readouterr().out
    if path.stem == "find_mislabelled":  # what it is there to show
        assert int(shell.user_ns["found"]["ALM-KD's weight"][:50].sum()) >= 40
    if path.stem == "huggingface":
        assert shell.user_ns["auc"] > 0.85
    if path.stem == "quickstart":
        accuracy = [row["test/accuracy"] for row in shell.user_ns["table"].values()]
        assert accuracy[-1] > accuracy[0]  # ALM-KD's student beats its teacher


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_without_outputs(path: Path) -> None:
    for cell in cells(path, "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None), f"strip {path.name}: nbstripout {path}"
