"""Trust in elements: estimates against enumeration and drawn truths, and whole trainings on drawn data."""

from __future__ import annotations

import itertools
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from lightning import Trainer, seed_everything
from scipy.optimize import minimize
from scipy.stats import linregress, norm
from sklearn.metrics import confusion_matrix, roc_auc_score
from torch import Tensor, nn

from lit_kd import ElementTrust
from lit_kd.data import DigitAttributesDataModule, OutliersDataModule, ShapesDataModule, TagsDataModule
from lit_kd.methods.element_trust import Believed, BelievedNumbers
from lit_kd.trust.elements import (
    NumberTrust,
    element_posterior,
    label_joint,
    pair_counts,
    teacher_channel,
    trust_numbers,
)
from lit_kd.types import IGNORED, UNLABELED, Batch, Outputs

TEACHER = torch.tensor([[0.9, 0.07, 0.03], [0.25, 0.6, 0.15], [0.2, 0.2, 0.6]])
LABELS = torch.tensor([[0.95, 0.03, 0.02], [0.3, 0.6, 0.1], [0.05, 0.45, 0.5]])
CLASSES = torch.tensor([0.6, 0.3, 0.1])


def drawn(rows: int, elements: int, labels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """True classes, given labels and what a teacher says, independent given the class, ``(rows, elements)`` each."""
    rng = np.random.default_rng(seed)
    true = rng.choice(3, (rows, elements), p=CLASSES.double() / CLASSES.double().sum())

    def noisy(channel: Tensor) -> Tensor:
        cumulative = channel.double().cumsum(1).numpy()[true]
        return torch.from_numpy((rng.random((rows, elements, 1)) > cumulative).sum(-1).clip(max=2))

    return torch.from_numpy(true), noisy(labels), noisy(TEACHER)


class TestCounts:
    def test_are_scikit_learns_confusion_matrix(self) -> None:
        _, y, said = drawn(5, 12, LABELS)
        y = y.view(5, 3, 4)
        y[1, 0], y[2] = IGNORED, UNLABELED
        kept = y.flatten() >= 0
        expected = confusion_matrix(y.flatten()[kept], said.flatten()[kept], labels=range(3))
        np.testing.assert_array_equal(pair_counts(y, said.view(5, 3, 4), 3)[0], expected)

    def test_of_several_labels_are_apart(self) -> None:
        y, said = torch.tensor([[1, 0], [1, UNLABELED]]), torch.tensor([[1, 1], [0, 1]])
        assert pair_counts(y, said, 2, 2).tolist() == [[[0, 0], [1, 1]], [[0, 1], [0, 0]]]

    def test_do_not_grow_with_the_image(self) -> None:
        for side in (4, 64):
            y = torch.zeros(2, side, side, dtype=torch.int64)
            assert pair_counts(y, y, 3).shape == (1, 3, 3)


class TestChannels:
    def test_a_class_without_trusted_elements_has_the_prior(self) -> None:
        found = teacher_channel(torch.tensor([[[500.0, 0, 0], [0, 0, 0], [0, 90, 10]]]), prior=10)[0]
        torch.testing.assert_close(found[0], torch.tensor([508, 1, 1]) / 510)
        torch.testing.assert_close(found[1], torch.tensor([0.1, 0.8, 0.1]))
        torch.testing.assert_close(found[2], torch.tensor([1, 91, 18]) / 110)

    def test_a_teacher_that_is_always_right_makes_it_the_counted_one(self) -> None:
        true, y, _ = drawn(20, 30, LABELS)
        counts = pair_counts(y, true, 3)
        expected = confusion_matrix(true.flatten(), y.flatten(), normalize="all")
        np.testing.assert_allclose(label_joint(counts, torch.eye(3).unsqueeze(0))[0], expected, atol=1e-6)

    def test_it_finds_the_true_channel(self) -> None:
        _, y, said = drawn(2000, 100, LABELS)
        joint = label_joint(pair_counts(y, said, 3), TEACHER.unsqueeze(0))[0]
        torch.testing.assert_close(joint.sum(1), CLASSES, atol=0.02, rtol=0)
        torch.testing.assert_close(joint, CLASSES.unsqueeze(1) * LABELS, atol=0.02, rtol=0)

    def test_it_is_the_maximum_that_scipy_finds(self) -> None:
        counts = torch.tensor([[50.0, 20, 9], [12, 40, 11], [5, 8, 30]])
        found = label_joint(counts.unsqueeze(0), TEACHER.unsqueeze(0))[0].double().numpy()
        n, t = counts.double().numpy(), TEACHER.double().numpy()

        def loss(logits: Any) -> float:
            joint = np.exp(logits - np.logaddexp.reduce(logits)).reshape(3, 3)  # [c, y]
            return float(-(n * np.log(np.einsum("cy,ct->yt", joint, t))).sum())

        best = min(minimize(loss, start, method="L-BFGS-B", tol=1e-12).fun for start in np.eye(9))
        assert loss(np.log(found.clip(1e-300)).ravel()) == pytest.approx(best, abs=0.02)


class TestPosterior:
    def test_is_bayes_by_enumeration(self) -> None:
        joint = CLASSES.unsqueeze(1) * LABELS
        for y, t in itertools.product(range(3), repeat=2):
            found = element_posterior(torch.tensor([y]), torch.tensor([t]), TEACHER[None], joint[None])
            each = [float(CLASSES[c] * LABELS[c, y] * TEACHER[c, t]) for c in range(3)]
            torch.testing.assert_close(found[0], torch.tensor(each) / sum(each))

    def test_without_a_label_the_teacher_speaks_alone(self) -> None:
        joint = CLASSES.unsqueeze(1) * LABELS
        y, said = torch.tensor([[UNLABELED, IGNORED]]), torch.tensor([[0, 1]])
        found = element_posterior(y, said, TEACHER[None], joint[None])
        for t in range(2):
            expected = CLASSES * TEACHER[:, t]
            torch.testing.assert_close(found[0, t], expected / expected.sum())

    def test_kinds_have_channels_of_their_own(self) -> None:
        joint, teacher = CLASSES.unsqueeze(1) * LABELS, torch.stack([TEACHER, torch.eye(3)])
        y, said = torch.tensor([[0, 0], [2, 1]]), torch.tensor([[1, 1], [2, 0]])
        found = element_posterior(y, said, teacher, torch.stack([joint, joint.T]))
        for row, kind in itertools.product(range(2), repeat=2):
            own = (joint, joint.T)[kind], teacher[kind]
            one = element_posterior(y[row : row + 1, kind], said[row : row + 1, kind], own[1][None], own[0][None])
            torch.testing.assert_close(found[row, kind], one[0])


class TestNumbers:
    def drawn(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Which of 2000 targets are right, the targets, what a teacher says of them, and the same of trusted rows."""
        draw = torch.Generator().manual_seed(0)
        truth = torch.randn(2200, 2, generator=draw, dtype=torch.float64)
        teacher = 2 + 0.5 * truth + 0.1 * torch.randn(2200, 2, generator=draw, dtype=torch.float64)
        right = torch.rand(2000, 2, generator=draw) < 0.7
        wrong = 12 * torch.rand(2000, 2, generator=draw, dtype=torch.float64) - 4
        return right, torch.where(right, truth[:2000], wrong), teacher[:2000], truth[2000:], teacher[2000:]

    def test_line_and_scale_are_scipys(self) -> None:
        _, y, teacher, trusted, heard = self.drawn()
        found = trust_numbers(y, teacher, trusted, heard)
        for d in range(2):
            line = linregress(heard[:, d], trusted[:, d])
            assert (float(found.slope[d]), float(found.offset[d])) == pytest.approx((line.slope, line.intercept))
            residuals = trusted[:, d] - line.intercept - line.slope * heard[:, d]
            assert float(found.scale[d]) == pytest.approx(float(residuals.std(correction=2)))

    def test_wrong_targets_are_found_and_a_missing_one_is_not_right(self) -> None:
        right, y, teacher, trusted, heard = self.drawn()
        believed, means = trust_numbers(y, teacher, trusted, heard).believed(y, teacher)
        assert roc_auc_score(right.flatten(), believed.flatten()) > 0.97
        assert float(believed.mean()) == pytest.approx(0.7, abs=0.03)
        torch.testing.assert_close(means, 2 * (teacher - 2), atol=0.2, rtol=0.1)
        y[0, 0] = torch.nan
        again, _ = trust_numbers(y, teacher, trusted, heard).believed(y, teacher)
        assert again[0, 0] == 0
        torch.testing.assert_close(again[1:], believed[1:], atol=0.01, rtol=0)

    def test_it_is_bayes(self) -> None:
        found = NumberTrust(*(torch.tensor([value], dtype=torch.float64) for value in (1.0, 2.0, 0.5, 0.3)))
        # of a normal density beside a constant one, at equal log-odds in the middle
        share = 0.5
        flat = float(norm.pdf(0, scale=0.5)) * share / (1 - share) / np.exp(0.3)
        for target in (3.0, 3.7, 6.0):
            density = share * norm.pdf(target, loc=1 + 2 * 1.0, scale=0.5)
            y = torch.tensor([[target]], dtype=torch.float64)
            right, _ = found.believed(y, torch.ones(1, 1, dtype=torch.float64))
            assert float(right) == pytest.approx(float(density / (density + (1 - share) * flat)))

    def test_a_missing_target_is_what_the_teacher_means(self) -> None:
        term, z = BelievedNumbers(), torch.zeros(1, 2, requires_grad=True)
        term.found = NumberTrust(*(torch.tensor([value, value]) for value in (1.0, 2.0, 1.0, 50.0)))
        term(Outputs(z, {}), Outputs(torch.ones(1, 2), {}), Batch(z, torch.tensor([[torch.nan, 2.5]]))).sum().backward()
        assert z.grad is not None
        torch.testing.assert_close(z.grad, torch.tensor([[-3.0, -2.5]]))


@pytest.mark.parametrize("task", ["dense", "tokens"])
def test_ignored_elements_teach_nothing(task: str) -> None:
    draw = torch.Generator().manual_seed(0)
    shape = (3, 3, 4, 5) if task == "dense" else (3, 5, 3)
    z, t = (torch.randn(shape, generator=draw) for _ in range(2))
    z.requires_grad_()
    y = torch.randint(3, (3, 4, 5) if task == "dense" else (3, 5), generator=draw)
    y[0], y[1, :2] = IGNORED, IGNORED
    term = Believed()
    term.channel, term.joint = TEACHER[None], (CLASSES.unsqueeze(1) * LABELS)[None]
    found = term(Outputs(z, {}), Outputs(t, {}), Batch(z, y))
    assert found[0] == 0
    found.sum().backward()
    assert z.grad is not None
    gradient = z.grad.movedim(1, -1) if task == "dense" else z.grad
    assert (gradient[y == IGNORED] == 0).all()
    assert (gradient[y != IGNORED] != 0).any(-1).all()


DRAWN: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "dense": (ShapesDataModule, "seg-4", {}),
    "tokens": (TagsDataModule, "tagger-24-8", {}),
    "multilabel": (DigitAttributesDataModule, "mlp-8", {"noise": "symmetric", "noise_rate": 0.5}),
}


class Knowing(nn.Module):
    """A teacher that knows most elements: of each sample it says the true classes, a tenth of them changed."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        parts, truth = data.parts, data.clean_labels
        rows = [parts.rows(torch.arange(len(truth))), parts.val, parts.test]
        inputs = [each.__getitems__(list(range(len(each)))) for each in rows]
        labels = torch.cat([truth, *(each.y for each in inputs[1:])])
        self.known = {
            bytes(x.numpy().tobytes()): y for x, y in zip(torch.cat([e.x for e in inputs]), labels, strict=True)
        }
        self.several, self.classes = data.task == "multilabel", data.num_classes
        self.dense = data.task == "dense"

    def forward(self, x: Tensor) -> Tensor:
        names = [one.numpy().tobytes() for one in x]
        y = torch.stack([self.known[name] for name in names]).clamp(min=0)
        draws = [torch.rand(y[0].shape, generator=torch.Generator().manual_seed(crc32(name))) for name in names]
        wrong = torch.stack(draws) < 0.1
        if self.several:
            return torch.where((y == 1) ^ wrong, 2.0, -2.0)
        said = nn.functional.one_hot(torch.where(wrong, (y + 1) % self.classes, y), self.classes) * 4.0
        return said.movedim(-1, 1) if self.dense else said


@pytest.mark.parametrize("task", DRAWN)
def test_trainings(task: str) -> None:
    kind, student, options = DRAWN[task]
    data = kind(seed=0, **options)
    data.setup()
    seed_everything(0, verbose=False)
    sizes = {"num_classes": data.num_classes, "input_shape": list(data.input_shape)}
    model = ElementTrust(student, Knowing(data), task=task, **sizes)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fitted = Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=4, limit_val_batches=1, **quiet)
    fitted.fit(model, data)
    assert model.terms is not None
    [term] = [term for term in model.terms if isinstance(term, Believed)]
    kinds, classes = (5, 2) if task == "multilabel" else (1, 3)
    assert term.channel.shape == term.joint.shape == (kinds, classes, classes)  # however large samples are
    n = data.train_size
    for kind in range(kinds):
        true, given = (labels[:n] if kinds == 1 else labels[:n, kind] for labels in (data.clean_labels, data.labels))
        kept = true != IGNORED
        expected = confusion_matrix(true[kept], given[kept], normalize="all")
        np.testing.assert_allclose(term.joint[kind], expected, atol=0.05)  # of which it is told nothing
    assert "test/accuracy" in fitted.test(model, data, verbose=False)[0]


def test_refused() -> None:
    model = ElementTrust("tagger-24-4", "tagger-24-4", task="tokens", num_classes=3)
    fitted = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="expected a meta split for ElementTrust"):
        fitted.fit(model, TagsDataModule(meta=0, seed=0))
    with pytest.raises(ValueError, match="expected one teacher for ElementTrust, found 2"):
        ElementTrust("mlp-4", ["mlp-4", "mlp-4"], task="multilabel", num_classes=3, input_shape=[4])
    with pytest.raises(ValueError, match=r"expected wrong, a share of rows, in \[0, 1\]; found 2"):
        TagsDataModule(wrong=2)


@pytest.mark.parametrize("kind", [ShapesDataModule, TagsDataModule, OutliersDataModule])
def test_drawn_data(kind: Any) -> None:
    zero, one = kind(seed=0), kind(seed=1)
    for data in (zero, one):
        data.setup()
        n = data.train_size
        assert data.noisy[n:].sum() == 0  # trusted rows are clean
        changed = (data.labels[:n] != data.clean_labels[:n]).flatten(1).any(1).float().mean()
        assert changed == pytest.approx(0.4, abs=0.07)  # a sequence without spans cannot be spoiled
    tests = [data.parts.test.__getitems__(list(range(len(data.parts.test)))) for data in (zero, one)]
    torch.testing.assert_close(tests[0].x, tests[1].x)
    torch.testing.assert_close(tests[0].y, tests[1].y)
    assert zero.fingerprint != one.fingerprint


def test_tags_follow_from_the_symbols_before() -> None:
    x, y = TagsDataModule().draw()
    for symbols, tags in zip(x[:200].tolist(), y[:200].tolist(), strict=True):
        for place, tag in enumerate(tags):
            before = [s for s in symbols[max(0, place - 5) : place] if s <= 8]  # cues and stops
            open_ = before and before[-1] <= 4 and not 1 <= symbols[place] <= 8
            expected = IGNORED if symbols[place] == 0 else (1 if before[-1] <= 2 else 2) if open_ else 0
            assert tag == expected
