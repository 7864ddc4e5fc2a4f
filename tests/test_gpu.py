"""The script for a GPU, tried without one."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest
import torch


def test_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert gpu.main(["--device", "cpu", "--quick", "--output", str(output)]) == 0
    rows = json.loads((output / "gpu.json").read_text())["rows"]
    assert list(rows) == list(gpu.QUICK)
    for name, row in rows.items():
        assert row["status"] == "ran"
        assert row["loss"] == row["loss_cpu"] > 0  # the same device, the same seed
        assert f"| {name} | ran | " in (output / "gpu.md").read_text()


def test_what_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "trainings", lambda teacher: {gpu.QUICK[0]: ["--model=NoSuchMethod"]})
    monkeypatch.setattr(gpu, "train_teacher", lambda *_: Path("teacher"))
    assert gpu.main(["--device", "cpu", "--quick", "--output", "out"]) == 1
    assert json.loads(Path("out/gpu.json").read_text())["rows"][gpu.QUICK[0]]["status"].startswith("failed: ")
    assert gpu.main(["--device", "cpu", "--quick", "--output", "out", "--minutes", "0"]) == 0
    assert json.loads(Path("out/gpu.json").read_text())["rows"][gpu.QUICK[0]] == {"status": "not run: no time"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(SystemExit, match="expected a GPU that torch can use, found none"):
        gpu.main([])


def test_every_method_is_there() -> None:
    shipped = {path.name for path in (gpu.CONFIGS / "methods").glob("*.yaml")}
    assert {Path(name).name for name in gpu.trainings(Path("t")) if name.startswith("configs/")} == shipped
