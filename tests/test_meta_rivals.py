"""Learning to reweight and Meta-Weight-Net, against finite differences and double backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from test_meta import last_layer_align, term_gradients
from torch import Tensor, nn
from torch.func import functional_call

from lit_kd import L2RW, MetaWeightNet
from lit_kd.data.table import SampleTable
from lit_kd.trust.meta import Head, MetaRows
from lit_kd.types import UNLABELED, Batch
from lit_kd.weightings import L2RW as Reweight
from lit_kd.weightings import MetaStep, Rule
from lit_kd.weightings import MetaWeightNet as Curve
from lit_kd.weightings.reweighting import net_weights

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
NOISE: dict[str, Any] = {"noise": "symmetric", "noise_rate": 0.4}


class Small:
    """A last layer in float64, ten rows, one teacher, and meta rows."""

    def __init__(self, meta: int = 6) -> None:
        g = torch.Generator().manual_seed(0)
        self.weight = torch.randn(CLASSES, 4, generator=g, dtype=torch.float64)
        self.features, self.meta = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (10, meta))
        self.y, self.meta_y = torch.arange(10) % CLASSES, torch.arange(meta) % CLASSES
        self.y[3] = UNLABELED
        self.teacher = torch.randn(10, CLASSES, generator=g, dtype=torch.float64)
        self.lr = 0.7

    def losses(self, weight: Tensor) -> Tensor:
        """Cross-entropy and KL divergence, ``(10, 2)``."""
        said, heard = (self.features @ weight.T).log_softmax(-1), self.teacher.softmax(-1)
        label = -said[torch.arange(10), self.y].where(self.y >= 0, 0)
        return torch.stack([label, (heard * (heard.log() - said)).sum(-1)], dim=1)

    def validation(self, weight: Tensor) -> Tensor:
        return F.cross_entropy(self.meta @ weight.T, self.meta_y)

    def step(self) -> MetaStep:
        logits = self.features @ self.weight.T
        gradients = term_gradients(logits, self.y, [self.teacher], 1.0)
        meta = MetaRows(self.meta, self.meta_y, torch.ones(len(self.meta), dtype=torch.bool))
        align = last_layer_align(Head(self.weight, None), self.features, gradients, meta)
        return MetaStep(torch.arange(10), self.y, logits, [self.teacher], align, self.lr, 10)


def start(rule: Rule) -> SampleTable:
    table = SampleTable(10, "test")
    rule.start(table, 1, torch.zeros(10, dtype=torch.bool), torch.zeros(10, dtype=torch.int64), 3)
    table.apply(lambda t: t.double() if t.is_floating_point() else t)
    return table


class TestL2RW:
    def test_a_batch_by_finite_differences(self) -> None:
        """How the validation loss changes with a row's weight in a step that takes no other row."""
        small, rule = Small(), Reweight()
        table = start(rule)
        rule.observe(table, small.step())
        leaf, e = small.weight.clone().requires_grad_(), 1e-5
        expected = torch.zeros(10, 2, dtype=torch.float64)
        for i in range(10):
            for k in range(2):
                [g] = torch.autograd.grad(small.losses(leaf)[i, k], leaf)
                ahead, behind = (small.validation(small.weight - sign * e * g) for sign in (1, -1))
                expected[i, k] = -(ahead - behind) / (2 * e)
        expected = expected.clamp(min=0)
        assert 0 < (expected == 0).sum() < 20
        torch.testing.assert_close(table["weights"], 10 * expected / expected.sum(), rtol=1e-6, atol=1e-6)
        assert table["weights"][3, 0] == 0

    def test_a_trusted_rows_twin_counts_and_its_mislabelled_one_does_not(self) -> None:
        small, rule = Small(meta=1), Reweight()
        small.weight.zero_()
        small.features[:2], small.y[:2] = small.meta[0], torch.tensor([0, 1])
        table = start(rule)
        rule.observe(table, small.step())
        assert table["weights"][0, 0] > 0
        assert table["weights"][1, 0] == 0

    def test_no_row_counts_where_none_helps(self) -> None:
        table, rule, step = start(Reweight()), Reweight(), Small().step()
        step.alignment = lambda weights, lr: -torch.ones_like(weights)
        rule.observe(table, step)
        assert (table["weights"] == 0).all()

    def test_a_training_by_finite_differences(self) -> None:
        """Through all layers, of the label alone, in float64; the student steps with the weights of its batch."""

        class Watched(L2RW):
            def meta_step(self, seen: Any, teachers: Any) -> None:
                super().meta_step(seen, teachers)
                meta = self.meta_batch
                theta = {name: p.detach() for name, p in self.student.named_parameters()}

                def losses(theta: dict[str, Tensor], batch: Batch) -> Tensor:
                    logits = functional_call(self.student, theta, (batch.x,))
                    return F.cross_entropy(logits, batch.y, reduction="none")

                expected = []
                for i in range(len(seen.train.y)):
                    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
                    g = torch.autograd.grad(losses(leaves, seen.train)[i], list(leaves.values()))
                    ends = [
                        losses({n: v - e * d for (n, v), d in zip(theta.items(), g, strict=True)}, meta).mean()
                        for e in (1e-5, -1e-5)
                    ]
                    expected.append((ends[1] - ends[0]).clamp(min=0))
                weights = torch.stack(expected) / torch.stack(expected).mean()
                self.proofs = [*getattr(self, "proofs", []), (self.table["weights"][seen.train.index, 0], weights)]

            def total(self, losses: Any, weights: Any, *rest: Any) -> Tensor:
                torch.testing.assert_close(weights[:, 0].double(), self.proofs[-1][1], rtol=1e-4, atol=1e-5)
                return super().total(losses, weights, *rest)

        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES))
        model = Watched(net, **BASE)
        trainer(precision="64-true", max_epochs=1).fit(model, Blobs(**NOISE))
        assert len(model.proofs) == 6
        assert any((found == 0).any() for found, _ in model.proofs)


class TestMetaWeightNet:
    def test_steps_by_double_backward(self) -> None:
        """Networks of torch's layers, torch's Adam, and the validation loss after the look-ahead."""
        small, rule = Small(), Curve(lr=0.01, weight_decay=0.3)
        table = start(rule)
        nets = []
        for flat in table.shared["weight_net"]:
            net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid()).double()
            for p, part in zip(net.parameters(), flat.split([100, 100, 100, 1]), strict=True):
                p.data = part.view_as(p).clone()
            nets.append(net)
        optimizer = torch.optim.Adam([p for net in nets for p in net.parameters()], lr=0.01, weight_decay=0.3)
        fixed = small.losses(small.weight)

        def weights() -> Tensor:
            return torch.cat([net(fixed[:, k : k + 1]) for k, net in enumerate(nets)], dim=1)

        for _ in range(3):
            leaf = small.weight.clone().requires_grad_()
            loss = (weights() * small.losses(leaf)).sum(1).mean()
            [g] = torch.autograd.grad(loss, leaf, create_graph=True)
            optimizer.zero_grad()
            small.validation(leaf - small.lr * g).backward()
            assert max(p.grad.abs().max() for net in nets for p in net.parameters()) > 1e-3  # type: ignore[union-attr]
            optimizer.step()
            rule.observe(table, small.step())
            expected = torch.stack([torch.cat([p.detach().flatten() for p in net.parameters()]) for net in nets])
            torch.testing.assert_close(table.shared["weight_net"], expected, rtol=1e-6, atol=1e-8)
            labelled = torch.stack([small.y >= 0, torch.ones(10, dtype=torch.bool)], dim=1)
            torch.testing.assert_close(table["weights"], weights().detach() * labelled, rtol=1e-6, atol=1e-8)

    def test_starts_as_torchs_layers_do(self) -> None:
        first, shift, out = start(Curve()).shared["weight_net"][:, :300].chunk(3, dim=1)
        assert 0.9 < first.abs().max() <= 1
        assert 0.9 < shift.abs().max() <= 1
        assert 0.09 < out.abs().max() <= 0.1

    def test_large_losses_weigh_less_where_labels_are_wrong(self) -> None:
        torch.manual_seed(0)
        model, data = MetaWeightNet("mlp-16", **BASE), Blobs(**NOISE)
        trainer(max_epochs=40, limit_val_batches=0).fit(model, data)
        assert model.table is not None
        curve = net_weights(model.table.shared["weight_net"], torch.linspace(0.1, 6, 20).unsqueeze(1))
        assert (curve.diff(dim=0) < 0).all()
        weights, noisy = model.table["weights"][:48, 0], data.noisy[:48]
        assert weights[~noisy].mean() > weights[noisy].mean() + 0.2


@pytest.mark.parametrize("method", [L2RW, MetaWeightNet])
@pytest.mark.parametrize("kind", ["exact", "last_layer"])
def test_beside_a_teacher(method: Any, kind: str) -> None:
    """Who is right beside many wrong labels: both weights are learned, and none is of a missing label."""
    data = Blobs(labeled=0.7, **NOISE)
    options = {"meta_gradient": kind, "optimizer": partial(torch.optim.SGD, lr=0.05)} | BASE
    model, fitted = method("mlp-8", trained_teachers(), **options), trainer(max_epochs=6)
    fitted.fit(model, data)
    weights = model.table["weights"][:48]
    assert weights.shape == (48, 3)
    assert len(weights.unique(dim=0)) > 20
    assert (weights[data.labels[:48] == UNLABELED, 0] == 0).all()
    assert weights[:, 1:].mean() > weights[data.noisy[:48], 0].mean()
    assert fitted.callback_metrics["val/accuracy"] > 0.9
