"""The rule robust: from hand-made readings to beliefs and weights, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_kd.data.table import SampleTable
from lit_kd.trust.evidence import fit_clean_probability
from lit_kd.weightings import Robust
from lit_kd.weightings.robust import memorization, teacher_quality, trust_to_weights

torch.set_num_threads(1)

TRAIN, META, NUM_CLASSES = 600, 300, 10
ROWS = TRAIN + META


class Epochs:
    """Hand-made readings: rows below 180 carry wrong labels; the student errs on 40% of the trusted rows."""

    def __init__(self, wrong_of_teachers: list[float], seed: int = 0, warmup: int = 5) -> None:
        self.rng, self.odds_rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        self.teachers = len(wrong_of_teachers)
        self.noisy = np.arange(ROWS) < 180
        self.labels = torch.from_numpy(self.rng.integers(0, NUM_CLASSES, ROWS))
        self.rule = Robust(warmup_epochs=warmup)
        self.table = SampleTable(ROWS, "test")
        self.start()
        self.fixed: dict[str, Tensor] = {}
        """Readings that are the same in each epoch."""
        self.drawn: list[tuple[Tensor, dict[str, Tensor]]] = []
        trusted = np.arange(TRAIN, ROWS)
        self.classes = [self.labels.clone() for _ in range(self.teachers + 1)]
        for classes, rate in zip(self.classes, [0.4, *wrong_of_teachers], strict=True):
            classes[:TRAIN] = torch.from_numpy(self.rng.integers(0, NUM_CLASSES, TRAIN))
            wrong = trusted[: round(rate * META)]
            classes[wrong] = (classes[wrong] + 1) % NUM_CLASSES

    def start(self) -> None:
        self.rule.start(self.table, self.teachers, torch.arange(ROWS) >= TRAIN, self.labels, 30)
        even = torch.full((self.teachers, NUM_CLASSES, NUM_CLASSES), 1 / NUM_CLASSES)
        self.table.shared.setdefault("teacher_channel", even)

    def readings(self) -> dict[str, Tensor]:
        alignment = 1.0 + 0.7 * self.rng.standard_t(3, size=ROWS)  # with outliers, to be clipped
        alignment[self.noisy] -= 3.0
        readings = {
            "alignment": alignment,
            "log_probability": -self.rng.gamma(2.0, 0.5 + 1.5 * self.noisy),
            "teacher_log_probability": -self.rng.gamma(2.0, 1.0 + self.noisy),
            "label_log_odds": self.odds_rng.normal(3.0 - 6.0 * self.noisy, 2.0),
            "teacher_right": self.rng.uniform(0.5, 1.0, (ROWS, self.teachers)),
        }
        values = {name: torch.from_numpy(array).float() for name, array in readings.items()}
        values["student_class"] = self.classes[0].float()
        return values | {"teacher_class": torch.stack(self.classes[1:], dim=1).float()} | self.fixed

    def validate(self, *errors: float) -> None:
        """How often the student was wrong, then each teacher; of so many rows that what is added is nothing."""
        self.rule.validated(self.table, torch.tensor([round(e * 10**12) for e in errors]), torch.tensor(10**12))

    def run(self, epochs: int, scale: float = 1.0, seen: Tensor | None = None) -> SampleTable:
        """Some epochs after the warm-up, in which the rows ``seen`` are."""
        seen = torch.arange(ROWS) if seen is None else seen
        for _ in range(epochs):
            values = {name: rows[seen] for name, rows in self.readings().items()}
            values["alignment"] = scale * values["alignment"]
            self.table.write(seen, **values)
            self.table.sync()
            self.rule.renew(self.table, epoch=self.rule.warmup - 1 + len(self.drawn))
            self.drawn.append((seen, values))
        return self.table


@pytest.mark.parametrize("teachers", [1, 3])
class TestRobust:
    def test_the_gate_opens_for_clean_labels(self, teachers: int) -> None:
        table = Epochs([0.4] * teachers).run(4)
        clean = table["clean_probability"]
        assert clean.shape == (ROWS,)
        assert clean[:180].mean() < 0.1
        assert clean[180:].mean() > 0.9
        assert (clean[TRAIN:] == 1).all()
        assert table["weights"][:180, 0].mean() < 0.15 * table["weights"][180:TRAIN, 0].mean()
        assert table["weights"].shape == (ROWS, teachers + 1)
        assert (table["weights"] >= 0).all()

    def test_the_noise_rate_is_too_large_rather_than_too_small(self, teachers: int) -> None:
        """300 vouching rows leave it open where clean ends, and each slope more that is fitted to them, more so."""
        rates = [Epochs([0.4] * teachers, seed).run(4).shared["noise_rate"].item() for seed in range(4)]
        assert 180 / TRAIN - 0.01 < np.mean(rates) < 180 / TRAIN + 0.04

    @pytest.mark.parametrize(("error", "quality"), [(0.4, 0.05), (0.41, 0), (0.36, 0.8)])
    def test_a_teachers_share_follows_from_its_error(self, teachers: int, error: float, quality: float) -> None:
        """Whatever class the teachers name: next to none for those that err as often as the student, in 0.4."""
        e = Epochs([error] * teachers)
        for classes in e.classes[1:]:
            classes[300:450] = e.labels[300:450]
            classes[450:TRAIN] = (e.labels[450:TRAIN] + 1) % NUM_CLASSES
        e.fixed = {"teacher_right": torch.zeros(ROWS, teachers)}
        assert (e.run(1)["weights"][:, 1:] == 0).all()  # epoch 4, and nobody has validated
        e.validate(0.4, *[error] * teachers)
        # before 1.6 times five epochs are over, after them, at 18 epochs from the end, and at the end
        for epoch, share in (5, 0.0), (6, 0.0), (7, 0.66), (11, 0.54), (28, 0.03), (29, 0.03):
            e.run(epoch - (3 + len(e.drawn)))
            weights = e.table["weights"][300:].double()
            expected = share * quality
            found = weights[:, 1:].sum(1) / weights.sum(1)
            torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-4, rtol=0)
            torch.testing.assert_close(weights[:, 1:], weights[:, 1:2].expand(-1, teachers))

    @pytest.mark.parametrize(("warmup", "first"), [(1, 2), (3, 5)])
    def test_when_teachers_are_first_heard(self, teachers: int, warmup: int, first: int) -> None:
        """Beside labels at all, and against them with full voice, from 1.6 warm-ups on."""
        e = Epochs([0.4] * teachers, warmup=warmup)
        for classes in e.classes[1:]:
            classes[:180] = (e.labels[:180] + 1) % NUM_CLASSES
        e.fixed = {"teacher_right": torch.ones(ROWS, teachers)}
        e.validate(0.4, *[0.0] * teachers)
        for epoch in range(warmup, first + 2):
            table = e.run(1)
            weights = table["weights"].double()
            trust = weights[TRAIN:].sum(1)
            share = weights[TRAIN:, 1:].sum(1) / trust
            assert (share > 0.3).all() if epoch >= first else (share == 0).all()
            clean = table["clean_probability"][:180].double()
            voice = (weights[:180, 1:].sum(1) / trust[0] - share[0] * clean) / (1 - clean)
            expected = 1.0 if epoch >= first else 0.3
            torch.testing.assert_close(voice, torch.full_like(voice, expected), atol=1e-3, rtol=0)

    @pytest.mark.parametrize(("own", "lasting"), [(0.5, 0), (0.27, 0.4875)])
    def test_what_lasts_of_a_teachers_share(self, teachers: int, own: float, lasting: float) -> None:
        """A student that errs on 40% of validation rows; what it errs on of rows that are not trusted is no matter."""
        e = Epochs([0.4] * teachers)
        e.fixed = {"teacher_right": torch.zeros(ROWS, teachers)}
        e.validate(0.4, *[0.375] * teachers)  # a quality of a half
        wrong = slice(TRAIN, TRAIN + round(own * META))
        for epoch, part in (8, 9 / 30), (14, 15 / 30), (28, 29 / 30), (29, 29 / 30):
            e.classes[0][TRAIN:] = e.labels[TRAIN:]
            e.run(epoch - 1 - (3 + len(e.drawn)))  # by heart, and only the latest epoch counts
            e.classes[0][wrong] = (e.labels[wrong] + 1) % NUM_CLASSES
            e.run(1)
            weights = e.table["weights"][TRAIN:].double()
            found, expected = weights[:, 1:].sum(1) / weights.sum(1), 0.5 * 0.9 * (1 - (1 - lasting) * part)
            torch.testing.assert_close(found, torch.full_like(found, expected), atol=1e-5, rtol=0)

    def test_errors_of_the_two_latest_validations(self, teachers: int) -> None:
        """The newer of two has as much to say as the older, and one before them nothing; five rows more are wrong."""
        e = Epochs([0.4] * teachers)
        for wrong in [0, 90], [120, 104], [110, 98]:
            e.rule.validated(e.table, torch.tensor(wrong[:1] + wrong[1:] * teachers), torch.tensor(200))
        # 120 and 106 of 200, five more included; of 226 errors half are one's alone, with a standard error of its root
        ratio = (106 + 0.5 * 113**0.5) / 120
        expected = torch.full((teachers,), 8 * (1 - ratio))
        torch.testing.assert_close(teacher_quality(e.table), expected)

    def test_labels_of_a_class_without_trusted_rows_are_believed(self, teachers: int) -> None:
        """Nothing speaks against them; of other classes, wrong labels are found as before."""
        e = Epochs([0.4] * teachers)
        e.labels[TRAIN:][e.labels[TRAIN:] == 3] = 4
        e.start()
        clean = e.run(3)["clean_probability"]
        absent, noisy = e.labels == 3, torch.from_numpy(e.noisy)
        assert (clean[absent] == 1).all()
        assert (clean[noisy & ~absent] < 0.1).float().mean() > 0.9
        assert (clean[~noisy & ~absent] > 0.9).float().mean() > 0.9

    def test_rows_not_seen_keep_their_evidence(self, teachers: int) -> None:
        e = Epochs([0.4] * teachers)
        e.run(2)
        names = ["epochs", "evidence_mean", "evidence_square_mean", "log_probability_mean"]
        names += ["label_log_odds_mean", "teacher_right_mean"]
        before = {name: e.table[name].clone() for name in names}
        table = e.run(1, seen=torch.arange(1, ROWS, 2))
        for name in names:
            torch.testing.assert_close(table[name][::2], before[name][::2], rtol=0, atol=0)
            assert (table[name][1::2] != before[name][1::2]).all()
        assert table["alignment"].isnan().all()  # ready for the next epoch
        assert table["epochs"].tolist() == [2, 3] * (ROWS // 2)

    def test_clean_probabilities_from_explicit_means(self, teachers: int) -> None:
        """Recursions against weighted means written out in float64, some rows missing in some epochs."""
        e = Epochs([0.4] * teachers)
        rng = np.random.default_rng(5)
        for _ in range(5):
            e.run(1, seen=torch.from_numpy(rng.permutation(ROWS)[:500]))
        table = e.run(1)
        history: list[list[tuple[float, float, float]]] = [[] for _ in range(ROWS)]
        for seen, values in e.drawn:
            a = values["alignment"].double().numpy()
            evidence = np.clip(a / np.sqrt((a**2).mean()), -3, 3)
            means = (values[name].tolist() for name in ("log_probability", "label_log_odds"))
            for row, *reading in zip(seen.tolist(), evidence, *means, strict=True):
                history[row].append(tuple(reading))
        features = np.empty((ROWS, 4))
        for row, readings in enumerate(history):
            ages = 0.9 ** np.arange(len(readings))[::-1]
            x, log_p, odds = np.array(readings).T
            mean = np.average(x, weights=ages)
            variance = np.average((x - mean) ** 2, weights=ages)
            features[row, :2] = mean * np.sqrt(ages.sum()) / np.sqrt(variance + 0.05), np.average(log_p, weights=ages)
            features[row, 3] = np.average(odds, weights=ages)
        features[:, 2] = e.drawn[-1][1]["teacher_log_probability"]
        fit = fit_clean_probability(features, np.arange(ROWS) >= TRAIN)
        assert 0.2 < fit.noise_rate < 0.4
        np.testing.assert_allclose(table["clean_probability"][:TRAIN].numpy(), fit.clean[:TRAIN], atol=2e-3)

    def test_rows_never_seen(self, teachers: int) -> None:
        hidden = torch.tensor([0, 1, 300, TRAIN, ROWS - 1])
        seen = torch.tensor(sorted(set(range(ROWS)) - set(hidden.tolist())))
        table = Epochs([0.4] * teachers).run(3, seen=seen)
        assert all(column.isfinite().all() for name, column in table.columns.items() if name != "alignment")
        clean = table["clean_probability"]
        assert clean[0].item() == pytest.approx(1 - table.shared["noise_rate"].item(), abs=0.01)
        torch.testing.assert_close(clean[hidden], torch.tensor([clean[0]] * 3 + [1.0, 1.0]))

    def test_an_epoch_without_trusted_rows(self, teachers: int) -> None:
        """A short epoch (``limit_train_batches``) may hold none: nothing is proven, nothing breaks."""
        e = Epochs([0.1] * teachers)
        table = e.run(1, seen=torch.arange(64))
        assert (table["clean_probability"] == 1).all()
        assert (table["weights"][:, 1:] == 0).all()
        e.validate(0.4, *[0.1] * teachers)
        e.run(9)
        weights = e.run(1, seen=torch.arange(64))["weights"]
        assert weights.isfinite().all()
        assert (weights[:, 1:] > 0).any()  # what was found before still counts

    def test_goes_on_from_a_checkpoint(self, teachers: int) -> None:
        whole, half = Epochs([0.3] * teachers), Epochs([0.3] * teachers)
        for epochs in (whole, half):
            epochs.run(6)
            epochs.validate(0.5, *[0.2] * teachers)  # it errs on 0.4 of its own: a part lasts
        whole.run(3)
        half.run(1)
        half.rule = Robust(warmup_epochs=5)
        half.table = SampleTable.from_state_dict(half.table.state_dict())
        half.start()
        half.run(2)
        for name, column in whole.table.columns.items():
            torch.testing.assert_close(half.table[name], column, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(half.table.shared, whole.table.shared, rtol=0, atol=0)


class TestRobustTeachers:
    def test_against_a_wrong_label_the_right_teacher_is_heard(self) -> None:
        e = Epochs([0.6, 0.6])
        for k in (1, 2):
            e.classes[k][:180] = (e.labels[:180] + k) % NUM_CLASSES
        e.fixed = {"teacher_right": torch.tensor([[0.01, 0.97]]).expand(ROWS, 2)}
        weights = e.run(6)["weights"][:180]
        assert (weights[:, 1] == 0).all()
        assert weights[:, 2].mean() > 3 * weights[:, 0].mean()
        # without a validation a voice of 0.3, with a teacher much better than the student 1
        e.validate(0.4, 0.9, 0.1)
        wrong = e.table["clean_probability"][:180] < 0.01
        heard = e.run(1)["weights"]
        ratio = heard[:180][wrong, 2] / weights[wrong, 2]
        assert ratio.mean().item() == pytest.approx(1 / 0.3, rel=0.05)
        assert (heard[300:, 1] == 0).all()
        assert (heard[300:, 2] > 0.5 * heard[300:].sum(1)).all()

    def test_memorization_by_hand(self) -> None:
        e = Epochs([0.4])
        trusted = torch.arange(ROWS) >= ROWS - 10
        assert memorization(e.table, e.labels, trusted) == 0  # nobody has validated
        for wrong, rows in [90, 90], [3, 40], [16, 60]:
            e.rule.validated(e.table, torch.tensor([wrong, 0]), torch.tensor(rows))
        assert memorization(e.table, e.labels, torch.zeros(ROWS, dtype=torch.bool)) == 0
        # 19 of the latest 100, and five more of each 50 on both sides: 0.29, against 0.1 and the errors among ten
        for own, expected in (0, 1.0), (1, 3 * (1 - 0.2 / 0.29)), (2, 0.0), (10, 0.0):
            e.table["student_class"] = e.labels.float()
            e.table["student_class"][ROWS - own :] += 1
            e.table["student_class"][:300] += 1
            assert memorization(e.table, e.labels, trusted) == pytest.approx(expected, abs=1e-6)

    def test_weights_by_hand(self) -> None:
        """Every row and class by itself, from the words of the docstring."""
        rng = np.random.default_rng(0)
        rows, teachers, num_classes = 300, 4, 3
        clean, right = rng.random(rows), rng.random((rows, teachers))
        labels, classes = rng.integers(0, num_classes, rows), rng.integers(0, num_classes, (rows, teachers))
        shares, voices = np.array([0.0, 0.2, 0.7, 0.5]), np.array([0.3, 0.6, 1.0, 0.0])
        expected, trust = np.zeros((rows, teachers + 1)), 0.0
        for i in range(rows):
            expected[i, 0] = (1 - max(shares)) * clean[i]
            trust += clean[i]
            for k in range(teachers):
                named = [j for j in range(teachers) if classes[i, j] == classes[i, k]]
                expected[i, 1 + k] = clean[i] * max(shares) * shares[k] / sum(shares)
                if classes[i, k] != labels[i]:
                    own = (1 - clean[i]) * right[i, k] / len(named)
                    expected[i, 1 + k] += voices[k] * own
                    trust += own
        found = trust_to_weights(*map(torch.from_numpy, (clean, right, classes, labels, shares, voices)))
        np.testing.assert_allclose(found.numpy(), expected / (trust / rows), rtol=1e-6, atol=1e-9)
