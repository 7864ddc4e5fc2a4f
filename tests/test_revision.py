"""Label Revision and the choice of rows to distil: pure functions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import rel_entr, softmax
from torch import Tensor

from lit_kd.losses import kd_loss, revise_labels, revised_teacher
from lit_kd.trust.meta import Head, MetaRows, select_rows, selection_scores
from lit_kd.types import UNLABELED


def random_cases(rows: int = 5000, classes: int = 7) -> tuple[Tensor, Tensor]:
    """From next to uniform to next to certain teachers."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=draw, dtype=torch.float64)
    scale = torch.logspace(-3, 2, rows, dtype=torch.float64).unsqueeze(1)
    return (scale * logits).softmax(1), torch.randint(classes, (rows,), generator=draw)


class TestReviseLabels:
    @pytest.mark.parametrize("eta", [0.0, 0.8])
    def test_true_class_is_on_top_of_every_row(self, eta: float) -> None:
        p, y = random_cases()
        wrong = p.argmax(1) != y
        assert wrong.sum() > 3000
        found = revise_labels(p, y, eta)
        assert torch.equal(found[~wrong], p[~wrong])
        assert torch.equal(found.argmax(1), y)
        others = found.clone().scatter_(1, y.unsqueeze(1), -1).amax(1)
        lead = found.gather(1, y.unsqueeze(1)).squeeze(1) - others
        torch.testing.assert_close(lead[wrong], torch.full_like(lead[wrong], 1 - eta), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.sum(1), torch.ones(len(y), dtype=torch.float64))
        assert (found >= 0).all()

    def test_formula_row_by_row(self) -> None:
        p, y = random_cases(200)
        assert torch.equal(revise_labels(p, torch.full((200,), UNLABELED)), p)
        found = revise_labels(p, y, 0.8).numpy()
        for row, q, label in zip(found, p.numpy(), y.tolist(), strict=True):
            if q.argmax() != label:
                beta = 0.8 / (q.max() - q[label] + 1)
                q = beta * q + (1 - beta) * np.eye(7)[label]
            np.testing.assert_allclose(row, q, rtol=1e-12)

    @pytest.mark.parametrize("eta", [-0.1, 1.0, float("nan")])
    def test_eta_out_of_range(self, eta: float) -> None:
        with pytest.raises(ValueError, match=r"expected eta in \[0, 1\).*found"):
            revise_labels(*random_cases(3), eta)

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_logits_for_kd_loss(self, temperature: float) -> None:
        """The loss is that of the revised softened probabilities; sure teachers in float32 give no nan."""
        p, y = random_cases(500)
        t, z = (p.log().float() * 3).clamp(min=-300), torch.randn(500, 7, generator=torch.Generator().manual_seed(1))
        found = kd_loss(z, revised_teacher(t, y, 0.8, temperature), temperature)
        revised = revise_labels((t.double() / temperature).softmax(1), y, 0.8)
        expected = temperature**2 * rel_entr(revised.numpy(), softmax(z.double().numpy() / temperature, axis=1)).sum(1)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def problem(bias: bool) -> tuple[Head, Tensor, Tensor, MetaRows]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    head = Head(normal(4, 5), normal(4) if bias else None)
    y = torch.randint(4, (30,), generator=draw)
    y[3] = UNLABELED
    meta_y = torch.randint(4, (12,), generator=draw)
    keep = torch.arange(12) != 5
    return head, normal(30, 5), y, MetaRows(normal(12, 5), meta_y, keep)


def flat_gradient(head: Head, features: Tensor, y: Tensor) -> Tensor:
    """Of the mean cross-entropy by all numbers of the head, by autograd."""
    parts = [p.clone().requires_grad_() for p in head if p is not None]
    logits = Head(*parts, *([None] * (2 - len(parts))))(features)
    return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(logits, y), parts)])


class TestSelectionScores:
    @pytest.mark.parametrize("bias", [True, False])
    def test_first_order_is_autograds(self, bias: bool) -> None:
        head, features, y, meta = problem(bias)
        target = flat_gradient(head, meta.features[meta.keep], meta.y[meta.keep])
        found = selection_scores(head, features, y, meta)
        for i in range(30):
            expected = 0.0 if i == 3 else float(target @ flat_gradient(head, features[i : i + 1], y[i : i + 1]))
            assert found[i].item() == pytest.approx(expected, abs=1e-12)

    def test_predicts_what_a_step_does(self) -> None:
        """The score is how fast the loss on trusted rows falls along the row's gradient."""
        head, features, y, meta = problem(True)
        assert head.bias is not None
        rows, step, i = meta._replace(keep=torch.ones(12, dtype=torch.bool)), 1e-6, 7
        own = flat_gradient(head, features[i : i + 1], y[i : i + 1])

        def loss(sign: int) -> Tensor:
            moved = Head(head.weight - sign * step * own[:20].view(4, 5), head.bias - sign * step * own[20:])
            return F.cross_entropy(moved(rows.features), rows.y)

        falls = (loss(-1) - loss(1)) / (2 * step)
        assert selection_scores(head, features, y, rows)[i].item() == pytest.approx(falls.item(), rel=1e-6)


class TestSelectRows:
    def test_best_of_the_labeled_and_all_others(self) -> None:
        scores = torch.tensor([0.1, 0.9, 0.0, 0.5, -2.0, 0.5])
        y = torch.tensor([0, 1, UNLABELED, 1, 0, 0])
        assert select_rows(scores, y, 0.4).tolist() == [False, True, True, True, False, False]
        assert select_rows(scores, y, 0.0).tolist() == [False, False, True, False, False, False]
        assert select_rows(scores, y, 1.0).all()
        assert select_rows(scores, torch.full((6,), UNLABELED), 0.5).all()
