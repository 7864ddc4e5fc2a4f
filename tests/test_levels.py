"""Multi-level distillation: what the paper means, and what the published code does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from methods import Blobs, build, trainer
from scipy.special import rel_entr, softmax
from torch import Tensor

from lit_kd.losses import relation_loss, standardised
from lit_kd.terms import MultiLevel
from lit_kd.types import UNLABELED, Batch, Outputs

B, C = 7, 5
Y = torch.tensor([0, 4, 2, UNLABELED, 1, 3, 3])


def logits(seed: int = 0, rows: int = B) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, C, generator=g).double(), 2 * torch.randn(rows, C, generator=g).double()


def value(z: Tensor, t: Tensor, **options: Any) -> Tensor:
    return MultiLevel(**options)(Outputs(z, {}), Outputs(t, {}), Batch(z, Y[: len(z)]))


def levels(z: Any, t: Any) -> tuple[Any, Any, Any]:
    """What each row adds to instances and batch, ``(B,)``, and each class to classes, ``(C,)``; by loops."""
    instance, batch, classes = np.zeros(len(z)), np.zeros(len(z)), np.zeros(C)
    for temperature in (2, 3, 4, 5, 6):
        p, q = (np.stack([softmax(row / temperature) for row in x]) for x in (z, t))
        for i in range(len(z)):
            instance[i] += temperature**2 * rel_entr(q[i], p[i]).sum() / len(z)
            for j in range(len(z)):
                batch[i] += (sum(p[i] * p[j]) - sum(q[i] * q[j])) ** 2 / len(z)
        for a in range(C):
            for b in range(C):
                classes[a] += (sum(p[:, a] * p[:, b]) - sum(q[:, a] * q[:, b])) ** 2 / C
    return instance, batch, classes


def halves(t: Any) -> tuple[Any, Any]:
    """The rows, and the classes, of which the teacher is less sure, as published code finds them."""
    said = np.stack([softmax(row) for row in t])
    sure, of_class = said.max(1), said.sum(0)
    return sure <= np.percentile(sure, 50), of_class <= np.percentile(of_class, 50)


@pytest.mark.parametrize("rows", [6, 7])
def test_by_loops(rows: int) -> None:
    z, t = logits(rows=rows)
    instance, batch, classes = levels(z.numpy(), t.numpy())
    unsure, rare = halves(t.numpy())
    assert (unsure.sum(), rare.sum()) == ((rows + 1) // 2, 3)
    expected = instance[unsure].sum() + batch[unsure].sum() + classes[rare].sum()
    assert value(z, t).item() == pytest.approx(expected, rel=1e-10)


def test_a_published_defect() -> None:
    """A mask that meets a mean: all rows count, and all classes, by the part that is masked."""
    z, t = logits()
    instance, batch, classes = levels(z.numpy(), t.numpy())
    unsure, rare = halves(t.numpy())
    expected = unsure.mean() * (instance.sum() + batch.sum()) + rare.mean() * classes.sum()
    assert value(z, t, published=True).item() == pytest.approx(expected, rel=1e-10)
    assert abs(value(z, t).item() / expected - 1) > 0.1
    sure = torch.tensor(~unsure).unsqueeze(1)
    differs = torch.where(sure, t + torch.eye(C).double()[Y.clamp(min=0)], t)  # only where the teacher is sure
    instance, batch, classes = levels(differs.numpy(), t.numpy())
    relations = batch[unsure].sum() + classes[rare].sum()
    assert value(differs, t).item() == pytest.approx(relations, rel=1e-10)
    assert value(differs, t, published=True).item() > unsure.mean() * instance.sum() > 0.01


def test_equal_logits_teach_nothing() -> None:
    z, t = logits()
    z = t.clone().requires_grad_()
    found = value(z, t + 3.0)
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-12)
    assert z.grad is not None
    assert z.grad.abs().max() < 1e-12


def test_order_does_not_count() -> None:
    z, t = logits()
    order, others = torch.tensor([3, 1, 0, 2, 6, 5, 4]), torch.tensor([4, 2, 0, 1, 3])
    for options in ({}, {"published": True}):
        torch.testing.assert_close(value(z[order], t[order], **options), value(z, t, **options))
        torch.testing.assert_close(value(z[:, others], t[:, others], **options), value(z, t, **options))
    p, q = z.softmax(-1), t.softmax(-1)
    ones = torch.ones(C).double()
    torch.testing.assert_close(relation_loss(p[order].mT, q[order].mT, ones), relation_loss(p.mT, q.mT, ones))


def test_standardised_instances_alone() -> None:
    z, t = logits()
    _, batch, classes = levels(z.numpy(), t.numpy())
    instance, _, _ = levels(standardised(z).numpy(), standardised(t).numpy())
    unsure, rare = halves(t.numpy())
    expected = instance[unsure].sum() + batch[unsure].sum() + classes[rare].sum()
    assert value(z, t, standardise=True).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_and_a_single_row(dtype: torch.dtype, published: bool) -> None:
    z = torch.tensor([[1e4, -1e4, 0], [0.0, 0, 0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[-1e4, 1e4, 0], [1e4, -1e4, 0], [0, 0, 0.0]], dtype=dtype)
    for rows in (3, 1):
        z.grad = None
        found = value(z[:rows], t[:rows], published=published)
        found.backward()
        assert found.dtype == torch.float32
        assert found.isfinite()
        assert z.grad is not None
        assert z.grad.isfinite().all()


def test_products_are_taken_in_float32() -> None:
    z, t = (x.float() for x in logits())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value(z, t)
    torch.testing.assert_close(found, value(z, t), rtol=1e-6, atol=0)


def test_rows_without_a_label_take_part() -> None:
    z, t = logits()
    term = MultiLevel()
    found = [term(Outputs(z, {}), Outputs(t, {}), Batch(z, y)) for y in (Y, torch.full((B,), UNLABELED))]
    assert found[0] == found[1]


def test_the_published_form_trains() -> None:
    model, fitted = build("multi-level", published=True), trainer()
    fitted.fit(model, Blobs(labeled=0.5))
    assert fitted.callback_metrics["val/accuracy"] > 0.9
    with pytest.raises(ValueError, match="MultiLevel compares the rows of a batch"):
        trainer().fit(build("multi-level", mix="mixup"), Blobs())
