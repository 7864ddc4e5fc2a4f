"""Comparative distillation, against a loop over pairs in float64, and its invariances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from torch import Tensor, nn

from lit_kd import ALMKD, ComparativeKD
from lit_kd.losses import comparative_loss
from lit_kd.terms import Comparative
from lit_kd.types import PENULTIMATE, UNLABELED, Batch, Outputs
from lit_kd.weightings import Paper

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 5), (4, 2, 3, 3), (2, 1)])
def test_by_pairs(shape: tuple[int, ...]) -> None:
    s, t = draw(*shape), draw(*shape, seed=1)
    rows = range(shape[0])
    pairs = [((s[i] - s[j]) - (t[i] - t[j])).square().mean() for i in rows for j in rows]
    torch.testing.assert_close(comparative_loss(s, t), torch.stack(pairs).mean(), rtol=1e-10, atol=0)


def test_what_all_samples_share_does_not_count() -> None:
    s = draw(7, 5).requires_grad_()
    found = comparative_loss(s, s.detach() + draw(1, 5, seed=2))
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(s.grad, torch.zeros_like(s), atol=1e-12, rtol=0)
    torch.testing.assert_close(comparative_loss(s + 4, draw(7, 5)), comparative_loss(s, draw(7, 5)))


def test_the_order_of_the_batch_does_not_count() -> None:
    s, t, order = draw(7, 5), draw(7, 5, seed=1), torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(comparative_loss(s[order], t[order]), comparative_loss(s, t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_extreme_logits_one_row_and_no_labels(dtype: torch.dtype, rows: int) -> None:
    z = torch.tensor([[1e4, -1e4], [0, 0], [-1e4, 1e4]], dtype=dtype)[:rows].requires_grad_()
    batch = Batch(z, torch.full((rows,), UNLABELED))
    found = Comparative()(Outputs(z, {}), Outputs(-z.detach(), {}), batch)
    found.backward()
    assert (found.shape, found.dtype) == ((), torch.float32)
    assert found.isfinite()
    assert (found == 0) == (rows == 1)
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_features_of_other_widths_have_an_adapter() -> None:
    for width, adapts in (16, False), (8, True):
        model = ComparativeKD(
            f"mlp-{width}", trained_teachers()[1], student_tap=PENULTIMATE, teacher_tap=PENULTIMATE, **BASE
        )
        trainer().fit(model, Blobs(labeled=0.5))
        assert model.terms is not None
        [term] = model.terms.each
        assert isinstance(term, Comparative)
        assert isinstance(term.adapter, nn.Linear) == adapts


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"expected features .* teacher's shape, \(4, 1\), found \(4, 3\)"):
        comparative_loss(draw(4, 3), draw(4, 1))
    with pytest.raises(ValueError, match="expected a layer of both networks, or of none for logits"):
        Comparative("layer1")
    model = ALMKD("mlp-8", trained_teachers()[0], term=Comparative(), rule=Paper(warmup_epochs=0, every=1), **BASE)
    with pytest.raises(ValueError, match="ALMKD cannot weigh Comparative by sample"):
        trainer().fit(model, Blobs())
    with pytest.raises(ValueError, match="Comparative compares the rows of a batch"):
        trainer().fit(ComparativeKD("mlp-8", trained_teachers()[0], mix="mixup", **BASE), Blobs())
