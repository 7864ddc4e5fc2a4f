"""The exact meta-gradient of pixels, tokens and numbers against central differences of the validation loss.

The oracle takes the look-ahead step with torch's own losses, sample by sample, in float64.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import seed_everything
from methods import trainer
from test_methods_tasks import SIZES, Few, Net
from torch import Tensor
from torch.func import functional_call

from lit_kd import ALMKD
from lit_kd.data import SampleTable, Source
from lit_kd.types import IGNORED, Batch, Outputs
from lit_kd.weightings import Amal, Paper
from lit_kd.weightings.base import MetaStep
from lit_kd.weightings.lookahead import Seen

LR = 0.3


class Holes(Few):
    """A row without any label, and one with half of them."""

    def load(self) -> Source:
        source = super().load()
        source.labels = source.labels.copy()
        missing = np.nan if self.task == "regression" else IGNORED
        source.labels[2], source.labels[5, :1] = missing, missing
        return source


class Noting:
    """Notes the weights and their gradient."""

    def observe(self, table: SampleTable, step: MetaStep) -> None:
        weights = table["weights"][step.index]
        self.noted = weights.double(), step.gradient(weights)
        super().observe(table, step)  # type: ignore[misc]


class NotedPaper(Noting, Paper):
    pass


class NotedAmal(Noting, Amal):
    pass


def label_loss(task: str, z: Tensor, y: Tensor) -> Tensor:
    """Of one sample, by torch."""
    if task == "regression":
        return torch.stack([(a - b) ** 2 if not b.isnan() else 0 * a for a, b in zip(z, y, strict=True)]).mean()
    if (y == IGNORED).all():
        return 0 * z.sum()
    return F.cross_entropy((z if task == "dense" else z.mT).unsqueeze(0), y.unsqueeze(0), ignore_index=IGNORED)


def teacher_loss(task: str, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Of one sample, at temperature 2."""
    if task == "regression":
        return F.mse_loss(z, t)
    if task == "dense":
        z, t = z.movedim(0, -1), t.movedim(0, -1)
    kept = y != IGNORED
    if not kept.any():
        return 0 * z.sum()
    logs = [(x[kept] / 2).log_softmax(-1) for x in (z, t)]
    return 4 * F.kl_div(*logs, reduction="batchmean", log_target=True)


class Proven(ALMKD):
    def meta_step(self, seen: Seen, teachers: list[Outputs]) -> None:
        theta = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        super().meta_step(seen, teachers)
        weights, found = self.rule.noted  # type: ignore[union-attr]
        task, meta, train, share = self.task.name, self.meta_batch, seen.train, self.rule.train_share

        def mean(values: dict[str, Tensor], rows: Batch, keep: list[int]) -> Tensor:
            z = functional_call(self.student, values, (rows.x,))
            return torch.stack([label_loss(task, z[i], rows.y[i]) for i in keep]).mean()

        def objective(given: Tensor) -> float:
            leaves = {name: value.requires_grad_() for name, value in theta.items()}
            with torch.enable_grad():
                z, t = functional_call(self.student, leaves, (train.x,)), teachers[0].logits
                each = [(label_loss(task, *pair), teacher_loss(task, pair[0], t[i], pair[1])) for i, pair in rows(z)]
                total = sum(w[0] * label + w[1] * taught for w, (label, taught) in zip(given, each, strict=True))
                steps = torch.autograd.grad(total / len(each), list(leaves.values()))
            moved = {name: v.detach() - LR * g for (name, v), g in zip(leaves.items(), steps, strict=True)}
            apart = [i for i, row in enumerate(meta.index.tolist()) if row not in train.index.tolist()]
            value = (1 - share) * mean(moved, meta, apart) + share * mean(moved, train, list(range(len(train.y))))
            return float(value)

        def rows(z: Tensor) -> Any:
            return enumerate(zip(z, train.y, strict=True))

        expected, eps = torch.zeros_like(weights), 1e-4
        for place in np.ndindex(*weights.shape):
            up, down = weights.clone(), weights.clone()
            up[place], down[place] = up[place] + eps, down[place] - eps
            expected[place] = (objective(up) - objective(down)) / (2 * eps)
        self.proofs = [*getattr(self, "proofs", []), (found, expected)]


@pytest.mark.parametrize("task", ["dense", "tokens", "regression"])
@pytest.mark.parametrize(
    "rule",
    [lambda: NotedPaper(warmup_epochs=0, every=1), lambda: NotedAmal(train_share=0.25, warmup_epochs=0, every=1)],
)
def test_finite_differences(task: str, rule: Any) -> None:
    seed_everything(0, verbose=False)
    options: dict[str, Any] = {
        "optimizer": partial(torch.optim.SGD, lr=LR),
        "temperature": 2.0,
        "meta_gradient": "exact",
    }
    model = Proven(Net(task), Net(task), num_classes=SIZES[task], task=task, rule=rule(), **options)
    trainer(precision="64-true", max_epochs=1).fit(model, Holes(task))
    assert len(model.proofs) >= 2
    for found, expected in model.proofs:
        assert expected.abs().max() > 1e-4
        assert (found - expected).abs().max() <= 1e-7 * expected.abs().max()
