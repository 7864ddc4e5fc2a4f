"""Meta-gradients against what they are derivatives of: real SGD steps on a real `nn.Linear`, then the validation loss.

Three oracles, none of which knows the closed form: central finite differences of the objective, double backward
through a differentiable step, and one process's result for work split over two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.trust.meta import Head, MetaRows, last_layer_derivative, meta_gradient, term_gradients
from lit_kd.types import UNLABELED
from lit_kd.weightings import MetaStep
from lit_kd.weightings.published import by_share

torch.set_num_threads(1)

CLASSES, WIDTH, META = 5, 6, 12
LR = 0.3


@dataclass
class Problem:
    """One group of the bilevel problem, in float64."""

    layer: nn.Linear
    features: Tensor
    y: Tensor
    teachers: list[Tensor]
    weights: Tensor
    meta: MetaRows
    temperature: float
    lr: float = LR

    def inner_loss(self, logits: Tensor, weights: Tensor) -> Tensor:
        terms = [cross_entropy(logits, self.y)]
        terms += [kd_loss(logits, t, self.temperature) for t in self.teachers]
        return (weights * torch.stack(terms, dim=1)).sum(1).mean()

    def validation_loss(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(self.meta.features[self.meta.keep], weight, bias)
        return F.cross_entropy(logits, self.meta.y[self.meta.keep])

    def objective(self, weights: Tensor) -> float:
        """L_val after one plain SGD step: autograd and torch.optim do the step."""
        return self.after_step(lambda logits: self.inner_loss(logits, weights), self.lr)

    def after_step(self, loss: Callable[[Tensor], Tensor], lr: float) -> float:
        layer = nn.utils.skip_init(nn.Linear, WIDTH, CLASSES, bias=self.layer.bias is not None, dtype=torch.float64)
        layer.load_state_dict(self.layer.state_dict())
        loss(layer(self.features)).backward()
        torch.optim.SGD(layer.parameters(), lr=abs(lr), maximize=lr < 0, foreach=False).step()
        with torch.no_grad():
            return float(self.validation_loss(layer.weight, layer.bias))

    def double_backward(self) -> Tensor:
        """dL_val / d weights through a differentiable step."""
        weights = self.weights.clone().requires_grad_()
        params = list(self.layer.parameters())
        grads = torch.autograd.grad(self.inner_loss(self.layer(self.features), weights), params, create_graph=True)
        moved = [p - self.lr * g for p, g in zip(params, grads, strict=True)]
        loss = self.validation_loss(moved[0], moved[1] if len(moved) > 1 else None)
        return torch.autograd.grad(loss, weights)[0]

    @property
    def head(self) -> Head:
        return Head(self.layer.weight.detach(), None if self.layer.bias is None else self.layer.bias.detach())

    def step(
        self,
        rows: slice = slice(None),
        meta: slice = slice(None),
        all_sum: Callable[[Tensor], Tensor] = lambda total: total,
    ) -> MetaStep:
        """Of all rows, or of those that one of several processes has."""
        features, meta_rows = self.features[rows], MetaRows(*(part[meta] for part in self.meta))
        return MetaStep(
            index=torch.arange(len(self.y))[rows],
            y=self.y[rows],
            logits=self.layer(features).detach(),
            teachers=[t[rows] for t in self.teachers],
            derivative=partial(last_layer_derivative, self.head, features, meta_rows, all_sum=all_sum),
            lr=self.lr,
            batch_size=len(self.y),
            temperature=self.temperature,
        )

    def gradient(self) -> Tensor:
        """What is under test."""
        return self.step().gradient(self.weights)


def problem(batch: int, teachers: int, temperature: float = 1.0, bias: bool = True, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(1000 * seed + 10 * batch + teachers)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def labels(n: int) -> Tensor:
        return torch.randint(0, CLASSES, (n,), generator=g)

    torch.manual_seed(seed)
    layer = nn.Linear(WIDTH, CLASSES, bias=bias, dtype=torch.float64)
    y = labels(batch)
    y[2::5] = UNLABELED
    keep = torch.ones(META, dtype=torch.bool)
    keep[1::4] = False
    return Problem(
        layer=layer,
        features=normal(batch, WIDTH),
        y=y,
        teachers=[2 * normal(batch, CLASSES) for _ in range(teachers)],
        weights=torch.rand(batch, teachers + 1, generator=g, dtype=torch.float64),
        meta=MetaRows(normal(META, WIDTH), labels(META), keep),
        temperature=temperature,
    )


def finite_differences(function: Callable[[Tensor], float], at: Tensor, eps: float = 1e-4) -> Tensor:
    """Central ones, of at most 64 coordinates drawn at random; nan for the rest."""
    result = torch.full_like(at, torch.nan)
    for i in torch.randperm(at.numel(), generator=torch.Generator().manual_seed(0))[:64].tolist():
        ends = []
        for sign in (1, -1):
            moved = at.clone()
            moved.view(-1)[i] += sign * eps
            ends.append(function(moved))
        result.view(-1)[i] = (ends[0] - ends[1]) / (2 * eps)
    return result


def close(found: Tensor, expected: Tensor) -> None:
    """To 1e-6, absolute and relative to the largest; most entries are far closer (1e-9 is the error of the oracle)."""
    assert found.shape == expected.shape
    known = ~expected.isnan()
    assert known.sum() >= min(64, found.numel())
    found, expected = found[known], expected[known]
    assert (found - expected).abs().max() <= 1e-6 * min(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


CASES = [
    (batch, teachers, temperature, bias)
    for batch in (1, 7, 64)
    for teachers in (1, 3)
    for temperature in (1.0, 4.0)
    for bias in (True, False)
]


class TestTermGradients:
    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_equal_autograd_of_the_losses(self, temperature: float) -> None:
        p = problem(11, 3, temperature)
        z = p.layer(p.features).detach().requires_grad_()
        losses = [cross_entropy(z, p.y)] + [kd_loss(z, t, temperature) for t in p.teachers]
        expected = torch.stack([torch.autograd.grad(loss.sum(), z)[0] for loss in losses], dim=1)
        found = term_gradients(z.detach(), p.y, p.teachers, temperature)
        assert found.shape == (11, 4, CLASSES)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)

    def test_missing_label_pulls_nowhere(self) -> None:
        p = problem(11, 1)
        missing = p.y == UNLABELED
        found = term_gradients(p.layer(p.features).detach(), p.y, p.teachers, 1.0)
        assert missing.sum() == 2
        assert (found[missing, 0] == 0).all()
        assert (found[missing, 1] != 0).all()


class TestMetaGradient:
    @pytest.mark.parametrize(("batch", "teachers", "temperature", "bias"), CASES)
    def test_equals_finite_differences(self, batch: int, teachers: int, temperature: float, bias: bool) -> None:
        p = problem(batch, teachers, temperature, bias)
        expected = finite_differences(p.objective, p.weights)
        close(p.gradient(), expected)

    @pytest.mark.parametrize(("batch", "teachers", "temperature", "bias"), CASES)
    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_equals_double_backward(self, batch: int, teachers: int, temperature: float, bias: bool, seed: int) -> None:
        p = problem(batch, teachers, temperature, bias, seed)
        torch.testing.assert_close(p.gradient(), p.double_backward(), rtol=1e-10, atol=1e-14)

    def test_the_look_ahead_matters(self) -> None:
        # otherwise the tests above could not tell a look-ahead from its absence
        p = replace(problem(7, 1), lr=5.0)
        torch.testing.assert_close(p.gradient(), p.double_backward(), rtol=1e-10, atol=1e-14)
        without = meta_gradient(p.step().alignment(p.weights, lr=0.0), p.lr, 7)
        assert (without - p.gradient()).norm() > 0.05 * p.gradient().norm()

    def test_rows_not_kept_have_no_say(self) -> None:
        p = problem(7, 1)
        g = torch.Generator().manual_seed(5)
        features, y = p.meta.features.clone(), p.meta.y.clone()
        features[~p.meta.keep] = 1e3 * torch.randn(3, WIDTH, generator=g, dtype=torch.float64)
        y[~p.meta.keep] = (y[~p.meta.keep] + 1) % CLASSES
        other = replace(p, meta=MetaRows(features, y, p.meta.keep))
        torch.testing.assert_close(other.gradient(), p.gradient(), rtol=1e-12, atol=0)

    def test_no_row_kept_says_nothing(self) -> None:
        p = problem(7, 1)
        p = replace(p, meta=p.meta._replace(keep=torch.zeros(META, dtype=torch.bool)))
        assert (p.gradient() == 0).all()

    @pytest.mark.parametrize("seed", range(5))
    def test_a_step_against_it_lowers_the_validation_loss(self, seed: int) -> None:
        p = problem(64, 3, seed=seed)
        gradient = p.gradient()
        fall = p.objective(p.weights) - p.objective(p.weights - 1e-3 * gradient / gradient.norm())
        assert fall == pytest.approx(1e-3 * float(gradient.norm()), rel=1e-2)

    def test_equals_autograd_in_float32_nearly(self) -> None:
        p = problem(64, 3)
        small = replace(
            p,
            layer=nn.Linear(WIDTH, CLASSES),
            features=p.features.float(),
            teachers=[t.float() for t in p.teachers],
            weights=p.weights.float(),
            meta=p.meta._replace(features=p.meta.features.float()),
        )
        small.layer.load_state_dict(p.layer.state_dict())
        assert small.gradient().dtype == torch.float32
        expected = p.double_backward()
        assert (small.gradient() - expected).abs().max() < 1e-5 * expected.abs().max()


class TestParametrisations:
    """Each rule moves along coordinates of its own; in each, the derivative is the true objective's."""

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("teachers", [1, 3])
    @pytest.mark.parametrize("batch", [1, 7, 64])
    def test_paper_the_label_has_what_the_teachers_leave(self, batch: int, teachers: int, bias: bool) -> None:
        p = problem(batch, teachers, temperature=4.0, bias=bias)
        g = torch.Generator().manual_seed(0)
        shares = torch.rand(batch, teachers, generator=g, dtype=torch.float64) / teachers

        def convex(s: Tensor) -> Tensor:
            return torch.cat([1 - s.sum(1, keepdim=True), s], dim=1)

        expected = finite_differences(lambda s: p.objective(convex(s)), shares)
        found = by_share(p.step().gradient(convex(shares)))
        close(found, expected)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("teachers", [1, 3])
    @pytest.mark.parametrize("batch", [1, 7, 64])
    def test_amal_independent_weights_up_to_two(self, batch: int, teachers: int, bias: bool) -> None:
        p = problem(batch, teachers, temperature=4.0, bias=bias)
        weights = 2 * p.weights
        expected = finite_differences(p.objective, weights)
        found = p.step().gradient(weights)
        close(found, expected)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("teachers", [1, 3])
    def test_robust_how_fast_one_term_alone_lowers_the_loss(self, teachers: int, bias: bool) -> None:
        p = problem(7, teachers, temperature=1.0, bias=bias)
        found = p.step().alignment(p.weights, lr=0.0)

        def along(sample: int, term: int, eps: float) -> float:
            """L_val after a step of size eps down the gradient of one term of one sample."""

            def loss(z: Tensor) -> Tensor:
                if term == 0:
                    return cross_entropy(z, p.y)[sample]
                return kd_loss(z, p.teachers[term - 1], p.temperature)[sample]

            return p.after_step(loss, eps)

        expected = torch.empty_like(found)
        for i in range(7):
            for k in range(teachers + 1):
                expected[i, k] = -(along(i, k, 1e-5) - along(i, k, -1e-5)) / 2e-5
        close(found, expected)

    def test_robust_does_not_depend_on_the_weights(self) -> None:
        p = problem(7, 3)
        torch.testing.assert_close(p.step().alignment(p.weights, 0.0), p.step().alignment(0 * p.weights, 0.0))


class TwoProcesses:
    """Runs a function in two threads whose ``all_sum`` meets at a barrier, as all-reduce does."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=10)
        self.parts: dict[int, Tensor] = {}
        self.results: dict[int, Tensor] = {}

    def run(self, work: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
        def all_sum_of(rank: int) -> Callable[[Tensor], Tensor]:
            def all_sum(tensor: Tensor) -> Tensor:
                self.parts[rank] = tensor.clone()
                self.barrier.wait()
                tensor.copy_(self.parts[0] + self.parts[1])  # in place, as torch.distributed.all_reduce
                self.barrier.wait()
                return tensor

            return all_sum

        def target(rank: int) -> None:
            try:
                self.results[rank] = work(rank, all_sum_of(rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=target, args=(rank,), daemon=True) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        assert sorted(self.results) == [0, 1], "a process failed"
        return [self.results[0], self.results[1]]


class TestAllSum:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("rows", "meta_rows"), [(8, 6), (3, 11)], ids=["halves", "uneven"])
    def test_two_processes_find_what_one_finds(self, rows: int, meta_rows: int, bias: bool) -> None:
        p = problem(16, 3, temperature=4.0, bias=bias)
        step = p.step()
        batch_parts = [slice(0, rows), slice(rows, None)]
        meta_parts = [slice(0, meta_rows), slice(meta_rows, None)]

        def work(rank: int, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
            part = p.step(batch_parts[rank], meta_parts[rank], all_sum)
            found = part.gradient(p.weights[part.index])
            return torch.cat([found, part.alignment(p.weights[part.index], lr=0.0)], dim=1)

        found = torch.cat(TwoProcesses().run(work))
        torch.testing.assert_close(found[:, :4], p.double_backward(), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found[:, 4:], step.alignment(p.weights, lr=0.0), rtol=1e-10, atol=1e-14)

    def test_a_process_whose_meta_rows_are_all_in_the_batch(self) -> None:
        p = problem(16, 1)
        keep = torch.tensor([True] * 6 + [False] * 6)
        p = replace(p, meta=p.meta._replace(keep=keep))

        def work(rank: int, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
            part = p.step(slice(8 * rank, 8 * rank + 8), slice(6 * rank, 6 * rank + 6), all_sum)
            return part.gradient(p.weights[part.index])

        found = torch.cat(TwoProcesses().run(work))
        torch.testing.assert_close(found, p.double_backward(), rtol=1e-10, atol=1e-14)
