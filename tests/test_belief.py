"""Beliefs about labels and teachers, against loops over rows and classes, and numbers by hand."""

from __future__ import annotations

from math import erf, sqrt
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from lit_kd.trust.belief import Belief, believe, better, echoes, false_doubt, frequency, label_channel, mostly_right
from lit_kd.types import UNLABELED

Array = NDArray[np.float64]
CLASSES = 4


class Rows(NamedTuple):
    """What `believe` is told of N rows."""

    student: Tensor
    labels: Tensor
    trusted: Tensor
    said: Tensor
    errors: Tensor | None
    truth: Tensor

    def beliefs(self, rest: float = 0.0) -> Belief:
        return believe(*self[:5], rest)


def counts(student: float, *teachers: float) -> Tensor:
    """Of teachers that speak of all rows, and as many of both together, (3, K + 1)."""
    own = torch.tensor([student, *teachers], dtype=torch.float32)
    return torch.stack([own[:1].expand_as(own), own, own])


def rows(teachers: int = 1, n: int = 60, seed: int = 0, dtype: torch.dtype = torch.float64, **other: Any) -> Rows:
    """An unsure student, 30% wrong labels, a few rows without one, teachers that err less; the last 12 are trusted."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, CLASSES, n)
    student = rng.dirichlet(np.ones(CLASSES), n) + 1.5 * np.eye(CLASSES)[truth]
    labels = np.where(rng.random(n) < 0.3, rng.integers(0, CLASSES, n), truth)
    labels[-12:] = truth[-12:]
    labels[:5] = UNLABELED
    said = np.where(rng.random((n, teachers)) < 0.15, rng.integers(0, CLASSES, (n, teachers)), truth[:, None])
    found: dict[str, Any] = {
        "student": torch.tensor(student / student.sum(1, keepdims=True), dtype=dtype),
        "labels": torch.tensor(labels),
        "trusted": torch.arange(n) >= n - 12,
        "said": torch.tensor(said),
        "errors": counts(40.0, *(20.0 + k for k in range(teachers))) if teachers else None,
        "truth": torch.tensor(truth),
    }
    return Rows(**(found | other))


def em(student: Array, y: Array, known: Array, pseudo: float = 5.0) -> Array:
    """The channel after ten steps from the diagonal, one row at a time, from the squares of what the student says."""
    classes = student.shape[1]
    start = [[0.7 * (c == d) + 0.3 / classes for d in range(classes)] for c in range(classes)]
    channel = [list(row) for row in start]
    for _ in range(10):
        counts = [[pseudo * value for value in row] for row in start]
        for p, label, counted in zip(student, y, known, strict=True):
            if counted:
                joint = [p[c] ** 2 * channel[c][label] for c in range(classes)]
                for c in range(classes):
                    counts[c][label] += joint[c] / sum(joint)
        channel = [[value / sum(row) for value in row] for row in counts]
    return np.array(channel)


class TestLabelChannel:
    def test_against_a_loop(self) -> None:
        r = rows()
        labelled = r.labels != UNLABELED
        known = labelled & ~r.trusted
        found, posterior = label_channel(r.student, r.labels.clamp(min=0), labelled, known)
        channel = em(r.student.numpy(), r.labels.numpy(), known.numpy())
        np.testing.assert_allclose(found.numpy(), channel, atol=1e-12)
        for i, label in enumerate(r.labels.tolist()):
            joint = r.student[i].numpy() * (channel[:, label] if label != UNLABELED else 1)
            np.testing.assert_allclose(posterior[i].numpy(), joint / joint.sum(), atol=1e-12)
        torch.testing.assert_close(posterior[:5], r.student[:5])  # they have no label

    def test_of_a_student_that_knows_all_it_is_what_was_counted(self) -> None:
        r = rows(n=400)
        labelled = r.labels != UNLABELED
        sure = torch.eye(CLASSES, dtype=torch.float64)[r.truth]
        found, _ = label_channel(sure, r.labels.clamp(min=0), labelled, labelled & ~r.trusted)
        counts = 5 * (0.7 * np.eye(CLASSES) + 0.3 / CLASSES)
        for c, y in zip(r.truth[5:-12].tolist(), r.labels[5:-12].tolist(), strict=True):
            counts[c, y] += 1
        np.testing.assert_allclose(found.numpy(), counts / counts.sum(1, keepdims=True), atol=1e-12)


def false_rates(doubt: Array, trusted: NDArray[np.bool_], untrusted: NDArray[np.bool_]) -> Array:
    """Of each untrusted row the lowest rate of all bounds at which it is doubted, and 1 for the others."""
    found = np.ones(len(doubt))
    for i in np.flatnonzero(untrusted):
        for bound in doubt[untrusted]:
            if bound <= doubt[i]:
                right = (1 + sum(d >= bound for d in doubt[trusted])) / (1 + trusted.sum())
                found[i] = min(found[i], right / np.mean([d >= bound for d in doubt[untrusted]]))
    return found


def by_bayes(r: Rows, quality: list[float]) -> tuple[Array, Array]:
    """The posterior of each row, from student, channel and teachers' confusions; then the rate of false doubt."""
    student, labels, said = r.student.numpy(), r.labels.numpy(), r.said.numpy()
    trusted, labelled = r.trusted.numpy(), labels != UNLABELED
    n, teachers = said.shape
    channel = em(student, labels, labelled & ~trusted)
    posterior = np.zeros((n, CLASSES))
    for i in range(n):
        for c in range(CLASSES):
            posterior[i, c] = student[i, c] * (channel[c, labels[i]] if labelled[i] else 1)
            for k in range(teachers):
                named = sum(trusted[j] and labels[j] == c and said[j, k] == said[i, k] for j in range(n))
                of_class = sum(trusted[j] and labels[j] == c for j in range(n))
                prior = 10 * (0.7 * (c == said[i, k]) + 0.3 / CLASSES)
                share = quality[k] * max(quality) / sum(quality)
                posterior[i, c] *= ((prior + named) / (10 + of_class)) ** share
        posterior[i] /= posterior[i].sum()
    doubt = np.array([1 - posterior[i, labels[i]] for i in range(n)])
    false = false_rates(doubt, trusted, labelled & ~trusted)
    frequent = [min(1.0, CLASSES * np.mean(labels[labelled] == c)) for c in range(CLASSES)]
    for c in range(CLASSES):
        of_label = sum((posterior[i] for i in range(n) if labels[i] == c and not trusted[i]), np.zeros(CLASSES))
        said = [int(student[i].argmax()) == c for i in range(n) if labels[i] == c and trusted[i]]
        frequent[c] *= of_label[c] >= max(of_label) or sum(said) > len(said) / 2
    for i in range(n):
        own = np.eye(CLASSES)[labels[i]]
        if trusted[i]:
            posterior[i] = own
        elif labelled[i]:
            posterior[i] = own + (1 - false[i]) * frequent[labels[i]] * (posterior[i] - own)
    return posterior, false


def no_echo(r: Rows) -> Rows:
    """Its teachers name the truth where the label is wrong, so that none repeats it."""
    wrong = (r.labels != r.truth).unsqueeze(1)
    return r._replace(said=torch.where(wrong, r.truth.unsqueeze(1), r.said))


def sure(r: Rows) -> Tensor:
    """A student that says the truth with a probability of 0.91."""
    return 0.03 + 0.88 * torch.eye(CLASSES, dtype=r.student.dtype)[r.truth]


class TestBelieve:
    @pytest.mark.parametrize("teachers", [0, 1, 2, 3])
    @pytest.mark.parametrize("rest", [0.0, 0.6])
    def test_against_bayes(self, teachers: int, rest: float) -> None:
        r = no_echo(rows(teachers, n=120))
        found = r.beliefs(rest)
        quality = found.quality.tolist()  # for which there are tests of their own
        assert all(0.1 < q <= 1 for q in quality)
        posterior, false = by_bayes(r, quality)
        untrusted = (r.labels != UNLABELED) & ~r.trusted
        assert false.min() < 0.5 < false.max()
        np.testing.assert_allclose(found.false_doubt[untrusted].numpy(), false[untrusted.numpy()], atol=1e-6)
        # float32 where frequencies are
        np.testing.assert_array_equal(found.classes.numpy(), posterior.argmax(1))
        labels = r.labels.numpy()
        for i in range(len(labels)):
            own = posterior[i, labels[i]] if labels[i] != UNLABELED else 0
            assert found.clean[i].item() == pytest.approx(own, abs=1e-6)
            sure = posterior[i].max() ** 3
            sure *= 1 if labels[i] != UNLABELED else max(quality, default=0)
            beside = [
                rest * quality[k] * max(quality) / sum(quality) * (r.said[i, k].item() == posterior[i].argmax())
                for k in range(teachers)
            ]
            expected = [sure * (1 - sum(beside)), *(sure * one for one in beside)]
            np.testing.assert_allclose(found.weights[i].numpy(), expected, atol=1e-6)

    def test_the_same_teacher_twice_says_no_more_than_once(self) -> None:
        once = rows(1, n=120)
        thrice = once._replace(said=once.said.expand(-1, 3), errors=counts(40.0, 20, 20, 20))
        one, three = once.beliefs(0.5), thrice.beliefs(0.5)
        assert one.quality > 0.1
        torch.testing.assert_close(three.clean, one.clean)
        torch.testing.assert_close(three.weights[:, 0], one.weights[:, 0])
        torch.testing.assert_close(three.weights[:, 1:].sum(1), one.weights[:, 1])

    def test_trusted_rows_keep_their_label(self) -> None:
        r = rows(2, n=120)
        student = torch.full_like(r.student, 1e-3)
        student[torch.arange(120), (r.labels + 1) % CLASSES] = 1 - 3e-3  # all that it says is against them
        found = r._replace(student=student, said=((r.labels + 1) % CLASSES).unsqueeze(1).expand(-1, 2)).beliefs(0.5)
        assert torch.equal(found.classes[r.trusted], r.labels[r.trusted])
        assert (found.clean[r.trusted] == 1).all()
        expected = torch.tensor([1.0, 0, 0], dtype=torch.float64).expand(12, -1)
        torch.testing.assert_close(found.weights[r.trusted], expected)

    def test_rows_without_a_label_wait_for_a_teacher(self) -> None:
        r = rows(1, n=120)
        for errors in (None, counts(20.0, 20.0), counts(20.0, 30.0)):
            found = r._replace(errors=errors).beliefs(0.5)
            assert (found.weights[:5] == 0).all()
            assert (found.weights[:, 1] == 0).all()
        heard = no_echo(r)._replace(student=sure(r), errors=counts(90.0, 5.0)).beliefs()
        helpful = torch.tensor([[90.0, 90], [95, 95], [90, 5]])  # it errs more often, but where the student is sure
        together = no_echo(r)._replace(student=sure(r), errors=helpful).beliefs()
        assert torch.equal(together.quality, heard.quality)
        assert heard.quality > 0.85
        assert (heard.weights[:5, 0] > 0.7).all()
        assert torch.equal(heard.classes[:5], r.truth[:5])
        assert (heard.clean[:5] == 0).all()

    @pytest.mark.parametrize("vouching", [0, 1, 3])
    def test_right_labels_of_a_rare_class_that_the_student_has_not_learned(self, vouching: int) -> None:
        """Of 20 rows of a class in 620 it says another one, and few trusted rows or none tell that it is wrong."""
        truth = torch.tensor([0, 1, 2] * 200 + [3] * (20 + vouching))
        student = torch.full((len(truth), CLASSES), 0.02).index_put(
            (torch.arange(len(truth)), truth), torch.tensor(0.94)
        )
        student[600:] = torch.tensor([0.7, 0.1, 0.1, 0.1])
        trusted = torch.arange(len(truth)) >= 620
        trusted[540:600] = True
        found = believe(student, truth, trusted, truth[:, None][:, :0])
        assert torch.equal(found.classes, truth)
        assert found.clean[600:].min() > 0.95
        assert found.clean.mean() > 0.99

    def test_a_trusted_row_without_a_label_vouches_for_nothing(self) -> None:
        r = rows(1, n=120)
        expected, found = (
            r._replace(trusted=trusted).beliefs(0.5) for trusted in (r.trusted, r.trusted | (r.labels < 0))
        )
        for name in Belief._fields:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)

    def test_nobody_vouches_or_everybody_is_vouched_for(self) -> None:
        r = rows(1, n=40)
        without, alone = (r._replace(trusted=torch.full((40,), all_of_them)) for all_of_them in (False, True))
        assert (without.beliefs().false_doubt == 0).all()  # nothing tells
        assert without.beliefs().weights.isfinite().all()
        found = alone.beliefs()
        assert torch.equal(found.classes[5:], r.labels[5:])
        assert (found.clean[5:] == 1).all()
        assert found.weights.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("teachers", [0, 2])
    def test_order_of_rows_and_numbers_of_classes_do_not_matter(self, dtype: torch.dtype, teachers: int) -> None:
        r = rows(teachers, n=300, dtype=dtype)
        order, names = torch.randperm(300), torch.randperm(CLASSES)
        found, expected = r._replace(**{n: getattr(r, n)[order] for n in Rows._fields if n != "errors"}), r.beliefs(0.5)
        mixed = found.beliefs(0.5)
        for name in ("classes", "weights", "clean", "false_doubt"):
            torch.testing.assert_close(getattr(mixed, name), getattr(expected, name)[order])
        student = torch.empty_like(r.student).index_copy(1, names, r.student)
        labels = torch.where(r.labels == UNLABELED, UNLABELED, names[r.labels])
        renamed = r._replace(student=student, labels=labels, said=names[r.said]).beliefs(0.5)
        torch.testing.assert_close(renamed.classes, names[expected.classes])
        torch.testing.assert_close(renamed.channel[names][:, names], expected.channel)
        for name in ("weights", "clean", "quality", "false_doubt"):
            torch.testing.assert_close(getattr(renamed, name), getattr(expected, name))

    @pytest.mark.parametrize("seed", range(5))
    def test_bounds_whatever_is_said(self, seed: int) -> None:
        """One-hot students, impossible labels, a class that nobody names, all in float32."""
        rng = np.random.default_rng(seed)
        n, teachers = 50, seed % 3
        student = torch.eye(CLASSES)[torch.tensor(rng.integers(0, CLASSES - 1, n))]
        student[: 10 * seed] = torch.tensor(rng.dirichlet(np.full(CLASSES, 1e-2), 10 * seed)).float()
        labels = torch.tensor(rng.integers(-1, CLASSES, n))
        trusted = torch.tensor(rng.random(n) < 0.3)
        said = torch.tensor(rng.integers(0, CLASSES, (n, teachers)))
        errors = counts(*rng.integers(0, 50, 1 + teachers).tolist())
        found = believe(student, labels, trusted, said, errors, rest=1.0)
        for values in (found.weights, found.weights.sum(1), found.clean, found.quality, found.false_doubt):
            assert values.isfinite().all()
            assert (values >= 0).all()
            assert (values <= 1 + 1e-6).all()
        assert (found.clean[labels == UNLABELED] == 0).all()


class TestBetter:
    def test_by_hand(self) -> None:
        """A normal deviate of the difference, both sides of it."""
        [found, equal, worse, barely] = better(counts(30.0, 9.0, 30.0, 45.0, 29.0)).tolist()
        assert found == pytest.approx(erf(21 / sqrt(40) / sqrt(2)), abs=1e-6)
        assert found == pytest.approx(0.99910, abs=1e-4)
        assert (equal, worse) == (0, 0)
        assert barely == pytest.approx(0.1027, abs=1e-4)

    def test_fewer_errors_are_better_and_more_rows_are_surer(self) -> None:
        falling = better(counts(40.0, *range(60)))
        assert (falling.diff() <= 0).all()
        assert (falling[:38].diff() < 0).float().mean() > 0.5
        more = [better(counts(4.0 * rows, 3.0 * rows)).item() for rows in (1, 10, 100)]
        assert more == sorted(more)
        assert more[0] < 0.3
        assert more[2] > 0.99


class TestEchoes:
    def test_by_hand(self) -> None:
        said, y = torch.tensor([[0, 1], [1, 1], [2, 0], [0, 0]]), torch.tensor([0, 0, 2, 0])
        untrusted = torch.tensor([True, True, True, True])  # the others add nothing
        found = echoes(said, y, torch.tensor([0.5, 1.0, 0.25, 0.25]), untrusted)
        torch.testing.assert_close(found, torch.tensor([1.0 / 2.2, 0.25 / 2.2]))  # 0.2 is a twentieth of the rows
        torch.testing.assert_close(echoes(said, y, torch.zeros(4), untrusted), torch.zeros(2))  # nothing is doubted
        few = torch.tensor([True, True, False, False])  # labels that could be doubted at all
        torch.testing.assert_close(echoes(said, y, torch.tensor([0.5, 1.0, 0, 0]), few), torch.tensor([0.5 / 1.6, 0.0]))

    def test_who_repeats_wrong_labels_is_not_heard(self) -> None:
        r = rows(2, n=400)
        said = torch.stack([r.truth, r.labels.where(r.labels != UNLABELED, 0)], dim=1)
        found = r._replace(student=sure(r), said=said, errors=counts(90.0, 5.0, 5.0)).beliefs(0.5)
        assert found.quality[0] > 0.85  # some doubt is left about labels that are right
        assert found.quality[1] == 0
        assert (found.weights[:, 2] == 0).all()

    def test_who_never_does_keeps_its_quality(self) -> None:
        r = rows(1, n=400)
        other = ((r.labels + 1) % CLASSES).unsqueeze(1)
        found = r._replace(said=other, errors=counts(30.0, 9.0)).beliefs()
        torch.testing.assert_close(found.quality, better(counts(30.0, 9.0)).double())


class TestFalseDoubt:
    def test_by_hand(self) -> None:
        """5, 4, 3, 2, 1 of five others have at least the doubt of each, and 3, 2, 1, 0, 0 of three right ones."""
        others, right = [0.0, 0.2, 0.4, 0.6, 0.8], [0.0, 0.3, 0.5]
        doubt, trusted = torch.tensor(others + right), torch.arange(8) >= 5
        found = false_doubt(doubt, trusted, ~trusted)
        rates = [1, (3 / 4) / (4 / 5), (2 / 4) / (3 / 5), (1 / 4) / (2 / 5), (1 / 4) / (1 / 5)]
        assert found[:5].tolist() == pytest.approx([*rates[:4], rates[3]])  # the last one is above 1

    @given(st.lists(st.tuples(st.floats(0, 1, width=32), st.sampled_from(["trusted", "other", "none"])), max_size=20))
    def test_against_a_loop(self, drawn: list[tuple[float, str]]) -> None:
        doubt = torch.tensor([d for d, _ in drawn])
        trusted, untrusted = (torch.tensor([who == kind for _, who in drawn]).bool() for kind in ("trusted", "other"))
        found = false_doubt(doubt, trusted, untrusted)
        expected = false_rates(doubt.numpy(), trusted.numpy(), untrusted.numpy())
        np.testing.assert_allclose(found[untrusted].numpy(), expected[untrusted.numpy()], rtol=1e-6)
        assert ((found >= 0) & (found <= 1)).all()
        assert (found[doubt.argsort()].diff() <= 0).all()  # a greater doubt is false no more often

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.lists(st.floats(0, 1), max_size=20))
    def test_each_right_label_without_a_doubt_lowers_it(self, others: list[float], right: list[float]) -> None:
        before = torch.ones(len(others))
        for more in range(4):
            doubt = torch.tensor(others + right + [0.0] * more)
            trusted = torch.arange(len(doubt)) >= len(others)
            found = false_doubt(doubt, trusted, ~trusted)[: len(others)]
            assert (found <= before + 1e-6).all()
            before = found

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
    def test_where_no_label_is_known_to_be_right_all_doubt_is_false(self, others: list[float]) -> None:
        trusted = torch.zeros(len(others), dtype=torch.bool)
        assert (false_doubt(torch.tensor(others), trusted, ~trusted) == 1).all()


def test_frequency_of_rare_classes_by_hand() -> None:
    y = torch.tensor([0] * 6 + [1] * 2 + [2] * 4)
    labelled = torch.arange(12) > 1  # four of class 0, two of 1, four of 2, none of 3
    torch.testing.assert_close(frequency(y, labelled, 4), torch.tensor([1, 2 / 2.5, 1, 0]))


class TestMostlyRight:
    def test_by_hand(self) -> None:
        posterior = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.6, 0.4, 0.0], [0.0, 1.0, 0.0]])
        y, untrusted = torch.tensor([0, 1, 1, 1]), torch.tensor([True, True, True, False])
        assert mostly_right(posterior, y, untrusted).tolist() == [True, True, True]  # 0.9 of 0, that of 1 against 0.8
        posterior[1] = torch.tensor([0.31, 0.5, 0.19])
        assert mostly_right(posterior, y, untrusted).tolist() == [True, False, True]  # 0.9 against 0.91; 2 has no label

    def test_a_class_that_the_student_has_lost_keeps_its_labels(self) -> None:
        """No trusted row has class 3, and for all of its rows the student says 0; other wrong labels are found."""
        truth = torch.arange(CLASSES).repeat(150)
        wrong = torch.arange(600) % 7 == 0
        labels, trusted = torch.where(wrong, (truth + 1) % CLASSES, truth), (truth < 3) & (torch.arange(600) >= 480)
        labels = torch.where(trusted, truth, labels)
        student = 0.02 + 0.92 * torch.eye(CLASSES)[torch.where(truth == 3, 0, truth)]
        found = believe(student, labels, trusted, truth[:, None][:, :0])
        lost, others = (truth == 3) & ~wrong, (truth < 2) & wrong & ~trusted  # 2 was taken for 3
        assert torch.equal(found.classes[lost], truth[lost])
        assert found.clean[lost].min() > 0.99
        assert torch.equal(found.classes[others], truth[others])

    def test_a_rare_class_of_which_most_labels_are_wrong(self) -> None:
        """Trusted rows tell that the student knows it, so its labels may be doubted."""
        truth = torch.cat([torch.arange(3).repeat_interleave(300), torch.full((60,), 3)])
        rng = torch.Generator().manual_seed(0)
        order = torch.randperm(960, generator=rng)
        truth, wrong = truth[order], torch.rand(960, generator=rng) < 0.4
        trusted = torch.arange(960) >= 860
        labels = torch.where(wrong & ~trusted, torch.randint(4, (960,), generator=rng), truth)
        student = 0.02 + 0.92 * torch.eye(CLASSES)[truth]
        mistaken = (labels == 3) & (truth != 3)
        assert mistaken.sum() > (labels == 3).sum() / 2
        knows = believe(student, labels, trusted, truth[:, None][:, :0])
        other = torch.where(truth == 3, 0, truth)  # does not
        lost = believe(0.02 + 0.92 * torch.eye(CLASSES)[other], labels, trusted, truth[:, None][:, :0])
        assert knows.clean[mistaken].mean() < 0.75  # rare classes are doubted less
        assert (lost.clean[mistaken & ~trusted] == 1).all()
