"""The yardsticks of the study of margins are trainings by lit_kd itself, done side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

STUDIES = Path(__file__).parent / "studies"


@pytest.mark.parametrize("meta", [False, True])
def test_fixed_weights_are_kd(meta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    import margins

    monkeypatch.setattr(margins, "EPOCHS", 3)
    monkeypatch.setattr(margins, "WEIGHTS", (0.0, 0.7))
    data = margins.ScenarioData("digits", "pair30", 3)
    data.setup()
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with torch.no_grad():
        logits = teacher(torch.cat([data.x("train"), data.x("meta")]))
    side_by_side = margins.fixed_weights([data], [teacher], "mlp-16", meta)[0]
    data.train_on_meta = meta
    one_by_one = []
    for weight in margins.WEIGHTS:
        margins.seed_everything(3, verbose=False)
        model = margins.FixedKD(logits, teacher=teacher, weight=weight, **margins.options("mlp-16", data))
        one_by_one.append(margins.fit(model, data))
    at_best, last = zip(*one_by_one, strict=True)
    assert side_by_side == pytest.approx([*at_best, *last], abs=1e-6)
    assert side_by_side[0] != pytest.approx(side_by_side[1], abs=1e-3)


def test_the_weight_that_is_best_on_other_seeds_is_best_by_no_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    import margins

    rng = np.random.default_rng(0)
    best, unlucky = [], []
    for _ in range(400):  # cells in which no weight is better than another, nor than ours
        weights, ours = rng.normal(size=(10, 7)), rng.normal(size=10)
        best.append(100 * (ours.mean() - weights[:, margins.best_weight(weights.tolist())].mean()))
        unlucky.append(np.mean(margins.unlucky(ours.tolist(), weights.tolist())))
    error = 100 * (2 / 10 / 400) ** 0.5
    assert abs(np.mean(unlucky)) < 4 * error
    assert np.mean(best) < -10 * error
    assert margins.unlucky([1.0, 2.0], [[0.0, 1.0], [2.0, 0.0]]) == [100, 200]
