"""Co-teaching and JoCoR, against losses written out row by row, and networks trained alone."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import pytest
import torch
from lightning import seed_everything
from methods import CLASSES, SHAPE, Blobs, trainer
from test_every_method import assert_same, module
from test_terms import CLASSES as FOUR
from test_terms import Logits, close, draw, kl, softmax, step
from torch import Tensor

from lit_kd import Batch, CoTeaching, JoCoR, Supervised
from lit_kd.losses import cross_entropy
from lit_kd.types import UNLABELED

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
ROWS = 10


def batch() -> Batch:
    y = torch.arange(ROWS) % FOUR
    y[4] = UNLABELED
    return Batch(draw(ROWS, 4), y)


def smallest(losses: list[float], kept: int) -> list[int]:
    return sorted(range(len(losses)), key=lambda i: losses[i])[:kept]


def gradients(found: Tensor, nets: list[Any]) -> list[Tensor]:
    return list(torch.autograd.grad(found, [net.fc.weight for net in nets], retain_graph=True))


class TestCoTeaching:
    def test_a_step(self) -> None:
        """Of nine labelled rows a third is dropped; the mean is over the six that the other keeps."""
        nets, rows = [Logits(0), Logits(1)], batch()
        model = CoTeaching(nets[0], peers=[nets[1]], noise_rate=1 / 3, ramp_epochs=0, num_classes=FOUR)
        found = step(model, rows)
        picked = []
        for net in nets:
            p = [softmax(net(x).detach()) for x in rows.x]  # type: ignore[union-attr]
            losses = [math.inf if y == UNLABELED else -math.log(q[y]) for q, y in zip(p, rows.y, strict=True)]
            picked.append(smallest(losses, 6))
        assert len(set(picked[0])) == len(set(picked[1])) == 6
        assert set(picked[0]) != set(picked[1])
        assert not {4} & {*picked[0], *picked[1]}
        each = [cross_entropy(net(rows.x), rows.y)[other].mean() for net, other in zip(nets, picked[::-1], strict=True)]
        close(found.detach(), sum(each).detach())  # type: ignore[union-attr]
        for ours, theirs in zip(gradients(found, nets), gradients(sum(each), nets), strict=True):  # type: ignore[arg-type]
            close(ours, theirs)

    def test_equal_networks_swap_nothing(self) -> None:
        nets, rows = [Logits(0), Logits(1)], batch()
        model = CoTeaching(nets[0], peers=[nets[1]], noise_rate=0.4, ramp_epochs=0, num_classes=FOUR)
        nets[1].load_state_dict(nets[0].state_dict())
        found = step(model, rows)
        losses = cross_entropy(nets[0](rows.x), rows.y)[rows.y >= 0]
        close(found.detach(), 2 * losses.sort().values[:5].mean().detach())
        one, other = gradients(found, nets)
        close(one, other)

    def test_without_noise_it_is_two_networks_alone(self) -> None:
        """To the digit, with the same first weights and the same order; two epochs."""
        nets, data = [module("mlp-8"), module("mlp-12")], {"noise": "symmetric", "noise_rate": 0.4, "seed": 0}
        alone = copy.deepcopy(nets)
        for net in alone:
            seed_everything(0, verbose=False)
            trainer().fit(Supervised(net, **BASE), Blobs(**data))
        seed_everything(0, verbose=False)
        trainer().fit(CoTeaching(nets[0], peers=[nets[1]], noise_rate=0.0, **BASE), Blobs(**data))
        for ours, expected in zip(nets, alone, strict=True):
            assert_same(ours.state_dict(), expected.state_dict())

    def test_the_dropped_share_rises(self) -> None:
        """To half of each batch of 8 rows, over four epochs; both networks learn from equally many."""

        class Watched(CoTeaching):
            kept: ClassVar[list[list[set[int]]]] = [[] for _ in range(6)]

            def weigh_all(self, losses: Any, batch: Batch) -> Any:
                weights = super().weigh_all(losses, batch)
                self.kept[self.current_epoch].append({int((w > 0).sum()) for w in weights})
                return weights

        model = Watched("mlp-8", peers=["mlp-12"], noise_rate=0.5, ramp_epochs=4, **BASE)
        trainer(max_epochs=6).fit(model, Blobs())
        assert model.kept == [[{count}] * 6 for count in (8, 7, 6, 5, 4, 4)]


def test_a_soft_label_that_is_missing_is_not_chosen() -> None:
    """Though its loss is the smallest, 0."""
    model = CoTeaching("mlp-8", peers=["mlp-12"], noise_rate=0.5, ramp_epochs=0, **BASE)
    soft = Batch(torch.zeros(3, 1), torch.tensor([[0.0, 0.0], [0.9, 0.1], [0.2, 0.8]]))
    assert model.small(torch.tensor([0.0, 2.0, 1.0]), soft).tolist() == [0.0, 0.0, 3.0]


class TestJoCoR:
    def test_a_step(self) -> None:
        """The gradient flows through both sides of the divergence."""
        nets, rows, a = [Logits(0), Logits(1)], batch(), 0.85
        model = JoCoR(nets[0], peers=[nets[1]], agreement=a, noise_rate=1 / 3, ramp_epochs=0, num_classes=FOUR)
        found = step(model, rows)
        losses = []
        for x, y in zip(rows.x, rows.y.tolist(), strict=True):  # type: ignore[arg-type]
            p, q = (softmax(net(x).detach()) for net in nets)
            label = math.inf if y == UNLABELED else -math.log(p[y]) - math.log(q[y])
            losses.append((1 - a) * label + a * (kl(p, q) + kl(q, p)))
        kept = smallest(losses, 6)
        close(found.detach(), sum(losses[i] for i in kept) / 6)
        said = [net(rows.x).log_softmax(-1) for net in nets]
        agree = ((said[0].exp() - said[1].exp()) * (said[0] - said[1])).sum(-1)  # of both divergences
        labels = [cross_entropy(one, rows.y) for one in said]
        expected = ((1 - a) * (labels[0] + labels[1]) + a * agree)[kept].mean()
        for ours, theirs in zip(gradients(found, nets), gradients(expected, nets), strict=True):
            close(ours, theirs)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: CoTeaching("mlp-8", peers=["mlp-8"], **BASE), "which CoTeaching must know, found None: count wrong"),
        (lambda: JoCoR("mlp-8", peers=["mlp-8"], noise_rate=1.0, **BASE), r"in \[0, 1\), which JoCoR must know"),
        (lambda: JoCoR("mlp-8", peers=["mlp-8"] * 2, noise_rate=0.1, **BASE), "one peer, as JoCoR trains two"),
        (lambda: JoCoR("mlp-8", peers=["mlp-8"], agreement=1.0, noise_rate=0.1, **BASE), "agreement in"),
        (lambda: JoCoR("mlp-8", peers=["mlp-8"], mix="mixup", noise_rate=0.1, **BASE), "expected no mix with JoCoR"),
    ],
)
def test_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
