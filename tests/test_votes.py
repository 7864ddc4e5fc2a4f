"""Votes of annotators against crowd-kit, and against likelihoods that are summed by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from crowdkit.aggregation import DawidSkene, MajorityVote
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_kd.trust.votes import dawid_skene, likeliest, majority_vote, vote_shares
from lit_kd.types import UNLABELED


def drawn(
    rows: int = 200, annotators: int = 5, classes: int = 4, missing: float = 0.3, seed: int = 0
) -> tuple[Tensor, Tensor, Any]:
    """Votes of annotators with confusions of their own, the truth, and the confusions."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(classes, rows, p=rng.dirichlet(np.full(classes, 5.0)))
    right = np.linspace(0.9, 0.35, annotators)[:, None, None]
    confusion = right * np.eye(classes) + (1 - right) * rng.dirichlet(np.ones(classes), (annotators, classes))
    votes = np.array([[rng.choice(classes, p=confusion[k, c]) for k in range(annotators)] for c in truth])
    votes[rng.random(votes.shape) < missing] = UNLABELED
    return torch.tensor(votes), torch.tensor(truth), confusion


def table(votes: Tensor) -> pd.DataFrame:
    """As crowd-kit reads votes."""
    rows, annotators = (votes != UNLABELED).nonzero(as_tuple=True)
    return pd.DataFrame({"task": rows.numpy(), "worker": annotators.numpy(), "label": votes[rows, annotators].numpy()})


seeds = pytest.mark.parametrize("seed", [0, 1, 2])


@seeds
def test_majority_is_that_of_crowd_kit(seed: int) -> None:
    votes, _, _ = drawn(seed=seed)
    shares = vote_shares(votes, 4)
    clear = (shares == shares.amax(1, keepdim=True)).sum(1) == 1
    expected = MajorityVote().fit_predict(table(votes)).reindex(range(len(votes))).fillna(UNLABELED)
    found = majority_vote(votes, 4)
    assert clear.sum() > 100
    assert found[clear].tolist() == expected[clear.numpy()].astype(int).tolist()
    assert (found[~shares.any(1)] == UNLABELED).all()


@seeds
@pytest.mark.parametrize("known", [0, 40])
def test_dawid_skene_is_that_of_crowd_kit(seed: int, known: int) -> None:
    """Without smoothing, and without a stop; crowd-kit keeps probabilities above 1e-10."""
    votes, truth, _ = drawn(seed=seed)
    asked = (votes != UNLABELED).any(1)  # crowd-kit knows no row without votes
    votes, truth = votes[asked], truth[asked]
    told = pd.Series(truth[:known].numpy(), index=range(known)) if known else None
    expected = DawidSkene(n_iter=50, tol=-1e9).fit(table(votes), told)
    some = truth.where(torch.arange(len(truth)) < known, UNLABELED) if known else None
    found = dawid_skene(votes, 4, some, smoothing=1e-10, steps=50, tolerance=-1)
    np.testing.assert_allclose(found.classes, expected.probas_.sort_index()[range(4)], atol=1e-7)
    np.testing.assert_allclose(found.prior, expected.priors_.sort_index(), atol=1e-7)
    for k in range(5):
        theirs = expected.errors_.loc[k].reindex(range(4)).fillna(0)[range(4)].T  # by label, of each class
        np.testing.assert_allclose(found.confusion[k], theirs, atol=1e-7)


@seeds
def test_likelihood_and_posterior_by_all_assignments(seed: int) -> None:
    """The sum over every assignment of classes to rows, one row's class at a time held fixed."""
    votes, _, _ = drawn(rows=6, annotators=3, classes=2, seed=seed)
    found = dawid_skene(votes, 2, steps=400, tolerance=1e-14)
    total, by_class = 0.0, np.zeros((6, 2))
    for classes in itertools.product(range(2), repeat=6):
        p = 1.0
        for row, c in enumerate(classes):
            p *= float(found.prior[c])
            for k, vote in enumerate(votes[row].tolist()):
                p *= 1.0 if vote == UNLABELED else float(found.confusion[k, c, vote])
        total += p
        by_class[range(6), classes] += p
    assert float(found.log_likelihood[-1]) == pytest.approx(np.log(total), abs=1e-9)
    np.testing.assert_allclose(found.classes, by_class / total, atol=1e-6)


@seeds
def test_no_step_loses_likelihood(seed: int) -> None:
    votes, _, _ = drawn(seed=seed)
    found = dawid_skene(votes, 4, smoothing=1e-12).log_likelihood
    assert len(found) > 5
    assert (found.diff() > -1e-9).all()


def test_confusions_of_many_rows_are_found() -> None:
    votes, truth, confusion = drawn(rows=20000, missing=0.1)
    found = dawid_skene(votes, 4)
    assert (found.confusion - torch.tensor(confusion)).abs().max() < 0.03
    assert (likeliest(votes, 4) == truth).float().mean() > (majority_vote(votes, 4) == truth).float().mean() + 0.01


def test_an_annotator_who_names_the_next_class_is_understood() -> None:
    rng = np.random.default_rng(0)
    truth = torch.tensor(rng.integers(0, 3, 300))
    good = torch.stack([truth.where(torch.tensor(rng.random(300) < 0.8), (truth + 2) % 3) for _ in range(2)], dim=1)
    votes = torch.cat([good, (truth.unsqueeze(1) + 1) % 3], dim=1)
    assert (likeliest(votes, 3) == truth).float().mean() > 0.95 > (majority_vote(votes, 3) == truth).float().mean()


def test_known_rows_stay_and_teach_the_confusions() -> None:
    """Where most annotators swap the classes, only known rows tell; it is a start from the vote, so some do not do."""
    truth = torch.arange(100) % 2
    votes = torch.stack([1 - truth, 1 - truth, truth], dim=1)
    known = truth.where(torch.arange(100) < 60, UNLABELED)
    assert (likeliest(votes, 2) == 1 - truth).all()
    assert (likeliest(votes, 2, known) == truth).all()
    assert (majority_vote(votes, 2, known)[:10] == truth[:10]).all()
    assert (dawid_skene(votes, 2, known).classes[:10].argmax(1) == truth[:10]).all()


def test_rows_without_votes() -> None:
    votes, _, _ = drawn(missing=0.9)
    silent = (votes == UNLABELED).all(1)
    assert silent.any()
    found = dawid_skene(votes, 4, smoothing=1e-10, steps=5000, tolerance=1e-12)
    torch.testing.assert_close(found.classes[silent], found.prior.expand(int(silent.sum()), -1), rtol=0, atol=1e-5)
    assert (likeliest(votes, 4)[silent] == UNLABELED).all()
    assert (likeliest(votes, 4)[~silent] != UNLABELED).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 5))
def test_annotators_rows_and_classes_may_be_renumbered(seed: int, annotators: int, classes: int) -> None:
    votes, _, _ = drawn(30, annotators, classes, seed=seed)
    rng = np.random.default_rng(seed)
    rows, people, names = (torch.tensor(rng.permutation(n)) for n in (30, annotators, classes))
    found = dawid_skene(votes, classes, steps=20)
    renamed = names[votes.clamp(min=0)].where(votes != UNLABELED, UNLABELED)
    again = dawid_skene(renamed[rows][:, people], classes, steps=20)
    assert found.classes.dtype == torch.float64
    torch.testing.assert_close(found.classes.sum(1), torch.ones(30).double())
    torch.testing.assert_close(again.classes[:, names], found.classes[rows], rtol=1e-5, atol=1e-7)
