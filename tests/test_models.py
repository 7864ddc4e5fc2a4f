from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_kd.models import build_model, last_linear, load_student, resolve_model
from lit_kd.models.checkpoint import completed, read_student
from lit_kd.models.export import export_student
from lit_kd.models.taps import Composite, Tapped

OWN = ["mlp-16-8", "cnn-16", "resnet8", "resnet8x4", "wrn-10-1", "wrn-16-2"]


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def images(shape: tuple[int, ...], batch: int = 4) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))


# Shapes


@pytest.mark.parametrize("name", [*OWN, "timm/resnet10t"])
def test_logits_and_gradients(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    shape = (1, 8, 8)
    model = build_model(name, 7, shape)
    assert model.training
    logits = model(images(shape))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert [n for n, g in grads.items() if g is None or not g.isfinite().all()] == []
    if not name.startswith("timm"):  # timm's residual branches start at zero, and so do their gradients
        assert [n for n, g in grads.items() if g is not None and not g.any()] == []


@pytest.mark.parametrize(("name", "side"), [("googlenet", 32), ("vit_b_32", 32), ("inception_v3", 75)])
def test_torchvision_gives_plain_logits_in_training(name: str, side: int) -> None:
    with torch.device("meta"):  # large networks: their shapes are enough
        model = build_model(f"torchvision/{name}", 5, (3, side, side))
        assert model.training
        assert model(torch.zeros(2, 3, side, side)).shape == (2, 5)


def test_timm_transformers_are_built_for_the_images() -> None:
    pytest.importorskip("timm")
    model = build_model("timm/vit_tiny_patch16_224", 5, (1, 32, 32))
    assert model(images((1, 32, 32), 2)).shape == (2, 5)


# What the networks are


# By 100 classes, as they have been published and are counted in RepDistiller's networks.
PUBLISHED = {
    "resnet20": 278_324,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn-16-2": 703_284,
    "wrn-40-1": 569_780,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        assert size(build_model(name, 100)) == PUBLISHED[name]


def test_small_sizes() -> None:
    assert size(build_model("mlp-256-128", 10, (64,))) == 65 * 256 + 257 * 128 + 129 * 10
    convs = 9 * (16 + 16 * 32 + 32 * 64)
    assert size(build_model("cnn-16", 10, (1, 8, 8))) == convs + 2 * (16 + 32 + 64) + 65 * 10


def test_a_basic_block_is_the_paper_s() -> None:
    block = build_model("resnet8", 10).eval().get_submodule("layer2.0")
    x = images((16, 8, 8), 2)
    out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    short = F.conv2d(x, block.shortcut[0].weight, stride=2) / (1 + block.shortcut[1].eps) ** 0.5
    torch.testing.assert_close(block(x), F.relu(out + short))


@pytest.mark.parametrize(("stage", "channels"), [("layer1.0", 16), ("layer2.0", 16)])
def test_a_pre_activation_block_is_the_paper_s(stage: str, channels: int) -> None:
    block = build_model("wrn-10-1", 10).eval().get_submodule(stage)
    x = images((channels, 8, 8), 2)
    active = F.relu(x / (1 + block.bn1.eps) ** 0.5)
    short = x if stage == "layer1.0" else F.conv2d(active, block.shortcut.weight, stride=2)
    torch.testing.assert_close(block(x), short + block.conv2(F.relu(block.bn2(block.conv1(active)))))


def test_convolutions_start_by_fan_out() -> None:
    weight = build_model("resnet8x4", 10).get_submodule("layer3.0.conv2").weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name", ["cnn-16", "resnet8", "wrn-10-1"])
def test_one_layout_for_hooks(name: str) -> None:
    model, found = build_model(name, 10), {}
    for path in ("layer1", "layer2", "layer3", "pool"):
        model.get_submodule(path).register_forward_hook(
            lambda _module, _args, out, path=path: found.__setitem__(path, out.dim())
        )
    model(images((3, 32, 32), 2))
    assert found == {"layer1": 4, "layer2": 4, "layer3": 4, "pool": 2}


@pytest.mark.parametrize("name", ["mlp-32", "resnet8", "timm/resnet10t"])
def test_the_seed_decides_the_weights(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")

    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build_model(name, 10, (3, 8, 8)).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21", r"expected a model of mlp-H.*resnet20.*timm/NAME.*; found unknown model 'resnet21'"),
        ("", "found unknown model ''"),
        ("mlp-0", "expected a model of mlp-H"),
        ("mlp-٣", "expected a model of mlp-H"),
        ("cnn-16-32", "cnn-W"),
        ("wrn-17-2", r"wrn-D-W with D = 6n \+ 4"),
        ("wrn-4-2", r"wrn-D-W with D = 6n \+ 4"),
        ("torchvision/resnet19", "one of .*resnet18.* found unknown model 'resnet19'"),
        ("torchvision/fasterrcnn_resnet50_fpn", "unknown model"),
        ("torchvision/", "unknown model ''"),
        ("timm/resnet19", "unknown model 'resnet19'"),
        ("timm/hf-hub:timm/resnet18.a1_in1k", "unknown model"),  # timm would look for it on the network
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(ValueError, match=message):
        build_model(name, 10, (3, 32, 32))


def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm/resnet18 needs timm, .*pip install 'lit_kd\[timm\]'"):
        build_model("timm/resnet18", 10)


def test_weights_are_never_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    build_model("torchvision/resnet18", 10)
    pytest.importorskip("timm")
    build_model("timm/resnet18.a1_in1k", 10)


# The last linear layer


@pytest.mark.parametrize("name", ["mlp-32", "wrn-10-1", "torchvision/mobilenet_v3_small", "timm/convnext_atto"])
def test_last_linear_gives_the_logits(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    model = build_model(name, 6, (3, 32, 32)).eval()
    path, linear = last_linear(model)
    assert model.get_submodule(path) is linear
    seen: list[Tensor] = []
    linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    logits = model(images((3, 32, 32), 2))
    assert len(seen) == 1
    torch.testing.assert_close(seen[0] @ linear.weight.T + linear.bias, logits)
    with pytest.raises(ValueError, match=r"Flatten has no nn\.Linear"):
        last_linear(nn.Flatten())


# Checkpoints


def checkpoint(**changes: Any) -> dict[str, Any]:
    """A Lightning checkpoint of a run with student cnn-4 on 1x8x8 images of 5 classes."""
    torch.manual_seed(3)
    student = build_model("cnn-4", 5, (1, 8, 8))
    student(images((1, 8, 8), 16))  # moves BN's running statistics
    state = {f"student.{k}": v for k, v in student.state_dict().items()}
    return {
        "epoch": 1,
        "state_dict": {**state, "teacher.weight": torch.ones(2)},
        "hyper_parameters": {"student": "cnn-4", "num_classes": 5, "input_shape": [1, 8, 8], "lr": 0.1},
        **changes,
    }


def hparams(**changes: Any) -> dict[str, Any]:
    return {**checkpoint()["hyper_parameters"], **changes}


def save(tmp_path: Path, content: Any, name: str = "last.ckpt") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


def test_load_student_restores_the_network(tmp_path: Path) -> None:
    saved = checkpoint()
    path = save(tmp_path, saved)
    before = torch.get_rng_state()
    for model in (load_student(path), load_student(str(path)), resolve_model(str(path), 5, (1, 8, 8))):
        assert not model.training
        assert all(p.requires_grad for p in model.parameters())
        state = model.state_dict()
        assert set(state) == {k[8:] for k in saved["state_dict"] if k.startswith("student.")}
        assert all(torch.equal(v, saved["state_dict"][f"student.{k}"]) for k, v in state.items())
        assert state["layer1.1.num_batches_tracked"] == 1
        assert model(images((1, 8, 8))).shape == (4, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_resolve_model_takes(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    assert resolve_model(model, 5) is model
    path = save(tmp_path, checkpoint(), "epoch=3-step=9")  # any existing file
    assert last_linear(resolve_model(str(path), 5))[1].out_features == 5
    with pytest.raises(ValueError, match="expected a network for 10 classes, found one for 5"):
        resolve_model(str(path), 10)
    path = save(tmp_path, checkpoint(hyper_parameters=hparams(task="multilabel")))
    assert last_linear(resolve_model(str(path), 5, task="multilabel"))[1].out_features == 5
    with pytest.raises(ValueError, match="expected a network for classification, found one for multilabel"):
        resolve_model(str(path), 5, task="classification")
    for suffix in (".ckpt", ".pt", ".pth"):
        with pytest.raises(FileNotFoundError, match=r"No such file.*resnet20\.\w+"):
            resolve_model(f"resnet20{suffix}", 5)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", pickle.dumps({"a": 1})])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.ckpt: not a file that torch\.save wrote, or a damaged one"):
        load_student(tmp_path / "a.ckpt")


class Call:
    def __init__(self, function: Any, argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def test_an_unsafe_checkpoint_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    for call in (Call(exec, f"open({str(mark)!r}, 'w')"), Call(os.system, f"touch {mark}")):
        with pytest.raises(ValueError, match=r"found a pickled \S*(exec|system), which can run code"):
            load_student(save(tmp_path, checkpoint(callbacks=call)))
    assert not mark.exists()


def test_a_checkpoint_of_a_live_network(tmp_path: Path) -> None:
    # As Lightning writes it when save_hyperparameters meets an nn.Module.
    with pytest.raises(ValueError, match=r"found a pickled torch\.nn\S*Linear, .*pass the nn\.Module itself"):
        load_student(save(tmp_path, checkpoint(hyper_parameters=hparams(student=nn.Linear(2, 2)))))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "expected a Lightning checkpoint, a dict, found a list"),
        ({}, "found the keys none: rebuild the network"),
        (checkpoint(state_dict={"model.a": torch.ones(1)}), r"weights under 'student\.'.*found the keys model.a"),
        (checkpoint(hyper_parameters={}), r"a model's name as student, .* found None .*live nn\.Module"),
        (checkpoint(hyper_parameters=hparams(student="a/b.ckpt")), "found 'a/b.ckpt'.*rebuild the network"),
        (checkpoint(hyper_parameters=hparams(student="resnet21")), "do not fit .*unknown model 'resnet21'"),
        (checkpoint(hyper_parameters=hparams(num_classes=None)), "found 'cnn-4' and None"),
        (checkpoint(hyper_parameters=hparams(student="cnn-8")), "do not fit .* cnn-8 with 5 .*size mismatch"),
        (checkpoint(composite={"tap": "layer3"}), "do not fit .*student_features"),
    ],
)
def test_an_unfit_checkpoint(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_student(save(tmp_path, content))
    assert "last.ckpt: " in str(caught.value)


# Composites


BODIES: list[Any] = [
    ("cnn-4", (3, 16, 16), "layer3", (16, 4, 4), (32, 2, 2)),
    ("cnn-4", (3, 8, 8), "layer3", (16, 2, 2), (8, 4, 4)),
    ("mlp-8", (1, 4, 4), "penultimate", (8,), (16,)),
]


def composite(name: str, shape: tuple[int, ...], tap: str, given: Any, wanted: Any) -> Composite:
    torch.manual_seed(1)
    student = Composite(build_model(name, 5, shape), tap)
    student.build(given, wanted, nn.Linear(wanted[0], 5))
    student(images(shape, 16))  # moves BN's running statistics
    return student.eval()


@pytest.mark.parametrize(("name", "shape", "tap", "given", "wanted"), BODIES)
class TestComposite:
    def test_what_it_computes(self, name: str, shape: Any, tap: str, given: Any, wanted: Any) -> None:
        student, x = composite(name, shape, tap, given, wanted), images(shape)
        found = Tapped(student, ("projector",))(x)
        projected = found.features["projector"]
        assert projected.shape == (4, wanted[0], *map(min, given[1:], wanted[1:]))
        features = Tapped(student.body, (tap,))(x).features[tap]
        assert features.shape == (4, *given)
        torch.testing.assert_close(projected, student.projector(features))
        pooled = projected.flatten(2).mean(2) if len(given) == 3 else projected
        torch.testing.assert_close(found.logits, pooled @ student.head.weight.T + student.head.bias)
        assert last_linear(student)[1] is student.head

    def test_what_learns(self, name: str, shape: Any, tap: str, given: Any, wanted: Any) -> None:
        student = composite(name, shape, tap, given, wanted)
        F.cross_entropy(student(images(shape)), torch.arange(4)).backward()
        without = {n for n, p in student.named_parameters() if p.grad is None}
        own_head = "body." + last_linear(student.body)[0]
        assert without == {f"{layer}.{part}" for layer in ("head", own_head) for part in ("weight", "bias")}
        assert without == {n for n, p in student.named_parameters() if not p.requires_grad}

    def test_round_trips(self, name: str, shape: Any, tap: str, given: Any, wanted: Any, tmp_path: Path) -> None:
        student, x = composite(name, shape, tap, given, wanted), images(shape)
        state = {f"student.{k}": v for k, v in student.state_dict().items()}
        hyper = {"student": name, "num_classes": 5, "input_shape": list(shape)}
        path = save(tmp_path, {"state_dict": state, "hyper_parameters": hyper, "composite": student.spec})
        read = read_student(path)
        torch.testing.assert_close(read.model(x), student(x))
        if tap != "penultimate" and given[1] > wanted[1]:  # once, as it takes seconds
            for path, kind in (("s.onnx", "onnx"), ("s.pt2", "torch_export")):
                assert export_student(read.model, tmp_path / path, kind, input_shape=shape) < 1e-5
            export_student(read.model, tmp_path / "s.safetensors", "safetensors", input_shape=shape)
            with safetensors.safe_open(tmp_path / "s.safetensors", "pt") as file:
                spec = json.loads(file.metadata()["composite"])
            again = completed(build_model(name, 5, shape), spec).eval()
            again.load_state_dict(safetensors.torch.load_file(tmp_path / "s.safetensors"))
            torch.testing.assert_close(again(x), student(x))


def test_shapes_that_do_not_fit() -> None:
    student = Composite(build_model("mlp-8", 5, (4,)), "penultimate")
    for given, wanted, head in [((8,), (16, 2, 2), (16, 5)), ((8, 2), (16, 2), (16, 5)), ((8,), (16,), (8, 5))]:
        with pytest.raises(ValueError, match="expected features of student and teacher that are both"):
            student.build(given, wanted, head)
    with pytest.raises(ValueError, match="no layer 'layer9'"):
        Composite(nn.Linear(2, 2), "layer9")


def test_a_body_that_reads_a_mapping() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build_model("mlp-8", 5, (4,))

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            out: Tensor = self.net(left + right)
            return out

    student = Composite(Named(), "penultimate")
    student.build((8,), (6,), (6, 5))
    assert student(left=torch.ones(3, 4), right=torch.ones(3, 4)).shape == (3, 5)
