"""Labels as distributions: semantic smoothing, the Brier score, a teacher made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from scipy.special import log_softmax, rel_entr, softmax
from test_terms import step
from torch import Tensor, nn

from lit_kd import KD, MutualLearning, Supervised
from lit_kd.losses import brier_score, smoothed_cross_entropy, teacher_free_loss
from lit_kd.terms import KL, Brier, CrossEntropy, LabelTerm, SmoothedCrossEntropy, TeacherFree
from lit_kd.trust.similarity import shared_attributes, vector_similarity
from lit_kd.trust.transition import gold_transition
from lit_kd.types import UNLABELED, Batch, Outputs

B, C = 6, 4
Y = torch.tensor([0, 3, UNLABELED, 1, 2, 2])
PI = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.125, 0.5, 0.375, 0.0], [0.0, 0.5, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]])
BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}


def logits(seed: int = 0) -> Tensor:
    return 2 * torch.randn(B, C, generator=torch.Generator().manual_seed(seed)).double()


def gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z).sum(), z)[0]


def labels(y: Tensor = Y) -> Tensor:
    """One-hot rows, zeros where there is no label."""
    found = torch.zeros(len(y), C).double()
    for i, c in enumerate(y.tolist()):
        if c != UNLABELED:
            found[i, c] = 1
    return found


class TestSmoothed:
    def test_by_row(self) -> None:
        z = logits()
        found = SmoothedCrossEntropy(PI, 0.25).loss(z, Y)
        for i, y in enumerate(Y.tolist()):
            said = log_softmax(z[i].numpy())
            target = [0.75 * (c == y) + 0.25 * PI[y, c].item() for c in range(C)]
            expected = 0 if y == UNLABELED else -sum(target[c] * said[c] for c in range(C))
            assert found[i].item() == pytest.approx(expected, rel=1e-10)

    def test_uniform_is_label_smoothing_and_identity_is_cross_entropy(self) -> None:
        z, y = logits(), Y.clamp(min=0)
        uniform = SmoothedCrossEntropy(torch.full((C, C), 1 / C), 0.3)
        torch.testing.assert_close(uniform.loss(z, y), F.cross_entropy(z, y, label_smoothing=0.3, reduction="none"))
        for matrix, part in ((torch.eye(C), 0.3), (PI, 0.0)):
            found = SmoothedCrossEntropy(matrix, part).loss(z, y)
            torch.testing.assert_close(found, F.cross_entropy(z, y, reduction="none"), rtol=1e-10, atol=1e-12)

    def test_gradient(self) -> None:
        z, y = logits(), Y.clamp(min=0)
        target = 0.75 * labels(y) + 0.25 * PI.double()[y]
        found = gradient(lambda x: SmoothedCrossEntropy(PI, 0.25).loss(x, y), z)
        torch.testing.assert_close(found, z.softmax(-1) - target, rtol=1e-10, atol=1e-12)

    def test_soft_labels(self) -> None:
        z, y = logits(), labels()
        torch.testing.assert_close(
            smoothed_cross_entropy(z, 0.5 * y + 0.5 * y.roll(1, 0), PI.double(), 0.25),
            0.5 * smoothed_cross_entropy(z, y, PI.double(), 0.25)
            + 0.5 * smoothed_cross_entropy(z, y.roll(1, 0), PI.double(), 0.25),
        )

    @pytest.mark.parametrize(
        ("matrix", "match"),
        [
            ([[1.5, -0.5], [0.0, 1.0]], "rows are at least 0 and sum to 1, found .1.5, -0.5. in row 0"),
            ([[0.5, 0.5], [0.5, 0.25]], "rows are at least 0 and sum to 1, found .0.5, 0.25. in row 1"),
            ([[0.5, 0.5]], "expected a 1 x 1 similarity matrix, found shape"),
            ([[0.5, math.nan], [0.5, 0.5]], "found .0.5, nan. in row 0"),
            ([[0.5, 0.5], [1.0]], r"all as long, found rows of shapes \[\(1,\), \(2,\)\]"),
        ],
    )
    def test_what_is_no_matrix(self, matrix: Any, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            SmoothedCrossEntropy(matrix)
        with pytest.raises(ValueError, match=r"expected smoothing in \[0, 1\], found 1.5"):
            SmoothedCrossEntropy(PI, 1.5)

    def test_matrices_as_networks_give_them(self) -> None:
        """With a graph, in bfloat16."""
        for matrix in (torch.eye(2, requires_grad=True), torch.eye(2).bfloat16(), list(torch.eye(2))):
            term = SmoothedCrossEntropy(matrix)  # type: ignore[arg-type]
            torch.testing.assert_close(term.matrix, torch.eye(2))
            vectors = vector_similarity({"a": matrix[0], "b": matrix[1]}, ["a", "b"])  # type: ignore[dict-item]
            torch.testing.assert_close(vectors, torch.eye(2).double())

    def test_no_product_is_rounded_under_autocast(self) -> None:
        z, term = (
            logits().float(),
            SmoothedCrossEntropy(PI.double() ** 0.5 / (PI.double() ** 0.5).sum(1, keepdim=True), 0.25),
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = term.loss(z, Y)
        torch.testing.assert_close(found, term.loss(z, Y), rtol=1e-6, atol=0)

    def test_a_matrix_of_another_size_is_refused_before_the_training(self) -> None:
        steps: list[int] = []
        model = Supervised("mlp-8", label_term=SmoothedCrossEntropy(PI), **BASE)
        model.training_step = lambda *_: steps.append(1)  # type: ignore[assignment, method-assign]
        with pytest.raises(ValueError, match="expected a matrix of the 3 classes, found one of 4"):
            trainer().fit(model, Blobs())
        assert not steps


class TestMatrices:
    def test_of_attributes(self) -> None:
        """Actions: take cup, wash cup, wash pan; verbs and nouns as columns."""
        table = [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
        found = shared_attributes(table)
        torch.testing.assert_close(
            found,
            torch.tensor([[2 / 3, 1 / 3, 0], [1 / 4, 1 / 2, 1 / 4], [0, 1 / 3, 2 / 3]]).double(),
            atol=1e-7,
            rtol=0,
        )

    def test_of_vectors_by_cosines(self) -> None:
        v = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
        found = vector_similarity(v)
        for i in range(5):
            cosines = [max(0.0, float(v[i] @ v[j] / (v[i].norm() * v[j].norm()))) for j in range(5)]
            np.testing.assert_allclose(found[i].numpy(), np.array(cosines) / sum(cosines), rtol=1e-10)
        assert (found == 0).any()
        torch.testing.assert_close(vector_similarity(v * torch.arange(1, 6).unsqueeze(1)), found)
        torch.testing.assert_close(found.sum(1), torch.ones(5).double())

    def test_of_what_a_teacher_says_of_each_class(self) -> None:
        said = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
        SmoothedCrossEntropy(gold_transition(said, torch.arange(40) % 3))
        SmoothedCrossEntropy(gold_transition(F.one_hot(said.argmax(-1), 3).float(), torch.arange(40) % 3))

    def test_names_give_the_order(self) -> None:
        rows = {"cup": [1.0, 0.0, 1.0], "dog": [0.0, 1.0, 0.0], "pan": [1.0, 0.0, 0.0]}
        for make in (shared_attributes, vector_similarity):
            found = make(rows, classes=["dog", "pan", "cup"])
            torch.testing.assert_close(found, make([rows["dog"], rows["pan"], rows["cup"]]))

    @pytest.mark.parametrize(
        ("make", "match"),
        [
            (lambda: vector_similarity({"a": [1.0]}), r"as classes the names \['a'\] in their order, found no names"),
            (lambda: vector_similarity({"a": [1.0]}, ["b"]), r"the names \['a'\] in their order, found \['b'\]"),
            (lambda: vector_similarity({"a": [1.0]}, ["a", "a"]), r"found \['a', 'a'\]"),
            (lambda: vector_similarity([[1.0], [2.0]], ["a"]), "one row for each of 1 classes, found 2"),
            (lambda: vector_similarity([[1.0, 0.0], [0.0, 0.0]]), "a vector other than 0 of each class.*of class 1"),
            (
                lambda: vector_similarity(torch.ones(3)),
                r"one row of numbers a class, all as long, found rows of shapes \[\(\)\]",
            ),
            (lambda: vector_similarity([[1.0], [math.inf]]), r"expected finite numbers, found \[inf\] in row 1"),
            (lambda: vector_similarity({"a": [1.0], "b": [1.0, 2.0]}, ["a", "b"]), "all as long"),
            (lambda: shared_attributes([[1, -1]]), "attributes of at least 0, found -1"),
            (lambda: shared_attributes([[0, 0], [1, 0]]), "an attribute of each class, found none of class 0"),
        ],
    )
    def test_what_has_no_matrix(self, make: Callable[[], Tensor], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            make()


class TestBrier:
    def test_by_row(self) -> None:
        z = logits()
        found = Brier().loss(z, Y)
        for i, y in enumerate(Y.tolist()):
            p = softmax(z[i].numpy())
            expected = 0 if y == UNLABELED else sum((p[c] - (c == y)) ** 2 for c in range(C))
            assert found[i].item() == pytest.approx(expected, rel=1e-10)
        torch.testing.assert_close(brier_score(z, labels()), found)

    def test_its_mean_is_the_distance_from_the_true_probabilities(self) -> None:
        """E over y is ||f - p*||^2 + 1 - sum p*^2."""
        z, true = logits(1)[:1], logits(2)[:1].softmax(-1)
        mean = sum(true[0, c] * brier_score(z, torch.tensor([c]))[0] for c in range(C))
        distance = (z.softmax(-1) - true).square().sum() + 1 - true.square().sum()
        torch.testing.assert_close(mean, distance, rtol=1e-10, atol=0)

        def expected(x: Tensor) -> Tensor:
            return torch.stack([true[0, c] * brier_score(x, torch.tensor([c]))[0] for c in range(C)])

        assert gradient(expected, true.log()).abs().max() < 1e-12

    def test_a_published_defect(self) -> None:
        """What is meant to switch to the squared error trains by cross-entropy, or else takes the error of logits."""
        net = nn.Linear(4, CLASSES).double()
        batch = Batch(torch.randn(5, 4).double(), torch.tensor([0, 2, 1, UNLABELED, 1]))
        found = step(Supervised(net, num_classes=CLASSES, label_term=Brier()), batch)
        z = net(batch.x)
        p, y = z.softmax(-1), F.one_hot(batch.y.clamp(min=0), CLASSES)
        expected = sum(((p[i] - y[i]) ** 2).sum() for i in (0, 1, 2, 4)) / 5
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        assert (found - F.cross_entropy(z, batch.y, ignore_index=UNLABELED)).abs() > 0.1
        shifted = brier_score(z + 7, batch.y)
        torch.testing.assert_close(shifted, brier_score(z, batch.y), rtol=1e-10, atol=0)  # of logits it would not be

    def test_it_trains_a_teacher(self) -> None:
        fitted = trainer(max_epochs=6)
        fitted.fit(Supervised("mlp-16", label_term=Brier(), **BASE), Blobs())
        assert fitted.callback_metrics["val/accuracy"] > 0.9


class TestTeacherFree:
    def test_as_published(self) -> None:
        """KL is averaged over rows and classes, and multiplied by m."""
        z, y, alpha, m = logits(), Y.clamp(min=0), 0.3, 50.0
        kls = []
        for i, c in enumerate(y.tolist()):
            u = softmax(np.array([0.99 if k == c else 0.01 / (C - 1) for k in range(C)]) / 20)
            kls.append(list(rel_entr(u, softmax(z[i].numpy()))))
        expected = 0.7 * F.cross_entropy(z, y).item() + alpha * m * float(np.mean(kls))
        assert TeacherFree(alpha, 20.0, m).loss(z, y).mean().item() == pytest.approx(expected, rel=1e-10)

    @pytest.mark.parametrize("m", [None, 10.0])
    def test_gradient(self, m: float | None) -> None:
        z, y, alpha = logits(), Y.clamp(min=0), 0.3
        u = ((0.99 * labels(y) + 0.01 / (C - 1) * (1 - labels(y))) / 20).softmax(-1)
        p, size = z.softmax(-1), 1 if m is None else m / C
        expected = (1 - alpha) * (p - labels(y)) + alpha * size * (p - u)
        found = gradient(lambda x: teacher_free_loss(x, y, alpha, 20.0, m), z)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    def test_it_is_uniform_label_smoothing(self) -> None:
        """At C = 100 and T = 20 the teacher says 0.0105 of the label's class and 0.0100 of the others."""
        z, y = logits(3).repeat(1, 25), Y.clamp(min=0)
        found = gradient(lambda x: teacher_free_loss(x, y), z)
        smoothed = gradient(lambda x: F.cross_entropy(x, y, label_smoothing=0.1, reduction="none"), z)
        assert (found - smoothed).abs().max() < 1e-4
        assert gradient(lambda x: teacher_free_loss(x, y, 1.0), torch.zeros(B, 100).double())[0, 0].item() == (
            pytest.approx(0.01 - math.exp(0.99 / 20) / (math.exp(0.99 / 20) + 99 * math.exp(0.01 / 99 / 20)), rel=1e-9)
        )

    def test_the_other_form_is_kd(self) -> None:
        """A teacher of the same architecture: (1 - a) CE + a m T^2 KL, KL averaged over rows and classes."""
        net, teacher = nn.Linear(4, CLASSES).double(), nn.Linear(4, CLASSES).double()
        x, y, alpha, m = torch.randn(5, 4).double(), torch.tensor([0, 2, 1, 0, 1]), 0.95, 10.0
        term = KL(6.0, weight=m / CLASSES)
        found = step(KD(net, teacher, num_classes=CLASSES, weight=alpha, term=term), Batch(x, y))
        p, q = ((f(x) / 6).softmax(-1).detach().numpy() for f in (net, teacher))
        published = 0.05 * F.cross_entropy(net(x), y).item() + alpha * m * 36 * float(np.mean(rel_entr(q, p)))
        assert found.item() == pytest.approx(published, rel=1e-10)

    @pytest.mark.parametrize("wrong", [{"alpha": 1.5}, {"temperature": 0.0}, {"multiplier": -1.0}])
    def test_what_does_not_fit(self, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=r"expected alpha in \[0, 1\], a temperature above 0 and a multiplier"):
            TeacherFree(**wrong)


THREE = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.0, 0.0, 1.0]])
TERMS: list[LabelTerm] = [SmoothedCrossEntropy(THREE), SmoothedCrossEntropy(THREE, 1.0), Brier(), TeacherFree()]


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
class TestEach:
    def test_float32_under_autocast(self, term: LabelTerm) -> None:
        z, y = torch.randn(4, 3).bfloat16(), torch.tensor([0, 2, UNLABELED, 1])
        expected = term(Outputs(z.float(), {}), None, Batch(z, y))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = term(Outputs(z, {}), None, Batch(z, y))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_extreme_logits(self, term: LabelTerm, dtype: torch.dtype) -> None:
        z = torch.tensor([[1e4, -1e4, 0], [0.0, 0, 0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
        found = term(Outputs(z, {}), None, Batch(z, torch.tensor([1, 0, UNLABELED])))
        found.sum().backward()
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert found[2] == 0
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert not z.grad[2].any()

    def test_soft_labels(self, term: LabelTerm) -> None:
        z, y = torch.randn(4, 3), torch.tensor([0, 2, UNLABELED, 1])
        soft = (F.one_hot(y.clamp(min=0), 3) * (y != UNLABELED).unsqueeze(1)).float()
        torch.testing.assert_close(term.loss(z, soft), term.loss(z, y))

    def test_methods_take_it(self, term: LabelTerm) -> None:
        for model in (
            Supervised("mlp-8", label_term=term, mix="mixup", **BASE),
            KD("mlp-8", trained_teachers()[0], label_term=term, **BASE),
            MutualLearning("mlp-8", ["mlp-12", "mlp-16"], label_term=term, **BASE),
        ):
            fitted = trainer(max_epochs=1)
            fitted.fit(model, Blobs(labeled=0.8))
            assert fitted.callback_metrics["train/loss"].isfinite()
        assert Supervised("mlp-8", label_term=term, task="classification", **BASE).task.name in CrossEntropy.tasks
