"""Options of speed change how fast networks run, and nothing else."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import LightningModule
from methods import CLASSES, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from torch import Tensor, fx, nn

from lit_kd import ALMKD
from lit_kd.data import Source, TensorRows
from lit_kd.models import build_model
from lit_kd.models.taps import Tapped
from lit_kd.teachers.modules import Teachers
from lit_kd.teachers.speed import Frozen, Speed, reads_channels_last
from lit_kd.terms import TASKS
from lit_kd.types import PENULTIMATE, Batch, Outputs
from lit_kd.weightings import Paper
from lit_kd.weightings.whole_network import Exact


def alive(model: nn.Module) -> nn.Module:
    """In eval mode, frozen, with running statistics as after a training."""
    draw = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(generator=draw)
            layer.running_var.uniform_(0.5, 2, generator=draw)
            nn.init.uniform_(layer.weight, 0.5, 2)
            nn.init.normal_(layer.bias)
    return model.eval().requires_grad_(False)


class Net(nn.Module):
    """One convolution with BatchNorm; what the forward pass does with them is up to the test."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.features(x).relu().mean((2, 3)))


class ReadTwice(Net):
    def features(self, x: Tensor) -> Tensor:
        raw = self.conv(x)
        return self.norm(raw) + raw


class UsedTwice(Net):
    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(-x)


class Branches(Net):
    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else self.conv(x)


class Aside(Net):
    """Its forward pass finds the convolution where modules are not looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = [self.conv]

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.aside[0](x))


class ObjectOut(Net):
    def forward(self, x: Tensor) -> Outputs:
        return Outputs(super().forward(x), {})


class ViewIn(Net):
    """Fails on tensors that are laid out channels last."""

    def features(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        return out.view(len(x), -1).view_as(out)


class Lightning(LightningModule, Net):
    """A teacher that is a LightningModule."""


NETS = [Net, ReadTwice, UsedTwice, Branches, Aside, ObjectOut, ViewIn, Lightning]


@pytest.mark.parametrize("kind", NETS)
def test_any_teacher_gives_what_it_gave(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = alive(kind())
    before = copy.deepcopy(model.state_dict())
    teachers = Teachers([model], (PENULTIMATE,))
    for x in (torch.randn(6, *SHAPE), torch.randn(6, *SHAPE).abs(), -torch.randn(5, *SHAPE).abs()):
        expected = Tapped(model, (PENULTIMATE,))(x)
        found = teachers(Batch(x, x[:, 0]))[0]
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.features, expected.features, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "shape", "left"),
    [("resnet8", (3, 8, 8), 0), ("wrn-10-1", (3, 8, 8), 4), ("torchvision/mobilenet_v3_small", (3, 32, 32), 0)],
)
def test_batch_norm_is_folded_where_a_convolution_comes_before(name: str, shape: tuple[int, ...], left: int) -> None:
    model = alive(build_model(name, CLASSES, shape))
    frozen, x = Frozen(model, (PENULTIMATE,), Speed()), torch.randn(3, *shape)
    expected = Tapped(model, (PENULTIMATE,))(x)
    for _ in range(2):
        found = frozen(x)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.features, expected.features, rtol=1e-4, atol=1e-4)
    with torch.profiler.profile() as profile:
        frozen(x)
    norms = [event.name for event in profile.events() if event.name == "aten::batch_norm"]
    assert len(norms) == left


def test_any_layer_can_be_tapped() -> None:
    tap = "layer2.0"
    model = alive(build_model("resnet8", CLASSES, (3, 8, 8)))
    x = torch.randn(3, 3, 8, 8)
    found, expected = Frozen(model, (tap,), Speed())(x).features[tap], Tapped(model, (tap,))(x).features[tap]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert found.stride() == expected.stride()  # whoever reads it may depend on that


@pytest.mark.parametrize("how", ["new epoch", "dtype"])
def test_a_teacher_that_changes_is_heard_after_it_is_told(how: str) -> None:
    model, x = alive(Net()), torch.randn(4, *SHAPE)
    teachers = Teachers([model])
    before = teachers(Batch(x, x[:, 0]))[0].logits
    if how == "dtype":
        teachers.apply(Tensor.double)
        x = x.double()
    with torch.no_grad():
        model.conv.weight.mul_(-1)
    if how == "new epoch":
        teachers.forget()
    after = teachers(Batch(x, x[:, 0]))[0].logits
    assert not torch.allclose(before.to(after.dtype), after, atol=1e-3)
    torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-4)


def test_a_teacher_in_bfloat16_gives_float32() -> None:
    model = alive(build_model("resnet8", CLASSES, (3, 8, 8)))
    x = torch.randn(16, 3, 8, 8)
    found = Frozen(model, (PENULTIMATE,), Speed(teacher_precision="bf16"))(x)
    exact = Tapped(model, (PENULTIMATE,))(x)
    assert found.logits.dtype == found.features[PENULTIMATE].dtype == torch.float32
    assert not torch.allclose(found.logits, exact.logits, rtol=1e-5)
    assert (found.logits - exact.logits).norm() < 0.05 * exact.logits.norm()


def _fit(model: Any, epochs: int = 2, **options: Any) -> Any:
    fitted = trainer(max_epochs=epochs)
    fitted.fit(model, Blobs(), **options)
    return fitted


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo without code generation, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("kd", {"channels_last": True}),
        ("kd", {"teacher_precision": "bf16"}),
        ("kd", {"compile": True}),
        ("almkd-robust", {"compile": True}),  # which taps a layer of the student, and compiles the teacher alone
    ],
)
def test_training_is_the_same(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    def student() -> nn.Module:
        torch.manual_seed(0)
        return build_model("cnn-2", CLASSES, SHAPE)

    plain = build(method, student(), channels_last=False)
    _fit(plain)
    teachers = trained_teachers()
    before = copy.deepcopy([t.state_dict() for t in teachers])
    whole = build(method, student(), teachers, **options)
    path = tmp_path / "last.ckpt"
    _fit(whole, epochs=2).save_checkpoint(path)
    found, expected = (nn.utils.parameters_to_vector(m.student.parameters()) for m in (whole, plain))
    # two epochs at this learning rate make 1/256 of a teacher's logit a tenth of a weight at most
    assert (found - expected).norm() < (0.1 if "teacher_precision" in options else 1e-4) * expected.norm()
    checkpoint = torch.load(path, weights_only=True)
    assert list(checkpoint["state_dict"]) == list(plain.state_dict())
    for was, teacher in zip(before, teachers, strict=True):
        torch.testing.assert_close(teacher.state_dict(), was, rtol=0, atol=0)
    loaded = type(whole).load_from_checkpoint(path, student=student())
    x = blobs()[0]
    torch.testing.assert_close(loaded.eval()(x), whole.eval()(x))


def test_a_resumed_run_ends_bitwise_the_same(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return build("kd", build_model("cnn-2", CLASSES, SHAPE), channels_last=True)

    path = tmp_path / "half.ckpt"
    whole = model()
    _fit(whole, epochs=3)
    _fit(model(), epochs=1).save_checkpoint(path)
    resumed = model()
    _fit(resumed, epochs=3, ckpt_path=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_students_of_others_keep_their_layout_unless_told() -> None:
    class Own(nn.Sequential):
        pass

    layers = (nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, CLASSES))
    for kind, told, expected in [(nn.Sequential, None, True), (Own, None, False), (Own, True, True)]:
        student = kind(*copy.deepcopy(layers))
        model = build("kd", student, channels_last=told)
        _fit(model, epochs=1)
        assert reads_channels_last(student, (), model.speed) == expected
        assert {weight.is_contiguous() for weight in student.parameters()} == {True}
    x = torch.randn(2, 3, 4, 5)
    assert Tapped(nn.Identity(), (), True).laid_out(x).is_contiguous(memory_format=torch.channels_last)
    traced = fx.symbolic_trace(nn.Sequential(*layers))
    assert not reads_channels_last(traced, (), Speed())  # it may be anybody's code


class Colour(Blobs):
    input_shape = (3, 8, 8)

    def load(self) -> Source:
        rows, y = TensorRows(torch.randn(90, *self.input_shape)), np.arange(90) % CLASSES
        return Source(rows, rows, y, rows, y, identity=b"colour")


def test_a_meta_step_reads_images_channels_last() -> None:
    student = build_model("cnn-2", CLASSES, (3, 8, 8))
    strides = []
    student.register_forward_pre_hook(lambda _, given: strides.append(given[0].stride(1)))
    teacher = build_model("cnn-2", CLASSES, (3, 8, 8))
    rule = Paper(warmup_epochs=0, every=1, repeats=1)
    model = ALMKD(student, teacher, num_classes=CLASSES, rule=rule)
    fitted = trainer(max_epochs=1, limit_val_batches=0)
    fitted.fit(model, Colour())
    assert set(strides) == {1}
    assert len(strides) > 1.5 * fitted.global_step


def test_the_exact_meta_gradient_refuses_a_compiled_student() -> None:
    shapes: Any = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
    model = ALMKD("mlp-8", trained_teachers()[0], rule="paper", meta_gradient="exact", compile=True, **shapes)
    with pytest.raises(ValueError, match="compile=False"):
        trainer().fit(model, Blobs())


@pytest.mark.parametrize("tracks", [True, False])
def test_the_validation_gradient_does_not_depend_on_how_rows_are_split(tracks: bool) -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=tracks), nn.Linear(6, 3)).double()
    module: Any = SimpleNamespace(
        student=student, tapped_student=Tapped(student), task=TASKS["classification"], num_classes=3, rule=Paper()
    )
    x, y, keep = torch.randn(70, 5).double(), torch.arange(70) % 3, torch.arange(70) % 4 > 0
    theta = dict(student.named_parameters())
    found = Exact(module)._validation_gradient(Batch(x, y), keep, theta)
    losses = F.cross_entropy(student.eval()(x), y, reduction="none")
    expected = torch.autograd.grad(losses[keep].mean(), list(student.parameters()))
    torch.testing.assert_close(list(found.values()), list(expected))
