"""The rule robust in trainings: what it finds, what it asks for, what it leaves alone."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from lightning import seed_everything
from methods import CLASSES, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from sklearn.metrics import roc_auc_score
from test_every_method import Each, noisy
from torch import Tensor, nn
from torch.nn import functional as F

from lit_kd import ALMKD, Batch, Supervised
from lit_kd.data import DigitsDataModule, Source, TensorRows
from lit_kd.data.table import SampleTable
from lit_kd.terms import Hint
from lit_kd.types import UNLABELED
from lit_kd.weightings import MetaStep, Robust
from lit_kd.weightings.robust import compare_classes

SHAPED: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
DIGITS: dict[str, Any] = {
    "num_classes": 10,
    "input_shape": [1, 8, 8],
    "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "lr_scheduler": "cosine",
}


class Trusting(Supervised):
    """Cross-entropy, on the meta rows, too."""

    trains_on_meta = True


def both(*wrong: int) -> Tensor:
    """Errors of the student, then of teachers that speak of all rows, (3, K + 1)."""
    own = torch.tensor(wrong)
    return torch.stack([own[:1].expand_as(own), own, own])


def fit(model: Any, seed: int, **noise: Any) -> tuple[Any, DigitsDataModule, float]:
    """Train a little on digits; the model, its data, and the accuracy."""
    data, fitted = DigitsDataModule(batch_size=64, seed=seed, **noise), trainer(max_epochs=12)
    seed_everything(seed, verbose=False)
    fitted.fit(model, data)
    [measured] = fitted.test(model, data, verbose=False)
    return model, data, measured["test/accuracy"]


def auc(model: Any, data: DigitsDataModule) -> float:
    """Of wrong labels among the training rows, by the clean probability."""
    wrong = (data.labels != data.clean_labels)[: data.train_size]
    return float(roc_auc_score(wrong, 1 - model.table["clean_probability"][: data.train_size]))


class TestDigits:
    teacher = partial(nn.Sequential, nn.Flatten(), nn.Linear(64, 10))  # knows nothing

    def test_wrong_labels_are_found(self) -> None:
        model, data, _ = fit(ALMKD("mlp-64", self.teacher(), **DIGITS), 0, noise="symmetric", noise_rate=0.4)
        assert auc(model, data) > 0.98
        wrong, weights = (data.labels != data.clean_labels)[: data.train_size], model.table["weights"]
        assert (model.table["clean_probability"][data.train_size :] == 1).all()
        assert weights[: data.train_size][wrong, 0].mean() < 0.6 * weights[: data.train_size][~wrong, 0].mean()
        assert 0.5 * wrong.float().mean() < model.table.shared["noise_rate"] < 1.1 * wrong.float().mean()

    def test_pair_noise_does_less_harm_than_to_cross_entropy(self) -> None:
        """Which learns from training and meta rows, too, and is the teacher."""
        gains = []
        for seed in range(3):
            noise: dict[str, Any] = {"noise": "asymmetric", "noise_rate": 0.3}
            teacher, _, plain = fit(Trusting("mlp-64", **DIGITS), seed, **noise)
            model, data, accuracy = fit(ALMKD("mlp-64", teacher.student, **DIGITS), seed, **noise)
            gains.append(accuracy - plain)
            assert auc(model, data) > 0.98
            assert model.table["weights"][:, 1].max() < 0.01  # it repeats wrong labels
        assert sum(gains) / 3 > 0.01

    def test_right_labels_are_left_alone(self) -> None:
        """All but a few hard rows, of which none is revised."""
        model, _, accuracy = fit(ALMKD("mlp-64", self.teacher(), **DIGITS), 0)
        assert ((model.table["weights"] - torch.tensor([1.0, 0.0])).abs().amax(1) < 1e-2).float().mean() > 0.99
        assert not model.table["revised_weight"].any()
        assert model.table.shared["noise_rate"] < 1e-3
        assert accuracy > 0.94


def started(rows: int = 12, teachers: int = 1, rule: Robust | None = None, **shared: Any) -> tuple[Robust, SampleTable]:
    """Before the first batch; the last third is trusted, and rows 0 and 1 have no label."""
    rule, table = rule or Robust(), SampleTable(rows, "test")
    labels = torch.arange(rows) % CLASSES
    labels[:2] = UNLABELED
    rule.start(table, teachers, torch.arange(rows) >= rows - rows // 3, labels, **({"epochs": 9} | shared))
    return rule, table


def seen(logits: Tensor, teachers: list[Tensor], index: Tensor | None = None) -> MetaStep:
    """All rows, or some, in a batch."""
    index = torch.arange(len(logits)) if index is None else index

    def never(weights: Tensor, lr: float) -> Tensor:
        raise AssertionError("it must not look ahead")

    return MetaStep(index, torch.zeros_like(index), logits, teachers, never, 0.0, len(index))


class TestMemory:
    def test_is_the_mean_of_what_was_said_the_latest_most(self) -> None:
        rule, table = started(rule=Robust(decay=0.6))
        draw, said = torch.Generator().manual_seed(0), []
        for epoch in range(4):
            logits = torch.randn(12, CLASSES, generator=draw)
            rows = torch.arange(12) if epoch != 1 else torch.arange(6)  # half of them are not seen once
            rule.observe(table, seen(logits[rows], [logits[rows]], rows))
            said.append(logits.softmax(-1))
        for row in range(12):
            kept = [said[e][row] for e in range(4) if e != 1 or row < 6]
            ages = torch.tensor([0.6 ** (len(kept) - 1 - k) for k in range(len(kept))])
            expected = (torch.stack(kept) * ages.unsqueeze(1)).sum(0) / ages.sum()
            torch.testing.assert_close(table["memory"][row], expected)
        assert table["epochs"].tolist() == [4] * 6 + [3] * 6
        torch.testing.assert_close(table["teacher_class"][:, 0], said[-1].argmax(1))


def test_nothing_is_doubted_before_the_first_trusted_row_is_seen() -> None:
    """Else it would be taken for data without any."""
    rule, table = started(teachers=0)
    rows = torch.arange(2, 8)
    rule.observe(table, seen(-6.0 * F.one_hot(rule.labels[rows], CLASSES), [], rows))
    rule.renew(table, 0)
    assert (table["clean_probability"] == 1).all()
    rule.observe(table, seen(6.0 * F.one_hot(rule.labels[8:], CLASSES), [], torch.arange(8, 12)))
    rule.renew(table, 0)
    assert table["clean_probability"][rows].max() < 1


def taught(rule: Robust, says: float = 6.0, **shared: Any) -> tuple[Robust, SampleTable, Tensor]:
    """A student that says the true class of 300 rows, a teacher that knows it; a tenth of the labels are wrong."""
    rule, table = started(300, rule=rule, **shared)
    truth, wrong = torch.arange(300) % CLASSES, torch.arange(300) % 10 == 3
    wrong[200:] = False
    rule.labels[wrong] = (truth[wrong] + 1) % CLASSES
    logits = says * torch.eye(CLASSES)[truth]
    logits[3] = 1.0 * torch.eye(CLASSES)[truth[3]]  # here it is unsure
    rule.observe(table, seen(logits, [3 * logits]))
    return rule, table, wrong


class TestWeights:
    def test_of_a_revised_label_are_the_learned_classs(self) -> None:
        """The label has none, and what is learned in its place has all."""
        rule, table, wrong = taught(Robust(early_epochs=1))
        wrong[3] = False  # in doubt
        rule.renew(table, 2)
        batch = Batch(torch.zeros(300, 1), rule.labels, torch.arange(300))
        before = table["weights"].clone()
        learned, weights = rule.revise(table, batch).y, rule.weights(table, torch.arange(300))
        torch.testing.assert_close(learned[4:], torch.arange(4, 300) % CLASSES)
        assert (weights[wrong, 0] > 0.5).all()
        assert not table["weights"][wrong, 0].any()
        assert table["clean_probability"][wrong].max() < 0.3
        assert (weights[:2] == 0).all()  # no teacher is heard
        assert (learned[:2] == UNLABELED).all()
        assert (table["weights"][200:, 0] > 0.9).all()
        torch.testing.assert_close(table["weights"], before)  # what the table holds is left as it is
        assert weights.sum(1).mean().item() == pytest.approx(1, abs=1e-5)

    def test_a_teacher_is_heard_after_early_learning_and_less_to_the_end(self) -> None:
        rule, table, _ = taught(Robust(3), epochs=9)
        heard = []
        for epoch in range(9):
            rule.validated(table, both(80, 5), torch.tensor(200))
            rule.renew(table, epoch)
            heard.append(float((table["weights"][200:, 1] / table["weights"][200:].sum(1)).mean()))
            if epoch == 2:  # and says what rows are that have no label
                batch = Batch(torch.zeros(2, 1), rule.labels[:2], torch.arange(2))
                assert rule.revise(table, batch).y.tolist() == [0, 1]
                assert (rule.weights(table, torch.arange(2)).sum(1) > 0.8).all()
                assert not table["weights"][:2, 0].any()
        assert heard[:2] == [0, 0]
        assert 0.55 < heard[2] < 6 / 9  # two thirds of the training are left
        parts = [heard[epoch] / heard[2] for epoch in range(2, 9)]
        assert parts == pytest.approx([6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 1 / 6], rel=1e-4)  # never 0
        for _ in range(2):  # of all validations the two latest count
            rule.validated(table, both(80, 80), torch.tensor(200))
        rule.renew(table, 7)
        assert not table["weights"][:, 1].any()

    def test_rows_that_were_not_seen_keep_what_they_have(self) -> None:
        rule, table = started(30)
        rule.renew(table, 0)  # none was seen
        assert (table["weights"] == torch.tensor([1.0, 0.0])).all()
        logits = torch.randn(20, CLASSES)
        rule.observe(table, seen(logits, [logits], torch.arange(20)))
        rule.renew(table, 3)
        assert (table["weights"][20:] == torch.tensor([1.0, 0.0])).all()
        assert all(column.isfinite().all() for column in table.columns.values())


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"early_epochs": 0}, "early_epochs of at least 1, or None; found 0"),
            ({"decay": 1.0}, r"decay in \[0, 1\), found 1.0"),
            ({"decay": -0.1}, "found -0.1"),
        ],
    )
    def test_that_are_wrong(self, options: dict[str, Any], match: str) -> None:
        with pytest.raises(ValueError, match=match):
            Robust(**options)

    @pytest.mark.parametrize(
        ("early", "epochs", "expected"), [(None, 30, (3, 30)), (None, 1, (1, 1)), (4, 30, (4, 30))]
    )
    def test_early_epochs(self, early: int | None, epochs: int, expected: tuple[int, int]) -> None:
        rule, _ = started(rule=Robust(early), epochs=epochs)
        assert (rule.early, rule.length) == expected

    def test_teachers_that_are_never_heard(self) -> None:
        with pytest.warns(UserWarning, match="never heard: 30 epochs end before early_epochs=50"):
            started(rule=Robust(50), epochs=30)

    def test_a_training_of_unknown_length(self) -> None:
        rule, _ = started(rule=Robust(4), epochs=None)
        assert (rule.early, rule.length) == (4, 40)


class TestTraining:
    def test_asks_for_no_meta_batches_and_looks_at_no_layer(self) -> None:
        student = nn.Sequential(nn.Flatten(), nn.Linear(16, CLASSES), nn.Tanh())  # no linear layer at its end
        model, shown = ALMKD(student, trained_teachers()[0], **SHAPED), []
        watch = Each(lambda _, __, ___, batch, *____: shown.append(type(batch)), "on_train_batch_start")
        trainer(callbacks=watch).fit(model, Blobs())
        assert set(shown) == {Batch}
        assert len(shown) == 2 * 72 // 8
        assert (model.table["epochs"] == 2).all()  # meta rows, too

    def test_terms_of_features_can_be_weighed(self) -> None:
        model = ALMKD("mlp-16", trained_teachers()[1], term=Hint(), **SHAPED)
        trainer().fit(model, Blobs())
        assert model.table["weights"].isfinite().all()

    @pytest.mark.parametrize("mix", ["mixup", "cutmix"])
    def test_mixed_inputs(self, mix: Any) -> None:
        """Each row is seen once in an epoch, where its share is greatest."""
        model = ALMKD("cnn-2", trained_teachers(), mix=mix, **SHAPED)
        trainer(max_epochs=4).fit(model, noisy())
        assert (model.table["epochs"] == 4).all()
        torch.testing.assert_close(model.table["memory"].sum(1), torch.ones(72))
        assert model.table["weights"].isfinite().all()

    @pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
    def test_precision(self, precision: Any) -> None:
        model = build("almkd-robust")
        trainer(precision=precision, max_epochs=3).fit(model, noisy())
        assert model.table is not None
        assert model.table["weights"].isfinite().all()
        assert len(model.table["memory"].unique(dim=0)) > 40

    def test_rows_without_a_label_wait_for_a_teacher_that_is_better(self) -> None:
        data, model = Blobs(labeled=0.5), build("almkd-robust")
        trainer(max_epochs=4).fit(model, data)
        assert model.table is not None
        missing = data.labels == UNLABELED
        assert missing.sum() == 24
        assert (model.table["memory"][missing].max(1).values > 0.4).all()  # though they are seen
        assert not model.table["weights"][missing].any()
        assert (model.table["weights"][~missing, 0] > 0.5).all()


class TestCompareClasses:
    @pytest.mark.parametrize("seed", range(5))
    def test_usual_rows_are_fine(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
        others, trusted = (torch.multinomial(shares, n, True, generator=draw) for n in (2000, 100))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            compare_classes(others, trusted, 4)

    def test_other_shares_are_told(self) -> None:
        others, trusted = torch.arange(2000) % 4, torch.tensor([0] * 70 + [1] * 10 + [2] * 10 + [3] * 10)
        with pytest.warns(UserWarning, match="such as 70 of class 0 where 25 are expected"):
            compare_classes(others, trusted, 4)

    @pytest.mark.parametrize("skewed", [False, True])
    def test_in_a_training(self, skewed: bool) -> None:
        """Once, after a third of the training: trusted rows of class 2 alone but one of each other."""

        class Skewed(Blobs):
            def load(self) -> Source:
                x, y = blobs(240)
                return Source(TensorRows(x), TensorRows(x), y.numpy(), test_size=24, identity=b"skewed")

            @property
            def trusted(self) -> Tensor:
                rows = super().trusted
                if skewed and self.trainer is not None:
                    rows = rows & ((self.labels == 2) | ~rows.cumsum(0).gt(9))
                return rows

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(max_epochs=6).fit(build("almkd-robust"), Skewed(meta=60, val=24, batch_size=16))
        found = [one for one in caught if "other shares of the classes" in str(one.message)]
        assert len(found) == skewed
