"""No file that is read runs code: through every entry, a hostile file is refused in one line and does nothing."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUIET, call, configs
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from methods import CLASSES, SHAPE, Blobs, trainer

from lit_kd import ALMKD, KD, Supervised
from lit_kd.distiller.saved import distrust_files
from lit_kd.teachers.cache import TeacherCache


class Attack:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def student() -> Supervised:
    return Supervised("mlp-4", num_classes=CLASSES, input_shape=list(SHAPE))


@pytest.fixture(params=["checkpoint", "pickle"])
def hostile(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that would do but for what else it holds, or a bare pickle; torch is told to trust all files."""
    monkeypatch.chdir(tmp_path)
    attack, path = Attack(tmp_path / "harm"), tmp_path / "evil.ckpt"
    if request.param == "pickle":
        path.write_bytes(pickle.dumps(attack))
    else:
        fitted = trainer(max_epochs=1)
        fitted.fit(student(), Blobs())
        fitted.save_checkpoint(path)
        torch.save(torch.load(path, weights_only=True) | {"more": attack}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    return path


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
    "predict": lambda path: call("predict", path, "images"),
    "samples": lambda path: call("samples", "--config=run.yaml", "--ckpt_path", path, "--output=s.csv"),
    "load_from_checkpoint": lambda path: Supervised.load_from_checkpoint(path),
    "Trainer.fit": lambda path: trainer().fit(student(), Blobs(), ckpt_path=path),
    "Trainer.test": lambda path: trainer().test(student(), Blobs(), ckpt_path=path),
    "teacher": lambda path: trainer().fit(KD("mlp-4", str(path), num_classes=3, input_shape=[1, 4, 4]), Blobs()),
}
quiet = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")


@quiet
def test_the_attack_works(hostile: Path) -> None:
    with suppress(RuntimeError):  # too late
        torch.load(hostile, weights_only=False)
    assert Path("harm").exists()


@quiet
@pytest.mark.parametrize("entry", ENTRIES)
def test_checkpoints(entry: str, hostile: Path) -> None:
    Path("images").mkdir()
    Path("images/a.png").touch()
    Path("run.yaml").write_text("data: {class_path: DigitsDataModule}")
    with pytest.raises(ValueError, match=r"evil\.ckpt: ") as error:
        ENTRIES[entry](hostile)
    assert not Path("harm").exists()
    assert "found a pickled" in str(error.value) or "not a file that torch.save wrote" in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        ["fit", "--config", "run.yaml"],
        ["compare", "run.yaml"],
        ["samples", "--config=run.yaml", "--ckpt_path=c.ckpt", "--output=s.csv"],
    ],
    ids=lambda line: line[0],
)
def test_configs(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("data: !!python/object/apply:os.system ['touch harm']")
    with pytest.raises((ValueError, SystemExit)):
        call(*line)
    assert "python/object/apply" in capsys.readouterr().err or line[0] != "fit"
    assert not Path("harm").exists()


@pytest.mark.parametrize("named", ["hostile_module.Attack", {"class_path": "hostile_module.Attack"}], ids=["s", "d"])
def test_hyperparameters_import_nothing(named: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_module.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    content = {
        "state_dict": student().state_dict(),
        "pytorch-lightning_version": "2.6.6",
        "hyper_parameters": {
            **{"student": "mlp-4", "num_classes": CLASSES, "input_shape": list(SHAPE), "optimizer": named},
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
            "_class_path": "lit_kd.methods.supervised.Supervised",
        },
    }
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match=r"evil.ckpt: .* found hostile_module.Attack as \w+: importing it would run"):
        Supervised.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("value", ["test.csv", "weights.csv"])
def test_names_of_files_are_no_imports(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a module or a folder of that name could be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("weights").mkdir()
    model = KD("mlp-4", num_classes=CLASSES, input_shape=list(SHAPE), teacher_cache=TeacherCache(value, "float16"))
    almkd = ALMKD("mlp-4", num_classes=CLASSES, input_shape=list(SHAPE), start_weights=value)
    for each in (model, almkd):
        content = {"state_dict": each.state_dict(), "hyper_parameters": dict(each.hparams)}
        torch.save(content | {"pytorch-lightning_version": "2.6.6"}, "a.ckpt")
        assert type(each).load_from_checkpoint("a.ckpt").hparams == each.hparams


@quiet
@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_open_files_themselves(strategy: type[Any], hostile: Path, monkeypatch: Any) -> None:
    loads: list[Any] = []
    monkeypatch.setattr(strategy, "load_checkpoint", lambda _, path, weights_only=None: loads.append(path))
    fitted = trainer()
    monkeypatch.setattr(fitted._accelerator_connector, "strategy", strategy())
    distrust_files(fitted)
    distrust_files(fitted)  # of the next stage
    with pytest.raises(ValueError, match=r"evil\.ckpt: "):
        fitted.strategy.load_checkpoint(hostile)
    fitted.strategy.load_checkpoint(hostile.parent)
    assert loads == [hostile.parent]
    assert not Path("harm").exists()
