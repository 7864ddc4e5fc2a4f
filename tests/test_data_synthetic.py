"""The drawn data sets: that they are the ones described, and how they are split."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lit_kd.data import BlobsDataModule, DataModule, GMMDataModule, SpiralDataModule

torch.set_num_threads(1)
SPREADS = [1.4, 2.8, 1.7, 4.0, 2.0, 3.5, 1.5, 2.5]
SIZES = {GMMDataModule: (8100, 450, 450, 1000), SpiralDataModule: (4860, 270, 270, 600)}
SIZES[BlobsDataModule] = SIZES[GMMDataModule]


def ready(kind: Any, **arguments: Any) -> DataModule:
    data: DataModule = kind(**({"seed": 0} | arguments))
    data.setup()
    return data


def parts(data: DataModule) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and given labels of train, meta, val and test."""
    split = data.parts
    rows = (split.train_rows(meta=False), split.meta_rows(), split.val, split.test)
    batches = [part.__getitems__(list(range(len(part)))) for part in rows]
    return [(batch.x.numpy(), batch.y.numpy()) for batch in batches]  # type: ignore[union-attr]


def whole(data: DataModule) -> tuple[np.ndarray, np.ndarray]:
    x, y = (np.concatenate(both) for both in zip(*parts(data), strict=True))
    return x, y


@pytest.mark.parametrize("kind", list(SIZES))
def test_the_seed_draws_the_split_and_not_the_points(kind: Any) -> None:
    zero, one = ready(kind), ready(kind, seed=1)
    for data in (zero, one):
        assert tuple(len(y) for _, y in parts(data)) == SIZES[kind]
        for _, y in parts(data):
            counts = np.bincount(y, minlength=kind.num_classes)
            assert len(counts) == kind.num_classes
            assert counts.max() - counts.min() <= 1
        x, drawn = whole(data)[0], kind().draw()[0].astype(np.float32)
        np.testing.assert_array_equal(x[np.lexsort(x.T)], drawn[np.lexsort(drawn.T)])  # each point in one part
    assert zero.fingerprint == ready(kind).fingerprint != one.fingerprint
    np.testing.assert_array_equal(parts(zero)[3][0], parts(one)[3][0])  # no teacher has seen a test row
    assert not np.array_equal(parts(zero)[2][0], parts(one)[2][0])


def test_clusters_sit_on_corners_of_a_cube() -> None:
    # scikit-learn's description: distinct corners at distance class_sep, and no feature made of others
    x, y = whole(ready(GMMDataModule))
    means = np.stack([x[y == c].mean(0) for c in range(20)])
    np.testing.assert_allclose(np.abs(means), 1.0, atol=0.5)  # five standard errors
    assert len(np.unique(np.sign(means), axis=0)) == 20
    assert np.linalg.matrix_rank(np.cov(x.T)) == 14


def test_noise_is_what_the_source_asks_scikit_learn_for() -> None:
    from sklearn.datasets import make_classification

    options = {"n_features": 14, "n_informative": 14, "n_redundant": 0, "n_classes": 20, "n_clusters_per_class": 1}
    # flip_y is drawn after the points: without shuffling the rows correspond
    _, clean = make_classification(10000, **options, flip_y=0.0, random_state=42, shuffle=False)
    _, flipped = make_classification(10000, **options, flip_y=0.2, random_state=42, shuffle=False)
    data = ready(GMMDataModule, noise="symmetric", noise_rate=0.2)
    ours = data.noisy[: data.train_size].float().mean().item()
    assert ours == pytest.approx(float((clean != flipped).mean()), abs=0.02)


def test_spirals_turn_with_the_radius() -> None:
    x, y = whole(ready(SpiralDataModule))
    radius = np.hypot(*x.T)
    jitter = np.arctan2(x[:, 0], x[:, 1]) - 4.74 * (y + radius / 4)
    jitter = (jitter[radius > 0.01] + np.pi) % (2 * np.pi) - np.pi
    assert jitter.mean() == pytest.approx(0, abs=0.01)
    assert jitter.std() == pytest.approx(0.2, abs=0.01)
    for arm in range(4):
        np.testing.assert_allclose(np.sort(radius[y == arm]), np.arange(1500) * 4 / 1499, atol=1e-5)


def test_blobs_have_their_centres_and_spreads() -> None:
    x, y = whole(ready(BlobsDataModule))
    centres = np.random.RandomState(20).uniform(-20, 20, (8, 2))
    for c, spread in enumerate(SPREADS):
        np.testing.assert_allclose(x[y == c].mean(0), centres[c], atol=4 * spread / np.sqrt(1250))
        np.testing.assert_allclose(x[y == c].std(0), spread, rtol=0.1)
