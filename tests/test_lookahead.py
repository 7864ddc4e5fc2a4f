"""The meta-step of real trainings against double backward through the look-ahead, for any term.

The oracle runs the student's pass again with explicit parameters, its buffers and random numbers as before, takes a
differentiable step on formulas of its own, and differentiates the validation loss by the weights.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods import CLASSES, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from test_every_method import DictBlobs, Keyword, assert_same, noisy
from test_manual import Frozen, Wrapped, almkd
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lit_kd import ALMKD
from lit_kd.data import DataModule, DigitsDataModule, Source, TensorRows
from lit_kd.losses import decoupled_kd_loss
from lit_kd.models import build_model
from lit_kd.terms import DecoupledKL, GeneralizedCrossEntropy, Hint, Term
from lit_kd.types import UNLABELED, Batch, Outputs
from lit_kd.weightings import Paper
from lit_kd.weightings.lookahead import LastLayer, Seen

SHAPED: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
LR = 0.3


class Net(nn.Module):
    """Convolutions, BatchNorm, dropout, a residual connection, and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.unused, self.last = nn.Linear(2, 2), nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        self.map = x + self.conv(self.drop(x))
        self.hidden = self.drop(F.relu(self.map)).flatten(1)
        out: Tensor = self.last(self.hidden)
        return out


class Seeded(nn.Module):
    """With a state that each pass changes and uses, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, CLASSES))
        self.register_buffer("state", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[:3](x)
        if self.training:
            self.state.mul_(0.9).add_(h.detach().mean(0))
        out: Tensor = self.layers[3](h * self.state)
        return out


class Attention(nn.Module):
    """Over the rows of an image, with dropout, a shared weight and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.4, batch_first=True)
        self.last, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.last.weight
        self.layer.linear1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.again(self.last(self.layer(x.flatten(1, 2))).mean(1))[:, :CLASSES]
        return out


class Taken(Frozen):
    """Takes the meta-step with weights of its own, and keeps both gradients: after the look-ahead, and without."""

    def __init__(self, train_share: float = 0.0, meta_rows: int | None = None) -> None:
        super().__init__(taken=True)
        self.train_share, self.meta_rows = train_share, meta_rows  # type: ignore[misc]

    def start(self, table: Any, teachers: int, *_: Any) -> None:
        drawn = torch.rand(table.size, teachers + 1, generator=torch.Generator().manual_seed(0))
        table.add("weights", drawn, rows=True)


def kl(logits: Tensor, t: Tensor) -> Tensor:
    """At temperature 4."""
    p = (t / 4).softmax(-1)
    return 16 * (p * (p.log() - (logits / 4).log_softmax(-1))).sum(-1)


class Proven(ALMKD):
    """Compares each meta-step's gradient with that by double backward."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.buffers_before = {name: b.clone() for name, b in self.student.named_buffers()}
        super().training_step(batch, batch_idx)

    def prepare_batch(self, batch: Batch) -> Batch:
        batch = super().prepare_batch(batch)  # may draw who is mixed with whom
        self.random_before = torch.get_rng_state()
        return batch

    def meta_step(self, seen: Seen, teachers: list[Outputs]) -> None:
        assert self.table is not None
        weights = self.table["weights"][seen.train.index]
        super().meta_step(seen, teachers)
        found = self.oracle(seen, teachers, self.meta_batch, weights)
        self.proofs = [*getattr(self, "proofs", []), (self.rule.seen[-1], found)]

    def distances(self, logits: Tensor, student: Any, seen: Seen, teachers: list[Outputs]) -> list[Tensor]:
        """What is compared, by formulas of its own."""
        y, found = seen.train.y, []
        for k, teacher in enumerate(teachers):
            if isinstance(self._templates[0], Hint):
                assert self.terms is not None
                hint = self.terms.weighted[1 + k]
                features = student.hidden if hint.student_taps[0] == "penultimate" else student.map
                adapted = copy.deepcopy(hint.adapter)(features)
                found.append((adapted - teacher.features[hint.teacher_taps[0]]).square().flatten(1).mean(1))
            elif isinstance(self._templates[0], DecoupledKL):
                found.append(decoupled_kd_loss(logits, teacher.logits, y, 1.0, 2.0, 4.0))
            else:
                found.append(kl(logits, teacher.logits))
        return [d if self.selected is None else d * self.selected[seen.train.index] for d in found]

    @torch.enable_grad()
    def oracle(self, seen: Seen, teachers: list[Outputs], meta: Batch, weights: Tensor) -> Tensor:
        student, y = copy.deepcopy(self.student), seen.train.y
        student.load_state_dict(self.buffers_before, strict=False)
        evaluated = copy.deepcopy(self.student).eval()  # whose statistics know the batch
        leaves = {name: p.detach().requires_grad_() for name, p in self.student.named_parameters() if p.requires_grad}
        if self.meta_gradient == "last_layer":
            leaves = {name: p for name, p in leaves.items() if name.startswith("last.")}
        pairs = seen.train.pairs
        lam = (weights if pairs is None else weights[pairs.main]).double().requires_grad_()
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels cannot be differentiated twice
            torch.set_rng_state(self.random_before)
            logits = functional_call(student, leaves, (seen.train.x,))
            if pairs is not None:  # each row takes part in two mixtures, by its share of each
                logits = logits[pairs.inputs]
            torch.testing.assert_close(logits, seen.student.logits)
            p = logits.softmax(-1).gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1)
            robust = isinstance(self._templates[1], GeneralizedCrossEntropy)
            label = ((1 - p**0.7) / 0.7 if robust else -p.log()).where(y != UNLABELED, 0)
            losses = torch.stack([label, *self.distances(logits, student, seen, teachers)], dim=1)
            counts = lam if pairs is None else lam[pairs.rows] * pairs.share.unsqueeze(1)
            g = torch.autograd.grad(
                (counts * losses).sum(1).mean(), list(leaves.values()), create_graph=True, materialize_grads=True
            )
            moved = {name: leaf - LR * step for (name, leaf), step in zip(leaves.items(), g, strict=True)}

            def loss(rows: Batch, keep: Tensor) -> Tensor | float:
                if rows.pairs is not None:
                    return 0.0  # mixed rows have no share in what is validated
                z = functional_call(evaluated, moved, (rows.x,))
                return F.cross_entropy(z[keep], rows.y[keep], ignore_index=UNLABELED, reduction="sum") / keep.sum()

            validation = loss(meta, ~torch.isin(meta.index, seen.train.index))
            if isinstance(self.look_ahead, LastLayer):
                validation = self.over_all_rows(evaluated, moved, meta)
            share = self.rule.train_share
            if share and self.meta_gradient == "last_layer":  # features as they are seen in training
                z = F.linear(student.hidden, moved["last.weight"], moved["last.bias"])
                trained = F.cross_entropy(z, y, ignore_index=UNLABELED, reduction="sum") / len(y)
            else:
                trained = loss(seen.train, torch.ones_like(y, dtype=torch.bool))
            total = (1 - share) * validation + share * trained
            return torch.autograd.grad(total, lam)[0]

    def over_all_rows(self, evaluated: Any, moved: dict[str, Tensor], meta: Batch) -> Tensor:
        """Over features of the latest meta batches, each of its own step."""
        with torch.no_grad():
            evaluated(meta.x)
        self.kept = [*getattr(self, "kept", []), (evaluated.hidden, meta.y)][-len(self.look_ahead.rows) :]
        hidden, y = (torch.cat(parts) for parts in zip(*self.kept, strict=True))
        return F.cross_entropy(F.linear(hidden, moved["last.weight"], moved["last.bias"]), y)


def prove(kind: Any, student: nn.Module, teachers: int = 1, rule: Any = None, steps: int = 2, **options: Any) -> Proven:
    """Train in float64 on rows some of which have no label; each meta-gradient is as it should be."""
    torch.manual_seed(1)
    base = {"optimizer": partial(torch.optim.SGD, lr=LR), "temperature": 4.0, "meta_gradient": kind} | SHAPED
    nets = [Net() for _ in range(teachers)]
    model = Proven(student, nets, rule=rule or Taken(), **(base | options))
    data = Blobs(labeled=0.7, seed=0, **({"batch_size": 12} if steps == 2 else {}))
    trainer(precision="64-true", max_epochs=1, limit_train_batches=steps).fit(model, data)
    assert len(model.proofs) == steps
    for found, expected in model.proofs:
        assert expected.shape[1] == teachers + 1
        assert expected.abs().max() > 1e-5
        limit = 1e-4 if kind == "central" else 1e-8
        assert (found - expected).abs().max() <= limit * expected.abs().max()
    return model


HINTS: dict[str, Callable[[], Term]] = {
    "penultimate": Hint,
    "maps": lambda: Hint("conv", "conv"),  # through an adapter with BatchNorm
}


class TestProven:
    @pytest.mark.parametrize("kind", ["last_layer", "exact", "central"])
    @pytest.mark.parametrize("share", [0.0, 0.25])
    def test_kl(self, kind: str, share: float) -> None:
        model = prove(kind, Net(), 2, Taken(share))
        missing = model.data.labels == UNLABELED
        assert missing.any()

    @pytest.mark.parametrize("kind", ["last_layer", "exact", "central"])
    def test_decoupled(self, kind: str) -> None:
        prove(kind, Net(), 2, Taken(0.25), term=DecoupledKL(1.0, 2.0, 4.0))

    @pytest.mark.parametrize("kind", ["exact", "central"])
    def test_hint(self, kind: str) -> None:
        prove(kind, Net(), 2, Taken(0.25), term=Hint())

    @pytest.mark.parametrize("kind", ["last_layer", "exact"])
    def test_another_label_term(self, kind: str) -> None:
        prove(kind, Net(), label_term=GeneralizedCrossEntropy(0.7))

    @pytest.mark.parametrize("kind", ["last_layer", "exact"])
    def test_rows_that_are_not_distilled_or_have_no_label_learn_no_weight(self, kind: str) -> None:
        model = prove(kind, Net(), select=0.5, steps=4)
        gradients = torch.cat([found for found, _ in model.proofs])
        assert (gradients == 0).any(0).all()  # of both kinds
        assert (gradients != 0).any(0).all()

    @pytest.mark.parametrize("kind", ["last_layer", "exact", "central"])
    @pytest.mark.parametrize("mix", ["mixup", "cutmix"])
    def test_mixed_rows(self, kind: str, mix: str) -> None:
        prove(kind, Net(), 2, mix=mix, steps=3)

    @pytest.mark.parametrize("student", [Seeded, Attention, partial(build_model, "wrn-10-1", CLASSES, SHAPE)])
    def test_other_networks(self, student: Callable[[], nn.Module]) -> None:
        prove("exact", student())

    def test_over_the_meta_rows_of_the_latest_steps(self) -> None:
        model = prove("last_layer", Net(), rule=Taken(meta_rows=1000), steps=6)
        assert isinstance(model.look_ahead, LastLayer)
        assert sum(len(y) for _, y, _ in model.look_ahead.rows) == 24  # all that there are


def test_180_meta_rows_of_digits() -> None:
    model = ALMKD("mlp-4", build_model("mlp-4", 10, (1, 8, 8)), rule="paper", num_classes=10, input_shape=[1, 8, 8])
    model.rule.warmup_epochs = 0  # type: ignore[attr-defined]
    data = DigitsDataModule(meta=180, batch_size=64)
    trainer(max_epochs=1, limit_val_batches=0).fit(model, data)
    assert isinstance(model.look_ahead, LastLayer)
    assert 180 <= sum(len(y) for _, y, _ in model.look_ahead.rows) < 180 + 64


class TestNoTrace:
    @pytest.mark.parametrize("kind", ["exact", "central"])
    @pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
    def test_of_the_meta_step(self, kind: Any, precision: Any) -> None:
        """On BatchNorm, of the student and of the adapter, on dropout's random numbers, on gradients."""

        def run(taken: bool) -> tuple[Any, Any]:
            torch.manual_seed(3)
            model = ALMKD(
                Net(), Net(), rule=Frozen(taken), meta_gradient=kind, term=Hint("conv", "conv", weight=0.1), **SHAPED
            )
            fitted = trainer(precision=precision, limit_train_batches=3)
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "a second pass")
                fitted.fit(model, noisy())
            return model.rule, [model.state_dict(), fitted.optimizers[0].state_dict(), torch.get_rng_state()]

        (_, expected), (rule, found) = run(False), run(True)
        assert len(rule.seen) == 6
        assert all(gradient.any() and gradient.dtype != torch.bfloat16 for gradient in rule.seen)
        assert_same(found[1:], expected[1:])
        # the check before the first update runs in both
        assert_same(found[0], expected[0])

    def test_agreement_in_float32(self) -> None:
        """On the same data all kinds speak of the same samples."""
        found = {}
        for kind in ("last_layer", "exact", "central"):
            torch.manual_seed(0)
            model = almkd("cnn-2", Frozen(True), meta_gradient=kind)
            trainer(max_epochs=1).fit(model, noisy())
            assert isinstance(model.rule, Frozen)
            found[kind] = torch.cat(model.rule.seen).double().flatten()
        assert F.cosine_similarity(found["central"], found["exact"], dim=0) > 0.999
        assert 0.2 < F.cosine_similarity(found["last_layer"], found["exact"], dim=0) < 0.99


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Square.apply(x)
        return out


class TestStudents:
    @pytest.mark.parametrize("kind", ["exact", "central"])
    def test_that_the_last_layer_refuses(self, kind: Any) -> None:
        frozen = build_model("mlp-8", CLASSES, SHAPE)
        frozen[3].requires_grad_(False)  # type: ignore[index]
        for student in (nn.Sequential(nn.Conv2d(1, CLASSES, 4), nn.Flatten()), Wrapped("scaled"), frozen):
            trainer(max_epochs=1, limit_train_batches=2).fit(almkd(student, Frozen(True), meta_gradient=kind), Blobs())

    def test_mapping_in_object_out(self) -> None:
        student, *teachers = [Keyword(net) for net in (build_model("cnn-2", CLASSES, SHAPE), *trained_teachers())]
        model = build("almkd-paper", student, teachers, meta_gradient="exact")
        trainer(limit_train_batches=3).fit(model, DictBlobs())
        assert model.table is not None
        assert len(model.table["weights"].unique(dim=0)) > 10

    def test_without_forward_mode(self) -> None:
        """Said before the first update, though the first meta-step may come many epochs later."""
        student = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Squares(), nn.Linear(8, CLASSES))
        before = copy.deepcopy(student.state_dict())
        with pytest.raises(ValueError, match=r"(?s)forward-mode.*Use meta_gradient: central"):
            trainer().fit(almkd(student, Paper(), meta_gradient="exact"), Blobs())
        assert_same(student.state_dict(), before)
        trainer(max_steps=2).fit(almkd(student, Paper(), meta_gradient="central"), Blobs())
        assert not torch.equal(student[1].weight, before["1.weight"])  # type: ignore[arg-type]

    def test_whose_pass_cannot_be_repeated(self) -> None:
        class Counting(nn.Module):
            passes = 0

            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(16, CLASSES)

            def forward(self, x: Tensor) -> Tensor:
                self.passes += 1
                out: Tensor = self.layer(x.flatten(1)) * self.passes
                return out

        with pytest.warns(UserWarning, match="a second pass of Counting over a batch gives other logits"):
            trainer(max_steps=1).fit(almkd(Counting(), meta_gradient="exact"), Blobs())


class Several(DataModule):
    """Three clouds of points, each sample in one or two of them; some labels are missing."""

    task = "multilabel"
    num_classes = CLASSES
    input_shape = SHAPE

    def load(self) -> Source:
        x, y = blobs()
        labels = F.one_hot(y, CLASSES).numpy()
        labels[:, 0] |= labels[:, 1]
        labels[:20] = UNLABELED
        return Source(TensorRows(x), TensorRows(x), labels, test_size=24, identity=b"several")


class TestSeveralLabels:
    """Any of three labels a sample."""

    @pytest.mark.parametrize("kind", ["last_layer", "exact"])
    def test_paper(self, kind: Any) -> None:
        rule = Paper(warmup_epochs=1, every=1, step_size=50.0)
        model = ALMKD("mlp-8", trained_teachers()[1], rule=rule, task="multilabel", meta_gradient=kind, **SHAPED)
        fitted, data = trainer(max_epochs=8), Several(batch_size=8, meta=24, val=24)
        fitted.fit(model, data)
        assert model.table is not None
        missing = (data.labels == UNLABELED).all(1)
        assert missing.any()
        assert (model.table["weights"][missing, 0] == 0).all()
        assert len(model.table["weights"].unique(dim=0)) > 20
        assert fitted.callback_metrics["val/accuracy"] > 0.85

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            (
                {"rule": "robust"},
                "the rule Robust needs one class a sample, found task 'multilabel': use the rule paper",
            ),
            (
                {"rule": "paper", "term": DecoupledKL()},
                "expected terms for multilabel, found DecoupledKL, for classification",
            ),
        ],
    )
    def test_refused(self, options: dict[str, Any], match: str) -> None:
        model = ALMKD("mlp-8", trained_teachers()[1], task="multilabel", **SHAPED, **options)
        with pytest.raises(ValueError, match=match):
            trainer().fit(model, Several(batch_size=8, meta=24, val=24))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"term": Hint()}, "Hint by sample: it compares features, .*set meta_gradient to exact, or pass it as extra"),
    ],
)
def test_terms_that_cannot_be_weighed(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        trainer().fit(ALMKD("mlp-8", trained_teachers()[0], rule=Paper(), **SHAPED, **options), Blobs())
