"""The sample table, alone and in two real processes."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_kd.data.table import SampleTable, all_rows, all_sum

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]


def table(rows: int = 6) -> SampleTable:
    made = SampleTable(rows, "digits")
    made.add("weights", torch.tensor([0.9, 0.1]))
    made.add("score", torch.tensor(2.0))
    return made


class TestRows:
    def test_add_keeps_a_column_that_is_there(self) -> None:
        t = table()
        t["weights"][0, 0] = 7.0  # rows do not share memory
        assert t["weights"][1:, 0].tolist() == torch.full((5,), 0.9).tolist()
        t.write(torch.tensor([3]), score=torch.tensor([8.0]))
        t.add("score", torch.tensor(0.0))
        assert t["score"].tolist() == [2, 2, 2, 8, 2, 2]
        # a checkpoint of a training with one teacher, resumed with two
        match = r"expected 6 rows of shape \(3,\) in column 'weights'.*found 6 of shape \(2,\)"
        with pytest.raises(ValueError, match=match):
            t.add("weights", torch.zeros(3))

    def test_add_a_whole_column(self) -> None:
        t, start = table(), torch.randn(6, 2, 3)
        t.add("memory", start, rows=True)
        assert torch.equal(t["memory"], start)
        t.write(torch.tensor([1]), memory=torch.zeros(1, 2, 3))
        assert start[1].all()  # the caller's tensor is its own
        t.add("memory", start, rows=True)
        assert not t["memory"][1].any()
        with pytest.raises(ValueError, match=r"6 rows of shape \(2,\) in column 'other' .* found 5 of shape \(2,\)"):
            t.add("other", torch.zeros(5, 2), rows=True)

    @pytest.mark.parametrize("write", [SampleTable.write, SampleTable.exchange])
    def test_write_touches_its_rows_alone(self, write: Any) -> None:
        t = table()
        weights = torch.tensor([[4.0, 40.0], [1.0, 10.0]])
        write(t, torch.tensor([4, 1]), weights=weights, score=torch.tensor([4.0, 1.0]))
        assert t["score"].tolist() == [2, 1, 2, 2, 4, 2]
        assert t["weights"][[4, 1]].tolist() == weights.tolist()
        assert (t["weights"][[0, 2, 3, 5]] == torch.tensor([0.9, 0.1])).all()
        write(t, torch.tensor([], dtype=torch.int64), score=torch.tensor([]))

    def test_exchange_takes_the_last_of_several(self) -> None:
        t = table()
        t.exchange(torch.tensor([5, 0, 5, 0]), score=torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert t["score"].tolist() == [4, 2, 2, 2, 2, 3]

    def test_sync_in_one_process_changes_nothing(self) -> None:
        t = table()
        t["score"] = torch.tensor([1.0, float("nan"), 3.0, 4.0, 5.0, 6.0])
        t.write(torch.tensor([2, 2]), score=torch.tensor([30.0, 30.0]))
        t.sync()
        assert t["score"].nan_to_num(-1).tolist() == [1, -1, 30, 4, 5, 6]

    def test_apply_reaches_columns_and_shared_values(self) -> None:
        t = table()
        t.shared["rate"] = torch.tensor(0.25)
        t.write(torch.tensor([0]), score=torch.tensor([1.0]))
        t.apply(lambda column: column.double() if column.is_floating_point() else column)
        assert {t["weights"].dtype, t["score"].dtype, t.shared["rate"].dtype} == {torch.float64}
        t.sync()
        assert t["score"].tolist() == [1, 2, 2, 2, 2, 2]


class TestStateDict:
    def test_round_trip_through_a_file(self, tmp_path: Path) -> None:
        t = table()
        for number, dtype in enumerate(DTYPES):
            t.add(str(dtype), torch.tensor([number, 1], dtype=dtype))
        t.write(torch.tensor([5]), weights=torch.tensor([[float("nan"), 0.3]]))
        t.shared["rate"] = torch.tensor(0.25)
        names = list(t.columns)
        torch.save({"sample_table": t.state_dict()}, tmp_path / "file.ckpt")
        state = torch.load(tmp_path / "file.ckpt", weights_only=True)["sample_table"]
        back = SampleTable.from_state_dict(state)
        assert (back.size, back.fingerprint) == (6, "digits")
        assert list(back.columns) == names
        for name, column in back.columns.items():
            torch.testing.assert_close(column, t[name], rtol=0, atol=0, equal_nan=True)
        assert back.shared == {"rate": torch.tensor(0.25)}
        back.check(6, "digits")

    @pytest.mark.parametrize(("size", "fingerprint"), [(7, "digits"), (6, "mnist")])
    def test_check_refuses_other_data(self, size: int, fingerprint: str) -> None:
        expected = f"expected 6 rows with fingerprint digits, found {size} rows with fingerprint {fingerprint}.*Use the"
        with pytest.raises(ValueError, match=expected):
            table().check(size, fingerprint)


# Two processes


def disjoint(rank: int) -> dict[str, Tensor]:
    """Rank 0 writes rows 0, 1, 2, rank 1 rows 3 and 4; row 5 is nobody's and holds what it held."""
    t = SampleTable(6, "digits")
    t.add("pair", torch.tensor([0.5, -0.5]))
    t.add("seen_or_nan", torch.tensor(float("nan")))
    for dtype in DTYPES:
        t.add(str(dtype), torch.tensor(0, dtype=dtype))
    index = torch.tensor([[0, 1, 2], [3, 4]][rank])
    t.write(index, pair=torch.stack([index + 10.0, index + 20.0], dim=1), seen_or_nan=index.float())
    t.write(index, **{str(dtype): index % 2 for dtype in DTYPES})
    t.sync()
    return dict(t.columns)


def twice(rank: int) -> dict[str, Tensor]:
    """Both write row 2, as padding repeats rows; then each rewrites the other's; then a whole column is replaced."""
    t = table()
    t.write(torch.tensor([2]), score=torch.tensor([[20.0, 40.0][rank]]))
    t.write(torch.tensor([rank]), score=torch.tensor([5.0 + rank]))
    t.sync()
    t.write(torch.tensor([1 - rank]), score=torch.tensor([50.0 + rank]))
    t.sync()
    after = t["score"].clone()
    t.sync()  # nothing to do
    t.write(torch.tensor([3]), score=torch.tensor([1e6 * rank]))
    t["score"] = torch.arange(6.0)
    t.sync()
    return {"after": after, "replaced": t["score"]}


def exchanged(rank: int) -> dict[str, Tensor]:
    """Row 2 is in both batches: the last process's counts; an earlier `write` is synced as ever."""
    t = table()
    t.add("flag", torch.tensor(False))
    t.write(torch.tensor([4 + rank]), score=torch.tensor([8.0 + rank]))
    index = torch.tensor([[1, 2], [2, 3]][rank])
    t.exchange(index, score=index * 10.0 + rank, weights=index[:, None].expand(2, 2), flag=index > 1)
    t.sync()
    return dict(t.columns)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results: dict[str, Any] = {
        "disjoint": disjoint(rank),
        "twice": twice(rank),
        "exchanged": exchanged(rank),
        "all_rows": all_rows(torch.arange(6).view(3, 2)[:, rank]),  # not contiguous
        "all_sum": all_sum(torch.tensor([1.0, 10.0 * rank])),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes found; both are started once, and killed where they hang."""
    folder = tmp_path_factory.mktemp("gloo")
    context = multiprocessing.get_context("fork")  # spares the seconds that imports take
    processes = [context.Process(target=process, args=(rank, str(folder)), daemon=True) for rank in (0, 1)]
    for p in processes:
        p.start()
    try:
        for p in processes:
            p.join(timeout=100)
        assert [p.exitcode for p in processes] == [0, 0], "a process failed or hung"
    finally:
        for p in processes:
            p.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes(both: list[dict[str, Any]]) -> None:
    for found in (ranks["disjoint"] for ranks in both):
        assert found["pair"].tolist() == [[i + 10.0, i + 20.0] for i in range(5)] + [[0.5, -0.5]]
        assert found["seen_or_nan"].nan_to_num(-1).tolist() == [0, 1, 2, 3, 4, -1]
        for dtype in DTYPES:
            assert found[str(dtype)].dtype == dtype
            assert found[str(dtype)].tolist() == [0, 1, 0, 1, 0, 0]
    for found in (ranks["twice"] for ranks in both):
        assert found["after"].tolist() == [51, 50, 30, 2, 2, 2]
        assert found["replaced"].tolist() == [0, 1, 2, 3, 4, 5]
    for found in (ranks["exchanged"] for ranks in both):
        assert found["score"].tolist() == [2, 10, 21, 31, 8, 9]
        assert found["weights"][1:4].tolist() == [[1, 1], [2, 2], [3, 3]]
        assert found["flag"].tolist() == [False, False, True, True, False, False]
    assert [ranks["all_rows"].tolist() for ranks in both] == [[0, 2, 4, 1, 3, 5]] * 2
    assert [ranks["all_sum"].tolist() for ranks in both] == [[2, 10]] * 2
