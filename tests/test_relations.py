"""Losses on how samples of a batch relate, against loops and scipy in float64, limits and invariances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from methods import CLASSES, SHAPE, Blobs, build, trained_teachers, trainer
from scipy.spatial.distance import pdist, squareform
from scipy.stats import ortho_group
from test_combinations import Images
from torch import Tensor, nn

from lit_kd import ALMKD, KD, PKT, RKD, Batch, Outputs, SimilarityPreserving
from lit_kd.losses import affinity_loss, angle_loss, distance_loss, similarity_loss
from lit_kd.terms import Affinity, Relational, Similarity
from lit_kd.terms import relations as terms
from lit_kd.types import UNLABELED

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
LOSSES = [similarity_loss, affinity_loss, distance_loss, angle_loss]
TERMS = [Similarity("f", "f"), Affinity("f", "f"), Relational("f", "f")]
of_each_loss = pytest.mark.parametrize("loss", LOSSES)
of_each_term = pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)


def draw(rows: int = 6) -> tuple[Tensor, Tensor]:
    """Features of student and teacher, of other widths."""
    g = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 4, generator=g).double(), 3 * torch.randn(rows, 7, generator=g).double() + 1


def value(term: Any, s: Tensor, t: Tensor) -> Tensor:
    y = torch.full((len(s),), UNLABELED)
    found: Tensor = term(Outputs(s, {"f": s}), Outputs(t, {"f": t}), Batch(s, y, None))
    return found


def smooth_l1(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def similarity_by_hand(s: np.ndarray, t: np.ndarray) -> float:
    n, total = len(s), 0.0
    for i in range(n):
        rows = [np.array([sum(f[i] * f[j]) for j in range(n)]) for f in (s, t)]
        a, b = (row / math.sqrt(sum(row**2)) for row in rows)
        total += sum((a - b) ** 2)
    return total / n**2


def affinity_by_hand(s: np.ndarray, t: np.ndarray) -> float:
    q, p = (1 - 0.5 * squareform(pdist(f, "cosine")) for f in (s, t))
    q, p = (f / f.sum(1, keepdims=True) for f in (q, p))
    each = [p[i, j] * math.log((p[i, j] + 1e-7) / (q[i, j] + 1e-7)) for i in range(len(s)) for j in range(len(s))]
    return sum(each) / len(each)


def distance_by_hand(s: np.ndarray, t: np.ndarray) -> float:
    a, b = (squareform(pdist(f) / pdist(f).mean()) for f in (s, t))
    return float(np.mean([smooth_l1(x, y) for x, y in zip(a.flat, b.flat, strict=True)]))


def angle_by_hand(s: np.ndarray, t: np.ndarray) -> float:
    """By the law of cosines."""

    def cosine(d: np.ndarray, i: int, j: int, k: int) -> float:
        if i in (j, k):
            return 0.0
        return float((d[i, j] ** 2 + d[i, k] ** 2 - d[j, k] ** 2) / (2 * d[i, j] * d[i, k]))

    a, b, n = squareform(pdist(s)), squareform(pdist(t)), len(s)
    triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    return float(np.mean([smooth_l1(cosine(a, *one), cosine(b, *one)) for one in triples]))


BY_HAND = [similarity_by_hand, affinity_by_hand, distance_by_hand, angle_by_hand]


@pytest.mark.parametrize(("loss", "by_hand"), zip(LOSSES, BY_HAND, strict=True))
@pytest.mark.parametrize("rows", [3, 6, 9])
def test_by_hand(loss: Any, by_hand: Any, rows: int) -> None:
    s, t = draw(rows)
    assert loss(s, t).item() == pytest.approx(by_hand(s.numpy(), t.numpy()), rel=1e-10)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, t), s)


def test_weights_of_rkd() -> None:
    s, t = draw()
    found = value(Relational("f", "f", distance=2.0, angle=3.0), s, t)
    torch.testing.assert_close(found, 2 * distance_loss(s, t) + 3 * angle_loss(s, t))
    torch.testing.assert_close(value(Relational("f", "f"), s, t), 25 * distance_loss(s, t) + 50 * angle_loss(s, t))


@of_each_loss
def test_what_does_not_count(loss: Any) -> None:
    s, t = draw()
    turn = torch.from_numpy(ortho_group.rvs(4, random_state=0))
    moved = 3.0 * s @ turn
    if loss in (distance_loss, angle_loss):
        moved = moved + 5.0
    if loss is affinity_loss:
        moved = moved * torch.arange(1, 7).unsqueeze(1)  # each row by a scale of its own
    torch.testing.assert_close(loss(moved, t), loss(s, t), rtol=1e-10, atol=1e-12)
    assert loss(moved, s).abs() < 1e-12
    assert loss(s, t) > 1e-6
    wide = torch.cat([s, torch.zeros(6, 9)], 1)  # the width does not count, and neither does the order of samples
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(loss(wide[order], t[order]), loss(s, t), rtol=1e-10, atol=1e-12)


@of_each_term
class TestFew:
    def test_one_row(self, term: Any) -> None:
        s = torch.ones(1, 3, requires_grad=True)
        found = value(term, s, torch.ones(1, 5))
        found.backward()
        assert found.item() == pytest.approx(0.0, abs=1e-6)
        assert s.grad is not None
        torch.testing.assert_close(s.grad, torch.zeros(1, 3), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("whose", ["student", "teacher", "both"])
    def test_equal_rows_and_rows_of_zeros(self, term: Any, whose: str) -> None:
        s, t = (x.float() for x in draw())
        for f in [s] if whose == "student" else [t] if whose == "teacher" else [s, t]:
            f[1] = f[0]
            f[2:4] = 0
        for rows in 6, 4:
            leaf = s[:rows].clone().requires_grad_()
            found = value(term, leaf, t[:rows])
            found.backward()
            assert found.isfinite()
            assert leaf.grad is not None
            assert leaf.grad.abs().max() < 1e3  # and a row of zeros has no gradient of 1e12
        same = torch.ones(5, 3, requires_grad=True)
        found = value(term, same, t[:5])
        found.backward()
        assert found.isfinite()
        assert same.grad is not None
        assert same.grad.isfinite().all()


def test_two_rows_have_one_distance_and_no_angle() -> None:
    s, t = (x[:2] for x in draw())
    assert distance_loss(s, t).abs() < 1e-12
    assert angle_loss(s, t).abs() < 1e-12


class TestPublishedDefects:
    def test_distances_from_scalar_products_lose_their_digits(self) -> None:
        s, t = draw()
        far = (s + 4096).float()
        squares = far.square().sum(1)
        wrong = (squares.unsqueeze(0) + squares.unsqueeze(1) - 2 * far @ far.T).clamp(min=1e-12).sqrt()
        right = torch.from_numpy(squareform(pdist(s.numpy()))).float()
        assert (wrong - right).abs().max() > 0.5
        torch.testing.assert_close(distance_loss(far, t.float()), distance_loss(s, t).float(), rtol=1e-2, atol=0)

    def test_a_root_of_zero_has_no_gradient(self) -> None:
        """Which made PKT's NaN for a dead row: its value was repaired, its gradient was not."""
        dead, t = draw()
        dead[0] = 0
        s = dead.requires_grad_()
        s.square().sum(1).sqrt().sum().backward()
        assert s.grad is not None
        assert s.grad.isnan().any()
        s.grad = None
        affinity_loss(s, t).backward()
        assert s.grad.isfinite().all()

    def test_cosines_below_minus_one(self) -> None:
        """Rounding gives them, and what is left of an affinity is then below 0."""
        g = torch.Generator().manual_seed(0)
        for _ in range(50):
            f = torch.randn(1, 3000, generator=g)
            opposed = torch.cat([f, -f, -f])
            assert affinity_loss(opposed, opposed.flip(0)).isfinite()


@of_each_term
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_features(term: Any, dtype: torch.dtype) -> None:
    """Scalar products of whole maps are beyond float16."""
    s, t = ((1e4 * x.clamp(-3, 3)).to(dtype).repeat(1, 9).unflatten(1, (-1, 3, 3)) for x in draw(9))
    s.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = value(term, s, t)
    found.backward()
    assert found.dtype == torch.float32
    assert s.grad is not None
    assert s.grad.isfinite().all()
    torch.testing.assert_close(found, value(term, s.float(), t.float()))  # autocast rounds nothing


def test_angles_of_the_first_rows_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = draw(200)
    expected = 25 * distance_loss(s, t) + 50 * angle_loss(s[:128], t[:128])
    torch.testing.assert_close(value(Relational("f", "f"), s, t), expected)
    seen = []
    monkeypatch.setattr(terms, "angle_loss", lambda a, b: seen.append((len(a), len(b))) or angle_loss(a, b))
    value(Relational("f", "f"), *draw(1000))
    assert seen == [(128, 128)]


@pytest.mark.parametrize("method", [SimilarityPreserving, PKT, RKD])
class TestMethods:
    def test_vision_transformer_as_teacher(self, method: Any) -> None:
        from torchvision.models import VisionTransformer

        teacher: nn.Module = VisionTransformer(4, 2, 2, 2, 16, 32, num_classes=CLASSES)
        for taps in {}, {"teacher_tap": "encoder.layers.encoder_layer_1", "student_tap": "layer3"}:
            fitted = trainer(max_epochs=1, precision="bf16-mixed")
            model = method("cnn-2", teacher, weight=1.0, num_classes=CLASSES, input_shape=[3, 4, 4], **taps)
            fitted.fit(model, Images())
            assert fitted.callback_metrics["train/teacher"].isfinite()

    def test_near_taps_are_named(self, method: Any) -> None:
        with pytest.raises(ValueError, match=r"no layer 'layer_2' in ConvNet; the nearest are \['layer2"):
            trainer().fit(method("cnn-2", trained_teachers()[0], student_tap="layer_2", **BASE), Blobs())

    def test_rows_without_a_label(self, method: Any) -> None:
        fitted = trainer(max_epochs=1)
        fitted.fit(method("mlp-8", trained_teachers(), weight=1.0, **BASE), Blobs(labeled=6, batch_size=5))
        assert fitted.callback_metrics["train/loss"].isfinite()


@pytest.mark.parametrize("method", ["similarity-preserving", "pkt", "rkd"])
def test_without_labels_the_student_comes_to_relate_samples_as_the_teacher(method: str) -> None:
    model, found = build(method, teachers=trained_teachers()[:1]), list[float]()

    def note(means: Any, rows: int) -> None:
        found.append(means["train/teacher"].item())

    model.weigh = lambda *_: [0.0, 1.0]  # type: ignore[method-assign]
    model.log_means = note  # type: ignore[method-assign]
    trainer(max_epochs=15, limit_val_batches=0).fit(model, Blobs())
    assert np.mean(found[-6:]) < 0.6 * np.mean(found[:6])


@pytest.mark.parametrize("term", [Similarity(), Affinity(), Relational()], ids=lambda term: term.name)
def test_beside_weights_by_sample(term: Any) -> None:
    """One number a batch is no term that is weighed by sample, but an extra one."""
    with pytest.raises(ValueError, match="it couples the rows of a batch"):
        trainer().fit(ALMKD("mlp-8", trained_teachers()[1], term=term, meta_gradient="exact", **BASE), Blobs())
    fitted = trainer(max_epochs=1)
    fitted.fit(KD("mlp-8", trained_teachers()[1], extra=[term], **BASE), Blobs())
    assert fitted.callback_metrics[f"train/{term.name}"].isfinite()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="weights of distance and angle of at least 0, found -1"):
        Relational(distance=-1)
    with pytest.raises(ValueError, match="a weight of at least 0, found -3"):
        PKT("mlp-8", "a", weight=-3.0, **BASE)
