"""What `lit_kd.audit` finds: its score by hand, its ranking against cleanlab, and what corrected labels are worth."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from methods import CLASSES, SHAPE, Blobs, trained_teachers, trainer
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

import lit_kd.report.audit
from lit_kd import ALMKD, Supervised, audit
from lit_kd.data import DigitAttributesDataModule, DigitsDataModule
from lit_kd.data.table import SampleTable
from lit_kd.report.audit import by_cleanlab, compared, precision, quiet_trainer
from lit_kd.report.gallery import write_gallery
from lit_kd.report.label_issues import LabelIssues, find_issues, learned_nothing, write_audit, write_labels
from lit_kd.trust.belief import believe
from lit_kd.trust.labels import doubt
from lit_kd.types import UNLABELED

SHAPED: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
PAIR = partial(DigitsDataModule, noise="asymmetric", noise_rate=0.3, meta=0.05, val=0)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestDoubt:
    def test_row_by_row(self) -> None:
        rng = np.random.default_rng(0)
        said, clean, labels = rng.dirichlet(np.ones(4), 50), rng.random(50), rng.integers(0, 4, 50)
        found = doubt(torch.tensor(clean), torch.tensor(said), torch.tensor(labels))
        for i, y in enumerate(labels):
            other = max(said[i, c] for c in range(4) if c != y)
            assert float(found[i]) == pytest.approx(np.mean([1 - clean[i], (1 + other - said[i, y]) / 2]))

    def test_it_is_a_probability(self) -> None:
        said = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
        assert doubt(torch.tensor([1.0, 0.0, 0.5]), said, torch.zeros(3, dtype=torch.long)).tolist() == [0, 1, 0.5]


def by_hand(said: list[list[float]], clean: list[float], labels: list[int], learned: list[int]) -> LabelIssues:
    """What is found on training rows of such labels."""
    data = Blobs()
    data.setup()
    n = len(labels)
    data.parts.given[: data.train_size] = UNLABELED
    data.parts.given[:n] = torch.tensor(labels)
    data.parts.knows_truth = True
    table = SampleTable(len(data.labels), data.fingerprint)
    table.add("memory", torch.zeros(CLASSES))
    table.add("clean_probability", torch.ones(()))
    table.add("learned_class", torch.zeros((), dtype=torch.int64))
    table.add("weights", torch.tensor([1.0]))
    table.write(
        torch.arange(n),
        memory=torch.tensor(said),
        clean_probability=torch.tensor(clean),
        learned_class=torch.tensor(learned),
    )
    return find_issues(table, data, torch.empty(0))


def test_what_is_found_by_hand() -> None:
    """Doubts: 0.05 / 2 + 0.1 / 4 + ...; the third is doubted though the rule believes its label a little more."""
    said = [[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]
    found = by_hand(said, [1.0, 0.2, 0.55], [0, 0, 1], [0, 1, 1])
    expected = [0.5 * (0 + 0.1), 0.5 * (0.8 + 0.85), 0.5 * (0.45 + 0.75)]
    assert found.index.tolist() == [1, 2, 0]
    assert (1 - found.score).tolist() == pytest.approx([expected[1], expected[2], expected[0]])
    assert found.given.tolist() == [0, 1, 0]
    assert found.is_issue.tolist() == [True, True, False]
    assert found.suggested.tolist() == [1, 2, 0]
    assert found.expected == pytest.approx(expected[1] + expected[2])
    assert found.true is not None


class TestOnDigits:
    @pytest.fixture(scope="class")
    def data(self) -> DigitsDataModule:
        data = PAIR(seed=0)
        data.setup()
        return data

    @pytest.fixture(scope="class")
    def found(self, data: DigitsDataModule) -> LabelIssues:
        torch.manual_seed(0)
        return audit(data, "mlp-64", epochs=20)

    def test_it_is_right_about_labels_and_about_how_often(self, data: DigitsDataModule, found: LabelIssues) -> None:
        assert sorted(found.index) == list(range(data.train_size))
        assert found.ids == [data.parts.ids[i] for i in found.index]
        assert (np.diff(found.score) >= 0).all()
        assert found.true is not None
        wrong = found.given != found.true
        assert (wrong == data.noisy[: data.train_size].numpy()[found.index]).all()
        assert average_precision_score(wrong, 1 - found.score) > 0.97
        true = wrong[found.is_issue].sum()
        assert true > 0.9 * wrong.sum()
        assert abs(found.expected - true) < 0.12 * true
        assert (found.suggested == found.true)[found.is_issue].mean() > 0.9

    def test_better_than_cleanlab(self, data: DigitsDataModule, found: LabelIssues) -> None:
        make = partial(Supervised, "mlp-64", num_classes=10, input_shape=[1, 8, 8], lr_scheduler="cosine")
        theirs = by_cleanlab(found, data, make, lambda: quiet_trainer(20))
        assert found.true is not None
        ours = precision(found.given != found.true, found.score)
        for score in theirs.scores.values():
            assert min(np.subtract(ours, precision(found.given != found.true, score))) > 0.02
        assert data.train_on_meta is None
        assert f"{ours[0]:.3f}" in compared(found, theirs, 1.0)

    def test_corrected_labels_make_a_better_student(self, found: LabelIssues) -> None:
        accuracies = []
        for corrected in (False, True):
            data = PAIR(seed=0, train_on_meta=True)
            data.setup()
            if corrected:
                wrong = found.is_issue
                data.parts.given[found.index[wrong]] = torch.from_numpy(found.suggested[wrong])
            torch.manual_seed(0)
            fitted, model = quiet_trainer(20), Supervised("mlp-64", num_classes=10, input_shape=[1, 8, 8])
            fitted.fit(model, data)
            accuracies.append(fitted.test(model, data, verbose=False)[0]["test/accuracy"])
        assert accuracies[1] > accuracies[0] + 0.02

    def test_nothing_is_trusted(self) -> None:
        torch.manual_seed(0)
        data = PAIR(seed=0)
        found = audit(data, "mlp-64", trusted=0, epochs=20)
        assert data.meta_size == 0
        assert found.true is not None
        assert average_precision_score(found.given != found.true, 1 - found.score) > 0.93


def test_with_a_teacher_and_missing_labels() -> None:
    data = Blobs(labeled=40)
    found = audit(data, "mlp-8", trained_teachers()[0], trainer=lambda: trainer(max_epochs=2), input_shape=list(SHAPE))
    assert len(found.ids) == 40
    assert found.weights is not None
    assert found.weights.shape == (40, 2)


def test_without_trusted_rows_doubt_stays() -> None:
    said, labels = torch.tensor([[0.2, 0.8], [0.7, 0.3]] * 20), torch.zeros(40, dtype=torch.long)
    labels[::4] = 1
    nobody, teachers = torch.zeros(40, dtype=torch.bool), torch.zeros(40, 0, dtype=torch.long)
    found = believe(said, labels, nobody, teachers)
    assert (found.false_doubt == 0).all()
    assert found.clean.min() < 0.5
    model = ALMKD("mlp-8", [], **SHAPED)
    with pytest.warns(UserWarning, match="no row is trusted, so that nothing tells which doubt about a label is false"):
        trainer(max_epochs=2).fit(model, Blobs(meta=0))
    assert (model.table["epochs"] == 2).all()


class TestAStudentThatLearnedNothing:
    """Of 10 classes, alike or not; trusted rows are the last."""

    @staticmethod
    def told(right: int, rows: int = 400, largest: int = 40, trusted: int = 0) -> str | None:
        """What is said where so many rows are right, of labels of which so many are the largest class."""
        data = Blobs(meta=trusted, val=0)
        data.setup()
        rest = torch.arange(rows - largest) % 9 + 1
        y = torch.cat([torch.zeros(largest, dtype=torch.long), rest])
        data.parts.given, data.parts.positions["train"] = y, np.arange(rows - trusted)
        names = torch.where((torch.arange(rows) - (rows - trusted)) % rows < right, y, (y + 1) % 10)
        return learned_nothing(F.one_hot(names, 10).float(), data)

    @pytest.mark.parametrize(("rows", "largest"), [(400, 40), (100, 90), (30, 6)])
    def test_as_an_exact_test_tells(self, rows: int, largest: int) -> None:
        """Against Clopper and Pearson's interval: both agree but for some counts at the border."""
        told = [self.told(right, rows, largest) is not None for right in range(rows + 1)]
        exact = [
            scipy.stats.binomtest(right, rows).proportion_ci(0.95).low <= largest / rows for right in range(rows + 1)
        ]
        assert told == sorted(told, reverse=True)
        assert abs(sum(told) - sum(exact)) <= 2
        assert told[largest]
        assert not told[rows]

    def test_trusted_rows_count_before_others(self) -> None:
        assert self.told(50, trusted=50) is None
        assert "of 50 trusted rows it names the label of 0, " in str(self.told(0, trusted=50))
        expected = "of 400 training rows it names the label of 3, and the most frequent class is that of 40"
        assert expected in str(self.told(3))

    def test_rows_that_were_never_seen_and_numbers_that_are_none(self) -> None:
        data = Blobs(meta=0, val=0)
        data.setup()
        said = F.one_hot(data.labels, CLASSES).float()
        said[::2] = 0
        assert learned_nothing(said, data) is None
        assert learned_nothing(torch.full_like(said, torch.nan), data) is not None

    def test_the_audit_says_so(self, tmp_path: Path) -> None:
        still = {"optimizer": partial(torch.optim.SGD, lr=0.0), "input_shape": list(SHAPE)}
        with pytest.warns(UserWarning, match="the student seems to have learned nothing"):
            found = audit(Blobs(), "mlp-8", trainer=lambda: trainer(max_epochs=1), **still)
        assert found.note is not None
        write_gallery(tmp_path / "page.html", found, None, None, "Labels")
        assert f"<b>Note:</b> {found.note}" in (tmp_path / "page.html").read_text()


class TestFiles:
    def test_they_read_back(self, tmp_path: Path) -> None:
        data = DigitsDataModule(noise="symmetric", noise_rate=0.4, seed=0)
        found = audit(data, "mlp-16", epochs=2)
        table, labels = write_audit(tmp_path / "new", found, data)
        rows = read(table)
        assert [row["id"] for row in rows] == found.ids
        assert [float(row["label_score"]) for row in rows] == found.score.tolist()
        assert [row["is_label_issue"] == "True" for row in rows] == found.is_issue.tolist()
        assert {row["id"]: int(row["label"]) for row in read(labels)} == {
            name: c for name, c, wrong in zip(found.ids, found.suggested, found.is_issue, strict=True) if wrong
        }
        with pytest.raises(FileExistsError, match=r"label_issues.csv is there already"):
            write_audit(tmp_path / "new", found, data)

    def test_a_label_that_is_taken_away_is_empty(self, tmp_path: Path) -> None:
        write_labels(tmp_path / "labels.csv", ["a.png", "b.png"], np.array([1, UNLABELED]), ["cat", "dog"])
        assert (tmp_path / "labels.csv").read_text() == "id,label\na.png,dog\nb.png,\n"


def test_cleanlab_is_asked_about_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Blobs(noise="symmetric", noise_rate=0.4)
    found = audit(data, "mlp-8", trainer=lambda: trainer(max_epochs=2), input_shape=list(SHAPE))
    said = np.random.default_rng(0).dirichlet(np.ones(CLASSES), data.train_size)
    monkeypatch.setattr(lit_kd.report.audit, "cross_predict", lambda *_: torch.from_numpy(said))
    theirs, labels = by_cleanlab(found, data, lambda: Supervised("mlp-8", **SHAPED), trainer), data.labels.numpy()
    for way, score in theirs.scores.items():
        expected = get_label_quality_scores(labels[: data.train_size], said, method=way)
        np.testing.assert_allclose(score, expected[found.index])
    assert (theirs.is_issue == find_label_issues(labels[: data.train_size], said, n_jobs=1)[found.index]).all()


class TestBadInput:
    def test_several_labels_a_sample(self) -> None:
        with pytest.raises(ValueError, match=r"expected data of one class a sample.*found several labels a sample"):
            audit(DigitAttributesDataModule(seed=0), "mlp-8")

    def test_no_labels(self) -> None:
        data = Blobs()
        data.setup()
        data.parts.given[: data.train_size] = UNLABELED
        with pytest.raises(ValueError, match="expected training rows with a label, found none"):
            audit(data, "mlp-8")

    def test_trusted_rows_without_labels(self) -> None:
        data = Blobs()
        data.setup()
        data.parts.given[-2:] = UNLABELED
        with pytest.raises(ValueError, match="expected a label for each trusted row, found 2 without one"):
            audit(data, "mlp-8")

    @pytest.mark.parametrize("trusted", [0, 0.2])
    def test_data_that_are_split(self, trusted: float) -> None:
        data = Blobs(meta=0.3 if trusted == 0 else 0)
        data.setup()
        with pytest.raises(ValueError, match=r"expected data that are not split yet, found \d+ meta rows"):
            audit(data, "mlp-8", trusted=trusted)
