"""The yardsticks of the study of margins are trainings by lit_kd itself, done side by side."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

STUDIES = Path(__file__).parent / "studies"


@pytest.mark.parametrize("meta", [False, True])
def test_fixed_weights_are_kd(meta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    import margins

    monkeypatch.setattr(margins, "EPOCHS", 5)
    monkeypatch.setattr(margins, "WEIGHTS", (0.0, 0.7))
    datas = [margins.ScenarioData("digits", "pair30", seed) for seed in (8, 10)]
    torch.manual_seed(0)
    teachers = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)) for _ in datas]
    for data in datas:
        data.setup()
    side_by_side = margins.fixed_weights(datas, teachers, "mlp-16", meta)
    for data, teacher, found in zip(datas, teachers, side_by_side, strict=True):
        with torch.no_grad():
            logits = teacher(torch.cat([data.x("train"), data.x("meta")]))
        data.train_on_meta = meta
        one_by_one = []
        for weight in margins.WEIGHTS:
            margins.seed_everything(data.seed, verbose=False)
            model = margins.FixedKD(logits, teacher=teacher, weight=weight, **margins.options("mlp-16", data))
            one_by_one.append(margins.fit(model, data))
        at_best, last = zip(*one_by_one, strict=True)
        assert found == pytest.approx([*at_best, *last], abs=1e-6)
    assert len({tuple(part) for found in side_by_side for part in (found[:2], found[2:])}) > 2  # nothing is exchanged
    assert side_by_side[0][0] != pytest.approx(side_by_side[0][1], abs=1e-3)


def test_the_report_takes_the_better_of_both_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    import margins

    monkeypatch.setattr(margins, "WEIGHTS", (0.0, 0.7))
    early = [[0.82, 0.80, 0.71, 0.70], [0.86, 0.84, 0.71, 0.70], [0.84, 0.85, 0.71, 0.70]]
    late = [[0.5, 0.6, 0.79, 0.80], [0.5, 0.6, 0.92, 0.90], [0.5, 0.6, 0.70, 0.85]]
    cell = {"seeds": [0, 1, 2], "train": early, "train + meta": late}
    cell |= {"best": [0.83, 0.83, 0.83], "last": [0.88, 0.90, 0.89], "silent": [0.86, 0.88, 0.87]}
    (tmp_path / "digits-sym40-mlp-32.json").write_text(json.dumps(cell | {"auc": [None] * 3, "rate": [[0, 0]] * 3}))
    margins.report([("digits", "sym40", "mlp-32"), ("digits", "not", "done")], tmp_path)
    row = next(csv.DictReader((tmp_path / "margins.csv").open()))
    assert row["best on train"].startswith("84.0")
    assert row["best on train + meta"].startswith("85.0")
    assert row["margin, train"].startswith("+5.0")
    assert row["margin, + meta"].startswith("+4.0")
    assert row["teacher adds"].startswith("+2.0")
    assert [row[f"{name}, train"] for name in ("w", "epoch")] == ["0", "best"]
    assert [row[f"{name}, + meta"] for name in ("w", "epoch")] == ["0.7", "last"]
    text = capsys.readouterr().out
    for line in [
        "on train, weight and epoch in hindsight: mean +5.00",
        "on train, all at the best validation epoch: mean -1.00",
        "on train, all at the last epoch: mean +18.00",
        "on train + meta, weight and epoch in hindsight: mean +4.00",
        "on train + meta, all at the best validation epoch: mean +23.00",
        "on train + meta, all at the last epoch: mean +4.00",
        "on train, weight and epoch in hindsight, of other seeds: mean +5.00",
        "on train + meta, weight and epoch in hindsight, of other seeds: mean +9.00",  # 8, 0 and 19
        "on train + meta, all at the best validation epoch, of other seeds: mean +23.00",
    ]:
        assert line in text


def test_yardsticks_of_one_epoch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    import margins

    cell, old = ("digits", "clean", "mlp-32"), {"seeds": [0], "train": [[0.5] * 7]}
    message = "lacks the fixed weights' accuracies at the last epoch"
    (tmp_path / "yardsticks").mkdir()
    torch.save(old, tmp_path / "yardsticks" / "digits-clean-mlp-32.pt")
    with pytest.raises(SystemExit, match=message):
        margins.run(cell, [0], {}, tmp_path, prepare=True)
    (tmp_path / "digits-clean-mlp-32.json").write_text(json.dumps(old | {"alm-kd": [0.5], "last": [0.5]}))
    with pytest.raises(SystemExit, match=message):
        margins.run(cell, [0], {}, tmp_path)
    with pytest.raises(SystemExit, match=message):
        margins.report([cell], tmp_path)


def test_the_weight_that_is_best_on_other_seeds_is_best_by_no_luck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(STUDIES))
    import margins

    rng = np.random.default_rng(0)
    best, unlucky = [], []
    for _ in range(400):  # cells in which no weight is better than another, nor than ours, at two epochs alike
        weights, ours = rng.normal(size=(10, 7)), rng.normal(size=10)
        weights = np.concatenate([weights, 0.8 * weights + 0.6 * rng.normal(size=(10, 7))], axis=1)
        best.append(100 * (ours.mean() - weights[:, margins.best_column(weights.tolist())].mean()))
        unlucky.append(np.mean(margins.unlucky(ours.tolist(), weights.tolist())))
    error = 100 * (2 / 10 / 400) ** 0.5
    assert abs(np.mean(unlucky)) < 4 * error
    assert np.mean(best) < -10 * error
    assert margins.unlucky([1.0, 2.0], [[0.0, 1.0], [2.0, 0.0]]) == [100, 200]
