"""The losses of other libraries and ours on the same tensors, as docs/migrating.md tells them.

timm and cleanlab are called; trl too, where it is installed. mmrazor and mdistiller are not: their formulas stand here
in float64, as their public code has them, written anew with numpy and scipy.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from lightning import LightningModule
from methods import Blobs, trainer
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import pearsonr
from torch import Tensor, nn

from lit_kd import KD, WSLD, Batch, Outputs
from lit_kd.data.table import SampleTable
from lit_kd.losses import (
    angle_loss,
    attention_loss,
    correlation_loss,
    cross_entropy,
    decoupled_kd_loss,
    distance_loss,
    divergence,
    hint_loss,
    kd_loss,
)
from lit_kd.report.label_issues import find_issues
from lit_kd.terms import HardLabel

B, C, T = 12, 6, 4.0
DRAW = torch.Generator().manual_seed(0)
Z, TEACHER = 2 * torch.randn(2, B, C, dtype=torch.float64, generator=DRAW)
Y = torch.randint(C, (B,), generator=DRAW)
z, t, y = Z.numpy(), TEACHER.numpy(), Y.numpy()


def same(ours: Tensor, theirs: Any) -> None:
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    assert abs(float(theirs)) > 1e-3


class Given(nn.Module):
    """A network that gives the logits that it was told, as timm's tasks want it."""

    num_classes, in_chans = C, 3

    def __init__(self, logits: Tensor, features: Tensor | None = None) -> None:
        super().__init__()
        self.logits, self.features = logits, features
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
        self.head_hidden_size = 0 if features is None else features.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.logits

    def forward_features(self, x: Tensor) -> Tensor:
        return self.logits

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | None:
        return self.features if pre_logits else self.logits


class TestTimm:
    images = torch.zeros(B, 3, 2, 2, dtype=torch.float64)
    options: ClassVar[dict[str, Any]] = {"criterion": nn.CrossEntropyLoss(), "dtype": torch.float64, "verbose": False}

    def test_logits(self) -> None:
        """The weights 1 and 1, which timm has where none is given, are the weight 0.5 at twice the learning rate."""
        from timm.task import LogitDistillationTask

        for given, weight, scale in (
            ({"task_loss_weight": 0.3}, 0.7, 1),
            ({}, 0.5, 2),
            ({"distill_loss_weight": 3.0}, 0.75, 4),
        ):
            task = LogitDistillationTask(Given(Z), Given(TEACHER), temperature=T, **given, **self.options)
            found = task(self.images, Y)
            same(kd_loss(Z, TEACHER, T).mean(), found["kd_loss"])
            same(scale * ((1 - weight) * cross_entropy(Z, Y) + weight * kd_loss(Z, TEACHER, T)).mean(), found["loss"])

    def test_hard_labels(self) -> None:
        """Of DeiT: our term takes the same logits as the label's loss, timm a head of its own."""
        from timm.task import TokenDistillationTask

        class Two(Given):
            def set_distilled_training(self, enable: bool = True) -> None:
                pass

            def forward(self, x: Tensor) -> Any:
                return self.logits, self.logits

        task = TokenDistillationTask(Two(Z), Given(TEACHER), distill_type="hard", task_loss_weight=0.5, **self.options)
        ours = HardLabel()(Outputs(Z, {}), Outputs(TEACHER, {}), Batch(self.images, Y, None))
        same((0.5 * cross_entropy(Z, Y) + 0.5 * ours).mean(), task(self.images, Y)["loss"])

    def test_features(self) -> None:
        from timm.task import FeatureDistillationTask

        f, g = torch.randn(2, B, 7, dtype=torch.float64, generator=DRAW)
        task = FeatureDistillationTask(Given(Z, f), Given(TEACHER, g), **self.options)
        same(hint_loss(f, g).mean(), task(self.images, Y)["kd_loss"])

    def test_cross_entropies(self) -> None:
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        same(cross_entropy(Z, Y, label_smoothing=0.1).mean(), LabelSmoothingCrossEntropy(0.1)(Z, Y))
        same(cross_entropy(Z, TEACHER.softmax(1)).mean(), SoftTargetCrossEntropy()(Z, TEACHER.softmax(1)))


class TestMmrazor:
    def test_kl_divergence(self) -> None:
        """Its reduction "mean" is over rows and classes, "sum" over all."""
        every = T**2 * rel_entr(softmax(t / T, 1), softmax(z / T, 1))
        for reduction, ours in (("batchmean", 1), ("mean", 1 / C), ("sum", B)):
            theirs = {"batchmean": every.sum() / B, "mean": every.mean(), "sum": every.sum()}[reduction]
            same(ours * kd_loss(Z, TEACHER, T).mean(), theirs)

    @pytest.mark.parametrize("of", ["mmrazor", "mdistiller"])
    def test_decoupled(self, of: str) -> None:
        """mmrazor's sums over rows, whatever its `reduction` says, as torch then heeds `size_average`."""
        reference = {"reduction": "mean", "size_average": False}
        log_p, q = torch.from_numpy(log_softmax(z, 1)), torch.from_numpy(softmax(t, 1))
        with pytest.warns(UserWarning, match="size_average"):
            assert torch.nn.functional.kl_div(log_p, q, **reference) == pytest.approx(rel_entr(q, log_p.exp()).sum())

        def binary(logits: np.ndarray) -> np.ndarray:
            p = softmax(logits / T, 1)[np.arange(B), y]
            return np.stack([p, 1 - p], 1)

        others = np.arange(C) != y[:, None]
        p, q = (softmax((logits / T)[others].reshape(B, C - 1), 1) for logits in (t, z))
        theirs = T**2 * (1.0 * rel_entr(binary(t), binary(z)).sum() + 8.0 * rel_entr(p, q).sum())
        ours = decoupled_kd_loss(Z, TEACHER, Y, alpha=1.0, beta=8.0, temperature=T).mean()
        same(B * ours if of == "mmrazor" else ours, theirs if of == "mmrazor" else theirs / B)

    def test_dist(self) -> None:
        """Its epsilon is as ours, added to the product of norms."""
        p, q = softmax(z / T, 1), softmax(t / T, 1)
        inter = np.mean([1 - pearsonr(p[i], q[i])[0] for i in range(B)])
        intra = np.mean([1 - pearsonr(p[:, c], q[:, c])[0] for c in range(C)])
        a, b = (torch.from_numpy(x) for x in (p, q))
        same(T**2 * (correlation_loss(a, b).mean() + correlation_loss(a.mT, b.mT).mean()), T**2 * (inter + intra))

    def test_relations(self) -> None:
        """It brings features to length 1 before, as the authors' code on request; ours takes them as they are."""
        f, g = torch.randn(2, 5, 7, dtype=torch.float64, generator=DRAW)
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (f.numpy(), g.numpy())]
        apart, cosines = [], []
        for x in unit:
            d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
            apart.append(d / d[d > 0].mean())
            towards = [[(a - b) / max(np.linalg.norm(a - b), 1e-12) for a in x] for b in x]
            cosines.append(np.array([[[u @ v for v in row] for u in row] for row in towards]))

        def smooth(a: np.ndarray, b: np.ndarray) -> float:
            d = np.abs(a - b)
            return float(np.where(d < 1, d**2 / 2, d - 0.5).mean())

        ours = [torch.from_numpy(x) for x in unit]
        same(distance_loss(*ours), smooth(*apart))
        same(angle_loss(*ours), smooth(*cosines))

    def test_attention(self) -> None:
        f, g = torch.randn(2, B, 5, 3, 3, dtype=torch.float64, generator=DRAW)
        vectors = [(x.numpy() ** 2).mean(1).reshape(B, 9) for x in (f, g)]
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in vectors]
        same(attention_loss(f, g).mean(), ((unit[0] - unit[1]) ** 2).mean())

    def test_weighted_soft_labels(self) -> None:
        """It takes the cross-entropy with the teacher, and we the divergence, less by the teacher's entropy."""
        own, theirs = (-log_softmax(logits, 1)[np.arange(B), y] for logits in (z, t))
        w = 1 - np.exp(-own / (theirs + 1e-7))
        p = softmax(t / 2, 1)
        crosses = -(p * log_softmax(z / 2, 1)).sum(1)
        entropy = -(p * log_softmax(t / 2, 1)).sum(1)
        model = WSLD(nn.Linear(1, C), nn.Linear(1, C), num_classes=C)
        found = model.weigh(Outputs(Z, {}), [Outputs(TEACHER, {})], Batch(Z, Y, None))
        assert isinstance(found, Tensor)
        same((found[:, 1] * kd_loss(Z, TEACHER, 2.0)).mean(), 2.5 * 4 * (w * (crosses - entropy)).mean())


class TestTrl:
    """Its GKD loss has no T squared, and counts tokens whose label is not -100."""

    @pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
    def test_by_the_formula(self, beta: float) -> None:
        p, q = softmax(t / 0.9, 1), softmax(z / 0.9, 1)
        m = beta * p + (1 - beta) * q
        theirs = (beta * rel_entr(p, m) + (1 - beta) * rel_entr(q, m)).sum(1).mean()
        logs = ((x / 0.9).log_softmax(-1) for x in (TEACHER, Z))
        same(divergence(*logs, kind="jensen_shannon", beta=beta).mean(), theirs)

    @pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
    @pytest.mark.parametrize(
        ("beta", "kind"), [(0.1, "jensen_shannon"), (0.7, "jensen_shannon"), (0, "forward"), (1, "reverse")]
    )
    def test_called(self, beta: float, kind: Any) -> None:
        from trl.experimental.gkd import GKDTrainer

        labels = torch.where(torch.arange(B) % 3 > 0, Y, -100)
        sequences = [x.view(3, 4, C) for x in (Z, TEACHER)]
        theirs = GKDTrainer.generalized_jsd_loss(*sequences, labels.view(3, 4), beta=beta, temperature=0.9)
        logs = ((x / 0.9).log_softmax(-1)[labels != -100] for x in (TEACHER, Z))
        same(divergence(*logs, kind=kind, beta=beta if kind == "jensen_shannon" else 0.5).mean(), theirs)


def test_cleanlab() -> None:
    """Half of a `label_score` is cleanlab's normalized margin; the other half is what the weights' rule believes."""
    data = Blobs(noise="symmetric", noise_rate=0.4)
    data.setup()
    n, given = data.train_size, data.labels[: data.train_size]
    said = torch.randn(n, 3, dtype=torch.float64, generator=DRAW).softmax(1)
    clean = torch.rand(len(data.labels), generator=DRAW)
    table = SampleTable(len(data.labels), data.fingerprint)
    memory = torch.zeros(len(data.labels), 3)
    memory[:n] = said.float()
    columns = {
        "memory": memory,
        "learned_class": memory.argmax(1),
        "clean_probability": clean,
        "weights": torch.ones(len(clean), 2),
    }
    for name, column in columns.items():
        table.add(name, column, rows=True)
    issues = find_issues(table, data, torch.empty(0))
    margin = get_label_quality_scores(given.numpy(), said.numpy(), method="normalized_margin")
    np.testing.assert_allclose(issues.score, (clean.numpy()[issues.index] + margin[issues.index]) / 2, atol=1e-6)
    assert find_label_issues(given.numpy(), said.numpy(), n_jobs=1).shape == issues.is_issue.shape


def test_a_training_with_weights_that_do_not_sum_to_1() -> None:
    """Two epochs of SGD: theirs with weights of sum 2, ours with twice the learning rate and half the weight decay."""
    a, b, lr, decay = 0.1, 0.9, 0.2, 0.01
    scale = 2 * (a + b)

    class Bare(LightningModule):
        def __init__(self, net: nn.Module, teacher: nn.Module) -> None:
            super().__init__()
            self.net, self.teacher = net, teacher

        def training_step(self, batch: Batch, _: int) -> Tensor:
            with torch.no_grad():
                taught = self.teacher(batch.x)
            z = self.net(batch.x)
            kl = nn.functional.kl_div((z / T).log_softmax(1), (taught / T).softmax(1), reduction="batchmean") * T**2
            return 2 * a * nn.functional.cross_entropy(z, batch.y) + 2 * b * kl

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr, momentum=0.9, weight_decay=decay)

    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr * scale, momentum=0.9, weight_decay=decay / scale)

    bare, ours = Bare(net(1), net(2)), KD(net(1), net(2), num_classes=3, weight=b, temperature=T, optimizer=sgd)
    for model in (bare, ours):
        trainer(max_epochs=2, limit_val_batches=0).fit(model, Blobs())
    torch.testing.assert_close(ours.student.state_dict(), bare.net.state_dict(), rtol=1e-4, atol=1e-5)
