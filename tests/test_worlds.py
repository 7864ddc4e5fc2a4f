"""Recommendation, sequences without alignment and a policy, against brute force and other libraries."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import CONFIGS, QUIET, call, read_csv, version
from lightning import Trainer, seed_everything
from sklearn.metrics import ndcg_score
from torch import Tensor, nn
from torchmetrics.retrieval import RetrievalNormalizedDCG, RetrievalRecall

from lit_kd import AdversarialKD, Batch, OracleCTC, Outputs, UnKD
from lit_kd.data import PopularItemsDataModule, SymbolSequencesDataModule
from lit_kd.data.cartpole import BalancingPolicy, CartPoleDataModule, returns
from lit_kd.losses.ctc import ctc_loss, greedy
from lit_kd.losses.ranking import draw_pairs, pairwise_loss, popularity_groups
from lit_kd.methods.oracle_ctc import SEQUENCES, FrameKL, SymbolErrorRate
from lit_kd.models.worlds import FrameNet, MatrixFactorisation
from lit_kd.terms.ranking import BPR, GroupRanking, Ranking, held_out_loss
from lit_kd.types import IGNORED

USERS, ITEMS = 30, 40


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def trainer(**options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**quiet | {"enable_checkpointing": False} | options)


def outputs(logits: Tensor) -> Outputs:
    return Outputs(logits, {})


class TestGroups:
    def test_by_hand(self) -> None:
        """10 7 | 5 4 | 3 2 2 1: 17 9 and 8 of 34; the middles 5, 13.5, 19.5, 24, 27.5, 30, 32, 33.5 of thirds 11.3."""
        counts = torch.tensor([1, 10, 2, 3, 4, 7, 2, 5])
        assert popularity_groups(counts, 3).tolist() == [2, 0, 2, 2, 2, 1, 2, 1]

    def test_each_has_about_as_many(self) -> None:
        counts = torch.randint(0, 30, (300,), generator=torch.Generator().manual_seed(0))
        found = popularity_groups(counts, 4)
        sums = torch.stack([counts[found == g].sum() for g in range(4)])
        assert (sums - counts.sum() / 4).abs().max() <= 30
        assert all(counts[found == g].min() >= counts[found == g + 1].max() for g in range(3))

    @pytest.mark.parametrize(("counts", "groups"), [([5, 5], 3), ([9, 0, 0], 2), ([0, 0], 1), ([1, 2], 0)])
    def test_refused(self, counts: list[int], groups: int) -> None:
        with pytest.raises(ValueError, match=r"^expected interactions .* lower groups$"):
            popularity_groups(torch.tensor(counts), groups)


class TestPairs:
    def test_how_often(self) -> None:
        """Against the probabilities of one draw and then another, item by item."""
        torch.manual_seed(0)
        scores, among = torch.tensor([[0.1, 3.0, -2.0, 9.0, 1.0]]), torch.tensor([[True, True, True, False, True]])
        first, second, there = draw_pairs(scores, among, 40000, sharpness=1.5)
        assert there.all()
        ranks = {1: 0, 4: 1, 0: 2, 2: 3}
        worth = {item: math.exp(-rank / 1.5) for item, rank in ranks.items()}
        total, found = sum(worth.values()), Counter(zip(first[0].tolist(), second[0].tolist(), strict=True))
        for a, b in itertools.combinations(ranks, 2):  # in the order of the ranking
            one = worth[a] / total * worth[b] / (total - worth[a])
            expected = one + worth[b] / total * worth[a] / (total - worth[b])
            assert found[a, b] / 40000 == pytest.approx(expected, abs=0.01)
            assert not found[b, a]

    def test_too_few_items(self) -> None:
        among = torch.tensor([[True, False, False], [True, False, True], [False, False, False]])
        first, second, there = draw_pairs(torch.tensor([[0.0, 1, 2]] * 3), among, 2)
        assert there.tolist() == [[False] * 2, [True] * 2, [False] * 2]
        assert (first[1].tolist(), second[1].tolist()) == ([2, 2], [0, 0])
        assert pairwise_loss(torch.randn(3, 3), first, second, there)[[0, 2]].tolist() == [0, 0]

    def test_loss(self) -> None:
        z = torch.randn(2, 4, dtype=torch.float64)
        first, second = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 3], [0, 0]])
        found = pairwise_loss(z, first, second, torch.tensor([[True, True], [True, False]]))
        expected = [-math.log(1 / (1 + math.exp(z[r, b] - z[r, a]))) for r, a, b in ((0, 0, 1), (0, 1, 3), (1, 2, 0))]
        assert found.tolist() == pytest.approx([(expected[0] + expected[1]) / 2, expected[2]])


def ranked() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of two networks, labels, and groups."""
    draw = torch.Generator().manual_seed(3)
    z, t = torch.randn(6, 12, generator=draw, requires_grad=True), torch.randn(6, 12, generator=draw)
    return z, t, torch.randint(2, (6, 12), generator=draw), torch.arange(12) % 3


class TestRankingTerms:
    def test_pairs_stay_in_a_group_and_leave_positives_out(self) -> None:
        """Each pair pushes its two items as far apart: the gradient over the items of a group sums to 0."""
        z, t, y, group_of = ranked()
        loss = GroupRanking(group_of, 30)(outputs(z), outputs(t), Batch(z, y))
        [gradient] = torch.autograd.grad(loss.sum(), z)
        assert (gradient[y == 1] == 0).all()
        assert gradient.abs().sum() > 0.1
        for group in range(3):
            torch.testing.assert_close(gradient[:, group_of == group].sum(1), torch.zeros(6), atol=1e-6, rtol=0)

    def test_one_group_compares_all(self) -> None:
        z, t, y, group_of = ranked()
        loss = GroupRanking(torch.zeros_like(group_of), 30)(outputs(z), outputs(t), Batch(z, y))
        [gradient] = torch.autograd.grad(loss.sum(), z)
        assert gradient[:, group_of == 0].sum(1).abs().max() > 0.01

    def test_known_values(self) -> None:
        z, t, y, group_of = ranked()
        term = GroupRanking(group_of, 31)
        same = term(outputs(z * 0), outputs(t), Batch(z, y))
        assert same[same > 0].tolist() == pytest.approx([math.log(2)] * int((same > 0).sum()))
        assert (term(outputs(t), outputs(t), Batch(z, y)) < math.log(2)).all()

    def test_bpr_is_the_mean_over_all_pairs(self) -> None:
        z, _, y, _ = ranked()
        y[0], y[1] = 1, 0
        torch.manual_seed(0)
        found = torch.stack([BPR()(outputs(z), None, Batch(z, y)) for _ in range(1500)]).mean(0)
        for row in range(2, 6):
            has, other = z[row][y[row] == 1], z[row][y[row] == 0]
            expected = torch.stack([-F.logsigmoid(a - b) for a in has for b in other]).mean()
            assert found[row].item() == pytest.approx(expected.item(), rel=0.03)
        assert found[:2].tolist() == [0, 0]

    def test_held_out_loss(self) -> None:
        z, _, y, _ = ranked()
        y[0] = 0
        z = z.detach().masked_fill((torch.arange(12) < 2) & (y == 0), -torch.inf)
        target = y / y.sum(1, keepdim=True).clamp(min=1)
        expected = -(target * z.log_softmax(1).where(y == 1, 0)).sum(1)
        torch.testing.assert_close(held_out_loss(z, y), expected)

    @pytest.mark.parametrize("items", [None, torch.arange(12) % 3 == 1])
    def test_metrics(self, items: Tensor | None) -> None:
        z, _, y, _ = ranked()
        z, y = z.detach(), y.clone()
        y[0] = 0
        wanted = y if items is None else y * items
        rows = wanted.any(1)
        index = torch.arange(6).unsqueeze(1).expand_as(y)[rows].flatten()
        for discounted, theirs in ((False, RetrievalRecall), (True, RetrievalNormalizedDCG)):
            own = Ranking(4, discounted, items)
            for part in (slice(0, 2), slice(2, 6)):
                own.update(z[part], y[part])
            expected = theirs(top_k=4)(z[rows].flatten(), wanted[rows].flatten(), indexes=index)
            torch.testing.assert_close(own.compute(), expected)
        assert own.compute().item() == pytest.approx(ndcg_score(wanted[rows], z[rows], k=4))


def factors(features: int = 6) -> MatrixFactorisation:
    return MatrixFactorisation(USERS, ITEMS, features)


class TestUnKD:
    def test_trainings(self) -> None:
        seed_everything(0, verbose=False)
        data = PopularItemsDataModule(USERS, ITEMS, batch_size=10, seed=0)
        fitted = trainer(max_epochs=30)
        teacher = UnKD(factors(16), num_classes=ITEMS, optimizer=adam)
        fitted.fit(teacher, data)
        (before,) = fitted.test(UnKD(factors(), num_classes=ITEMS), data, verbose=False)
        (of_teacher,) = fitted.test(teacher, data, verbose=False)
        assert of_teacher["test/ndcg"] > before["test/ndcg"] + 0.05
        student, fitted = UnKD(factors(), teacher.student, num_classes=ITEMS, optimizer=adam), trainer(max_epochs=20)
        fitted.fit(student, data)
        (found,) = fitted.test(student, data, verbose=False)
        assert found["test/teacher_agreement"] > 0.4
        assert {f"test/{name}_group_{group}" for name in ("recall", "ndcg") for group in range(4)} < set(found)
        [said] = trainer().predict(student, data.loader(data.parts.test, batch_size=USERS))
        seen = data.parts.test.rows.seen  # type: ignore[attr-defined]
        assert not seen.gather(1, said["items"]).any()

    def test_what_the_world_is_like(self) -> None:
        data = PopularItemsDataModule(seed=1)
        data.setup()
        train, val, test = data.labels, data.parts.val.labels, data.parts.test.labels
        assert (train + val + test <= 1).all()
        assert ((train + val + test).sum(1) == 20).all()  # a tenth of all items
        assert train.any(1).all()
        assert torch.corrcoef(torch.stack([train.sum(0), (train + val + test).sum(0)]).float())[0, 1] < 0.7

    @pytest.mark.parametrize(
        "options", [{"weight": -1.0}, {"groups": 0}, {"groups": 31}, {"top": 0}, {"top": ITEMS + 1}], ids=str
    )
    def test_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"^expected a weight of at least 0, .* found"):
            UnKD(factors(), num_classes=ITEMS, **options)

    def test_data_refused(self) -> None:
        with pytest.raises(ValueError, match="expected at least 2 users and 20 items, found 1 and 50"):
            PopularItemsDataModule(1, 50)


class TestCTC:
    def test_against_all_alignments(self) -> None:
        draw = torch.Generator().manual_seed(0)
        z = torch.randn(4, 5, 3, generator=draw, dtype=torch.float64)
        y = torch.tensor([[1], [2], [1], [2]]).repeat(1, 5)
        for row, target in enumerate(([1], [2, 1], [1, 1], [2, 1, 2])):
            y[row] = torch.tensor(target + [IGNORED] * (5 - len(target)))
        for row, found in enumerate(ctc_loss(z, y)):
            target, p, total = [int(s) for s in y[row] if s != IGNORED], z[row].softmax(-1), 0.0
            for path in itertools.product(range(3), repeat=5):
                if [c for c, _ in itertools.groupby(path) if c] == target:
                    total += math.prod(p[t, c].item() for t, c in enumerate(path))
            assert found.item() == pytest.approx(-math.log(total) / len(target))

    def test_greedy_and_error_rate(self) -> None:
        draw = torch.Generator().manual_seed(0)
        z, y = torch.randn(20, 9, 4, generator=draw), torch.full((20, 9), IGNORED)
        for row in y:
            length = int(torch.randint(1, 6, (), generator=draw))
            row[:length] = torch.randint(1, 4, (length,), generator=draw)
        best = [row.argmax(-1).tolist() for row in z]
        assert greedy(z) == [[c for c, _ in itertools.groupby(row) if c] for row in best]

        @cache
        def edits(a: tuple[int, ...], b: tuple[int, ...]) -> int:
            if not a or not b:
                return len(a) + len(b)
            one = edits(a[1:], b[1:]) + (a[0] != b[0])
            return min(one, edits(a[1:], b) + 1, edits(a, b[1:]) + 1)

        targets = [tuple(int(s) for s in row if s != IGNORED) for row in y]
        wrong = sum(edits(tuple(a), b) for a, b in zip(greedy(z), targets, strict=True))
        rate = SymbolErrorRate()
        for part in (slice(0, 7), slice(7, 20)):
            rate.update(z[part].softmax(-1), y[part])
        assert rate.compute().item() == pytest.approx(wrong / sum(map(len, targets)))

    def test_frame_kl(self) -> None:
        z, t = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
        y = torch.tensor([[1] + [IGNORED] * 4] * 3)  # silent frames count, too
        found = FrameKL()(outputs(z), outputs(t), Batch(z, y))
        for row in range(3):
            expected = F.kl_div(z[row].log_softmax(-1), t[row].softmax(-1), reduction="batchmean")
            torch.testing.assert_close(found[row], expected)
        assert FrameKL()(outputs(t), outputs(t), Batch(z, y)).abs().max() < 1e-6

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            ([[1.0, 2.0, 1.0]], "targets of an integer type"),
            ([1, 2, 1], "targets of an integer type"),
            ([[IGNORED] * 3], "at least 1 symbol"),
            ([[1, IGNORED, 2]], "padded behind their end"),
            ([[0, 1, IGNORED]], "symbols from 1 to 3, as 0 is the blank, found 0 to 1"),
            ([[1, 4, IGNORED]], "symbols from 1 to 3, as 0 is the blank, found 1 to 4"),
            ([[1, 1, 2]], "at least 4 frames for the longest target, found 3"),
        ],
        ids=str,
    )
    def test_targets_refused(self, y: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SEQUENCES.check_labels(torch.tensor(y), 4, True)


class Listener(FrameNet):
    """A student that notes what it is given."""

    def forward(self, frames: Tensor, target: Tensor | None = None) -> Tensor:
        assert target is None
        return super().forward(frames)


def sequences(**options: Any) -> SymbolSequencesDataModule:
    small: dict[str, Any] = {
        "batch_size": 16,
        "sequences": 300,
        "symbols": 3,
        "val": 30,
        "test": 100,
        "spread": 0.5,
        "seed": 0,
    }
    return SymbolSequencesDataModule(**small | options)


class TestOracleCTC:
    def test_trainings(self) -> None:
        """The oracle leans on its target, and the student never sees one."""
        seed_everything(0, verbose=False)
        data, base = sequences(), {"num_classes": 4, "optimizer": adam}
        oracle, fitted = OracleCTC(FrameNet(8, 4, 16, oracle=True), reads_target=True, **base), trainer(max_epochs=12)
        fitted.fit(oracle, data)
        (found,) = fitted.test(oracle, data, verbose=False)
        assert found["test/error_rate"] < 0.5
        with torch.no_grad():
            x, y, _ = data.parts.test.__getitems__(list(range(100)))
            own, others = (ctc_loss(oracle.student(x, target), y).mean() for target in (y, y.roll(1, 0)))
        assert others > own + 0.3
        student, fitted = OracleCTC(Listener(8, 4, 8), oracle.student, **base), trainer(max_epochs=8)
        fitted.fit(student, data)
        (found,) = fitted.test(student, data, verbose=False)
        assert found["test/error_rate"] < 0.9
        assert found["test/teacher_agreement"] > 0.5

    def test_an_oracle_does_not_know_the_order(self) -> None:
        net, x = FrameNet(8, 4, 5, oracle=True), torch.randn(1, 6, 8)
        said = [net(x, torch.tensor([[*target, IGNORED]])) for target in ((1, 2, 2), (2, 1, 2), (1, 1, 2))]
        torch.testing.assert_close(said[0], said[1])
        assert (said[0] - said[2]).abs().max() > 1e-3

    def test_weights(self) -> None:
        model, out = OracleCTC(FrameNet(8, 4), num_classes=4, weight=0.3), outputs(torch.zeros(2, 3, 4))
        batch = Batch(torch.zeros(2, 3, 8), torch.ones(2, 3))
        assert [model.weigh(out, [out] * n, batch) for n in range(3)] == [[1.0], [0.7, 0.3], [0.7, 0.15, 0.15]]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weight": 1.5}, r"expected a weight in \[0, 1\], found 1.5"),
            ({"teacher_cache": "memory"}, "expected neither mix nor teacher_cache"),
            ({"task": "classification"}, "expected as task of OracleCTC one of"),
        ],
    )
    def test_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            OracleCTC(FrameNet(8, 4), num_classes=4, **options)

    def test_an_oracle_needs_targets(self) -> None:
        with pytest.raises(ValueError, match="expected frames and targets, as the network is an oracle"):
            FrameNet(8, 4, oracle=True)(torch.zeros(1, 3, 8))

    def test_data_refused(self) -> None:
        with pytest.raises(ValueError, match="expected at least 1 sequence, 2 to 8 symbols"):
            sequences(symbols=1)

    def test_targets_are_what_is_shown(self) -> None:
        """Without noise, the nearest prototype of each frame, without repeats and silence, is the target."""
        data = sequences(spread=0.0, symbols=5)
        data.setup()
        x, y, _ = data.parts.train_rows(False).__getitems__(list(range(100)))
        prototypes = x.flatten(0, 1).unique(dim=0)
        assert len(prototypes) == 6
        for frames, target in zip(x, y, strict=True):
            shown = [key for key, _ in itertools.groupby(map(tuple, frames.tolist())) if any(key)]
            assert len(shown) == (target != IGNORED).sum()


@pytest.mark.parametrize(
    ("name", "net", "options"),
    [
        ("unkd", "MatrixFactorisation, init_args: {users: 400, features: 6}", ()),
        ("oracle_ctc", "FrameNet, init_args: {features: 8, oracle: true}", ("--model.reads_target=true",)),
    ],
)
def test_commands(name: str, net: str, options: tuple[str, ...], tmp_path: Path) -> None:
    config = ("--config", CONFIGS / "methods" / f"{name}.yaml", *QUIET, "--trainer.max_epochs=1")
    net = f"class_path: lit_kd.models.worlds.{net}"
    call("fit", *config, f"--model.student={{{net}}}", *options, f"--checkpoint.dirpath={tmp_path}")
    teacher = f"{{{net}, checkpoint: {tmp_path / 'last.ckpt'}, prefix: student.}}"
    call("fit", *config, f"--model.teacher={teacher}")
    metrics = read_csv(version(1) / "metrics.csv")
    assert any(row["val/teacher_agreement"] for row in metrics)


class TestCartPole:
    def test_the_policy_by_hand_balances(self) -> None:
        pytest.importorskip("gymnasium")
        assert returns(BalancingPolicy(), episodes=2) == [500, 500]
        assert max(returns(lambda x: torch.tensor([[0.0, 1.0]]), episodes=3)) < 20
        assert returns(BalancingPolicy(), 5.0, 3, seed=1) == returns(BalancingPolicy(), 5.0, 3, seed=1)
        assert sum(returns(BalancingPolicy(), 6.0, 4)) < 1500

    def test_a_student_of_it(self) -> None:
        pytest.importorskip("gymnasium")
        seed_everything(0, verbose=False)
        data = CartPoleDataModule(300, seed=0)
        options: dict[str, Any] = {"num_classes": 2, "input_shape": [4], "optimizer": adam, "epsilon": 0.05}
        model, fitted = AdversarialKD("mlp-16", BalancingPolicy(), temperature=1.0, **options), trainer(max_epochs=15)
        fitted.fit(model, data)
        assert fitted.test(model, data, verbose=False)[0]["test/accuracy"] > 0.9
        states = data.parts.train_rows(False)
        assert torch.equal(BalancingPolicy()(states.rows.x).argmax(1)[states.positions], data.labels)  # type: ignore[attr-defined]

    def test_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="expected noise of at least 0 and at least 1 episode"):
            returns(BalancingPolicy(), -1)
        with pytest.raises(ValueError, match="expected at least 1 state, and explore"):
            CartPoleDataModule(explore=2)
        monkeypatch.setitem(sys.modules, "gymnasium", None)
        with pytest.raises(ValueError, match="expected the package gymnasium, found none: pip install gymnasium"):
            returns(BalancingPolicy())


@pytest.mark.parametrize("net", [lambda: MatrixFactorisation(0, 3), lambda: MatrixFactorisation(3, 3, 0)])
def test_networks_refused(net: Any) -> None:
    with pytest.raises(ValueError, match="expected at least 1 user, item and feature"):
        net()


def test_a_network_of_its_own_may_read_the_mapping() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(ITEMS))

        def forward(self, user: Tensor, seen: Tensor) -> Tensor:
            return self.bias.expand(len(user), -1).masked_fill(seen, -torch.inf)

    data = PopularItemsDataModule(USERS, ITEMS, seed=0)
    fitted, model = trainer(max_epochs=40), UnKD(Biased(), num_classes=ITEMS, optimizer=adam)
    fitted.fit(model, data)
    assert torch.corrcoef(torch.stack([model.student.bias.detach(), data.labels.sum(0).float()]))[0, 1] > 0.7
