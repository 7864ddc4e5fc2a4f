"""Pure parts of lit_kd.data: noise, splits, sampler, rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lit_kd.data import UNLABELED, EpochSampler, ItemRows, TensorRows, corrupt, stratified_split, transition_matrix
from lit_kd.data.labels import count_rows
from lit_kd.data.partition import Partition, Source
from lit_kd.data.rows import JoinedRows
from lit_kd.data.seeds import derive_seed, resolve_seed

torch.set_num_threads(1)


def empirical(true: np.ndarray, given: np.ndarray, num_classes: int) -> np.ndarray:
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (true, given), 1)
    return counts


class TestNoise:
    def test_symmetric_by_hand(self) -> None:
        # Redrawn among all four classes: 0.6 + 0.4 / 4 stay.
        expected = np.full((4, 4), 0.1) + np.diag([0.6] * 4)
        np.testing.assert_allclose(transition_matrix("symmetric", 4, 0.4), expected, atol=1e-15)

    def test_asymmetric_by_hand(self) -> None:
        expected = [[0.7, 0, 0.3], [0, 1, 0], [0.3, 0, 0.7]]
        np.testing.assert_allclose(transition_matrix("asymmetric", 3, 0.3, {0: 2, 2: 0}), expected)
        following = [[0.7, 0.3, 0], [0, 0.7, 0.3], [0.3, 0, 0.7]]
        np.testing.assert_allclose(transition_matrix("asymmetric", 3, 0.3), following)

    @pytest.mark.parametrize(
        "matrix",
        [
            transition_matrix("symmetric", 5, 0.4),
            transition_matrix("asymmetric", 5, 0.25, {0: 3, 4: 1}),
            np.random.default_rng(0).dirichlet(np.ones(5), size=5),
        ],
        ids=["symmetric", "asymmetric", "any"],
    )
    def test_draws_follow_the_matrix(self, matrix: np.ndarray) -> None:
        n = 20_000
        true = np.repeat(np.arange(5), n)
        counts = empirical(true, corrupt(true, matrix, seed=1), 5)
        assert (counts[matrix == 0] == 0).all()
        # Chi-square of each row; 18.47 is the 99.9 % quantile at 4 degrees of freedom, fewer where cells are 0.
        expected = matrix * n
        chi = np.where(expected > 0, (counts - expected) ** 2 / np.maximum(expected, 1e-9), 0).sum(axis=1)
        assert (chi < 18.47).all(), chi

    def test_missing_labels_stay_and_change_nothing(self) -> None:
        matrix = transition_matrix("symmetric", 3, 1.0)
        true = np.arange(3000) % 3
        some = np.where(np.arange(3000) % 7 == 0, UNLABELED, true)
        full, given = corrupt(true, matrix, seed=0), corrupt(some, matrix, seed=0)
        assert (given[some == UNLABELED] == UNLABELED).all()
        np.testing.assert_array_equal(given[some != UNLABELED], full[some != UNLABELED])
        np.testing.assert_array_equal(true, np.arange(3000) % 3)  # the input is left alone
        assert not np.array_equal(full, corrupt(true, matrix, seed=1))

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"classes in \[0, 3\), found 1: 7"):
            transition_matrix("asymmetric", 3, 0.2, {1: 7})
        with pytest.raises(ValueError, match=r"found \[1\.5, -0\.5\] in row 0"):
            corrupt(np.array([0]), [[1.5, -0.5], [0, 1]], 0)
        with pytest.raises(ValueError, match=r"sum to 1, found \[0\.5, 0\.4\] in row 1"):
            corrupt(np.array([0]), [[1, 0], [0.5, 0.4]], 0)
        with pytest.raises(ValueError, match=r"labels in \[0, 2\) of the matrix, found 0 to 5"):
            corrupt(np.array([0, 5]), np.eye(2), 0)


class TestSplits:
    labels = np.random.default_rng(0).choice(5, size=1003, p=[0.4, 0.3, 0.2, 0.07, 0.03])

    def test_disjoint_covering_sized_stratified(self) -> None:
        parts = stratified_split(self.labels, {"meta": 0.1, "val": 150, "test": 0.2}, seed=3)
        assert list(parts) == ["train", "meta", "val", "test"]
        assert [len(p) for p in parts.values()] == [1003 - 100 - 150 - 201, 100, 150, 201]
        np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1003))
        assert [len(part) for part in stratified_split(self.labels, {"meta": 0, "val": 0.0}, 0).values()] == [
            1003,
            0,
            0,
        ]
        share = np.bincount(self.labels, minlength=5) / 1003
        for part in parts.values():
            assert (np.diff(part) > 0).all()
            counts = np.bincount(self.labels[part], minlength=5)
            # Each part is rounded once, from what two earlier ones rounded too.
            assert (abs(counts - share * len(part)) < 2.5).all()

    def test_every_row_can_fall_anywhere(self) -> None:
        # Over many seeds a row is in val at the rate of val.
        hits = np.zeros(60)
        for seed in range(400):
            hits[stratified_split(np.arange(60) % 3, {"val": 0.25}, seed)["val"]] += 1
        assert abs(hits / 400 - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / 400)

    def test_tiny_class_stays_in_train(self) -> None:
        labels = np.array([0] * 50 + [1] * 50 + [2])
        assert all(100 in stratified_split(labels, {"val": 0.2}, seed)["train"] for seed in range(10))

    @pytest.mark.parametrize(("size", "by"), [(8, "combination"), (4, "number"), (3, "nothing")])
    def test_several_labels_a_row(self, size: int, by: str) -> None:
        labels = np.array([[row >> bit & 1 for bit in range(3)] for row in range(8)] * 10)  # 0 to 3 labels a row
        for seed in range(5):
            part = stratified_split(labels, {"val": size}, seed)["val"]
            assert len(part) == size
            if by == "combination":
                assert len(np.unique(labels[part], axis=0)) == 8
            if by == "number":  # 1, 3, 3 and 1 of 8 rows
                np.testing.assert_allclose(
                    np.bincount(labels[part].sum(axis=1), minlength=4), [0.5, 1.5, 1.5, 0.5], atol=0.5
                )

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"expected rows left for train, found 1003 rows in all and a=600, b=502"):
            stratified_split(self.labels, {"a": 600, "b": 0.5}, 0)
        with pytest.raises(ValueError, match=r"one row a class \(5\), found 4"):
            stratified_split(self.labels, {"val": 4}, 0)


def test_sizes_of_parts() -> None:
    assert count_rows(100.0, 1000, "labeled") == count_rows(100, 1000, "labeled") == 100  # a config's 100 may be 100.0
    assert count_rows(0.25, 1000, "labeled") == 250
    for neither in (1.0, 1.5, -0.1, -3):
        with pytest.raises(ValueError, match=r"for labeled a fraction in \[0, 1\) or a whole number of rows"):
            count_rows(neither, 1000, "labeled")
    with pytest.raises(ValueError, match=r"found an empty split: 0\.0001 of 1003"):
        count_rows(1e-4, 1003, "val")


class TestSampler:
    @pytest.mark.parametrize(("size", "length"), [(50, None), (7, 50), (2, 2)])
    def test_ranks_together_are_one_process(self, size: int, length: int | None) -> None:
        batch, replicas = 4, 3

        def batches(num_replicas: int, rank: int, batch_size: int) -> list[list[int]]:
            sampler = EpochSampler(size, length, num_replicas, rank, seed=3)
            loader = DataLoader(range(size), batch_size, sampler=sampler, collate_fn=list)  # type: ignore[arg-type]
            sampler.set_epoch(2)
            return list(loader)

        one = batches(1, 0, batch * replicas)
        ranks = [batches(replicas, r, batch) for r in range(replicas)]
        assert {len(r) for r in ranks} == {len(one)}
        order = [i for b in one for i in b]
        padded = order + order[: -len(order) % replicas]
        for k in range(len(one)):
            together = sorted(i for r in ranks for i in r[k])
            assert together == sorted(padded[k * batch * replicas : (k + 1) * batch * replicas])

    def test_permutation_each_epoch(self) -> None:
        sampler = EpochSampler(20, seed=1)
        epochs = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            epochs.append(list(sampler))
            assert sorted(epochs[-1]) == list(range(20))
        assert epochs[0] != epochs[1] != epochs[2]
        sampler.set_epoch(1)
        assert list(sampler) == epochs[1]
        # Seed 1 at epoch 0 is not seed 0 at epoch 1, as a sum of both would have it.
        other = EpochSampler(20, seed=0)
        other.set_epoch(1)
        assert list(other) != epochs[0]

    def test_longer_than_size(self) -> None:
        draws = list(EpochSampler(5, length=12))
        assert sorted(draws[:5]) == sorted(draws[5:10]) == list(range(5))
        assert len(set(draws[10:])) == 2


def test_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert resolve_seed(None) == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert resolve_seed(None) == 17
    assert resolve_seed(3) == 3
    assert len({derive_seed(s, p) for s in range(50) for p in ("order", "noise")}) == 100


class TestRows:
    def test_joined_keeps_the_order(self) -> None:
        x = torch.arange(10.0)
        for rows in (
            JoinedRows(TensorRows(x[:6]), TensorRows(x[6:])),
            JoinedRows(ItemRows(TensorDataset(x[:6], x[:6])), ItemRows(TensorDataset(x[6:], x[6:]))),
            JoinedRows(TensorRows(x[:6]), ItemRows(TensorDataset(x[6:], x[6:]))),
        ):
            assert len(rows) == 10
            for positions in ([7, 0, 9, 3, 6, 5], [1, 2], [9, 6]):
                assert rows.fetch(positions).tolist() == positions  # type: ignore[union-attr]

    def test_joined_mappings(self) -> None:
        class Named(TensorRows):
            def fetch(self, positions: list[int]) -> Any:
                return {"a": super().fetch(positions), "b": torch.ones(len(positions), 2)}

        x: Any = JoinedRows(Named(torch.arange(5)), Named(torch.arange(5, 10))).fetch([8, 1, 6, 0])
        assert x["a"].tolist() == [8, 1, 6, 0]
        assert x["b"].shape == (4, 2)


def test_rows_have_names() -> None:
    x, y = TensorRows(torch.zeros(12, 2)), np.arange(12) % 3
    split = partial(Partition, num_classes=3, meta=3, val=3, matrix=None, seed=0, labeled=None, task="classification")
    letters = list("abcdefghijkl")
    own = split(Source(x, x, y, x, y, ids=letters))
    where = np.concatenate([own.positions[part] for part in ("train", "meta", "val")])
    assert own.ids == [letters[p] for p in where] + [f"test/{row}" for row in range(12)]
    held = split(Source(x, x, y, val=x, val_labels=y, val_ids=[f"held {row}" for row in range(12)]))
    assert held.ids[:12] == [str(row) for row in range(12)]
    assert set(held.ids[12:]) == {f"held {row}" for row in range(12)}
    with pytest.raises(ValueError, match="an id of its own for each of 12 rows, found 12 ids, 'a' more than once"):
        split(Source(x, x, y, ids=["a", "a", *letters[2:]]))
    with pytest.raises(ValueError, match="for each of 12 rows, found 3 ids"):
        split(Source(x, x, y, ids=letters[:3]))
