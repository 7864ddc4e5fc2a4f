"""AT, NST, VID and SRRL, against loops in float64, limits and invariances."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from test_combinations import Images
from torch import Tensor, nn

from lit_kd import ALMKD, KD, SRRL, VID, AttentionTransfer, Batch, Outputs
from lit_kd.losses import attention_loss, information_loss, selectivity_loss
from lit_kd.losses.maps import unit
from lit_kd.models import build_model, last_linear
from lit_kd.models.checkpoint import read_student
from lit_kd.terms import Attention, Selectivity, SoftmaxRegression, Term, Variational
from lit_kd.types import PENULTIMATE
from lit_kd.weightings import Paper

B = 3
BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
ONE = {"student_taps": ["layer1"], "teacher_taps": ["layer1"]}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(B, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(**features: Tensor) -> Outputs:
    return Outputs(torch.zeros(B, 2), features)


def value(term: Term, student: Outputs, teacher: Outputs) -> Tensor:
    found: Tensor = term(student, teacher, Batch(torch.zeros(B), torch.zeros(B), None))
    return found


def pooled(f: Tensor, h: int, w: int) -> np.ndarray:
    """One sample's map, averaged over whole blocks."""
    c, height, width = f.shape
    return f.numpy().reshape(c, h, height // h, w, width // w).mean((2, 4))


class TestAttention:
    @pytest.mark.parametrize(
        ("ours", "theirs", "size"),
        [
            ((2, 4, 4), (5, 4, 4), (4, 4)),
            ((2, 4, 8), (5, 2, 4), (2, 4)),
            ((2, 2, 2), (5, 4, 4), (2, 2)),
            ((2, 4, 2), (5, 2, 4), (2, 2)),
        ],
    )
    def test_by_hand(self, ours: Any, theirs: Any, size: Any) -> None:
        """Also of maps that are no squares, which published code takes for squares."""
        s, t = draw(*ours), draw(*theirs, seed=1)
        found = attention_loss(s, t)
        for b in range(B):
            maps = []
            for f in s[b], t[b]:
                small = pooled(f, *size)
                attention = [
                    sum(small[c, i, j] ** 2 for c in range(len(small))) / len(small)
                    for i in range(size[0])
                    for j in range(size[1])
                ]
                maps.append([a / math.sqrt(sum(x**2 for x in attention)) for a in attention])
            expected = sum((x - y) ** 2 for x, y in zip(*maps, strict=True)) / len(maps[0])
            assert found[b].item() == pytest.approx(expected, rel=1e-10)

    def test_what_does_not_count(self) -> None:
        s, t = draw(4, 3, 5), draw(6, 3, 5, seed=1)
        close = torch.testing.assert_close
        close(attention_loss(-3 * s[:, [2, 0, 3, 1]], 0.1 * t), attention_loss(s, t), rtol=1e-12, atol=0)
        close(attention_loss(5 * s, s), torch.zeros(B).double(), atol=1e-20, rtol=0)
        apart = torch.zeros(2, B, 1, 3, 5)
        apart[0, ..., 0, 0] = apart[1, ..., 1, 1] = 7.0
        close(attention_loss(*apart), torch.full((B,), 2 / 15))  # nothing is further apart

    def test_several_pairs_are_summed(self) -> None:
        s = {"a": draw(2, 4, 4), "b": draw(3, 2, 2, seed=1)}
        t = {"x": draw(5, 4, 4, seed=2), "y": draw(6, 4, 4, seed=3)}
        found = value(Attention(["a", "b"], ["x", "y"]), outputs(**s), outputs(**t))
        torch.testing.assert_close(found, attention_loss(s["a"], t["x"]) + attention_loss(s["b"], t["y"]))

    def test_dead_maps(self) -> None:
        s = torch.zeros(B, 2, 3, 3, requires_grad=True)
        found = attention_loss(s, torch.ones(B, 2, 3, 3))
        found.sum().backward()
        torch.testing.assert_close(found, torch.full((B,), 1 / 9))
        torch.testing.assert_close(s.grad, torch.zeros_like(s))

    @pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e-13])
    def test_vectors_close_to_zero_have_no_gradient(self, size: float) -> None:
        """Which a floor of the norm alone would make as large as one over it."""
        f = torch.full((B, 4), size, requires_grad=True)
        unit(f).sum().backward()
        torch.testing.assert_close(f.grad, torch.zeros_like(f), rtol=0, atol=0)
        far = torch.full((B, 4), 1e-6, requires_grad=True)
        torch.testing.assert_close(unit(far), torch.full((B, 4), 0.5))


def test_selectivity_by_hand() -> None:
    s, t = draw(2, 4, 4), draw(3, 2, 2, seed=1)
    found = selectivity_loss(s, t)
    for b in range(B):
        sets = []
        for f in s[b], t[b]:
            small = pooled(f, 2, 2).reshape(len(f), -1)
            sets.append([row / math.sqrt(sum(row**2)) for row in small])
        kernel = lambda a, b: np.mean([float(np.dot(x, y)) ** 2 for x in a for y in b])  # noqa: E731
        expected = kernel(sets[1], sets[1]) + kernel(sets[0], sets[0]) - 2 * kernel(*sets)
        assert found[b].item() == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(selectivity_loss(s, -3 * s.flip(1)), torch.zeros(B).double(), atol=1e-12, rtol=0)
    assert (found > 0).all()
    torch.testing.assert_close(value(Selectivity(["f"], ["f"]), outputs(f=s), outputs(f=t)), found)


class TestVariational:
    def test_by_hand(self) -> None:
        term = Variational(["a", "b"], ["a", "b"]).double()
        s = {"a": draw(2, 4, 2), "b": draw(3)}
        t = {"a": draw(3, 2, 4, seed=1), "b": draw(2, seed=2)}
        term.build(outputs(**s), outputs(**t))
        term.double()
        torch.testing.assert_close(term.variance(0), torch.full((3,), 5.0).double(), rtol=1e-5, atol=0)
        with torch.no_grad():
            term.raw_variances[0].copy_(torch.tensor([-1.0, 0.5, 2.0]))
        found = value(term, outputs(**s), outputs(**t)).detach()
        for b in range(B):
            expected = 0.0
            for k, tap in enumerate(("a", "b")):
                x, y = (f[tap][b].reshape(*f[tap][b].shape[:1], *((1, 1) if f[tap].dim() == 2 else f[tap].shape[2:]))
                        for f in (s, t))  # fmt: skip
                h, w = min(x.shape[1], y.shape[1]), min(x.shape[2], y.shape[2])
                x, y = pooled(x, h, w), pooled(y, h, w)
                variance = [math.log1p(math.exp(a)) + 1e-5 for a in term.raw_variances[k].tolist()]
                layers = [layer.weight.detach().numpy()[:, :, 0, 0] for layer in term.regressors[k][::2]]  # type: ignore[index]
                each = []
                for i in range(h):
                    for j in range(w):
                        hidden = np.maximum(layers[1] @ np.maximum(layers[0] @ x[:, i, j], 0), 0)
                        for c, mean in enumerate(layers[2] @ hidden):
                            each.append(0.5 * ((y[c, i, j] - mean) ** 2 / variance[c] + math.log(variance[c])))
                expected += sum(each) / len(each)
            assert found[b].item() == pytest.approx(expected, rel=1e-10)

    def test_the_best_variance_is_the_mean_squared_error(self) -> None:
        mean, teacher = draw(4, 3, 3), 0.2 * draw(4, 3, 3, seed=1)
        best = (mean - teacher).square().mean((0, 2, 3)).requires_grad_()
        found = information_loss(mean, teacher, best).mean()
        assert found.item() == pytest.approx(0.5 * (1 + best.log().mean().item()), rel=1e-10)
        found.backward()
        torch.testing.assert_close(best.grad, torch.zeros_like(best), atol=1e-12, rtol=0)
        small = information_loss(teacher, teacher, torch.full((4,), 1e-3).double())
        assert (small < 0).all()  # a density may be above 1

    def test_nothing_is_broadcast(self) -> None:
        with pytest.raises(ValueError, match=r"expected features .*, \(3, 4, 3, 3\), found \(3, 1, 3, 3\)"):
            information_loss(draw(1, 3, 3), draw(4, 3, 3), torch.ones(4))

    def test_variances_are_trained(self) -> None:
        """A list of them outside of the optimizer, as published, never learns."""
        model, fitted = VID("cnn-2", trained_teachers()[0], **BASE), trainer(max_epochs=3)
        fitted.fit(model, Blobs())
        assert model.terms is not None
        [term] = model.terms.each
        assert isinstance(term, Variational)
        optimized = {id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]}
        assert len(term.raw_variances) == 3
        for k, raw in enumerate(term.raw_variances):
            assert id(raw) in optimized
            assert (term.variance(k) < 5 - 1e-3).all()  # the teacher is told better than at first
        assert {f"terms.each.0.raw_variances.{k}" for k in range(3)} <= set(model.state_dict())


class TestSoftmaxRegression:
    def made(self, *ours: int) -> tuple[SoftmaxRegression, nn.Linear, Outputs, Outputs]:
        torch.manual_seed(0)
        head = nn.Linear(5, 4).double().requires_grad_(False)
        s, t = draw(*ours), draw(5, seed=1)
        student, teacher = outputs(f=s), Outputs(head(t), {PENULTIMATE: t})
        term = SoftmaxRegression("f")
        term.head = (head,)
        term.build(student, teacher)
        return term.double().eval(), head, student, teacher

    def test_maps_by_hand(self) -> None:
        term, head, student, teacher = self.made(3, 2, 4)
        conv, norm = term.connector[0], term.connector[1]  # type: ignore[index]
        with torch.no_grad():
            norm.running_mean.copy_(torch.arange(5))
            norm.running_var.copy_(torch.arange(1, 6))
        found = value(term, student, teacher).detach()
        for b in range(B):
            features = np.zeros(5)
            for d in range(5):
                for i in range(2):
                    for j in range(4):
                        at = float(conv.weight[d, :, 0, 0].detach() @ student.features["f"][b, :, i, j])
                        features[d] += max((at - d) / math.sqrt(d + 1 + 1e-5), 0) / 8
            logits = head.weight.numpy() @ features + head.bias.numpy()
            expected = np.mean((features - teacher.features[PENULTIMATE][b].numpy()) ** 2)
            expected += np.mean((logits - teacher.logits[b].numpy()) ** 2)
            assert found[b].item() == pytest.approx(expected, rel=1e-10)

    def test_gradients_flow_through_the_frozen_head(self) -> None:
        """Without gradients around it, as in published code, the second part teaches nothing."""
        term, head, student, teacher = self.made(6)
        f = student.features["f"].requires_grad_()
        value(term, student, teacher).sum().backward()
        connect = term.connector
        assert isinstance(connect, nn.Linear)
        miss = (connect(f) - teacher.features[PENULTIMATE]).detach()
        first, second = 2 / 5 * miss, 2 / 4 * miss @ head.weight.T @ head.weight  # both are linear here
        torch.testing.assert_close(f.grad, (first + second) @ connect.weight.detach(), rtol=1e-10, atol=1e-12)
        assert second.abs().max() > 0.01
        assert head.weight.grad is None

    def test_tokens_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"expected vectors or maps of layer 'f' of the student, found \(7, 16\)"):
            self.made(7, 16)

    @pytest.mark.parametrize("taps", [{}, {"student_tap": "layer3"}])
    def test_training(self, taps: dict[str, str], tmp_path: Path) -> None:
        teachers = trained_teachers()
        before = [last_linear(teacher)[1].weight.clone() for teacher in teachers]
        model, fitted = SRRL("cnn-2", teachers, **taps, **BASE), trainer()
        fitted.fit(model, Blobs())
        assert model.terms is not None
        names = {name for name, _ in model.named_parameters() if name.startswith("terms.")}
        assert names
        assert not [name for name in model.state_dict() if "head" in name]
        for term, teacher, weight in zip(model.terms.each, teachers, before, strict=True):
            assert term.head[0] is last_linear(teacher)[1]  # type: ignore[index]
            assert torch.equal(term.head[0].weight, weight)  # type: ignore[index, union-attr]
        fitted.save_checkpoint(tmp_path / "c.ckpt")
        exported = read_student(tmp_path / "c.ckpt").model
        assert {name for name, _ in exported.named_modules()} == {
            name for name, _ in build_model("cnn-2", CLASSES, SHAPE).named_modules()
        }
        trainer(max_epochs=1).fit(model, Blobs())  # once more

    def test_head_that_does_not_give_the_logits(self) -> None:
        class Doubled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = build_model("mlp-8", CLASSES, SHAPE)

            def forward(self, x: Tensor) -> Tensor:
                doubled: Tensor = 2 * self.net(x)
                return doubled

        with pytest.raises(ValueError, match="expected a teacher whose last linear layer gives its logits"):
            trainer().fit(SRRL("mlp-8", Doubled(), **BASE), Blobs())
        with pytest.raises(ValueError, match="expected no term: SRRL has its own"):
            SRRL("mlp-8", "a", term=Attention(), **BASE)
        with pytest.raises(ValueError, match=r"train with lit_kd.SRRL"):
            trainer().fit(KD("mlp-8", trained_teachers()[0], extra=[SoftmaxRegression()], **BASE), Blobs())


TERMS: dict[str, Term] = {
    "attention": Attention(["f"], ["f"]),
    "selectivity": Selectivity(["f"], ["f"]),
    "variational": Variational(["f"], ["f"]),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_features(name: str, dtype: torch.dtype) -> None:
    """Squares of features of float16 are beyond it from 256 on."""
    s, t = ((1e4 * f.clamp(-3, 3)).to(dtype) for f in (draw(3, 4, 4), draw(5, 4, 4, seed=1)))
    s[0], t[1] = 0, 0
    s.requires_grad_()
    term = TERMS[name]
    term.build(outputs(f=s.float()), outputs(f=t.float()))
    with torch.autocast("cpu", torch.bfloat16):
        found = value(term, outputs(f=s), outputs(f=t))
    found.sum().backward()
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert s.grad is not None
    assert s.grad.isfinite().all()
    if name != "variational":  # whose convolutions may be in bfloat16
        torch.testing.assert_close(found, value(term, outputs(f=s.float()), outputs(f=t.float())))


@pytest.mark.parametrize("method", [AttentionTransfer, VID])
class TestTaps:
    @pytest.mark.parametrize("student", ["cnn-2", "resnet8", "wrn-10-1", "torchvision/resnet18"])
    def test_stages_by_default(self, method: Any, student: str) -> None:
        teacher = build_model("resnet8x4", CLASSES, (3, 4, 4))
        fitted = trainer(max_epochs=1, limit_train_batches=2, precision="bf16-mixed")
        fitted.fit(method(student, teacher, weight=1.0, num_classes=CLASSES, input_shape=[3, 4, 4]), Images())
        assert fitted.callback_metrics["train/teacher"].isfinite()

    def test_an_mlp_has_no_stages(self, method: Any) -> None:
        with pytest.raises(ValueError, match=r"no layer 'layer1' in Sequential; the nearest are \['0', '1', '2'"):
            trainer().fit(method("mlp-8", trained_teachers()[0], **BASE), Blobs())

    def test_near_taps_are_named(self, method: Any) -> None:
        model = method("cnn-2", trained_teachers()[0], student_taps=["layer_2"], teacher_taps=["layer2"], **BASE)
        with pytest.raises(ValueError, match=r"no layer 'layer_2' in ConvNet; the nearest are \['layer2"):
            trainer().fit(model, Blobs())

    @pytest.mark.parametrize("given", [(["layer1"], ["layer1", "layer2"]), ([], []), ("layer1", "layer1")])
    def test_pairs(self, method: Any, given: Any) -> None:
        model = method("cnn-2", trained_teachers()[0], student_taps=given[0], teacher_taps=given[1], **BASE)
        with pytest.raises(ValueError, match="expected lists of as many layers of the student as of the teacher"):
            trainer().fit(model, Blobs())


@pytest.mark.parametrize("term", [Attention, Selectivity])
def test_vectors_are_no_maps(term: Any) -> None:
    mlp = KD("mlp-8", trained_teachers()[0], extra=[term(["1"], ["layer1"])], **BASE)
    with pytest.raises(ValueError, match=r"maps \(c, h, w\) of layer '1' of the student, found \(8,\): tap a conv"):
        trainer().fit(mlp, Blobs())
    vectors = KD("cnn-2", trained_teachers()[0], extra=[term(["layer1"], [PENULTIMATE])], **BASE)
    with pytest.raises(ValueError, match=r"maps \(c, h, w\) of layer 'penultimate' of the teacher, found \(8,\)"):
        trainer().fit(vectors, Blobs())


@pytest.mark.parametrize("term", [Attention, Variational, Selectivity])
def test_learned_weights_over_each(term: Any) -> None:
    model = ALMKD(
        "cnn-2", trained_teachers()[0], term=term(**ONE), meta_gradient="exact",
        rule=Paper(warmup_epochs=0, every=1), **BASE,
    )  # fmt: skip
    trainer(max_epochs=1).fit(model, Blobs())
    assert model.table is not None
    assert model.table["weights"].isfinite().all()
    assert model.table["weights"].std(0).max() > 0
