"""MixUp and CutMix of rows that keep their own label and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import QUIET, call, configs, read_yaml, version
from methods import CLASSES, METHODS, SHAPE, Blobs, build, trained_teachers, trainer
from test_terms import step
from torch import Tensor
from torchvision.transforms import v2

from lit_kd import KD, Batch, MixKD, MutualLearning, Supervised
from lit_kd.data.mixing import mixed
from lit_kd.models import build_model
from lit_kd.terms import ELR, SOP, Contrastive, CrossEntropy
from lit_kd.types import UNLABELED

SHAPED: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
MIXES = {"mixup": v2.MixUp, "cutmix": v2.CutMix}
COUPLED = ("dist", "similarity-preserving", "pkt", "rkd", "comparative-kd", "multi-level")
UNMIXED = (
    *COUPLED,
    "adversarial",
    "adversarial-teacher",
    "mixkd",
    "crd",
    "elr",
    "sop",
    "co-teaching",
    "jocor",
)  # which are refused with mix


def images(rows: int = 12) -> Batch:
    """With class numbers and indices."""
    torch.manual_seed(5)
    return Batch(torch.randn(rows, *SHAPE), torch.randint(CLASSES, (rows,)), 100 + torch.arange(rows))


class TestMixed:
    @pytest.mark.parametrize("name", MIXES)
    def test_the_same_inputs_and_labels_as_torchvision(self, name: str) -> None:
        batch = images()
        torch.manual_seed(1)
        x, labels = MIXES[name](num_classes=CLASSES)(batch.x, batch.y)
        torch.manual_seed(1)
        found = mixed(batch, MIXES[name]())
        torch.testing.assert_close(found.x, x)
        pairs = found.pairs
        assert pairs is not None
        part = pairs.share * len(batch.y) / len(pairs.rows)
        soft = torch.zeros(12, CLASSES).index_put((pairs.inputs, found.y), part, accumulate=True)
        torch.testing.assert_close(soft, labels)
        torch.testing.assert_close(found.index, 100 + pairs.rows)
        torch.testing.assert_close(found.y, batch.y[pairs.rows])

    def test_each_row_is_seen_where_its_share_is_greatest(self) -> None:
        pairs = mixed(images(), v2.MixUp()).pairs
        assert pairs is not None
        torch.testing.assert_close(pairs.rows[pairs.main], torch.arange(12))
        for row, main in enumerate(pairs.main):
            assert pairs.share[main] == pairs.share[pairs.rows == row].max()

    def test_a_choice_of_transforms_and_a_single_row(self) -> None:
        mix = v2.RandomChoice([v2.MixUp(), v2.CutMix(), v2.Identity()])
        for rows in (1, 2, 7):
            for _ in range(6):
                found = mixed(images(rows), mix)
                assert found.pairs is not None
                torch.testing.assert_close(found.pairs.share.mean(), torch.tensor(1.0))

    @pytest.mark.parametrize("x", [torch.randn(4, 3), torch.ones(4, 1, 2, 2, dtype=torch.uint8), {"a": torch.ones(4)}])
    def test_what_is_no_image(self, x: Any) -> None:
        with pytest.raises(ValueError, match=r"expected images to mix, floating-point \(B, channels, height, width\)"):
            mixed(Batch(x, torch.zeros(4).long()), v2.MixUp())


class TestLoss:
    @pytest.mark.parametrize("name", MIXES)
    def test_of_kd_is_that_of_mixed_labels(self, name: Any) -> None:
        """Fixed weights: the usual cross-entropy with torchvision's soft labels, and KL on the mixture."""
        batch, (teacher, _) = images(), trained_teachers()
        model = KD("mlp-8", teacher, weight=0.3, temperature=2.0, mix=name, **SHAPED)
        torch.manual_seed(1)
        found = step(model, batch)
        torch.manual_seed(1)
        x, labels = MIXES[name](num_classes=CLASSES)(batch.x, batch.y)
        logits, taught = model.student(x), teacher.eval()(x)
        kl = F.kl_div((logits / 2).log_softmax(-1), (taught / 2).softmax(-1), reduction="batchmean")
        torch.testing.assert_close(found, 0.7 * F.cross_entropy(logits, labels) + 0.3 * 4 * kl)

    def test_of_weights_by_row(self) -> None:
        """A weight goes with its row into both mixtures."""

        class Own(Supervised):
            def weigh(self, student: Any, sources: Any, batch: Batch) -> Tensor:
                assert batch.index is not None
                return (batch.index - 100).unsqueeze(1).float()

        batch, model = images(), Own("mlp-8", mix="mixup", **SHAPED)
        torch.manual_seed(1)
        found = step(model, batch)
        torch.manual_seed(1)
        x, shares = v2.MixUp(num_classes=12)(batch.x, torch.arange(12))
        log_p = model.student(x).log_softmax(-1)
        every = -log_p[:, batch.y]  # of each mixture with each row's label
        torch.testing.assert_close(found, (shares * torch.arange(12) * every).sum(1).mean())

    def test_of_rows_without_a_label_and_of_soft_labels(self) -> None:
        batch = images()
        batch.y[:3] = UNLABELED
        soft = F.one_hot(batch.y.clamp(min=0), CLASSES).float() * (batch.y != UNLABELED).unsqueeze(1)
        losses = []
        for y in (batch.y, soft):
            torch.manual_seed(1)
            model = Supervised(build_model("mlp-8", CLASSES, SHAPE), mix="cutmix", **SHAPED)
            torch.manual_seed(1)
            losses.append(step(model, batch._replace(y=y)))
        torch.testing.assert_close(*losses)

    def test_of_peers(self) -> None:
        """Networks that teach each other see the same mixtures."""
        batch, model = images(), MutualLearning("mlp-8", ["mlp-6"], mix="mixup", **SHAPED)
        torch.manual_seed(1)
        found = step(model, batch)
        torch.manual_seed(1)
        x, labels = v2.MixUp(num_classes=CLASSES)(batch.x, batch.y)
        a, b = model.student(x).log_softmax(-1), model.peers["peer_1"](x).log_softmax(-1)
        kl = F.kl_div(a, b.detach(), reduction="batchmean", log_target=True)
        kl = kl + F.kl_div(b, a.detach(), reduction="batchmean", log_target=True)
        torch.testing.assert_close(found, kl - (labels * (a + b)).sum(1).mean())


@pytest.mark.parametrize("method", [name for name in METHODS if name not in UNMIXED])
def test_every_method_trains(method: str) -> None:
    """Also those that keep what they believe of rows."""
    model = build(method, mix="cutmix")
    run = trainer(max_epochs=3)
    run.fit(model, Blobs(seed=0))
    assert run.callback_metrics["train/loss"].isfinite()
    if model.table is not None and "weights" in model.table:
        assert model.table["weights"].isfinite().all()


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Supervised("mlp-8", mix="mixed", **SHAPED), "expected as mix one of"),
        (lambda: MixKD("mlp-8", mix="mixup", **SHAPED), "without revise, select and mix"),
        (
            lambda: KD("mlp-8", trained_teachers()[0], mix="mixup", teacher_cache="memory", **SHAPED),
            "no teacher_cache where rows are mixed",
        ),
        (
            lambda: KD("mlp-8", trained_teachers()[0], mix="mixup", term=Contrastive(), **SHAPED),
            "Contrastive keeps what",
        ),
        (lambda: Supervised("mlp-8", mix="mixup", label_term=ELR(), **SHAPED), "ELR keeps what it saw"),
        (lambda: Supervised("mlp-8", mix="mixup", label_term=SOP(), **SHAPED), "SOP keeps what it saw"),
    ],
)
def test_what_cannot_be_mixed(make: Any, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        trainer().fit(make(), Blobs(seed=0))


@pytest.mark.parametrize("given", ["cutmix", "torchvision.transforms.v2.MixUp"])
def test_by_config(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call(
        "fit", *configs("supervised"), *QUIET, f"--model.mix={given}", "--model.student=cnn-2", "--trainer.max_epochs=1"
    )
    found = read_yaml(version(0) / "config.yaml")["model"]["init_args"]["mix"]
    assert given in (found, isinstance(found, dict) and found["class_path"])


def test_label_smoothing_goes_with_it() -> None:
    batch = images()
    model = Supervised("mlp-8", mix="mixup", label_term=CrossEntropy(label_smoothing=0.1), **SHAPED)
    torch.manual_seed(1)
    found = step(model, batch)
    torch.manual_seed(1)
    x, labels = v2.MixUp(num_classes=CLASSES)(batch.x, batch.y)
    torch.testing.assert_close(found, F.cross_entropy(model.student(x), labels, label_smoothing=0.1))
