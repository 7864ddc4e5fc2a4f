"""``lit-kd export``: other programs' runtimes give the Lightning module's logits."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.torch
import torch
from commands import call
from methods import Blobs, blobs, build, trainer
from torch import Tensor, nn

from lit_kd import Supervised
from lit_kd.data import DataModule, Source, TensorRows
from lit_kd.models import build_model
from lit_kd.models.export import export_student
from lit_kd.models.images import ImageInput

NAMES = ["ant", "bee", "cat"]
SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ".safetensors"}


class Pictures(DataModule):
    """A few noisy pictures of three classes."""

    num_classes = 3
    input_shape = (3, 16, 16)
    image_input = ImageInput(3, 16, [0.5, 0.4, 0.3], [0.2, 0.2, 0.2])

    def __init__(self) -> None:
        super().__init__(batch_size=8, meta=3, val=3)
        self.class_names = NAMES

    def load(self) -> Source:
        draw = torch.Generator().manual_seed(3)
        y = np.arange(30) % 3
        x = torch.randn(30, *self.input_shape, generator=draw) + torch.from_numpy(y).view(-1, 1, 1, 1)
        return Source(TensorRows(x), TensorRows(x), y, test_size=6)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of students that have trained a little, so that BatchNorm's statistics are not the initial ones."""
    folder, found = tmp_path_factory.mktemp("students"), {}
    for name in ("mlp-16", "resnet8", "timm/test_resnet"):
        fitted = trainer(max_epochs=1, limit_train_batches=2)
        fitted.fit(Supervised(name, num_classes=3, input_shape=[3, 16, 16]), Pictures())
        found[name] = folder / f"{name.replace('/', '-')}.ckpt"
        fitted.save_checkpoint(found[name])
    return found


def run(path: Path, name: str, x: Tensor) -> tuple[Tensor, dict[str, str]]:
    """Logits and metadata by the format's own library, without lit_kd."""
    if path.suffix == ".onnx":
        onnx.checker.check_model(onnx.load(path))
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        [given] = session.get_inputs()
        [found] = session.run(None, {given.name: x.numpy()})
        return torch.from_numpy(found), session.get_modelmeta().custom_metadata_map
    if path.suffix == ".pt2":
        texts = dict.fromkeys(("class_names", "input_shape", "image_input", "student", "lit_kd"), "")
        program = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=texts)
        return program.module()(x).detach(), texts
    model = build_model(name, 3, [3, 16, 16]).eval()
    model.load_state_dict(safetensors.torch.load_file(path))
    with safetensors.safe_open(path, "pt") as file, torch.no_grad():
        return model(x), file.metadata()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("timm/test_resnet", "onnx"), ("resnet8", "torch_export"), ("mlp-16", "safetensors")],
)
def test_logits_are_the_module_s(name: str, kind: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / f"student{SUFFIX[kind]}"
    call("export", checkpoints[name], "--format", kind, "--output", path)
    module = Supervised.load_from_checkpoint(checkpoints[name]).eval()
    for rows in (1, 7):
        x = torch.randn(rows, 3, 16, 16)
        with torch.no_grad():
            expected = module(x)
        found, metadata = run(path, name, x)
        assert found.shape == (rows, 3)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    told = {key: json.loads(text) for key, text in metadata.items()}
    assert told.pop("lit_kd")
    image = {"channels": 3, "size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    assert told == {"class_names": NAMES, "input_shape": [3, 16, 16], "student": name, "image_input": image}


def test_an_existing_file_is_kept(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"mine")
    given = ("export", checkpoints["mlp-16"], "--format=safetensors", "--output", path)
    with pytest.raises(FileExistsError, match=r"mine.safetensors is there already: .*--overwrite"):
        call(*given)
    assert path.read_bytes() == b"mine"
    call(*given, "--overwrite")
    assert len(safetensors.torch.load_file(path)) == 4
    assert list(tmp_path.iterdir()) == [path]


def test_another_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected as format one of .*'torch_export'.*, found 'tflite'"):
        export_student(nn.Linear(2, 2), tmp_path / "m", "tflite", input_shape=[2])


@pytest.mark.parametrize("kind", SUFFIX)
def test_a_suffix_of_another_format(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"ends in \{SUFFIX[kind]} for {kind}, found .*m\.pt$"):
        export_student(nn.Linear(2, 2), tmp_path / "m.pt", kind, input_shape=[2])
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fitted = trainer(max_epochs=0)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 2
    fitted.fit(Supervised("cnn-2", num_classes=2), torch.utils.data.DataLoader([*zip(x, y, strict=True)], 4))
    fitted.save_checkpoint("plain.ckpt")
    with pytest.raises(ValueError, match="found none: give --input_shape"):
        call("export", "plain.ckpt", "--format=torch_export")
    call("export", "plain.ckpt", "--format=torch_export", "--input_shape", 3, 8, 8)
    assert Path("plain.pt2").is_file()


class Wrapped(nn.Module):
    """Like the networks of transformers: an object with ``.logits``; dropout tells the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Dropout())

    def forward(self, x: Tensor) -> Any:
        return type("Out", (), {"logits": self.layers(x)})()


class Undecided(nn.Module):
    """What it computes depends on values: no graph holds it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_live_network(tmp_path: Path) -> None:
    network = Wrapped()
    export_student(network, tmp_path / "m.pt2", "torch_export", input_shape=[4])
    x = torch.randn(6, 4)
    found, _ = run(tmp_path / "m.pt2", "", x)
    torch.testing.assert_close(found, network.layers[0](x).detach(), rtol=0, atol=1e-5)
    assert network.training
    assert network.layers[1].training


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this student cannot be exported as torch_export: ") as error:
        export_student(Undecided(), tmp_path / "m.pt2", "torch_export", input_shape=[4])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "module"), [("onnx", "onnxruntime"), ("safetensors", "safetensors.torch")])
def test_the_extra_is_named(kind: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"not installed: pip install 'lit_kd\[export\]'"):
        export_student(nn.Linear(2, 2), tmp_path / f"m{SUFFIX[kind]}", kind, input_shape=[2])


def test_checkpoints_tell_of_the_data(tmp_path: Path) -> None:
    data = Blobs()
    data.class_names = NAMES
    loader = torch.utils.data.DataLoader([*zip(*blobs(), strict=True)], 8)
    nothing = dict.fromkeys(("class_names", "input_shape", "image_input", "fingerprint"))
    for given, known in (
        (data, {"class_names": NAMES, "input_shape": [1, 4, 4], "image_input": None}),
        (loader, nothing),
    ):
        fitted = trainer(max_epochs=1)
        fitted.fit(build("kd"), given)
        fitted.save_checkpoint(tmp_path / "c.ckpt")
        if given is data:
            known["fingerprint"] = data.fingerprint  # type: ignore[index]
        assert torch.load(tmp_path / "c.ckpt", weights_only=True)["data"] == known
