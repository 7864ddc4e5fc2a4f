"""ReviewKD, CAT-KD and SDD, against loops in float64, limits and invariances."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import CONFIGS
from methods import CLASSES, Blobs, trainer
from scipy.signal import correlate
from torch import Tensor, nn

from lit_kd import (
    ALMKD,
    CATKD,
    KD,
    SDD,
    AttentionTransfer,
    ComparativeKD,
    Distilled,
    Distiller,
    ReviewKD,
    Supervised,
    losses,
)
from lit_kd.data import Source, TensorRows
from lit_kd.models import adapt, build_model, last_linear
from lit_kd.models.taps import Replay, Tapped
from lit_kd.terms import (
    KL,
    BatchCorrelation,
    BernoulliKL,
    ClassMaps,
    CrossEntropy,
    DecoupledKL,
    Hint,
    Mixed,
    NormalisedKL,
    Review,
    ScaleDecoupled,
    Term,
)
from lit_kd.terms.features import gives_logits
from lit_kd.terms.stages import Fusion
from lit_kd.types import CLASS_MAPS, PENULTIMATE, UNLABELED, Batch, Outputs
from lit_kd.weightings import Paper

B, C, SHAPE = 5, 3, (1, 16, 16)
MAPS = CLASS_MAPS + "layer3"
BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(name: str = "cnn-2", seed: int = 0) -> nn.Module:
    """With statistics of BatchNorm that are not the initial ones, in eval mode and float64."""
    torch.manual_seed(seed)
    net = build_model(name, C, SHAPE).double()
    nn.init.normal_(last_linear(net)[1].bias)
    with torch.no_grad():
        net(torch.randn(8, *SHAPE, dtype=torch.float64))
    return net.eval()


def seen(net: nn.Module, x: Tensor, *taps: str) -> Outputs:
    return Tapped(net, taps)(x)


def pooled(maps: Any, k: int) -> Any:
    """The mean of each of k by k regions, in loops."""
    h, w = maps.shape[-2] // k, maps.shape[-1] // k
    return np.stack(
        [maps[..., i * h : i * h + h, j * w : j * w + w].mean((-2, -1)) for i in range(k) for j in range(k)], -1
    )


class TestPyramid:
    @pytest.mark.parametrize(("size", "sizes"), [(8, [4, 2, 1]), (4, [2, 1]), (2, [1]), (1, [])])
    def test_by_loops(self, size: int, sizes: list[int]) -> None:
        s, t = draw(B, 3, size, size), draw(B, 3, size, size, seed=1)
        for i, found in enumerate(losses.pyramid_loss(s, t)):
            a, b = s[i].numpy(), t[i].numpy()
            levels = [((a - b) ** 2).mean(), *(((pooled(a, k) - pooled(b, k)) ** 2).mean() for k in sizes)]
            weights = [0.5**n for n in range(len(levels))]
            assert found.item() == pytest.approx(np.average(levels, weights=weights), rel=1e-10)

    def test_a_constant_error_is_its_square_at_every_size(self) -> None:
        t = draw(B, 2, 6, 7)
        torch.testing.assert_close(losses.pyramid_loss(t - 3, t), torch.full((B,), 9.0, dtype=t.dtype))


def normal(x: Any, epsilon: float = 1e-5) -> Any:
    """BatchNorm in training, with its initial weights."""
    return (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + epsilon)


def nearest(x: Any, size: int) -> Any:
    at = [i * x.shape[-1] // size for i in range(size)]
    return x[:, :, at][:, :, :, at]


def conv3x3(x: Any, weight: Any) -> Any:
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return np.stack([[correlate(row, out, "valid")[0] for out in weight] for row in padded])


class TestReview:
    def test_by_hand(self) -> None:
        """Three stages, from the last, a vector, to the first."""
        ours = [draw(B, 2, 8, 8), draw(B, 4, 4, 4, seed=1), draw(B, 5, seed=2)]
        theirs = [draw(B, 3, 4, 4, seed=3), draw(B, 6, 4, 4, seed=4), draw(B, 7, seed=5)]
        term = Review(["a", "b", "c"], ["a", "b", "c"])
        student, teacher = (Outputs(draw(B, C), dict(zip("abc", found, strict=True))) for found in (ours, theirs))
        torch.manual_seed(0)
        term.build(student, teacher)
        found = term.double()(student, teacher, Batch(ours[0], torch.zeros(B)))

        expected, carried = np.zeros(B), None
        for k in (2, 1, 0):
            own, their = (x[k].numpy() if x[k].dim() == 4 else x[k].numpy()[:, :, None, None] for x in (ours, theirs))
            weights = {name: p.detach().numpy() for name, p in term.fusions[k].named_parameters()}
            x = normal(np.einsum("bchw,dc->bdhw", own, weights["inner.0.weight"][:, :, 0, 0]))
            assert x.shape[1] == 5  # the channels of the student's last stage
            if carried is not None:
                carried = nearest(carried, x.shape[-1])
                both = np.concatenate([x, carried], 1)
                logit = np.einsum("bchw,dc->bdhw", both, weights["attention.0.weight"][:, :, 0, 0])
                share = 1 / (1 + np.exp(-logit - weights["attention.0.bias"][None, :, None, None]))
                x = share[:, :1] * x + share[:, 1:] * carried
            carried = nearest(x, their.shape[-1])
            made = normal(conv3x3(carried, weights["outer.0.weight"]))
            levels = [((made - their) ** 2).mean((1, 2, 3))]
            levels += [((pooled(made, n) - pooled(their, n)) ** 2).mean((1, 2)) for n in (2, 1) if n < their.shape[-1]]
            expected += np.average(levels, axis=0, weights=[0.5**n for n in range(len(levels))])
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-10)

    def test_what_is_carried_is_at_most_512_wide(self) -> None:
        term = Review([PENULTIMATE], [PENULTIMATE])
        term.build(Outputs(draw(B, C), {PENULTIMATE: draw(B, 600)}), Outputs(draw(B, C), {PENULTIMATE: draw(B, 4)}))
        [fusion] = term.fusions
        assert isinstance(fusion, Fusion)
        assert fusion.inner[0].weight.shape == (512, 600, 1, 1)
        assert fusion.attention is None

    def test_later_stages_are_read_by_earlier_ones(self) -> None:
        features = {"a": draw(B, 2, 4, 4), "b": draw(B, 3, 2, 2).requires_grad_()}
        student = Outputs(draw(B, C), features)
        teacher = Outputs(draw(B, C), {"a": draw(B, 4, 4, 4), "b": draw(B, 4, 2, 2)})
        term = Review(["a", "b"], ["a", "b"])
        term.build(student, teacher)
        term.double()
        made = term.fusions[0](features["a"], term.fusions[1](features["b"], None, (2, 2))[1], (4, 4))[0]
        made.square().sum().backward()
        assert features["b"].grad is not None
        assert features["b"].grad.any()

    def test_refused(self) -> None:
        for given in ([], ["layer1"]), ([], []), (["layer1"], ["layer1", "layer2"]):
            with pytest.raises(ValueError, match="expected lists of as many layers of the student as of the teacher"):
                Review(*given)
        with pytest.raises(ValueError, match="expected warmup_epochs of at least 0"):
            ReviewKD("cnn-2", "a", warmup_epochs=-1, **BASE)
        out = Outputs(draw(B, C), {"a": draw(B, 4, 7)})
        with pytest.raises(ValueError, match=r"expected maps \(c, h, w\) of layer 'a' of the student, found \(4, 7\)"):
            Review(["a"], ["a"]).build(out, out)

    def test_one_row(self) -> None:
        """BatchNorm learns from it where there are several places."""
        for shape, places in ((4,), 1), ((4, 1, 1), 1), ((4, 2, 1), 2):
            one = Outputs(draw(1, C), {"a": draw(1, *shape)})
            term = Review(["a"], ["a"])
            term.build(one, one)
            term.double()
            if places == 1:
                with pytest.raises(ValueError, match=r"expected batches of several rows, .* drop_last=True"):
                    term(one, one, Batch(one.logits, torch.zeros(1)))
                term.eval()
            assert term(one, one, Batch(one.logits, torch.zeros(1))).isfinite().all()

    def test_warm_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, out = ReviewKD("cnn-2", "a", weight=6.0, warmup_epochs=3, **BASE), Outputs(draw(B, C), {})
        found = []
        for epoch in range(5):
            monkeypatch.setattr(ReviewKD, "current_epoch", epoch)
            found.append(model.weigh(out, [out, out], Batch(out.logits, torch.zeros(B))))
        assert found == [[1.0, pytest.approx(w), pytest.approx(w)] for w in (1, 2, 3, 3, 3)]


class TestClassMaps:
    """The tap, which all methods can read."""

    def test_their_mean_is_the_logit_without_bias(self) -> None:
        for name, tap in ("cnn-2", "layer3"), ("resnet8", "layer3"), ("wrn-10-1", "relu"), ("mlp-8", PENULTIMATE):
            net = network(name)
            out = seen(net, draw(B, *SHAPE), CLASS_MAPS + tap)
            maps = out.features[CLASS_MAPS + tap]
            mean = maps.mean((2, 3)) if maps.dim() == 4 else maps
            torch.testing.assert_close(mean + last_linear(net)[1].bias, out.logits, rtol=1e-10, atol=1e-10)

    def test_at_each_place(self) -> None:
        net, x = network(), draw(B, *SHAPE)
        out = seen(net, x, MAPS, "layer3")
        weight = last_linear(net)[1].weight
        for b, i, j in (0, 0, 0), (3, 2, 1):
            expected = weight @ out.features["layer3"][b, :, i, j]
            torch.testing.assert_close(out.features[MAPS][b, :, i, j], expected, rtol=1e-12, atol=1e-12)

    def test_of_the_layer_that_gives_the_logits(self) -> None:
        """And not of the last one that was made."""

        class Named(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.head, self.other = nn.Conv2d(1, 4, 3), nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                out: Tensor = self.head(self.conv(x).mean((2, 3)))
                return out

        for net in adapt(Named(), head="head"), Named():
            model = CATKD(net, network().float(), student_tap="conv", weight=0.1, **BASE)
            trainer(max_epochs=1).fit(model, Pictures())
            assert last_linear(net)[0] == "head"

    def test_of_changed_weights(self) -> None:
        """As the meta-gradient through all layers has them."""
        net, x = network(), draw(B, *SHAPE)
        weight = last_linear(net)[1].weight
        replay = Replay(net, (MAPS,))
        found = replay(x, {"fc.weight": 2 * weight.detach()}).features[MAPS]
        torch.testing.assert_close(found, 2 * seen(net, x, MAPS).features[MAPS])


class TestCATKD:
    @pytest.mark.parametrize("normalise", [True, False])
    def test_by_loops(self, normalise: bool) -> None:
        """From the maps and the layers' weights; sizes and widths may differ."""
        nets, x = (network(), network("cnn-3", 1)), draw(B, *SHAPE)
        outs = [seen(net, x, MAPS) for net in nets]
        found = ClassMaps(normalise=normalise)(*outs, Batch(x, torch.zeros(B)))
        cams = []
        for net in nets:
            features, weight = seen(net, x, "layer3").features["layer3"], last_linear(net)[1].weight.detach().numpy()
            corners = pooled(features.detach().numpy(), 2)  # (B, c, 4)
            cams.append(np.einsum("kc,bcp->bkp", weight, corners))
            if normalise:
                cams[-1] /= np.sqrt((cams[-1] ** 2).sum(-1, keepdims=True))
        expected = ((cams[0] - cams[1]) ** 2).mean((1, 2))
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-10)

    def test_no_scale_counts_where_maps_have_norm_1(self) -> None:
        s, t = draw(B, C, 8, 8), draw(B, C, 4, 4, seed=1)
        torch.testing.assert_close(losses.class_map_loss(7 * s, 0.1 * t), losses.class_map_loss(s, t))
        assert losses.class_map_loss(7 * s, s).max() < 1e-12
        assert (losses.class_map_loss(7 * s, s, normalise=False) > 0.1).all()

    def test_maps_of_zeros_have_no_gradient(self) -> None:
        """And those close to them none of 1e5."""
        for size in 0.0, 1e-20, 1e-14:
            s = torch.full((B, C, 2, 2), size, requires_grad=True)
            losses.class_map_loss(s, draw(B, C, 2, 2).float()).sum().backward()
            torch.testing.assert_close(s.grad, torch.zeros_like(s), rtol=0, atol=0)

    def test_the_default_weight_is_the_config_s(self) -> None:
        for name, method in ("cat_kd", CATKD), ("comparative_kd", ComparativeKD):
            config = yaml.safe_load((CONFIGS / f"methods/{name}.yaml").read_text())["model"]["init_args"]
            assert method("cnn-2", "a", **BASE).weight == config["weight"]

    def test_gradients_reach_the_student_s_head_and_not_the_teacher_s(self) -> None:
        teacher, student = network(seed=1).float(), network().float()
        before = copy.deepcopy(teacher.state_dict())
        model = CATKD(student, teacher, label_term=CrossEntropy(weight=0.0), weight=1.0, **BASE)
        weight, own = last_linear(student)[1].weight.detach().clone(), last_linear(student)[1].bias.detach().clone()
        trainer(max_epochs=1).fit(model, Pictures())
        assert not torch.equal(last_linear(student)[1].weight, weight)
        assert (last_linear(student)[1].bias - own).abs().max() < 0.05  # weight decay alone
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, before[name])
        assert all(p.grad is None for p in teacher.parameters())

    def test_a_single_place_has_no_norm(self) -> None:
        model = CATKD("mlp-8", network().float(), student_tap=PENULTIMATE, **BASE)
        with pytest.raises(ValueError, match="expected maps of at least 2 x 2 from the student's layer 'penultimate'"):
            trainer().fit(model, Pictures())


class TestSDD:
    @pytest.mark.parametrize("term", [KL(3.0), DecoupledKL(beta=2.0, weight=0.5), NormalisedKL(1.5, 2.0)])
    def test_one_region_is_the_term_itself(self, term: Any) -> None:
        x, y = draw(B, *SHAPE), torch.tensor([0, 1, 2, UNLABELED, 0])
        outs = [seen(net, x, MAPS) for net in (network(), network("cnn-3", 1))]
        found = ScaleDecoupled(term, scales=[1])(*outs, Batch(x, y))
        expected = term.weight * term(*outs, Batch(x, y))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    def test_regions_of_a_scale_have_the_whole_as_their_mean(self) -> None:
        x = draw(B, *SHAPE)
        out = seen(network(), x, MAPS)
        for scale in 1, 2, 4:
            found = losses.regional_logits(out.logits, out.features[MAPS], [scale])
            assert found.shape == (B, scale**2, C)
            torch.testing.assert_close(found.mean(1), out.logits, rtol=1e-10, atol=1e-10)

    def test_by_loops(self) -> None:
        """Each network's own head, with its bias, on the mean of each region of its own map."""
        nets, x, y = (network(), network("cnn-3", 1)), draw(B, *SHAPE), torch.tensor([0, 1, 2, UNLABELED, 0])
        with torch.no_grad():
            last_linear(nets[1])[1].weight.mul_(5)
            last_linear(nets[1])[1].bias.sub_(nets[1](x).mean(0))  # so that not all rows are of one class
        outs = [seen(net, x, MAPS) for net in nets]
        found = ScaleDecoupled(KL(2.0))(*outs, Batch(x, y))
        total, twice = np.zeros(B), 0
        for k in 1, 2, 4:
            said = []
            for net in nets:
                features, head = seen(net, x, "layer3").features["layer3"].detach().numpy(), last_linear(net)[1]
                said.append(head(torch.from_numpy(np.moveaxis(pooled(features, k), -1, 1))).detach().numpy())
            whole = outs[1].logits.argmax(1).numpy()
            for i in range(B):
                for region in range(k * k):
                    p, q = (np.exp(z[i, region] / 2) / np.exp(z[i, region] / 2).sum() for z in (said[1], said[0]))
                    right, right_whole = said[1][i, region].argmax() == y[i].item(), whole[i] == y[i].item()
                    twice += right != right_whole
                    total[i] += (2 if right != right_whole else 1) * 4 * (p * np.log(p / q)).sum()
        assert twice > 0
        np.testing.assert_allclose(found.detach().numpy(), total / 21, rtol=1e-10)

    def test_soft_labels_and_rows_without(self) -> None:
        x, y = draw(B, *SHAPE), torch.tensor([0, 1, 2, UNLABELED, 0])
        outs = [seen(net, x, MAPS) for net in (network(), network("cnn-3", 1))]
        soft = torch.nn.functional.one_hot(y.clamp(min=0), C).double() * (y != UNLABELED).unsqueeze(1)
        for term in KL(), DecoupledKL():
            found = [ScaleDecoupled(term)(*outs, Batch(x, given)) for given in (y, soft)]
            torch.testing.assert_close(*found)

    def test_what_is_not_finite_is_not_hidden(self) -> None:
        """The authors' code takes 0 in its place."""
        maps = draw(2, C, 4, 4)
        maps[0, 0, 0, 0] = torch.nan
        out = Outputs(maps.mean((2, 3)), {MAPS: maps})
        found = ScaleDecoupled()(out, out, Batch(maps, torch.zeros(2, dtype=torch.long)))
        assert found[0].isnan()
        assert found[1] == 0

    def test_refused(self) -> None:
        class Kept(KL):
            keeps_rows = True

        class Built(KL):
            def build(self, student: Outputs, teacher: Outputs | None) -> None:
                pass

        class Updated(KL):
            def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
                pass

        learned = KL()
        learned.scale = nn.Parameter(torch.zeros(()))  # type: ignore[assignment]
        logits_alone = Kept(), Built(), Updated(), learned, Mixed(), BernoulliKL()
        for wrong in BatchCorrelation(), Hint(), CrossEntropy(), *logits_alone:
            with pytest.raises(ValueError, match="expected a term of logits of one number a sample"):
                ScaleDecoupled(wrong)
        for scales in [], [0, 1]:
            with pytest.raises(ValueError, match="expected scales of whole numbers from 1"):
                ScaleDecoupled(scales=scales)
        teacher = network().float()
        for given, match in (
            ({"scales": [8]}, "expected maps of at least 8 x 8 from the student's layer 'layer3', found 4 x 4"),
            (
                {"student_tap": "layer2"},
                "expected the student's last linear layer to read the mean of its layer 'layer2'",
            ),
            (
                {"teacher_tap": "layer2"},
                "expected the teacher's last linear layer to read the mean of its layer 'layer2'",
            ),
            ({"teacher_tap": "layer_3"}, "no layer 'layer_3' in ConvNet; the nearest are"),
        ):
            with pytest.raises(ValueError, match=match):
                trainer().fit(SDD("cnn-2", teacher, **given, **BASE), Pictures())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="expected the student's last linear layer to read the mean of its layer"):
            trainer().fit(SDD("wrn-10-1", teacher, **BASE), Pictures())  # ReLU lies between


class TestGivesLogits:
    def test_what_rows_share_hides_nothing(self) -> None:
        """Such as a bias of a head, beside which all else is small."""
        maps, bias = draw(B, C, 4, 4), 1e4 * draw(C, seed=1)
        logits, other = maps.mean((2, 3)) + bias, draw(B, C, 4, 4, seed=2)
        for given in logits, logits.float():
            assert gives_logits(maps, given, bias=False)
            assert not gives_logits(other, given, bias=False)
            assert not gives_logits(maps.relu(), given, bias=False)
            assert gives_logits(maps.mean((2, 3)) + bias, given)
            assert not gives_logits(other.mean((2, 3)) + bias, given)
            assert not gives_logits(maps, given)

    def test_rounding(self) -> None:
        maps = draw(B, C, 4, 4)
        assert gives_logits(maps.bfloat16(), (maps.mean((2, 3)) + 3).bfloat16(), bias=False)
        same = maps[:1].expand(B, -1, -1, -1).float()
        assert gives_logits(same, same.mean((3, 2)))

    def test_a_single_row_and_other_shapes(self) -> None:
        maps = draw(1, C, 4, 4)
        assert gives_logits(maps, maps.mean((2, 3)) + 1, bias=False)
        assert not gives_logits(maps[:, :2], maps.mean((2, 3)))
        assert not gives_logits(draw(1, 7, C), maps.mean((2, 3)))


EXTREME = {
    "Review": Review(["layer3"], ["layer3"]),
    "ClassMaps": ClassMaps(),
    "ClassMaps of any norm": ClassMaps(normalise=False),
    "ScaleDecoupled": ScaleDecoupled(scales=[1, 2]),
    "ScaleDecoupled DKD": ScaleDecoupled(DecoupledKL(), scales=[1, 2]),
}


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values_give_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    maps = torch.tensor([[1e4, -1e4, 0, 0], [0, 0, 0, 0], [-1e4, 1e4, 1e4, 1e4]]).view(1, 3, 2, 2).to(dtype)
    s, t = torch.cat([maps, -maps]).requires_grad_(), torch.cat([maps.flip(1), 0 * maps])
    student, teacher = (Outputs(m.mean((2, 3)), {MAPS: m, "layer3": m}) for m in (s, t))
    term: Term = copy.deepcopy(EXTREME[name])
    term.build(student, teacher)
    found = term.to(dtype)(student, teacher, Batch(maps, torch.tensor([0, UNLABELED])))
    found.float().sum().backward()
    assert found.shape == (2,)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert s.grad is not None
    assert s.grad.isfinite().all()


class Pictures(Blobs):
    """Pictures of 16 by 16, on which networks have maps of more than one place."""

    input_shape = SHAPE

    def load(self) -> Source:
        generator, y = torch.Generator().manual_seed(7), torch.arange(120) % CLASSES
        x = torch.randn(CLASSES, *SHAPE, generator=generator)[y] + 0.5 * torch.randn(120, *SHAPE, generator=generator)
        return Source(TensorRows(x), TensorRows(x), y.numpy(), test_size=24, identity=b"pictures")


METHODS = {
    "review": lambda student, teacher, **base: ReviewKD(student, teacher, warmup_epochs=2, **base),
    "cat": lambda student, teacher, **base: CATKD(student, teacher, weight=1.0, **base),
    "sdd": lambda student, teacher, **base: SDD(student, teacher, **base),
    "sdd of dkd": lambda student, teacher, **base: SDD(
        student, teacher, term=DecoupledKL(beta=1.0), scales=[1, 2], **base
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_students_of_maps_learn(method: str) -> None:
    """Of another kind than the teachers, where labels are missing, and in bfloat16."""
    teachers, data = [network("cnn-3", 1).float(), network().float()], Pictures()
    data.setup()
    for teacher in teachers:
        optimizer = torch.optim.Adam(teacher.parameters(), 0.02)
        for _ in range(5):
            for batch in data.train_dataloader():
                optimizer.zero_grad()
                nn.functional.cross_entropy(teacher(batch.x), batch.y).backward()
                optimizer.step()
    model = METHODS[method]("resnet8", teachers, **BASE)
    run = trainer(max_epochs=3, precision="bf16-mixed")
    run.fit(model, Pictures(labeled=0.8))
    assert run.callback_metrics["val/accuracy"] > 0.9
    assert run.callback_metrics["train/loss"].isfinite()


def test_attention_on_small_maps_needs_a_small_weight() -> None:
    """That of the config; that of the benchmarks, for larger maps, leaves the label little."""
    config = yaml.safe_load((CONFIGS / "methods/attention_transfer.yaml").read_text())["model"]["init_args"]
    found, teacher = [], network("cnn-8").float()
    trainer(max_epochs=4).fit(Supervised(teacher, **BASE), Pictures(seed=0))
    for weight in config["weight"], 1000.0:
        torch.manual_seed(0)
        run = trainer(max_epochs=6)
        run.fit(AttentionTransfer("cnn-4", teacher, weight=weight, **BASE), Pictures(seed=0))
        found.append(run.callback_metrics["train/label"].item())
    assert found[0] < 0.4 * found[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_of_the_teacher_changes_nothing(method: str) -> None:
    found = []
    for cache in (None, "memory"):
        torch.manual_seed(3)
        model = METHODS[method](
            build_model("cnn-2", C, SHAPE), network("cnn-3", 1).float(), teacher_cache=cache, **BASE
        )
        run = trainer(max_epochs=1)
        run.fit(model, Pictures(seed=0))
        found.append(run.callback_metrics["train/loss"])
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


@pytest.mark.parametrize("term", [ClassMaps(weight=0.1), ScaleDecoupled(scales=[1, 2])])
def test_learned_weights_over_each(term: Term) -> None:
    """Through all layers, as the term reads features."""
    model = ALMKD(
        "cnn-2",
        network("cnn-3", 1).float(),
        term=term,
        rule=Paper(warmup_epochs=0, every=1),
        meta_gradient="exact",
        **BASE,
    )
    trainer().fit(model, Pictures())
    assert model.table is not None
    assert model.table["weights"].std(0).max() > 0


def test_beside_kd_and_within_another_module() -> None:
    class Own(Distilled):
        def __init__(self) -> None:
            super().__init__()
            self.net = build_model("cnn-2", C, SHAPE)
            self.teacher = (network("cnn-3", 1).float(),)

        def configure_distillation(self) -> Distiller:
            return KD(
                self.net, self.teacher[0], num_classes=CLASSES, extra=[ClassMaps(), ScaleDecoupled(scales=[1, 2])]
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.distillation(self.net(batch[0]), batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.01)

    run = trainer(max_epochs=1)
    run.fit(Own(), Pictures())
    for name in "class_maps", "scale_decoupled":
        assert math.isfinite(run.callback_metrics[f"distillation/{name}"])
