"""Meta-gradients against what they are derivatives of: real SGD steps on a real `nn.Linear`, then the validation loss.

Three oracles, none of which knows the closed form: central finite differences of the objective, double backward
through a differentiable step, and one process's result for work split over two.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.losses import cross_entropy, kd_loss
from lit_kd.trust.meta import Head, MetaRows, alignment, last_layer_derivative, look_ahead, meta_gradient
from lit_kd.types import UNLABELED
from lit_kd.weightings import MetaStep

torch.set_num_threads(1)

CLASSES, WIDTH, META = 5, 6, 12
LR = 0.3


def last_layer_align(
    head: Head,
    features: Tensor,
    gradients: Tensor,
    meta: MetaRows,
    all_sum: Callable[[Tensor], Tensor] = lambda total: total,
) -> Callable[[Tensor, float], Tensor]:
    """As a training's; from the terms' gradients by the logits, ``(B, K + 1, C)``."""

    def align(weights: Tensor, lr: float) -> Tensor:
        pull = torch.einsum("bk,bkc->bc", weights, gradients)
        ahead = look_ahead(head, features, pull, lr, all_sum) if lr else head
        return alignment(gradients, last_layer_derivative(ahead, features, meta, all_sum=all_sum))

    return align


def term_gradients(logits: Tensor, y: Tensor, teachers: list[Tensor], temperature: float) -> Tensor:
    """Of cross-entropy and KL, in closed form: what is said minus what is to be said."""
    target = F.one_hot(y.clamp(min=0), logits.shape[1]).to(logits)
    label = (logits.softmax(-1) - target) * (y != UNLABELED).unsqueeze(1)
    taught = [temperature * ((logits / temperature).softmax(-1) - (t / temperature).softmax(-1)) for t in teachers]
    return torch.stack([label, *taught], dim=1)


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
        logits, teachers = self.layer(features).detach(), [t[rows] for t in self.teachers]
        gradients = term_gradients(logits, self.y[rows], teachers, self.temperature)
        return MetaStep(
            index=torch.arange(len(self.y))[rows],
            y=self.y[rows],
            logits=logits,
            teachers=teachers,
            alignment=last_layer_align(self.head, features, gradients, meta_rows, all_sum),
            lr=self.lr,
            batch_size=len(self.y),
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


CASES = [(1, 1, 1.0, True), (7, 3, 4.0, False), (64, 1, 4.0, True), (64, 3, 1.0, True)]


class TestMetaGradient:
    @pytest.mark.parametrize(("batch", "teachers", "temperature", "bias"), CASES)
    def test_equals_finite_differences_and_double_backward(
        self, batch: int, teachers: int, temperature: float, bias: bool
    ) -> None:
        p = problem(batch, teachers, temperature, bias)
        close(p.gradient(), finite_differences(p.objective, p.weights))
        torch.testing.assert_close(p.gradient(), p.double_backward(), rtol=1e-10, atol=1e-14)
        assert (p.gradient()[p.y == UNLABELED, 0] == 0).all()

    def test_the_look_ahead_matters(self) -> None:
        # otherwise the tests above could not tell a look-ahead from its absence
        p = replace(problem(7, 1), lr=5.0)
        torch.testing.assert_close(p.gradient(), p.double_backward(), rtol=1e-10, atol=1e-14)
        without = meta_gradient(p.step().alignment(p.weights, 0.0), p.lr, 7)
        assert (without - p.gradient()).norm() > 0.05 * p.gradient().norm()

    def test_rows_not_kept_have_no_say(self) -> None:
        p = problem(7, 1)
        features, y = p.meta.features.clone(), p.meta.y.clone()
        features[~p.meta.keep] *= -1e3
        y[~p.meta.keep] = (y[~p.meta.keep] + 1) % CLASSES
        other = replace(p, meta=MetaRows(features, y, p.meta.keep))
        torch.testing.assert_close(other.gradient(), p.gradient(), rtol=1e-12, atol=0)
        nobody = replace(p, meta=p.meta._replace(keep=torch.zeros(META, dtype=torch.bool)))
        assert (nobody.gradient() == 0).all()

    def test_a_step_against_it_lowers_the_validation_loss(self) -> None:
        p = problem(64, 3)
        gradient = p.gradient()
        fall = p.objective(p.weights) - p.objective(p.weights - 1e-3 * gradient / gradient.norm())
        assert fall == pytest.approx(1e-3 * float(gradient.norm()), rel=1e-2)

    def test_paper_the_label_has_what_the_teachers_leave(self) -> None:
        """The derivative along the rule's own coordinates is the true objective's."""
        p = problem(7, 3, temperature=4.0)
        shares = torch.rand(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3

        def convex(s: Tensor) -> Tensor:
            return torch.cat([1 - s.sum(1, keepdim=True), s], dim=1)

        by_weight = p.step().gradient(convex(shares))
        close(by_weight[:, 1:] - by_weight[:, :1], finite_differences(lambda s: p.objective(convex(s)), shares))

    def test_without_a_look_ahead_how_fast_one_term_alone_lowers_the_loss(self) -> None:
        p = problem(7, 3, temperature=1.0)
        found = p.step().alignment(p.weights, 0.0)
        torch.testing.assert_close(found, p.step().alignment(0 * p.weights, 0.0))

        def along(sample: int, term: int, eps: float) -> float:
            """L_val after a step of size eps down the gradient of one term of one sample."""

            def loss(z: Tensor) -> Tensor:
                if term == 0:
                    return cross_entropy(z, p.y)[sample]
                return kd_loss(z, p.teachers[term - 1], p.temperature)[sample]

            return p.after_step(loss, eps)

        expected = torch.empty_like(found)
        for i in range(7):
            for k in range(4):
                expected[i, k] = -(along(i, k, 1e-5) - along(i, k, -1e-5)) / 2e-5
        close(found, expected)


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


@pytest.mark.parametrize(("rows", "meta_rows"), [(8, 6), (3, 11)], ids=["halves", "uneven"])
@pytest.mark.parametrize("alone", [False, True])
def test_two_processes_find_what_one_finds(rows: int, meta_rows: int, alone: bool) -> None:
    p = problem(16, 3, temperature=4.0)
    if alone:  # all meta rows of the second process are in the batch
        p = replace(p, meta=p.meta._replace(keep=torch.arange(META) < meta_rows))
    batch_parts, meta_parts = ([slice(0, cut), slice(cut, None)] for cut in (rows, meta_rows))

    def work(rank: int, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
        part = p.step(batch_parts[rank], meta_parts[rank], all_sum)
        weights = p.weights[part.index]
        return torch.cat([part.gradient(weights), part.alignment(weights, 0.0)], dim=1)

    found = torch.cat(TwoProcesses().run(work))
    torch.testing.assert_close(found[:, :4], p.double_backward(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found[:, 4:], p.step().alignment(p.weights, 0.0), rtol=1e-10, atol=1e-14)
