"""GroupDistil against group DRO's equations, written anew."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods import CLASSES, SHAPE, Blobs, blobs, build, trained_teachers, trainer
from torch import Tensor

from lit_kd import KD, Distiller, GroupDistil
from lit_kd.data import Source, TensorRows
from lit_kd.terms.base import weighted_means
from lit_kd.types import UNLABELED, Batch, Outputs
from lit_kd.weightings.groups import WorstGroupAccuracy, read_groups

BASE: dict[str, Any] = {"num_classes": CLASSES, "input_shape": list(SHAPE)}
Y = torch.tensor([0, 2, 2, UNLABELED, 0, 0, 2])


def method(kind: type[Distiller] = GroupDistil, log_weights: Tensor | None = None, **options: Any) -> Distiller:
    """One that no trainer has set up."""
    model = kind("mlp-8", "teacher.ckpt", temperature=2.0, weight=0.3, **options, **BASE)
    model.terms = model.make_terms()
    start = torch.zeros(CLASSES, dtype=torch.float64).log_softmax(0) if log_weights is None else log_weights
    model.table = SimpleNamespace(shared={"group_log_weights": start})  # type: ignore[assignment]
    return model


def batches(number: int, y: Tensor = Y) -> list[tuple[Outputs, list[Outputs], Batch]]:
    g = torch.Generator().manual_seed(1)
    z = 3 * torch.randn(number, 2, len(y), CLASSES, generator=g, dtype=torch.float64)
    return [(Outputs(one, {}), [Outputs(other, {})], Batch(one, y, torch.arange(len(y)))) for one, other in z]


def row_loss(z: Tensor, t: Tensor, y: int) -> Tensor:
    """``0.7 CE + 0.3 T^2 KL`` at T = 2."""
    p, q = (t / 2).softmax(0), (z / 2).softmax(0)
    return -0.7 * z.softmax(0)[y].log() + 0.3 * 4 * (p * (p / q).log()).sum()


def group_losses(z: Tensor, t: Tensor, y: Tensor) -> dict[int, Tensor]:
    """The mean of each group that there is."""
    found = {}
    for group in set(y.tolist()) - {UNLABELED}:
        rows = [i for i in range(len(y)) if y[i] == group]
        found[group] = sum(row_loss(z[i], t[i], group) for i in rows) / len(rows)
    return found


class TestEquations:
    @pytest.mark.parametrize("rate", [0.0, 0.01, 0.7])
    def test_loss_and_weights_by_group(self, rate: float) -> None:
        model, w = method(rate=rate), [1 / CLASSES] * CLASSES
        for student, teachers, batch in batches(4):
            means = weighted_means(*model.weighed(student, teachers, batch))
            found = group_losses(student.logits, teachers[0].logits, batch.y)
            w = [one * float(torch.exp(rate * found.get(g, torch.tensor(0.0)))) for g, one in enumerate(w)]
            w = [one / sum(w) for one in w]
            expected = sum(w[g] * loss for g, loss in found.items())
            assert means["loss"].item() == pytest.approx(float(expected), rel=1e-10)
            now = model.table.shared["group_log_weights"].exp()  # type: ignore[union-attr]
            torch.testing.assert_close(now, torch.tensor(w, dtype=torch.float64), rtol=1e-10, atol=0)

    def test_weights_are_the_softmax_of_the_summed_losses(self) -> None:
        model, total = method(rate=0.2), torch.zeros(CLASSES, dtype=torch.float64)
        for student, teachers, batch in batches(5):
            model.weighed(student, teachers, batch)
            for group, loss in group_losses(student.logits, teachers[0].logits, batch.y).items():
                total[group] += loss
        now = model.table.shared["group_log_weights"].exp()  # type: ignore[union-attr]
        torch.testing.assert_close(now, (0.2 * total).softmax(0), rtol=1e-10, atol=0)

    def test_one_group_that_has_all_weight_is_kd(self) -> None:
        [(student, teachers, batch)] = batches(1, torch.ones(6).long())
        sure = torch.tensor([-1e9, 0.0, -1e9], dtype=torch.float64)
        ours = weighted_means(*method(log_weights=sure).weighed(student, teachers, batch))
        theirs = weighted_means(*method(KD).weighed(student, teachers, batch))
        torch.testing.assert_close(ours["loss"], theirs["loss"])

    def test_autocast_does_not_round_the_weights(self) -> None:
        """In bfloat16, 300 rows would be counted as 300 less 1.3%."""
        student, teachers, batch = batches(1, torch.arange(903) % CLASSES)[0]
        student, teachers = Outputs(student.logits.float(), {}), [Outputs(teachers[0].logits.float(), {})]
        start = torch.zeros(CLASSES).log_softmax(0)
        expected = method(log_weights=start, rate=0.5).weighed(student, teachers, batch)
        with torch.autocast("cpu", torch.bfloat16):
            found = method(log_weights=start, rate=0.5).weighed(student, teachers, batch)
        torch.testing.assert_close(found[1], expected[1])

    def test_weights_have_no_gradient(self) -> None:
        [(student, teachers, batch)] = batches(1)
        z = student.logits.clone().requires_grad_()
        _, weights, _ = method(rate=0.5).weighed(Outputs(z, {}), teachers, batch)
        assert isinstance(weights, Tensor)
        assert not weights.requires_grad

    def test_a_row_without_a_label_and_a_group_without_rows(self) -> None:
        [(student, teachers, batch)] = batches(1)
        model = method(rate=0.5)
        _, weights, _ = model.weighed(student, teachers, batch)
        assert (weights[3] == 0).all()  # type: ignore[index]
        before = model.table.shared["group_log_weights"]  # type: ignore[union-attr]
        nobody = batch.with_labels(torch.full_like(Y, UNLABELED))
        means = weighted_means(*model.weighed(student, teachers, nobody))
        assert means["loss"] == 0
        torch.testing.assert_close(model.table.shared["group_log_weights"], before)  # type: ignore[union-attr]

    def test_a_group_that_was_forgotten_comes_back(self) -> None:
        """Weights themselves would be 0 for ever in float32."""
        model = method(rate=30.0, log_weights=torch.zeros(CLASSES).log_softmax(0))
        z = torch.tensor([[9.0, 0.0, 0.0]])
        for y, steps, group in ((1, 4, 1), (0, 40, 0)):
            said = z if y else -z
            for _ in range(steps):
                model.weighed(Outputs(said, {}), [Outputs(said, {})], Batch(z, torch.tensor([y]), None))
            now = model.table.shared["group_log_weights"].exp()  # type: ignore[union-attr]
            assert now[group] > 0.99
            assert y == 0 or now[0] == 0

    def test_far_logits(self) -> None:
        z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
        model = method(log_weights=torch.zeros(CLASSES).log_softmax(0))
        batch = Batch(z, torch.tensor([1, 1]), None)
        loss = weighted_means(*model.weighed(Outputs(z, {}), [Outputs(-z.detach(), {})], batch))["loss"]
        loss.backward()
        assert loss.isfinite()
        assert z.grad is not None
        assert z.grad.isfinite().all()


class TestTraining:
    def test_mixed_images_count_by_their_shares(self) -> None:
        fitted = trainer()
        fitted.fit(build("group-distil", mix="mixup"), Blobs())
        assert fitted.callback_metrics["train/loss"].isfinite()

    def test_a_hard_class_counts_more(self) -> None:
        model = build("group-distil", teachers=trained_teachers()[:1])
        trainer(max_epochs=3).fit(model, Hard())
        assert model.table is not None
        assert model.table.shared["group_log_weights"].argmax() == 2

    def test_a_class_without_rows_is_refused(self) -> None:
        model = GroupDistil("mlp-8", "mlp-8", num_classes=4, input_shape=list(SHAPE))
        with pytest.raises(ValueError, match=r"every class, found none of \[3\]"):
            trainer().fit(model, Wider())

    def test_bad_rate(self) -> None:
        with pytest.raises(ValueError, match="rate of at least 0"):
            GroupDistil("mlp-8", rate=-0.1, **BASE)


def table(path: Path, groups: dict[str, str]) -> str:
    """The path of a table of them."""
    path.write_text("id,group\n" + "".join(f"{name},{group}\n" for name, group in groups.items()))
    return str(path)


def drawn(rows: int = 120) -> dict[str, str]:
    """Groups of all rows, of other sizes, that classes do not tell."""
    of = torch.rand(rows, generator=torch.Generator().manual_seed(5)).tolist()
    return {str(row): "west" if u < 0.2 else "north" if u < 0.5 else "east" for row, u in enumerate(of)}


class TestGivenGroups:
    def test_loss_and_weights_by_group(self) -> None:
        group, y = [1, 0, 1, 1, 0, 1], torch.tensor([0, 2, 1, 1, 0, 2])
        model = method(rate=0.7, log_weights=torch.zeros(2, dtype=torch.float64).log_softmax(0))
        model.names, model.group_of, w = ["a", "b"], torch.tensor([9, *group]), [0.5, 0.5]  # type: ignore[assignment]
        for student, teachers, _ in batches(3, y):
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(2))
            z, t = student.logits[order], teachers[0].logits[order]
            shuffled = Batch(z, y[order], 1 + order)
            loss = weighted_means(*model.weighed(Outputs(z, {}), [Outputs(t, {})], shuffled))["loss"]
            each = [row_loss(student.logits[i], teachers[0].logits[i], int(y[i])) for i in range(len(y))]
            found = [torch.stack([each[i] for i in range(len(y)) if group[i] == g]).mean() for g in range(2)]
            w = [one * float(torch.exp(0.7 * part)) for one, part in zip(w, found, strict=True)]
            w = [one / sum(w) for one in w]
            assert loss.item() == pytest.approx(sum(one * float(part) for one, part in zip(w, found, strict=True)))

    @pytest.mark.parametrize("batch_size", [5, 64])
    def test_training_and_the_metric(self, tmp_path: Path, batch_size: int) -> None:
        """By a loop over the table and what is predicted of each test row; the weights have an entry a group."""
        groups = drawn()
        model = build("group-distil", groups=table(tmp_path / "g.csv", groups | {"further": "south"}))
        fitted, data = trainer(max_epochs=1), Noisy(batch_size=batch_size)
        fitted.fit(model, data)
        assert model.table is not None
        assert model.table.shared["group_log_weights"].shape == (3,)
        [found] = fitted.test(model, data, verbose=False)
        said = torch.cat([part["class"] for part in fitted.predict(model, data)])  # type: ignore[index, union-attr]
        hits: dict[str, list[bool]] = {}
        for row, (_, y, index) in enumerate(data.parts.test):
            name = data.parts.ids[int(index)]
            hits.setdefault(groups[name], []).append(bool(said[row] == y))
        assert len({sum(hit) / len(hit) for hit in hits.values()}) == 3
        assert found["test/worst_group_accuracy"] == pytest.approx(min(sum(hit) / len(hit) for hit in hits.values()))

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("id,group\n0,a\n1,b\n0,b\n", "expected each id once, found 3 rows of 2 ids"),
            ("id,group\n0,a\n1,\n", "expected a group for each of the data's 2 rows, found none for 1, such as '1'"),
            ("id,class\n0,a\n", "expected the columns id and group, found id, class"),
        ],
    )
    def test_tables_that_are_refused(self, tmp_path: Path, text: str, match: str) -> None:
        (tmp_path / "g.csv").write_text(text)
        with pytest.raises(ValueError, match=match):
            read_groups(str(tmp_path / "g.csv"), ["0", "1"])

    def test_a_group_without_training_rows_is_refused(self, tmp_path: Path) -> None:
        data = Blobs(seed=0)
        data.setup()
        groups = drawn() | {data.parts.ids[-1]: "lonely"}
        with pytest.raises(ValueError, match=r"a label of every group, found none of \['lonely'\]"):
            trainer().fit(build("group-distil", groups=table(tmp_path / "g.csv", groups)), Blobs(seed=0))


class Noisy(Blobs):
    """No network is right about all rows."""

    def load(self) -> Source:
        x, y = blobs()
        x = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return Source(TensorRows(x), TensorRows(x), y.numpy(), test_size=48)


class Hard(Blobs):
    """Of the last class, inputs are noise."""

    def load(self) -> Source:
        x, y = blobs()
        x[y == 2] = torch.randn(x[y == 2].shape, generator=torch.Generator().manual_seed(0)) * 3
        return Source(TensorRows(x), TensorRows(x), y.numpy(), test_size=24)


class Wider(Blobs):
    """There is a fourth class, without rows."""

    num_classes = 4


class TestWorstGroupAccuracy:
    def test_by_hand(self) -> None:
        metric = WorstGroupAccuracy(4)
        said, y = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 0, 2, 1])
        for part in range(2):  # of class 3 there are no rows
            rows = slice(3 * part, 3 * part + 3)
            metric.update(F.one_hot(said[rows], 4).float(), y[rows])
        assert metric.compute().item() == pytest.approx(1 / 2)

    def test_it_is_logged(self) -> None:
        fitted, model, data = trainer(), build("group-distil"), Blobs()
        fitted.fit(model, data)
        [found] = fitted.test(model, data, verbose=False)
        said = torch.cat([part["class"] for part in fitted.predict(model, data)])  # type: ignore[index, union-attr]
        y = torch.cat([batch.y for batch in data.test_dataloader()])
        worst = min((said == y)[y == c].float().mean().item() for c in range(CLASSES))
        assert found["test/worst_group_accuracy"] == pytest.approx(worst)
