"""The picture of decision regions that ``lit-kd compare`` draws for points of the plane."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import files, read_csv
from matplotlib.figure import Figure
from PIL import Image
from test_compare import RECIPE, TINY, compare, trained

from lit_kd.data import SpiralDataModule
from lit_kd.models import load_student
from lit_kd.report import comparison

PLANAR: dict[str, Any] = copy.deepcopy(RECIPE)
PLANAR["seeds"] = [1, 0]
PLANAR["defaults"]["data"]["class_path"] = "SpiralDataModule"
PLANAR["defaults"]["trainer"]["max_epochs"] = 1
del PLANAR["methods"]["Labels"]
PLANAR["methods"]["KD 0.1"] = {"model": {"class_path": "KD", "init_args": {"weight": 0.1}}}
PICTURE = TINY / "regions.png"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a recipe on spirals was run."""
    folder = tmp_path_factory.mktemp("planar")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        compare(PLANAR)
    return folder


@pytest.fixture
def figure(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The picture as it is drawn when the command is run again, which trains nothing."""
    monkeypatch.chdir(finished)
    before, picture, kept = files(TINY), PICTURE.read_bytes(), []
    PICTURE.unlink()
    chart = comparison.regions_chart
    monkeypatch.setattr(comparison, "regions_chart", lambda done: kept.append(chart(done)) or kept[-1])
    compare(PLANAR)
    assert trained(before) == set()
    assert PICTURE.read_bytes() == picture
    [drawn] = kept
    return drawn


def test_the_picture(figure: Figure) -> None:
    with Image.open(PICTURE) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
    assert PICTURE.stat().st_size < 200_000

    rows = read_csv(TINY / "results.csv")
    accuracy = {m: [float(r["test_accuracy"]) for r in rows if r["method"] == m] for m in ("KD 0.1", "KD 0.5")}
    best = max(accuracy, key=lambda method: np.mean(accuracy[method]))
    first = {r["method"]: f"{r['method']}: {100 * float(r['test_accuracy']):.1f}%" for r in rows if r["seed"] == "1"}
    panels = [axes for axes in figure.axes if axes.get_title()]
    expected = [first[method] for method in PLANAR["methods"] if method in (best, "ALM-KD")]
    assert [axes.get_title() for axes in panels] == [first["teacher"], *expected]
    assert f"{best} is the KD student with the best mean" in figure.get_supxlabel()
    assert "Rings: the label is wrong" in figure.get_supxlabel()

    data = SpiralDataModule(seed=1, noise="symmetric", noise_rate=0.3)
    data.setup()
    batch = data.parts.train_rows(meta=False).__getitems__(list(range(data.train_size)))
    row_of = {tuple(point): row for row, point in enumerate(batch.x.tolist())}  # type: ignore[union-attr]
    noisy = (data.labels != data.clean_labels).numpy()
    for axes in panels:
        folder = TINY / axes.get_title().split(":")[0].lower().replace(" ", "-") / "seed-1"
        student = load_student(folder / "best.ckpt")
        [image] = axes.images
        left, right, bottom, top = image.get_extent()
        colours = np.asarray(image.get_array())
        height, width, _ = colours.shape
        rng, of_class = np.random.default_rng(0), {}
        for row, column in zip(rng.integers(0, height, 200), rng.integers(0, width, 200), strict=True):
            x = left + (column + 0.5) / width * (right - left)
            y = bottom + (row + 0.5) / height * (top - bottom)
            decided = int(student(torch.tensor([[x, y]], dtype=torch.float32)).argmax())
            np.testing.assert_array_equal(of_class.setdefault(decided, colours[row, column]), colours[row, column])
        assert len(np.unique(list(of_class.values()), axis=0)) == len(of_class)

        rings, dots = axes.collections
        shown = [row_of[tuple(point)] for point in np.float32(dots.get_offsets()).tolist()]
        ringed = [row_of[tuple(point)] for point in np.float32(rings.get_offsets()).tolist()]
        assert len(set(shown)) == len(shown) == 800
        assert sorted(ringed) == sorted(row for row in shown if noisy[row])
        if "ALM-KD" in axes.get_title():
            weights = np.load(folder / "samples.npz")["weights"][:, 0]
            np.testing.assert_array_equal(dots.get_array(), weights[shown])
            assert dots.get_clim() == (0, max(1, weights.max()))
        else:
            face = dots.get_facecolors()[:, :3]
            labels = batch.y[shown].numpy()
            assert len(np.unique(np.column_stack([face, labels]), axis=0)) == len(np.unique(labels)) == 4


def test_nothing_to_set_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compare({**PLANAR, "seeds": [0], "methods": {"Labels": RECIPE["methods"]["Labels"]}, "teacher": None})
    assert not PICTURE.exists()
