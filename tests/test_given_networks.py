"""Networks as people have them: classes by their import path, checkpoints of other projects, odd outputs and heads."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import QUIET, call, configs, version
from lightning import LightningModule
from methods import CLASSES, Blobs, trainer
from torch import Tensor, nn

from lit_kd import ALMKD, KD
from lit_kd.models import adapt, build_model, load_student, load_teacher, resolve_model
from lit_kd.models.checkpoint import keep_plain
from lit_kd.weightings import Paper


class Net(nn.Module):
    """Its last linear layer in the order of registration is not its head."""

    def __init__(self, num_classes: int, features: int = 16, width: int = 8, form: str = "tensor") -> None:
        super().__init__()
        self.head = nn.Linear(width, num_classes)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(features, width), nn.Tanh())
        self.form = form

    def forward(self, x: Tensor) -> Any:
        hidden = self.body(x)
        logits = self.head(hidden)
        return {"tensor": logits, "tuple": (hidden, logits), "mapping": {"out": logits, "hidden": hidden}}[self.form]


class Theirs(LightningModule):
    """A module of another project."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(CLASSES)
        self.auxiliary = nn.Linear(2, 2)


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, Net]:
    """A checkpoint of theirs, and the network in it."""
    module = Theirs()
    saved = trainer()
    saved.strategy.connect(module)
    saved.save_checkpoint(tmp_path / "theirs.ckpt")
    return tmp_path / "theirs.ckpt", module.net


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class TestCheckpointsOfOthers:
    @pytest.mark.parametrize("prefix", ["net.", None])
    def test_of_lightning(self, theirs: tuple[Path, Net], prefix: str | None) -> None:
        path, net = theirs
        teacher = load_teacher(path, Net(CLASSES), prefix=prefix)
        assert equal(teacher, net)
        assert not teacher.training

    def test_of_weights_alone(self, tmp_path: Path) -> None:
        net = Net(CLASSES)
        torch.save(net.state_dict(), tmp_path / "weights.pth")
        assert equal(load_teacher(tmp_path / "weights.pth", Net(CLASSES)), net)

    def test_in_a_config(self, theirs: tuple[Path, Net]) -> None:
        path, net = theirs
        spec = {"class_path": "test_given_networks.Net", "checkpoint": str(path), "prefix": "net."}
        assert equal(resolve_model(spec, CLASSES), net)
        model = KD("mlp-8", spec, num_classes=CLASSES, input_shape=[1, 4, 4])
        trainer(max_epochs=1).fit(model, Blobs())
        assert equal(model.teachers.models[0], net)

    def test_those_that_do_not_fit(self, theirs: tuple[Path, Net]) -> None:
        path, _ = theirs
        with pytest.raises(ValueError, match=r"expected names such as model.head.weight, found net.head.weight"):
            load_teacher(path, Net(CLASSES), prefix="model.")
        with pytest.raises(ValueError, match=r"its weights do not fit the network.*size mismatch"):
            load_teacher(path, Net(CLASSES, width=9))
        with pytest.raises(ValueError, match=r"expected one prefix of 0.weight, ..., found net.head.weight"):
            load_teacher(path, nn.Sequential(nn.Linear(2, 2)))


class TestClassPaths:
    def test_on_the_command_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        short = (*QUIET, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
        own = {"class_path": "test_given_networks.Net", "init_args": {"features": 64}}
        Path("own.yaml").write_text(json.dumps({"model": {"class_path": "Supervised", "init_args": {"student": own}}}))
        call("fit", *configs("supervised"), "--config", "own.yaml", *short)
        trained = version(0) / "checkpoints" / "last.ckpt"
        with pytest.raises(ValueError, match=r"found a class of yours, .*give it as class_path, with checkpoint"):
            load_student(trained)
        teacher = own | {"checkpoint": str(trained), "prefix": "student."}
        call("fit", *configs("kd"), *short, "--model.student=mlp-8", f"--model.teacher={json.dumps(teacher)}")
        call("test", "--config", version(1) / "config.yaml", "--ckpt_path", version(1) / "checkpoints" / "last.ckpt")

    def test_an_import_path_alone(self) -> None:
        assert isinstance(build_model("test_given_networks.Net", CLASSES), Net)
        model = KD("test_given_networks.Net", build_model("mlp-8", CLASSES, (1, 4, 4)), num_classes=CLASSES)
        assert model.hparams["student"] == "test_given_networks.Net"

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("no_such_project.Net", "cannot be imported.*python -m lit_kd"),
            ("test_given_networks.Nett", "cannot be imported"),
            ("shutil.rmtree", "expected the import path of a class of nn.Module, found 'shutil.rmtree', a function"),
            ("pathlib.Path", "expected the import path of a class of nn.Module"),
            (
                {"class_path": "test_given_networks.Net", "weights": "x"},
                r"class_path and some of.*found \['weights'\]",
            ),
            ({"init_args": {}}, "expected a network's class_path"),
            ({"class_path": "test_given_networks.Net", "head": "body"}, r"one of \['head', 'body.1'\], found 'body'"),
        ],
    )
    def test_those_that_are_none(self, spec: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            resolve_model(spec, CLASSES)


class TestOutputs:
    @pytest.mark.parametrize(("form", "place"), [("tuple", 1), ("mapping", "out")])
    def test_logits_in_a_tuple_or_mapping(self, form: str, place: int | str) -> None:
        student, teacher = (adapt(Net(CLASSES, form=form), logits=place) for _ in range(2))
        fitted = trainer(max_epochs=4)
        fitted.fit(ALMKD(student, teacher, num_classes=CLASSES), Blobs())
        assert fitted.callback_metrics["val/accuracy"] > 0.9

    @pytest.mark.parametrize("head", [None, "head"])
    def test_the_head_is_the_layer_that_gives_the_logits(self, head: str | None) -> None:
        model = ALMKD(adapt(Net(CLASSES), head=head), Net(CLASSES), num_classes=CLASSES, rule=Paper(warmup_epochs=0))
        trainer(max_epochs=1).fit(model, Blobs())
        assert model.look_ahead.path == "head"  # type: ignore[attr-defined]
        assert model.tapped_student(torch.randn(2, 1, 4, 4)).features["penultimate"].shape == (2, 8)


class TestHuggingFace:
    def test_by_a_directory(self, tmp_path: Path) -> None:
        import transformers  # late, as it takes seconds

        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        config = transformers.BertConfig(vocab_size=30, max_position_embeddings=8, **sizes)
        saved = transformers.BertForSequenceClassification(config)
        saved.save_pretrained(tmp_path)
        fresh = build_model(f"hf/{tmp_path}", 5)
        assert fresh.classifier.out_features == 5  # type: ignore[union-attr]
        before = saved.bert.embeddings.word_embeddings.weight
        assert not torch.equal(fresh.bert.embeddings.word_embeddings.weight, before)  # type: ignore[union-attr, arg-type]
        loaded = build_model(f"hf/{tmp_path}", 5, pretrained=True)
        assert torch.equal(loaded.bert.embeddings.word_embeddings.weight, before)  # type: ignore[union-attr, arg-type]

    def test_what_is_not_at_hand(self) -> None:
        with pytest.raises(ValueError, match="expected hf/nobody/nothing's files on this machine, or pretrained=true"):
            build_model("hf/nobody/nothing", CLASSES)


def test_a_checkpoint_stands_by_itself(theirs: tuple[Path, Net], tmp_path: Path) -> None:
    path, _ = theirs
    spec = {"class_path": "test_given_networks.Net", "checkpoint": str(path), "init_args": {"features": np.int64(16)}}
    model = KD(spec, Net(CLASSES), num_classes=CLASSES)
    fitted = trainer(max_epochs=1)
    fitted.fit(model, Blobs())
    fitted.save_checkpoint(tmp_path / "run.ckpt")
    path.unlink()
    loaded = KD.load_from_checkpoint(tmp_path / "run.ckpt", teacher=Net(CLASSES), weights_only=True)
    assert equal(loaded.student, model.student)


def test_hyperparameters_of_odd_types(tmp_path: Path) -> None:
    """What is kept loads without running code."""

    class Odd(enum.StrEnum):
        ONE = "one"

    kept: dict[str, Any] = {
        "odd": Odd.ONE,
        "sizes": (np.float64(0.5),),
        "counts": {np.int64(1): 2},
        "net": nn.Linear(1, 1),
    }
    keep_plain(kept)
    torch.save(kept, tmp_path / "kept.pt")
    assert torch.load(tmp_path / "kept.pt", weights_only=True) == {"odd": "one", "sizes": (0.5,), "counts": {1: 2}}
