"""No file that is read runs code: through every entry, a hostile file is refused and does nothing."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUIET, call, configs
from methods import CLASSES, SHAPE, Blobs, trainer

from lit_kd import KD, Supervised
from lit_kd.models import load_student


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def student() -> Supervised:
    return Supervised("mlp-4", num_classes=CLASSES, input_shape=list(SHAPE))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that would do but for what else it holds."""
    folder = tmp_path_factory.mktemp("hostile")
    fitted = trainer(max_epochs=1)
    fitted.fit(student(), Blobs())
    fitted.save_checkpoint(folder / "evil.ckpt")
    content = torch.load(folder / "evil.ckpt", weights_only=True)
    torch.save(content | {"more": Attack(folder / "harm")}, folder / "evil.ckpt")
    (folder / "run.yaml").write_text("data: {class_path: DigitsDataModule}")
    (folder / "images").mkdir()
    (folder / "images/a.png").touch()
    return folder / "evil.ckpt"


FIT = (*configs("supervised"), *QUIET, "--trainer.max_epochs=1")
KD_FIT = (*configs("kd"), *QUIET, "--trainer.max_epochs=1")
ENTRIES: dict[str, Callable[[Path], Any]] = {
    "fit --model.teacher": lambda path: call("fit", *KD_FIT, "--model.teacher", path),
    "fit --model.student": lambda path: call("fit", *FIT, "--model.student", path),
    "fit --ckpt_path": lambda path: call("fit", *FIT, "--ckpt_path", path),
    "validate --ckpt_path": lambda path: call("validate", *FIT, "--ckpt_path", path),
    "test --ckpt_path": lambda path: call("test", *FIT, "--ckpt_path", path),
    "predict --ckpt_path": lambda path: call("predict", *FIT, "--ckpt_path", path),
    "export": lambda path: call("export", path, "--format=torch_export"),
    "predict": lambda path: call("predict", path, path.with_name("images")),
    "samples": lambda path: call(
        "samples", "--config", path.with_name("run.yaml"), "--ckpt_path", path, "--output=s.csv"
    ),
    "load_student": load_student,
    "load_from_checkpoint": Supervised.load_from_checkpoint,
    "Trainer.fit": lambda path: trainer().fit(student(), Blobs(), ckpt_path=path),
    "Trainer.test": lambda path: trainer().test(student(), Blobs(), ckpt_path=path),
    "teacher": lambda path: trainer().fit(KD("mlp-4", str(path), num_classes=3, input_shape=[1, 4, 4]), Blobs()),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_checkpoints(entry: str, hostile: Path) -> None:
    with pytest.raises((ValueError, pickle.UnpicklingError), match=r"(pickled|GLOBAL) posix\.system"):
        ENTRIES[entry](hostile)
    assert not hostile.with_name("harm").exists()


def test_the_attack_works(hostile: Path) -> None:
    torch.load(hostile, weights_only=False)
    assert hostile.with_name("harm").exists()
    hostile.with_name("harm").unlink()


@pytest.mark.parametrize(
    "line",
    [
        ["fit", "--config", "run.yaml"],
        ["compare", "run.yaml"],
        ["samples", "--config=run.yaml", "--ckpt_path=c.ckpt", "--output=s.csv"],
    ],
    ids=lambda line: line[0],
)
def test_configs(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("data: !!python/object/apply:os.system ['touch harm']")
    with pytest.raises((ValueError, SystemExit)):
        call(*line)
    assert "python/object/apply" in capsys.readouterr().err or line[0] != "fit"
    assert not Path("harm").exists()


@pytest.mark.parametrize(
    "named",
    [
        {"_instantiator": "hostile_module.make"},
        {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "hostile_module.Attack"},
        {"optimizer": "hostile_module.Attack"},
        {"optimizer": {"class_path": "hostile_module.Attack"}},
    ],
    ids=["instantiator", "class", "optimizer", "optimizer's class"],
)
def test_hyperparameters_import_nothing(named: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    hparams = {"student": "mlp-4", "num_classes": CLASSES, "input_shape": list(SHAPE), **named}
    content = {"state_dict": student().state_dict(), "hyper_parameters": hparams}
    torch.save(content | {"pytorch-lightning_version": "2.6.6"}, tmp_path / "evil.ckpt")
    refused = (
        pytest.raises(ValueError, match="blocked to prevent arbitrary code")
        if "_instantiator" in named
        else nullcontext()
    )
    with refused:  # by Lightning, which calls its own instantiator alone, and on our classes alone
        Supervised.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "harm").exists()
