"""The whole-network meta-gradient against double backward through a real look-ahead, and through real trainings."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods import CLASSES, SHAPE, Blobs, build, trained_teachers, trainer
from test_every_method import DictBlobs, Keyword, assert_same, noisy
from test_manual import Frozen, Wrapped, almkd
from test_meta import TwoProcesses
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_kd import ALMKD
from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.models import build_model
from lit_kd.trust.exact import (
    Derivative,
    MetaInputs,
    central_derivative,
    exact_derivative,
    moment,
    repeat,
    whole_network_derivative,
)
from lit_kd.types import UNLABELED
from lit_kd.weightings import MetaStep, Paper

ROWS, META = 12, 10


class Net(nn.Module):
    """Convolutions, BatchNorm, dropout, a residual connection, an unused layer, and a last layer that is not linear."""

    def __init__(self, normed: bool = True, dropout: float = 0.3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if normed else nn.Identity()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4) if normed else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.last = nn.Conv2d(4, CLASSES, 1)
        self.unused = nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
            for buffer in [b for b in self.buffers() if b.is_floating_point()]:
                buffer.add_(0.2 * torch.rand_like(buffer))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.drop(F.relu(x + self.norm2(self.conv(self.drop(x)))))
        out: Tensor = self.last(x).mean((2, 3)) * 3
        return out


class Problem:
    """One training batch, after the student's forward pass."""

    def __init__(
        self,
        teachers: int = 1,
        temperature: float = 1.0,
        lr: float = 0.3,
        model: nn.Module | None = None,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.model = (Net() if model is None else model).to(dtype)
        self.x = torch.randn(ROWS, *SHAPE, dtype=dtype)
        self.y = torch.randint(0, CLASSES, (ROWS,))
        self.y[::5] = UNLABELED
        self.teachers = [2 * torch.randn(ROWS, CLASSES, dtype=dtype) for _ in range(teachers)]
        self.weights = torch.rand(ROWS, teachers + 1, dtype=dtype)
        keep = torch.arange(META) % 4 != 1
        self.meta = MetaInputs(torch.randn(META, *SHAPE, dtype=dtype), torch.randint(0, CLASSES, (META,)), keep)
        self.temperature, self.lr = temperature, lr
        self.before = moment(self.model)
        self.logits: Tensor = self.model(self.x)

    def step(
        self,
        derivative: Derivative = exact_derivative,
        rows: slice = slice(None),
        meta: slice = slice(None),
        **options: Any,
    ) -> MetaStep:
        meta_rows = MetaInputs(*(part[meta] for part in self.meta))  # type: ignore[index]
        moved = partial(whole_network_derivative, self.model, self.x, self.before, self.logits, meta_rows)
        return MetaStep(
            index=torch.arange(ROWS)[rows],
            y=self.y[rows],
            logits=self.logits.detach(),
            teachers=[t[rows] for t in self.teachers],
            derivative=partial(moved, derivative=derivative, **options),
            lr=self.lr,
            batch_size=ROWS,
            temperature=self.temperature,
        )

    def terms(self, logits: Tensor) -> Tensor:
        losses = [cross_entropy(logits, self.y), *(kd_loss(logits, t, self.temperature) for t in self.teachers)]
        return torch.stack(losses, dim=1)

    def validation_loss(self, parameters: dict[str, Tensor]) -> Tensor:
        evaluated = copy.deepcopy(self.model).eval()
        keep = self.meta.keep
        assert isinstance(self.meta.x, Tensor)
        return F.cross_entropy(functional_call(evaluated, parameters, (self.meta.x[keep],)), self.meta.y[keep])

    def double_backward(self) -> Tensor:
        """dL_val / d weights: the pass is run again with a graph, its buffers and masks are those of the first."""
        weights = self.weights.clone().requires_grad_()
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        again = copy.deepcopy(self.model)
        again.load_state_dict(dict(self.before.buffers), strict=False)
        torch.set_rng_state(self.before.random[0])
        logits = functional_call(again, parameters, (self.x,))
        loss = (weights * self.terms(logits)).sum(1).mean()
        gradients = torch.autograd.grad(loss, parameters.values(), create_graph=True, materialize_grads=True)
        moved = {name: p - self.lr * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
        return torch.autograd.grad(self.validation_loss(moved), weights)[0]

    def products(self) -> Tensor:
        """Of each term's gradient with the validation gradient where the student is, one at a time."""
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        v = torch.autograd.grad(self.validation_loss(parameters), parameters.values(), materialize_grads=True)
        terms = self.terms(self.logits)
        found = torch.zeros_like(terms)
        for i, k in [(i, k) for i in range(ROWS) for k in range(terms.shape[1]) if terms[i, k] != 0]:
            g = torch.autograd.grad(terms[i, k], parameters.values(), retain_graph=True, materialize_grads=True)
            found[i, k] = sum((a * b).sum() for a, b in zip(g, v, strict=True))
        return found.detach()


def cosine(found: Tensor, expected: Tensor) -> float:
    return F.cosine_similarity(found.double().flatten(), expected.double().flatten(), dim=0).item()


class Seeded(nn.Module):
    """With a state that each pass changes and uses, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES))
        self.register_buffer("state", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[:3](x)
        if self.training:
            self.state.mul_(0.9).add_(h.detach().mean(0))
        out: Tensor = self.layers[3](h * self.state)
        return out


class Attention(nn.Module):
    """Over the rows of an image, with a shared weight and a frozen layer."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)
        self.last, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.last.weight
        self.layer.linear1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.last(self.layer(x.flatten(1, 2))).mean(1))[:, :CLASSES]
        return out


class TestExact:
    @pytest.mark.parametrize("teachers", [1, 3])
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    @pytest.mark.parametrize("lr", [0.05, 2.0])
    def test_equals_double_backward(self, teachers: int, temperature: float, lr: float) -> None:
        p = Problem(teachers, temperature, lr)
        expected = p.double_backward()
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(p.step().gradient(p.weights), expected, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("teachers", [1, 3])
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_without_a_look_ahead(self, teachers: int, temperature: float) -> None:
        p = Problem(teachers, temperature)
        found = p.step().alignment(p.weights, lr=0.0)
        torch.testing.assert_close(found, p.products(), rtol=1e-10, atol=1e-14)
        assert (found[p.y == UNLABELED, 0] == 0).all()

    @pytest.mark.parametrize("lr", [0.0, 0.5])
    @pytest.mark.parametrize(
        "model",
        [Seeded, partial(Attention, 0.0), partial(Attention, 0.4), partial(build_model, "wrn-10-1", CLASSES, SHAPE)],
        ids=["state", "attention", "attention-dropout", "wrn"],
    )
    def test_other_networks(self, model: Callable[[], nn.Module], lr: float) -> None:
        p = Problem(2, lr=lr, model=model())
        found = p.step().gradient(p.weights) if lr else p.step().alignment(p.weights, 0.0)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
            expected = p.double_backward() if lr else p.products()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)

    def test_the_look_ahead_matters(self) -> None:
        p = Problem(lr=2.0)
        without = -p.lr / ROWS * p.step().alignment(p.weights, lr=0.0)
        assert (without - p.double_backward()).norm() > 0.05 * without.norm()

    def test_no_row_kept_says_nothing(self) -> None:
        p = Problem()
        p.meta = p.meta._replace(keep=torch.zeros(META, dtype=torch.bool))
        for derivative in (exact_derivative, central_derivative):
            assert (p.step(derivative).gradient(p.weights) == 0).all()

    def test_the_pass_is_repeated_to_the_bit(self) -> None:
        for model in (Net(), Attention(0.4), Seeded()):
            p = Problem(model=model, dtype=torch.float32)
            assert_same(repeat(p.model, p.x, p.before), p.logits.detach())

    @pytest.mark.parametrize("derivative", [exact_derivative, central_derivative])
    def test_leaves_no_trace(self, derivative: Derivative) -> None:
        p = Problem(2, dtype=torch.float32)
        p.model.norm.eval()  # each part keeps its mode
        p.model.last.weight.grad = torch.ones_like(p.model.last.weight)  # type: ignore[union-attr]

        def state() -> list[Any]:
            gradients = [p.grad for p in p.model.parameters()]
            return [p.model.state_dict(), gradients, torch.get_rng_state(), [m.training for m in p.model.modules()]]

        before = copy.deepcopy(state())
        step = p.step(derivative)
        for _ in range(3):
            assert step.gradient(p.weights).any()
        assert_same(state(), before)
        p.logits.sum().backward()  # the graph is still there

    @pytest.mark.parametrize("rows", [6, 4])
    def test_two_processes_find_what_one_finds(self, rows: int) -> None:
        whole = Problem(2, model=Net(normed=False, dropout=0.0))
        parts, meta = [slice(0, rows), slice(rows, None)], [slice(0, 3), slice(3, None)]

        turn = threading.Lock()  # forward mode and the random numbers are one process's own

        def locked(*args: Any) -> tuple[Tensor, Tensor]:
            with turn:
                return exact_derivative(*args)

        def work(rank: int, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
            p = copy.copy(whole)
            p.model = copy.deepcopy(whole.model)
            p.x = whole.x[parts[rank]]
            p.logits = p.model(p.x)
            step = p.step(locked, parts[rank], meta[rank], all_sum=all_sum)
            weights = p.weights[parts[rank]]
            return torch.cat([step.gradient(weights), step.alignment(weights, 0.0)], dim=1)

        found = torch.cat(TwoProcesses().run(work))
        torch.testing.assert_close(found[:, :3], whole.double_backward(), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found[:, 3:], whole.products(), rtol=1e-10, atol=1e-14)

    def test_operator_without_forward_mode(self) -> None:
        p = Problem(model=nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES), Squares()))
        with pytest.raises(ValueError, match=r"forward-mode.*in Sequential.*Use meta_gradient: central"):
            p.step().alignment(p.weights, 0.0)
        p.step(central_derivative).alignment(p.weights, 0.0)


class TestCentral:
    @pytest.mark.parametrize("double", [None, True])
    @pytest.mark.parametrize("name", ["net", "mlp-32", "cnn-4", "resnet8", "wrn-10-1"])
    def test_agrees_with_exact_in_float32(self, name: str, double: bool | None) -> None:
        torch.manual_seed(0)
        model = Net() if name == "net" else build_model(name, CLASSES, SHAPE)
        p = Problem(2, model=model, dtype=torch.float32)
        exact = p.step().gradient(p.weights)
        found = p.step(partial(central_derivative, double=double)).gradient(p.weights)
        assert found.dtype == torch.float32
        assert cosine(found, exact) > 0.999
        torch.testing.assert_close(found.norm(), exact.norm(), rtol=0.02, atol=0)

    def test_converges(self) -> None:
        p = Problem(2)
        found = p.step(central_derivative).gradient(p.weights)
        torch.testing.assert_close(found, p.double_backward(), rtol=1e-6, atol=1e-9)

    def test_parameters_that_are_all_zero(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES))
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        p = Problem(model=model)
        found = p.step(central_derivative).gradient(p.weights)
        torch.testing.assert_close(found, p.double_backward(), rtol=1e-6, atol=1e-9)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Square.apply(x)
        return out


class TestFit:
    @pytest.mark.parametrize("rule", ["robust", Paper(warmup_epochs=1, every=1)], ids=["robust", "paper"])
    def test_a_residual_network(self, rule: Any) -> None:
        model, fitted = almkd("resnet8", rule, meta_gradient="exact"), trainer(limit_train_batches=4)
        fitted.fit(model, noisy())
        assert model.table is not None
        # in so few steps the robust rule finds no noise, and then all rows weigh the same
        learned = model.table["evidence_mean" if rule == "robust" else "weights"]
        assert len(learned.unique(dim=0)) > 10

    def test_unlike_the_last_layer_but_not_much(self) -> None:
        """On the same data both speak of the same samples."""
        found = {}
        for kind in ("last_layer", "exact", "central"):
            torch.manual_seed(0)
            model = almkd("cnn-2", Frozen(True), meta_gradient=kind)
            trainer(max_epochs=1).fit(model, noisy())
            assert isinstance(model.rule, Frozen)
            found[kind] = torch.cat(model.rule.seen)
        assert cosine(found["central"], found["exact"]) > 0.999
        assert 0.2 < cosine(found["last_layer"], found["exact"]) < 0.99

    @pytest.mark.parametrize("kind", ["exact", "central"])
    @pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
    def test_the_meta_step_leaves_no_trace(self, kind: Any, precision: Any) -> None:
        def run(taken: bool) -> tuple[Any, Any]:
            torch.manual_seed(3)
            model, fitted = (
                almkd(Net(), Frozen(taken), meta_gradient=kind),
                trainer(precision=precision, limit_train_batches=3),
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "a second pass")
                fitted.fit(model, noisy())
            return model.rule, [model.student.state_dict(), fitted.optimizers[0].state_dict(), torch.get_rng_state()]

        (_, expected), (rule, found) = run(False), run(True)
        assert len(rule.seen) == 6
        assert all(gradient.any() and gradient.dtype != torch.bfloat16 for gradient in rule.seen)
        assert_same(found, expected)

    @pytest.mark.parametrize("kind", ["exact", "central"])
    def test_students_that_the_last_layer_refuses(self, kind: Any) -> None:
        frozen = build_model("mlp-8", CLASSES, SHAPE)
        frozen[3].requires_grad_(False)  # type: ignore[index]
        for student in (nn.Sequential(nn.Conv2d(1, CLASSES, 4), nn.Flatten()), Wrapped("scaled"), frozen):
            trainer(max_epochs=1).fit(almkd(student, Frozen(True), meta_gradient=kind), Blobs())

    def test_mapping_in_object_out(self) -> None:
        student, *teachers = [Keyword(net) for net in (build_model("cnn-2", CLASSES, SHAPE), *trained_teachers())]
        model = build("almkd-paper", student, teachers, meta_gradient="exact")
        trainer(limit_train_batches=3).fit(model, DictBlobs())
        assert isinstance(model, ALMKD)
        assert model.table is not None
        assert len(model.table["weights"].unique(dim=0)) > 10

    @pytest.mark.parametrize("rule", ["robust", Paper()], ids=["robust", "paper"])
    def test_student_without_forward_mode(self, rule: Any) -> None:
        """Said before the first update, though the first meta-step may come many epochs later."""
        student = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Squares(), nn.Linear(8, CLASSES))
        before = copy.deepcopy(student.state_dict())
        with pytest.raises(ValueError, match=r"(?s)forward-mode.*Use meta_gradient: central"):
            trainer().fit(almkd(student, rule, meta_gradient="exact"), Blobs())
        assert_same(student.state_dict(), before)
        trainer().fit(almkd(student, rule, meta_gradient="central"), Blobs())
        assert not torch.equal(student[1].weight, before["1.weight"])  # type: ignore[arg-type]

    def test_student_whose_pass_cannot_be_repeated(self) -> None:
        class Counting(nn.Module):
            passes = 0

            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(16, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                self.passes += 1
                out: Tensor = self.layer(x.flatten(1)) * self.passes
                return out

        with pytest.warns(UserWarning, match="a second pass of Counting over a batch gives other logits"):
            trainer(max_steps=1).fit(almkd(Counting(), meta_gradient="exact"), Blobs())

    def test_unknown_kind(self) -> None:
        with pytest.raises(ValueError, match=r"meta_gradient of \['last_layer', 'exact', 'central'\], found 'full'"):
            almkd(meta_gradient="full")
