"""Sums over an epoch's rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_kd.distiller.ledger import AT_ONCE, Ledger


def test_means_over_rows_whatever_terms_come() -> None:
    rng, ledger, expected, rows = np.random.default_rng(0), Ledger(), dict[str, float](), 0
    for step in range(9):
        names = ["train/a", "train/b"] if step % 3 else ["train/b", "train/c", "train/a"]
        values, size = rng.normal(size=len(names)), int(rng.integers(1, 9))
        terms = {name: torch.tensor(v, requires_grad=True) for name, v in zip(names, values, strict=True)}
        loss = ledger.add(terms, size)
        assert loss.item() == pytest.approx(values.sum(), rel=1e-6)
        loss.backward()
        assert all(term.grad == 1 for term in terms.values())
        for name, value in [*zip(names, values, strict=True), ("train/loss", values.sum())]:
            expected[name] = expected.get(name, 0.0) + size * value
        rows += size
    assert {k: v.item() for k, v in ledger.means().items()} == pytest.approx(
        {k: v / rows for k, v in expected.items()}, rel=1e-5
    )


def test_means_of_many_steps_in_any_shape() -> None:
    rng, ledger = np.random.default_rng(0), Ledger()
    expected, rows = {"train/a": 0.0, "train/b": 0.0}, 0
    for step in range(3 * AT_ONCE + 5):
        size = int(rng.integers(2, 9))
        a, b = rng.normal(size=size), rng.normal(size=size if step % 3 else ())
        ledger.add({"train/a": torch.tensor(a), "train/b": torch.tensor(b, dtype=torch.float32)}, size)
        expected["train/a"] += a.sum()
        expected["train/b"] += size * b.mean()
        rows += size
        if step % 20 == 0:  # may be asked in between
            assert ledger.means()["train/a"].item() == pytest.approx(expected["train/a"] / rows, abs=1e-6)
    expected["train/loss"] = sum(expected.values())
    means = {name: mean.item() for name, mean in ledger.means().items()}
    assert means == pytest.approx({name: total / rows for name, total in expected.items()}, abs=1e-6)


def held(ledger: Ledger) -> list[Tensor]:
    return [taken for steps in ledger._steps.values() for taken in steps]


def test_holds_few_numbers_and_no_graph() -> None:
    ledger, most = Ledger(), 0
    for _ in range(4 * AT_ONCE):
        large = torch.randn(4, 1000, requires_grad=True)
        ledger.add({"train/a": large[:, 0], "train/b": large[:, 1] ** 2}, 4)
        ledger.add({"train/c": large[0, 0], "train/d": large.view(4, 10, 100)}, 4)
        assert not any(taken.requires_grad for taken in held(ledger))
        most = max(most, sum(taken.untyped_storage().nbytes() for taken in held(ledger)))
    assert most <= (2 * 4 + 2) * 4 * AT_ONCE


def test_a_term_may_be_written_to_afterwards() -> None:
    ledger, buffer = Ledger(), torch.zeros(4)
    for value in range(3):
        ledger.add({"train/a": buffer.fill_(value)}, 4)
    assert ledger.means() == {"train/a": 1.0, "train/loss": 1.0}


def test_counts_rows_far_in_low_precision() -> None:
    ledger = Ledger()
    for _ in range(40 * AT_ONCE):
        ledger.add({"train/a": torch.ones(16, dtype=torch.bfloat16)}, 16)
    assert ledger.means() == {"train/a": 1.0, "train/loss": 1.0}


def test_no_terms() -> None:
    with pytest.raises(ValueError, match="expected distill to return at least one loss term by name, found none"):
        Ledger().add({}, 4)


def test_a_term_may_be_called_loss() -> None:
    ledger = Ledger()
    ledger.add({"train/loss": torch.tensor(2.0)}, 4)
    assert ledger.means() == {"train/loss": 2.0}


def test_counts_far_in_low_precision() -> None:
    ledger = Ledger()
    for _ in range(2000):
        ledger.add({"train/a": torch.tensor(1.0, dtype=torch.bfloat16)}, 1)
    assert ledger.means() == {"train/a": 1.0, "train/loss": 1.0}


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_names_what_is_not_finite(reads: bool, bad: float) -> None:
    ledger = Ledger()
    ledger.reads = reads

    def add() -> None:
        ledger.add({"train/a": torch.tensor(1.0), "train/b": torch.tensor(bad)}, 3)

    def watch() -> None:
        ledger.watch("train/b", torch.tensor([1.0, bad, 2.0]))

    for take in (add, watch):
        if not reads:
            take()
        with pytest.raises(ValueError, match="expected finite numbers in train/b"):
            (take if reads else ledger.check)()
        ledger.clear()
        ledger.check()


def test_opposite_infinities_are_found() -> None:
    ledger, terms = Ledger(), dict[str, Tensor]()
    ledger.reads = True
    terms |= {"train/a": torch.tensor(torch.inf), "train/b": torch.tensor(-torch.inf)}
    with pytest.raises(ValueError, match="expected finite numbers in train/a"):
        ledger.add(terms, 2)
