"""The study of trust trains as lit_kd does. Long studies: make test-slow."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything
from sklearn.metrics import roc_auc_score

from lit_kd import ALMKD, GLC, KD, CoTeaching, Distiller, Supervised
from lit_kd.data import DigitsDataModule
from lit_kd.terms import ELR, GeneralizedCrossEntropy

ALIKE: dict[str, Callable[..., Distiller]] = {
    "CE": lambda student, teacher, first, **base: Supervised(student, **base),
    "KD 0.3": lambda student, teacher, first, **base: KD(student, teacher, weight=0.3, **base),
    "ELR": lambda student, teacher, first, **base: Supervised(student, label_term=ELR(), **base),
    "GCE": lambda student, teacher, first, **base: Supervised(student, label_term=GeneralizedCrossEntropy(), **base),
    "GLC": lambda student, teacher, first, **base: GLC(student, first, **base),
    "Co-teaching": lambda student, teacher, first, **base: CoTeaching(student, peers=[first], noise_rate=0.4, **base),
    "robust": lambda student, teacher, first, **base: ALMKD(student, teacher, **base),
}
"""Methods of the study as those of lit_kd; first is what GLC trains first, or the peer."""


@pytest.fixture
def _studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "studies"))


@pytest.mark.usefixtures("_studies")
def test_students_side_by_side_are_trained_as_by_lit_kd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two experiments of different sizes, 40% noise, a teacher that knows better; the final weights."""
    import scenarios
    import students
    from mlps import Mlps, fit

    monkeypatch.setattr(students, "EPOCHS", 9)
    experiments, datas, teachers = [], [], []
    for seed, meta, test in (3, 150, 1000), (4, 60, 1100):
        data = DigitsDataModule(test=test, meta=meta, val=100, noise="symmetric", noise_rate=0.4, seed=seed)
        data.setup()
        rows, val = data.parts.train_rows(True), data.parts.val
        train, held = (part.__getitems__(list(range(len(part)))) for part in (rows, val))
        x, val_x = train.x.flatten(1), held.x.flatten(1)
        teacher = fit(x, data.clean_labels, 64, 40, 10, seed)
        said, said_val = (teacher.forward(part.unsqueeze(0))[1][0] for part in (x, val_x))
        labels = data.labels, data.clean_labels, data.train_size
        scenario = scenarios.Scenario("sym40")
        experiments.append(scenarios.Experiment(scenario, seed, x, *labels, said, (val_x, held.y), said_val))
        teachers.append(torch.nn.Sequential(torch.nn.Flatten(), teacher.module(0)))
        datas.append(data)
    runs = students.Runs(scenarios.Data("digits", x, train.y, x, train.y), experiments)
    beginning, plain = Mlps([3, 4], 64, students.HIDDEN, 10), students.Method()
    plain.begin(runs)
    first = runs.train(plain, meta=False)
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    base = {"num_classes": 10, "input_shape": [1, 8, 8], "optimizer": sgd, "lr_scheduler": "cosine"}
    for name, make in ALIKE.items():
        method = students.METHODS[name]()
        method.begin(runs)
        if name == "Co-teaching":
            method.noise = torch.tensor([0.4, 0.4])
        others = [getattr(method, "peers", first).module(i) for i in range(2)]
        nets = runs.train(method)
        for i, data in enumerate(datas):
            student, before = (torch.nn.Sequential(torch.nn.Flatten(), n) for n in (beginning.module(i), others[i]))
            model = make(student, teachers[i], before, **base)
            data.train_on_meta = True
            trainer(9).fit(model, data)
            for found, expected in zip(nets.module(i).parameters(), model.student.parameters(), strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert isinstance(method, students.Trusting)
    assert all((table["revised_weight"] > 0).any() for table in method.tables)  # all of the rule was at work
    assert all((table["weights"][:, 1] > 0).any() for table in method.tables)
    torch.testing.assert_close(1 - method.doubt(1), model.table["clean_probability"], rtol=0, atol=1e-3)


@pytest.mark.usefixtures("_studies")
def test_study_of_trust_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import students
    import trust

    monkeypatch.setattr(students, "EPOCHS", 1)
    trained = []
    monkeypatch.setattr(
        trust, "measure", lambda runs, method, own=trust.measure: trained.append(1) or own(runs, method)
    )
    chosen = ["--scenarios", "sym40, weak", "clean, long tail", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="found none: run without --report"):
        trust.main(["--report", *chosen])
    trust.main(["--methods", "GCE", "--seeds", "0", *chosen])
    assert len(trained) == 2  # cross-entropy, to compare with, too
    more = ["--methods", "GCE", "no teachers", "--set", "decay=0.5", "STEPS=1", "--seeds", "0", "1", *chosen]
    trust.main(more)
    assert len(trained) == 2 + 3 + 5  # three methods more, and five of another seed
    trust.main(more)
    assert len(trained) == 10
    known = json.loads((tmp_path / "trust_digits.json").read_text())
    of_seeds = [known["GCE"][seed]["sym40, weak"] for seed in ("0", "1")]
    line = next(
        line
        for line in csv.DictReader((tmp_path / "trust.csv").open())
        if (line["method"], line["scenario"]) == ("GCE", "sym40, weak")
    )
    mean = 50 * sum(one["accuracy"] for one in of_seeds)
    assert float(line["accuracy"]) == pytest.approx(mean, abs=0.051)
    assert len(of_seeds[0]["classes"]) == 10
    text = (tmp_path / "trust.md").read_text()
    assert line["accuracy"] in text
    assert "| robust STEPS=1 |" in text


@pytest.mark.usefixtures("_studies")
def test_summary_of_the_study_of_trust() -> None:
    """By hand: two cells, of two seeds and two classes."""
    import trust

    def found(*accuracies: float, classes: tuple[float, float]) -> dict[str, list]:
        return {"accuracy": list(accuracies), "classes": [[classes[0], 0.5], [classes[1], 0.5]]}

    noisy = {"CE": found(0.6, 0.8, classes=(0.9, 0.7)), "GCE": found(0.7, 0.9, classes=(0.9, 0.9))}
    noisy["robust"] = found(0.798, 0.798, classes=(0.8, 0.7))
    clean = {"CE": found(0.9, 0.9, classes=(0.9, 0.9)), "GCE": found(0.8, 0.8, classes=(0.8, 0.9))}
    clean["robust"] = found(0.89, 0.9, classes=(1, 1))
    *_, plain, rival, ours = trust.summary({("digits", "sym40, weak"): noisy, ("digits", "clean, weak"): clean})
    assert plain == ["CE", "70.0", "80.0", "0.0", "100%", "50%", "0.0"]
    assert rival == ["GCE", "80.0", "80.0", "-10.0", "50%", "50%", "-5.0"]
    assert ours == ["robust", "79.8", "84.7", "-0.5", "50%", "50%", "-5.0"]


def trainer(epochs: int) -> Trainer:
    """Silent, on one CPU."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(max_epochs=epochs, accelerator="cpu", **quiet)


def fit(method: type[Supervised] | type[ALMKD], batch_size: int, lr: float, **options: object) -> tuple:
    """Train on digits with 30% pair noise; the model and its data."""
    data = DigitsDataModule(noise="asymmetric", noise_rate=0.3, batch_size=batch_size)
    sgd = partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model = method(**options, num_classes=10, input_shape=[1, 8, 8], optimizer=sgd, lr_scheduler="cosine")
    trainer(30).fit(model, data)
    return model, data


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_robust_rule_hardly_depends_on_batch_size_and_learning_rate(seed: int) -> None:
    """It finds the wrong labels at any batch size and learning rate.

    How many there are, it can tell only where the student has learned the clean rows: at lr 0.02, 30 epochs do not do.
    """
    seed_everything(seed)
    teacher, _ = fit(Supervised, 64, 0.1, student="mlp-256")
    areas, rates = {}, {}
    for batch_size, lr in [(16, 0.05), (32, 0.1), (64, 0.02), (64, 0.1), (64, 0.3), (128, 0.1), (256, 0.2)]:
        seed_everything(seed)
        model, data = fit(ALMKD, batch_size, lr, student="mlp-32", teacher=teacher.student)
        wrong = (data.labels != data.clean_labels)[: data.train_size].numpy()
        distrust = -model.table["weights"][: data.train_size, 0]
        areas[batch_size, lr] = round(float(roc_auc_score(wrong, distrust)), 3)
        rates[batch_size, lr] = round(float(model.table.shared["noise_rate"] - wrong.mean()), 3)
    print(areas, rates)
    assert min(areas.values()) > 0.9
    assert max(areas.values()) - min(areas.values()) < 0.06
    learned = [error for (_, lr), error in rates.items() if lr > 0.02]
    assert max(learned) - min(learned) < 0.05
    assert max(map(abs, learned)) < 0.08
