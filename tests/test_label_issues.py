"""DivideMix's divider against Bayes' rule, and confident learning against counts by hand and row by row."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cleanlab.count import compute_confident_joint
from cleanlab.filter import find_label_issues
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lit_kd import LossDivider, Supervised, cross_predict, cross_relabel
from lit_kd.data import DigitsDataModule
from lit_kd.terms import Weights
from lit_kd.trust.labels import clean_by_loss, confident_joint, label_issues
from lit_kd.types import UNLABELED, Batch, Outputs

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


class TestCleanByLoss:
    def test_a_known_mixture(self) -> None:
        """Near the posterior of the two normal distributions that the losses are drawn from, on any scale."""
        draw = np.random.default_rng(0)
        x = np.concatenate([draw.normal(0.5, 0.2, 3000), draw.normal(2.5, 0.5, 2000)])
        a, b = 0.6 * norm.pdf(x, 0.5, 0.2), 0.4 * norm.pdf(x, 2.5, 0.5)
        for scale in (1.0, 100.0):
            found = clean_by_loss(torch.from_numpy(scale * x + 3)).numpy()
            assert np.abs(found - a / (a + b)).mean() < 0.01

    def test_equal_losses(self) -> None:
        assert (clean_by_loss(torch.full((5,), 0.7)) == 1).all()

    def test_same_numbers_twice_and_global_random_numbers_stay(self) -> None:
        losses = torch.rand(50)
        before = np.random.get_state()[1].copy()  # noqa: NPY002 - scikit-learn's default would draw from it
        torch.testing.assert_close(clean_by_loss(losses), clean_by_loss(losses), rtol=0, atol=0)
        assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


BY_HAND = torch.tensor(
    # thresholds are the means of the own class's column: 0.7, 0.6, 0.5
    [
        [0.9, 0.1, 0.0],  # label 0, of 0
        [0.8, 0.1, 0.1],  # label 0, of 0
        [0.4, 0.6, 0.0],  # label 0, of 1: it reaches 0.6
        [0.1, 0.8, 0.1],  # label 1, of 1
        [0.5, 0.4, 0.1],  # label 1, of none
        [0.1, 0.2, 0.7],  # label 2, of 2
        [0.7, 0.0, 0.3],  # label 2, of 0
    ],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2])


def by_row(labels: Tensor, p: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The joint and the wrong labels, by loops."""
    n, c = p.shape
    threshold = [np.mean([float(p[i, k]) for i in range(n) if labels[i] == k]) for k in range(c)]
    count = np.zeros((c, c))
    for i in range(n):
        above = [(float(p[i, k]), k) for k in range(c) if p[i, k] >= threshold[k] - 1e-6]
        if above:
            count[labels[i], max(above)[1]] += 1
    for k in range(c):
        count[k, k] = max(count[k, k], 1)
        count[k] *= (labels == k).sum().item() / count[k].sum()
    wrong = np.zeros(n, dtype=bool)
    for a in range(c):
        for b in set(range(c)) - {a}:
            rows = sorted((i for i in range(n) if labels[i] == a), key=lambda i: float(p[i, a] - p[i, b]))
            for i in rows[: round(count[a, b])]:
                wrong[i] |= int(p[i].argmax()) != a
    return count, wrong


class TestConfidentLearning:
    def test_by_hand(self) -> None:
        expected = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(confident_joint(LABELS, BY_HAND), expected)
        assert label_issues(LABELS, BY_HAND).tolist() == [False, False, True, False, False, False, True]

    @pytest.mark.parametrize("seed", range(3))
    def test_by_row(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        truth = torch.randint(4, (300,), generator=g)
        noisy = torch.rand(300, generator=g) < 0.3
        labels = torch.where(noisy, (truth + 1) % 4, truth)
        logits = 3 * torch.eye(4)[truth] + torch.randn(300, 4, generator=g)
        p = logits.double().softmax(-1)
        joint, wrong = by_row(labels, p)
        torch.testing.assert_close(confident_joint(labels, p), torch.from_numpy(joint))
        found = label_issues(labels, p)
        assert found.tolist() == wrong.tolist()
        # and it finds the noise: which pairs, how many, which rows
        true_joint = torch.zeros(4, 4).index_put((labels, truth), torch.ones(300), accumulate=True).double()
        assert (confident_joint(labels, p) - true_joint).abs().max() < 12
        assert (found & noisy).sum() > 0.8 * noisy.sum()
        assert (found & noisy).sum() > 0.8 * found.sum()

    def test_a_class_that_no_row_is_labelled_as(self) -> None:
        """None is said to be of it."""
        labels, p = torch.tensor([0, 0, 1]), torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]])
        joint = confident_joint(labels, p)
        assert joint[2].tolist() == joint[:, 2].tolist() == [0, 0, 0]
        assert not label_issues(labels, p).any()

    @pytest.mark.parametrize("seed", range(4))
    def test_as_cleanlab_does(self, seed: int) -> None:
        """It rounds the joint to whole rows in a way of its own, so that counts may differ by one."""
        rng = np.random.default_rng(seed)
        truth = rng.integers(0, 5, 500)
        p = rng.dirichlet(np.full(5, 0.3), 500) + 2 * np.eye(5)[truth] * rng.random((500, 1))
        p /= p.sum(1, keepdims=True)
        labels = np.where(rng.random(500) < 0.3, rng.integers(0, 5, 500), truth)
        joint, expected = confident_joint(torch.tensor(labels), torch.tensor(p)), compute_confident_joint(labels, p)
        assert np.abs(joint.numpy() - expected).max() < 1
        wrong = find_label_issues(labels, p, filter_by="prune_by_noise_rate", n_jobs=1)
        assert 100 < wrong.sum() < 200
        assert (label_issues(torch.tensor(labels), torch.tensor(p)).numpy() != wrong).sum() <= 4


class TestLossDivider:
    def test_it_finds_wrong_labels(self) -> None:
        data = Blobs(labeled=0.9, train_on_meta=True, noise="symmetric", noise_rate=0.5)
        torch.manual_seed(0)
        model, fitted = LossDivider("mlp-16", trained_teachers(), warmup_epochs=2, **BASE), trainer(max_epochs=8)
        fitted.fit(model, data)
        weights, missing = model.table["weights"], data.labels == UNLABELED
        own = ~missing & ~data.trusted
        assert (weights[data.trusted, 0] == 1).all()
        assert (weights[missing, 0] == 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(72))
        torch.testing.assert_close(weights[:, 1], weights[:, 2])
        assert roc_auc_score(data.noisy[own], -weights[own, 0]) > 0.95

    def test_labels_count_fully_in_the_warm_up(self) -> None:
        model = LossDivider("mlp-8", warmup_epochs=2, **BASE)
        with pytest.warns(UserWarning, match="all 2 epochs are warm-up .*smaller warmup_epochs"):
            trainer(max_epochs=2).fit(model, Blobs())
        assert (model.table["weights"] == 1).all()

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="warmup_epochs of at least 1, found 0"):
            LossDivider("mlp-8", warmup_epochs=0, **BASE)


class Seeing(Supervised):
    """Keeps which rows it was trained on."""

    def __init__(self, **base: Any) -> None:
        super().__init__("mlp-64", **base)
        self.seen: set[int] = set()

    def weigh(self, student: Outputs, sources: list[Outputs], batch: Batch) -> Weights:
        assert batch.index is not None
        self.seen |= set(batch.index.tolist())
        return super().weigh(student, sources, batch)


class TestCrossPredict:
    @pytest.mark.parametrize("meta", [False, True])
    def test_no_row_is_predicted_by_who_saw_it(self, meta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        models: list[Seeing] = []
        asked: list[list[int]] = []
        predict = Seeing.predict_rows
        monkeypatch.setattr(
            Seeing,
            "predict_rows",
            lambda self, rows, **o: asked.append(rows.indices.tolist()) or predict(self, rows, **o),
        )
        data = Blobs(train_on_meta=meta, labeled=40)
        found = cross_predict(lambda: models.append(Seeing(**BASE)) or models[-1], data, trainer, folds=3)
        assert found.shape == (48, CLASSES)
        torch.testing.assert_close(found.sum(1), torch.ones(48))
        assert sorted(i for fold in asked for i in fold) == [*range(48)]
        labelled = set((data.labels != UNLABELED).nonzero().flatten().tolist())
        for model, fold in zip(models, asked, strict=True):
            assert model.seen == {i for i in labelled if i < (72 if meta else 48)} - set(fold)

    def test_finds_labels_that_a_student_learns_by_heart(self) -> None:
        make = partial(Supervised, "mlp-64", num_classes=10, input_shape=[1, 8, 8])
        data = DigitsDataModule(noise="symmetric", noise_rate=0.3, seed=0)
        p = cross_predict(make, data, lambda: trainer(max_epochs=10), folds=3)
        noisy, wrong = data.noisy[: data.train_size], label_issues(data.labels[: data.train_size], p)
        assert (wrong & noisy).sum() > 0.9 * noisy.sum()
        assert (wrong & noisy).sum() > 0.85 * wrong.sum()

    def test_relabelled_rows_are_more_often_right_than_their_teacher(self) -> None:
        """Few labels, and a teacher that is wrong about three rows of ten; labels that are given stay."""
        make = partial(Supervised, "mlp-64", num_classes=10, input_shape=[1, 8, 8])
        data = DigitsDataModule(labeled=50, seed=0)
        data.setup()
        n, truth = data.train_size, data.clean_labels[: data.train_size].clone()
        given = data.labels[:n].clone()
        g = torch.Generator().manual_seed(0)
        other = (truth + torch.randint(1, 10, (n,), generator=g)) % 10
        said = torch.where(torch.rand(n, generator=g) < 0.3, other, truth)
        labels = cross_relabel(make, data, lambda: trainer(max_epochs=10), said)
        assert torch.equal(labels[0], torch.where(given == UNLABELED, said, given))
        assert (labels[:, given != UNLABELED] == given[given != UNLABELED]).all()
        right = (labels == truth).float().mean(1)
        assert right[0] < 0.75
        assert right[1] > 0.85
        assert right[2] > right[1]
        assert torch.equal(data.labels[:n], labels[2])
        with pytest.raises(ValueError, match="expected rows without a label, found none"):
            cross_relabel(make, data, trainer, said)

    @pytest.mark.parametrize(
        "start", [torch.zeros(47, dtype=torch.long), torch.zeros(48, CLASSES), torch.full((48,), CLASSES)]
    )
    def test_what_is_no_class_for_each_row(self, start: Tensor) -> None:
        with pytest.raises(ValueError, match=r"expected as start 48 classes in \[0, 3\), found torch"):
            cross_relabel(lambda: Seeing(**BASE), Blobs(labeled=20), trainer, start)

    def test_labels_are_as_before_where_a_training_fails(self) -> None:
        data = Blobs(labeled=20)
        data.setup()
        before = data.labels.clone()
        with pytest.raises(ZeroDivisionError):
            cross_relabel(lambda: 1 // 0, data, trainer, data.clean_labels[:48])  # type: ignore[arg-type, return-value]
        assert torch.equal(data.labels, before)

    @pytest.mark.parametrize("folds", [1, 49])
    def test_numbers_of_folds(self, folds: int) -> None:
        with pytest.raises(ValueError, match=f"from 2 folds to one a row, found folds={folds} and 48 rows"):
            cross_predict(lambda: Seeing(**BASE), Blobs(), trainer, folds=folds)
