"""Divergences, standardised logits, NKD, DIST and WSLD, against loops in float64, limits and invariances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from methods import CLASSES, SHAPE, Blobs, build, trained_teachers, trainer, weighted_terms
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import pearsonr
from torch import Tensor

from lit_kd import ALMKD, DIST, KD, NKD, WSLD
from lit_kd.losses import correlation_loss, divergence, kd_loss, normalised_kd_loss, standardised
from lit_kd.losses.divergences import KINDS, Kind
from lit_kd.terms import KL, BatchCorrelation, BernoulliKL, Correlation, DecoupledKL, LogitTerm, NormalisedKL
from lit_kd.terms.base import weighted_means
from lit_kd.types import UNLABELED, Batch, Outputs
from lit_kd.weightings import Paper

B, C = 7, 5
Y = torch.tensor([0, 4, 2, UNLABELED, 1, 3, 3])


def logits(seed: int = 0, size: float = 2.0) -> tuple[Tensor, Tensor]:
    """Student's and teacher's, in float64."""
    g = torch.Generator().manual_seed(seed)
    return tuple(size * torch.randn(B, C, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def by_row(kind: str, p: Any, q: Any, beta: float) -> float:
    """One divergence from probabilities."""
    kl = lambda a, b: float(rel_entr(a, b).sum())  # noqa: E731
    m = beta * p + (1 - beta) * q
    return {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "jensen_shannon": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "total_variation": float(max((p - q)[list(s)].sum() for s in subsets(len(p)))),  # of all events the largest
        "skewed": kl(p, m),
        "skewed_reverse": kl(q, (1 - beta) * p + beta * q),
    }[kind]


def subsets(n: int) -> list[tuple[int, ...]]:
    """All of n numbers."""
    return [tuple(i for i in range(n) if mask >> i & 1) for mask in range(2**n)]


class TestDivergence:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("beta", [0.1, 0.5, 0.7])
    def test_by_row(self, kind: Kind, beta: float) -> None:
        z, t = logits()
        found = KL(3.0, divergence=kind, beta=beta).loss(z, t, Y)
        expected = [
            9 * by_row(kind, softmax(b.numpy() / 3), softmax(a.numpy() / 3), beta) for a, b in zip(z, t, strict=True)
        ]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)

    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_to_learn_where_both_say_the_same(self, kind: Kind) -> None:
        z, _ = logits()
        z.requires_grad_()
        found = KL(2.0, divergence=kind).loss(z, z.detach() + 3.0, Y)
        found.sum().backward()
        torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)
        if kind != "total_variation":  # it has a kink there
            torch.testing.assert_close(z.grad, torch.zeros_like(z), atol=1e-12, rtol=0)

    def test_bounds_and_limits(self) -> None:
        z, t = (x.log_softmax(-1) for x in logits(size=30.0))
        assert (divergence(z, t, "jensen_shannon") <= math.log(2) + 1e-12).all()
        torch.testing.assert_close(divergence(z, t, "jensen_shannon"), divergence(t, z, "jensen_shannon"))
        for kind in "skewed", "skewed_reverse":
            assert (divergence(z, t, kind, 0.1) <= -math.log(0.1) + 1e-12).all()
        assert (divergence(z, t, "total_variation") <= 1 + 1e-12).all()
        z, t = (x.log_softmax(-1) for x in logits())
        b = 1e-7
        torch.testing.assert_close(divergence(t, z, "jensen_shannon", b) / b, divergence(t, z), rtol=1e-5, atol=0)
        far = divergence(t, z, "jensen_shannon", 1 - b) / b
        torch.testing.assert_close(far, divergence(t, z, "reverse"), rtol=1e-5, atol=0)

    def test_forward_is_kd(self) -> None:
        z, t = logits()
        torch.testing.assert_close(KL(4.0).loss(z, t, Y), kd_loss(z, t, 4.0))

    def test_a_published_defect(self) -> None:
        """KL(m || p) in the place of KL(p || m): it is another number."""
        p, q = (x.log_softmax(-1) for x in logits())
        m = torch.logaddexp(p, q) - math.log(2)
        wrong = sum(0.5 * torch.nn.functional.kl_div(x, m, log_target=True, reduction="none").sum(-1) for x in (p, q))
        assert ((wrong - divergence(p, q, "jensen_shannon")).abs() > 1e-3).all()  # type: ignore[union-attr]

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_class_that_both_rule_out(self, kind: Kind) -> None:
        """It is as if there were no such class; its logit learns nothing."""
        z, t = logits()
        without = KL(divergence=kind).loss(z, t, Y)
        wide = [torch.cat([x, torch.full((B, 1), -torch.inf)], 1).requires_grad_() for x in (z, t)]
        found = KL(divergence=kind).loss(wide[0], wide[1], Y)
        torch.testing.assert_close(found, without, rtol=1e-12, atol=0)
        z.requires_grad_()
        [expected] = torch.autograd.grad(KL(divergence=kind).loss(z, t, Y).sum(), z)
        [gradient] = torch.autograd.grad(found.sum(), wide[0])
        torch.testing.assert_close(gradient[:, :-1], expected, rtol=1e-10, atol=1e-14)
        assert not gradient[:, -1].any()

    @pytest.mark.parametrize(
        "options", [{"divergence": "jeffreys"}, {"divergence": "skewed", "beta": 1.0}, {"beta": 5.0}]
    )
    def test_what_is_not_known(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"expected as divergence one of|expected beta in"):
            KL(**options)


class TestStandardised:
    @pytest.mark.parametrize(
        "term", [KL(standardise=True), DecoupledKL(standardise=True), NormalisedKL(standardise=True)]
    )
    def test_scale_and_shift_do_not_count(self, term: LogitTerm) -> None:
        z, t = logits()
        batch = Batch(z, Y, None)
        value = lambda a, b: term(Outputs(a, {}), Outputs(b, {}), batch)  # noqa: E731
        torch.testing.assert_close(value(3 * z + 1, 0.2 * t - 5), value(z, t), rtol=1e-5, atol=1e-6)
        z.requires_grad_()
        value(z, t).sum().backward()
        assert z.grad is not None
        torch.testing.assert_close(z.grad.sum(1), torch.zeros(B, dtype=z.dtype), atol=1e-6, rtol=0)
        torch.testing.assert_close((z.grad * z).sum(1), torch.zeros(B, dtype=z.dtype), atol=1e-5, rtol=0)

    def test_by_hand(self) -> None:
        found = standardised(torch.tensor([[1.0, 2.0, 3.0]]))
        torch.testing.assert_close(found, torch.tensor([[-1.0, 0.0, 1.0]]))
        with pytest.raises(ValueError, match="at least 3 classes with standardised logits, found 1"):
            standardised(torch.zeros(1, 1))

    def test_two_classes_are_refused_before_the_training(self) -> None:
        with pytest.raises(ValueError, match="at least 3 classes with standardised logits, found 2"):
            KD("mlp-8", "a", num_classes=2, input_shape=[4], term=KL(standardise=True)).make_terms()
        with pytest.raises(TypeError, match="standardise"):
            BernoulliKL(standardise=True)  # type: ignore[call-arg]


class TestNormalised:
    def test_by_row(self) -> None:
        z, t = logits()
        found = normalised_kd_loss(z, t, Y, gamma=1.5, temperature=3.0)
        for i, y in enumerate(Y.tolist()):
            if y == UNLABELED:
                assert found[i] == 0
                continue
            a, b, others = z[i].numpy(), t[i].numpy(), [c for c in range(C) if c != y]
            target = -softmax(b)[y] * log_softmax(a)[y]
            rest = -(softmax(b[others] / 3) * log_softmax(a[others] / 3)).sum()
            assert found[i].item() == pytest.approx(target + 1.5 * 9 * rest, rel=1e-10)

    def test_a_teacher_that_is_certain(self) -> None:
        z, t = logits()[0][:2], torch.tensor([[-torch.inf, 1.0, -torch.inf, -torch.inf, -torch.inf]] * 2).double()
        z.requires_grad_()
        found = normalised_kd_loss(z, t, torch.tensor([1, 0]), temperature=2.0)
        found.sum().backward()
        said = log_softmax(z[0].detach().numpy())[1], log_softmax(z[1, 1:].detach().numpy() / 2)[0]
        assert found.tolist() == pytest.approx([-said[0], -1.5 * 4 * said[1]], rel=1e-10)  # nothing of the others; of 1
        assert z.grad is not None
        assert z.grad.isfinite().all()

    def test_a_gamma_below_0(self) -> None:
        for make in (
            lambda: NormalisedKL(gamma=-1),
            lambda: NKD("mlp-8", "a", num_classes=3, input_shape=[4], gamma=-1),
        ):
            with pytest.raises(ValueError, match="gamma of at least 0, found -1"):
                make()
        with pytest.raises(ValueError, match="intra of at least 0, found -1"):
            DIST("mlp-8", "a", num_classes=3, input_shape=[4], intra=-1)

    def test_others_alike_teach_nothing_about_each_other(self) -> None:
        """The second part has no gradient there, but is not 0."""
        z, _ = logits()
        z.requires_grad_()
        y = Y.clamp(min=0)
        only = normalised_kd_loss(z, z.detach(), y, 1.0) - normalised_kd_loss(z, z.detach(), y, 0.0)
        assert (only > 0).all()
        only.sum().backward()
        torch.testing.assert_close(z.grad, torch.zeros_like(z), atol=1e-12, rtol=0)


class TestCorrelation:
    def test_by_row_and_by_class(self) -> None:
        z, t = logits()
        p, q = softmax(z.numpy() / 4, axis=1), softmax(t.numpy() / 4, axis=1)
        inter = [16 * (1 - pearsonr(p[i], q[i]).statistic) for i in range(B)]
        np.testing.assert_allclose(Correlation().loss(z, t, Y).numpy(), inter, rtol=1e-5)
        intra = 16 * np.mean([1 - pearsonr(p[:, c], q[:, c]).statistic for c in range(C)])
        assert BatchCorrelation().loss(z, t, Y).item() == pytest.approx(intra, rel=1e-5)

    def test_scale_and_shift_do_not_count(self) -> None:
        p, q = (x.softmax(-1) for x in logits())
        torch.testing.assert_close(correlation_loss(2 * p + 1, q), correlation_loss(p, q), rtol=1e-6, atol=1e-6)
        assert (correlation_loss(p, p) < 1e-6).all()
        assert ((correlation_loss(p, q) >= 0) & (correlation_loss(p, q) <= 2)).all()

    def test_what_is_constant_is_1_without_a_gradient(self) -> None:
        p = torch.full((2, C), 1 / C, requires_grad=True)
        found = correlation_loss(p, torch.rand(2, C))
        found.sum().backward()
        torch.testing.assert_close(found, torch.ones(2))
        assert p.grad is not None
        assert p.grad.isfinite().all()


TERMS = {
    **{f"KL {kind}": KL(divergence=kind) for kind in KINDS},
    "NormalisedKL": NormalisedKL(),
    "Correlation": Correlation(),
    "BatchCorrelation": BatchCorrelation(),
    "standardised": KL(standardise=True),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    z = torch.tensor([[1e4, -1e4, 0], [0.0, 0, 0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[-1e4, 1e4, 0], [1e4, -1e4, 0], [0, 0, 0.0]], dtype=dtype)
    found = TERMS[name](Outputs(z, {}), Outputs(t, {}), Batch(z, torch.tensor([0, 1, UNLABELED]), None))
    found.sum().backward()
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_float32_under_autocast(name: str) -> None:
    """Of what bfloat16 gives; there a divergence may come out below 0."""
    z, t = (x.bfloat16() for x in logits())
    batch = Batch(z, Y, None)
    expected = TERMS[name](Outputs(z.float(), {}), Outputs(t.float(), {}), batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = TERMS[name](Outputs(z, {}), Outputs(t, {}), batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


class TestWSLD:
    def test_weights_by_hand(self) -> None:
        model = WSLD("mlp-8", "teacher", num_classes=2, input_shape=list(SHAPE), weight=2.0)
        even = torch.zeros(3, 2)
        teacher = Outputs(torch.tensor([[0.0, 0.0], [0.0, 50.0], [0.0, 50.0]]), {})
        batch = Batch(even, torch.tensor([0, 1, 0]), None)
        weights = model.weigh(Outputs(even, {}), [teacher], batch)
        assert isinstance(weights, Tensor)
        torch.testing.assert_close(weights[:, 0], torch.ones(3))
        expected = torch.tensor([1 - math.exp(-1), 1.0, 1 - math.exp(-math.log(2) / 50)])
        torch.testing.assert_close(
            weights[:, 1], 2 * expected, rtol=1e-4, atol=1e-4
        )  # a wrong label silences the teacher

    def test_the_loss_of_each_row(self) -> None:
        """Without a label w is 1: the row learns all that the teacher says."""
        model = WSLD("mlp-8", "teacher", num_classes=C, input_shape=list(SHAPE), weight=2.0, temperature=3.0)
        z, t = logits()
        terms = weighted_terms(model, Outputs(z, {}), [Outputs(t, {})], Batch(z, Y, None))
        for i, y in enumerate(Y.tolist()):
            said, taught = log_softmax(z[i].numpy()), log_softmax(t[i].numpy())
            label, w = (0.0, 1.0) if y == UNLABELED else (-said[y], 1 - math.exp(said[y] / -taught[y]))
            kl = rel_entr(softmax(t[i].numpy() / 3), softmax(z[i].numpy() / 3)).sum()
            assert terms["label"][i].item() == pytest.approx(label, rel=1e-10)
            assert terms["teacher"][i].item() == pytest.approx(2 * w * 9 * kl, rel=1e-5)


@pytest.mark.parametrize("name", ["KL reverse", "KL total_variation", "NormalisedKL", "Correlation", "standardised"])
def test_learned_weights_over_each(name: str) -> None:
    model = ALMKD(
        "mlp-8", trained_teachers()[0], num_classes=CLASSES, input_shape=list(SHAPE), term=TERMS[name],
        rule=Paper(warmup_epochs=0, every=1),
    )  # fmt: skip
    trainer().fit(model, Blobs())
    assert model.table is not None
    assert model.table["weights"].std(0).max() > 0


@pytest.mark.parametrize(
    ("method", "options"),
    [("wsld", {}), ("group-distil", {}), ("kd", {"select": 0.5}), ("label-revision", {}), ("almkd-robust", {})],
)
def test_a_coupled_part_is_not_weighed_by_sample(method: str, options: dict[str, Any]) -> None:
    """Which is told before the first step."""
    model = build(method, term=BatchCorrelation(), **options)
    model.on_fit_start = lambda: pytest.fail("too late")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="cannot weigh BatchCorrelation by sample: it couples the rows of a batch"):
        trainer().fit(model, Blobs())
    trainer(max_epochs=1).fit(build(method, extra=[BatchCorrelation()], **options), Blobs())


def test_dist_in_all() -> None:
    """``CE + 2 T^2 (inter + 3 intra)``."""
    model = DIST("mlp-8", "teacher", num_classes=C, input_shape=list(SHAPE), weight=2.0, intra=3.0, temperature=4.0)
    model.terms, (z, t) = model.make_terms(), logits()
    found = weighted_means(*model.weighed(Outputs(z, {}), [Outputs(t, {})], Batch(z, Y, None)))["loss"]
    p, q = softmax(z.numpy() / 4, axis=1), softmax(t.numpy() / 4, axis=1)
    inter = np.mean([1 - pearsonr(p[i], q[i]).statistic for i in range(B)])
    intra = np.mean([1 - pearsonr(p[:, c], q[:, c]).statistic for c in range(C)])
    label = -sum(log_softmax(z[i].numpy())[y] for i, y in enumerate(Y.tolist()) if y != UNLABELED) / B
    assert found.item() == pytest.approx(label + 2 * 16 * (inter + 3 * intra), rel=1e-5)
