"""What models give and what is measured of it: taps, frozen teachers, metrics."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torch import Tensor, nn

from lit_kd import KD
from lit_kd.models import build_model
from lit_kd.models.taps import Tapped
from lit_kd.teachers.modules import Teachers
from lit_kd.terms import TASKS
from lit_kd.terms.task import EvaluationMetrics
from lit_kd.types import PENULTIMATE, Batch, logits_of

torch.set_num_threads(1)


class Net(nn.Module):
    """Batch norm and dropout, so that the mode shows; a layer after the tapped ones, which may fail."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 4)
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.stem(x).tanh())
        if self.fails:
            raise ArithmeticError("planted")
        out: Tensor = self.head(h)
        return out


class Text(nn.Module):
    """Takes keyword arguments and gives an object, as models of tokenised text do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.classifier = nn.Linear(8, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        mask = attention_mask.unsqueeze(-1)
        mean = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.classifier(mean), hidden_states=None)


def batch(rows: int = 5) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))


def of(x: Tensor) -> Batch:
    """A batch of inputs."""
    return Batch(x, torch.zeros(len(x), dtype=torch.int64))


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


class TestTapped:
    def test_features_are_those_of_hooks_by_hand(self) -> None:
        model = Net().eval()
        seen: dict[str, Tensor] = {}
        handles = [
            model.stem.register_forward_hook(lambda m, i, o: seen.update(stem=o)),
            model.blocks[1].register_forward_hook(lambda m, i, o: seen.update(norm=o)),
            model.head.register_forward_hook(lambda m, i, o: seen.update(last=i[0])),
        ]
        expected = model(batch())
        for handle in handles:
            handle.remove()
        outputs = Tapped(model, ["stem", "blocks.1", PENULTIMATE])(batch())
        torch.testing.assert_close(outputs.logits, expected, rtol=0, atol=0)
        assert set(outputs.features) == {"stem", "blocks.1", PENULTIMATE}
        for tap, name in [("stem", "stem"), ("blocks.1", "norm"), (PENULTIMATE, "last")]:
            torch.testing.assert_close(outputs.features[tap], seen[name], rtol=0, atol=0)

    @pytest.mark.parametrize("name", ["mlp-8", "cnn-16", "resnet8", "wrn-10-1"])
    def test_the_last_layer_maps_the_penultimate_features_to_the_logits(self, name: str) -> None:
        model = build_model(name, 7, (3, 16, 16))
        outputs = Tapped(model, [PENULTIMATE])(torch.randn(3, 3, 16, 16))
        weight, bias = list(model.parameters())[-2:]
        torch.testing.assert_close(outputs.features[PENULTIMATE] @ weight.T + bias, outputs.logits)

    @pytest.mark.parametrize("fails", [True, False])
    def test_no_hook_is_left(self, fails: bool) -> None:
        model = Net(fails)
        own = model.stem.register_forward_hook(lambda m, i, o: None)
        tapped = Tapped(model, ["stem", "blocks.1", PENULTIMATE])
        assert hooks(model) == 1
        if fails:
            with pytest.raises(ArithmeticError, match="planted"):
                tapped(batch())
        else:
            tapped(batch())
        assert hooks(model) == 1  # the user's
        own.remove()
        assert hooks(model) == 0

    @pytest.mark.parametrize(
        ("tap", "near"), [("block.1", "blocks.1"), ("Stem", "stem"), ("layer4", "stem"), ("blocks.9", "blocks.0")]
    )
    def test_an_unknown_layer(self, tap: str, near: str) -> None:
        with pytest.raises(ValueError, match=f"no layer '{tap}' in Net; the nearest are .*'{near}'"):
            Tapped(Net(), [tap])

    def test_mappings_and_objects_with_logits(self) -> None:
        model = Text()
        x = {"input_ids": torch.tensor([[1, 2, 0], [3, 4, 5]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
        outputs = Tapped(model, ["embedding", PENULTIMATE])(x)
        e = model.embedding.weight
        mean = torch.stack([(e[1] + e[2]) / 2, (e[3] + e[4] + e[5]) / 3])
        torch.testing.assert_close(outputs.features[PENULTIMATE], mean)
        torch.testing.assert_close(outputs.logits, mean @ model.classifier.weight.T + model.classifier.bias)
        assert outputs.features["embedding"].shape == (2, 3, 8)
        torch.testing.assert_close(logits_of(model, x), outputs.logits)


class TestTeachers:
    def test_outputs_in_order_and_without_gradients(self) -> None:
        models = [Net(), Net()]
        teachers = Teachers(models, ["stem", PENULTIMATE])
        outputs = teachers(of(batch()))
        assert len(outputs) == len(teachers) == 2
        for model, found in zip(models, outputs, strict=True):
            torch.testing.assert_close(found.logits, model.eval()(batch()), rtol=0, atol=0)
            torch.testing.assert_close(found.features["stem"], model.stem(batch()), rtol=0, atol=0)
            tensors = [found.logits, *found.features.values()]
            assert not any(t.requires_grad or t.is_inference() for t in tensors)
        # part of a loss that is differentiated, by the student's own tensors
        student = torch.zeros(5, 4, requires_grad=True)
        (student * outputs[0].logits).sum().backward()
        assert student.grad is not None

    def test_are_frozen_and_in_eval_mode(self) -> None:
        model = Net().train()
        state = copy.deepcopy(model.state_dict())
        teachers = Teachers([model])
        assert not any(module.training for module in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
        first, second = teachers(of(batch()))[0].logits, teachers(of(batch()))[0].logits
        torch.testing.assert_close(first, second, rtol=0, atol=0)  # no dropout
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=0, atol=0)  # no running statistics


class TestTeachersOfADistiller:
    @staticmethod
    def module(*teachers: nn.Module) -> KD:
        module = KD(student=nn.Linear(6, 4), teacher=list(teachers), num_classes=4)
        module.setup("fit")
        return module

    def test_are_no_part_of_it(self) -> None:
        teacher = Net()
        module = self.module(teacher)
        assert len(module.teachers) == 1
        assert {name for name, _ in module.named_parameters()} == {"student.weight", "student.bias"}
        assert not any("teacher" in name for name in module.state_dict() if not name.startswith("metrics."))
        held = {id(p) for p in [*module.parameters(), *module.buffers()]}
        assert not held & {id(t) for t in [*teacher.parameters(), *teacher.buffers()]}
        optimizer = module.configure_optimizers()
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in module.student.parameters()
        }

    def test_stay_in_eval_mode_and_frozen(self) -> None:
        teachers = [Net(), Net()]
        module = self.module(*teachers)
        module.train()
        module.requires_grad_(True)
        assert module.student.training
        assert not any(m.training for teacher in teachers for m in teacher.modules())
        assert not any(p.requires_grad for teacher in teachers for p in teacher.parameters())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_follow_its_dtype(self, dtype: torch.dtype) -> None:
        teachers = [Net(), Net()]
        module = self.module(*teachers)
        module.to(dtype)
        assert {p.dtype for teacher in teachers for p in teacher.parameters()} == {dtype}
        assert [out.logits.dtype for out in module.teachers(of(batch().to(dtype)))] == [dtype] * 2
        module.float()
        assert {p.dtype for teacher in teachers for p in teacher.parameters()} == {torch.float32}
        assert self.module(*teachers).double().teachers(of(batch().double()))[0].logits.dtype == torch.float64


def drawn(rows: int, classes: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits that are right more often than not, and labels."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (rows,), generator=g)
    logits = scale * torch.randn(rows, classes, generator=g)
    logits[torch.arange(rows), y] += scale
    return logits, y


def softmax64(logits: Tensor) -> np.ndarray:
    return torch.softmax(logits.double(), dim=1).numpy()


def ece_by_hand(logits: Tensor, y: Tensor, bins: int = 15) -> float:
    p = softmax64(logits)
    confidence, right = p.max(1), p.argmax(1) == y.numpy()
    gap = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            gap += inside.sum() / len(y) * abs(right[inside].mean() - confidence[inside].mean())
    return float(gap)


def measure(stage: str, classes: int) -> EvaluationMetrics:
    return EvaluationMetrics(stage, TASKS["classification"], classes)


def measured(metrics: EvaluationMetrics, batches: Sequence[tuple[Tensor, Tensor, list[Tensor]]]) -> dict[str, float]:
    logged: dict[str, Any] = {}
    for part in batches:
        logged = metrics.update(*part)
    return {name: metric.compute().item() for name, metric in logged.items()}


class TestMetrics:
    @pytest.mark.parametrize("classes", [2, 4, 6, 20])
    def test_against_sklearn(self, classes: int) -> None:
        logits, y = drawn(500, classes)
        found = measured(measure("val", classes), [(logits, y, [])])
        p, labels = softmax64(logits), np.arange(classes)
        expected = {
            "val/accuracy": accuracy_score(y, p.argmax(1)),
            "val/nll": log_loss(y, p, labels=labels),
            "val/ece": ece_by_hand(logits, y),
        }
        if classes > 5:
            expected["val/accuracy_top5"] = top_k_accuracy_score(y, p, k=5, labels=labels)
        assert 0.2 < expected["val/accuracy"] < 0.95
        assert found == pytest.approx(expected, abs=1e-5)

    def test_ece_of_four_samples(self) -> None:
        # confidences .9 (right), .9 (wrong), .6 (right), .6 (right): two bins, gaps |.5 - .9| and |1 - .6|
        p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
        found = measured(measure("test", 2), [(p.log(), torch.tensor([0, 1, 1, 1]), [])])
        assert found["test/ece"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.4, abs=1e-6)
        assert found["test/accuracy"] == pytest.approx(0.75)
        assert found["test/nll"] == pytest.approx(-np.log([0.9, 0.1, 0.6, 0.6]).mean(), abs=1e-6)

    def test_accumulates_over_batches_of_any_size(self) -> None:
        logits, y = drawn(300, 8)
        teachers = [drawn(300, 8, seed)[0] for seed in (1, 2)]
        parts = [slice(0, 7), slice(7, 200), slice(200, 201), slice(201, 300)]
        found = measured(measure("val", 8), [(logits[s], y[s], [t[s] for t in teachers]) for s in parts])
        assert found == pytest.approx(measured(measure("val", 8), [(logits, y, teachers)]), abs=1e-6)
        assert found["val/nll"] == pytest.approx(log_loss(y, softmax64(logits), labels=np.arange(8)), abs=1e-5)
        assert found["val/accuracy"] == pytest.approx(accuracy_score(y, logits.argmax(1)), abs=1e-6)
        assert found["val/ece"] == pytest.approx(ece_by_hand(logits, y), abs=1e-5)

    def test_agreement_with_the_mean_of_probabilities(self) -> None:
        # the mean of logits would choose class 1, a vote class 2
        p = torch.tensor([[0.98, 0.019, 0.001], [0.001, 0.499, 0.5], [0.24, 0.37, 0.39]])
        assert (p.mean(0).argmax(), p.log().mean(0).argmax(), p.argmax(1).mode().values) == (0, 1, 2)
        teachers = [row.log().unsqueeze(0) for row in p]
        for winner in range(3):
            student = torch.eye(3)[[winner]]
            found = measured(measure("val", 3), [(student, torch.tensor([0]), teachers)])
            assert found["val/teacher_agreement"] == float(winner == 0)

    def test_no_agreement_without_teachers_and_no_top5_of_five(self) -> None:
        logits, y = drawn(10, 5)
        assert set(measure("val", 5).update(logits, y, [])) == {"val/accuracy", "val/ece", "val/nll"}
        assert "test/accuracy_top5" in measure("test", 6).update(*drawn(10, 6), [])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_logits_of_another_precision(self, dtype: torch.dtype) -> None:
        logits, y = drawn(200, 6)
        logits = logits.to(dtype)
        found = measured(measure("val", 6), [(logits, y, [logits])])
        assert found["val/nll"] == pytest.approx(log_loss(y, softmax64(logits), labels=np.arange(6)), abs=1e-5)
        assert found["val/teacher_agreement"] == 1
