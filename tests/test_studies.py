"""The study of trust trains as lit_kd does. Long studies: make test-slow."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer, seed_everything
from sklearn.metrics import roc_auc_score

from lit_kd import ALMKD, GLC, KD, CoTeaching, Distiller, Supervised
from lit_kd.data import DigitsDataModule
from lit_kd.methods.element_trust import Believed
from lit_kd.terms import ELR, GeneralizedCrossEntropy
from lit_kd.types import IGNORED, Batch, Outputs
from lit_kd.weightings import Amal

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
def test_published_rules_of_the_study_descend_the_loss_of_the_other_trusted_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gradient of each weight against finite differences through the whole step of the last layer."""
    import scenarios
    import students

    x, y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    told = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    e = scenarios.Experiment(scenarios.Scenario("clean"), 0, x, y, y, 4, told, (x, y), told)
    runs = students.Runs(scenarios.Data("tiny", x, y, x, y), [e])
    runs.nets = nets = students.Mlps([5], 6, students.HIDDEN, 3)
    nets.parameters = [p.double() for p in nets.parameters]
    runs.x, runs.onehot = runs.x.double(), runs.onehot.double()
    method, index, found = students.Published(Amal(repeats=1)), torch.tensor([[1, 5, 2, -1]]), []
    method.begin(runs)
    method.soft, method.weights = method.soft.double(), torch.rand_like(method.weights, dtype=torch.float64)
    monkeypatch.setattr(method.rule, "move", lambda weights, gradient, rate: found.append(gradient) or weights)
    _, z = nets.forward(runs.x[:, index[0]])
    terms = torch.stack([students.Method.gradient(method, z, z.softmax(-1), index), method.taught(z, index)], dim=2)
    method.moved(terms, index)

    def loss_ahead(weights: torch.Tensor) -> torch.Tensor:
        """Of the trusted rows 4, 6 and 7, as 5 is in the batch, after a step on rows 1, 5 and 2."""
        head = [part.clone().requires_grad_() for part in nets.parameters[2:]]
        hidden = nets.forward(runs.x)[0][0]
        logits, taught = hidden[[1, 5, 2]] @ head[0][0] + head[1][0], method.soft[0, [1, 5, 2]]
        label = F.cross_entropy(logits, y[[1, 5, 2]], reduction="none")
        teacher = -16 * (taught * (logits / 4).log_softmax(-1)).sum(-1)
        step = torch.autograd.grad((weights[:, 0] * label + weights[:, 1] * teacher).mean(), head)
        w, b = (part - 0.1 * g for part, g in zip(head, step, strict=True))
        return F.cross_entropy(hidden[[4, 6, 7]] @ w[0] + b[0], y[[4, 6, 7]])

    weights = method.weights[0, [1, 5, 2]]
    for row, column in itertools.product(range(3), range(2)):
        small = torch.zeros_like(weights)
        small[row, column] = 1e-5
        slope = (loss_ahead(weights + small) - loss_ahead(weights - small)) / 2e-5
        assert found[0][row, column] == pytest.approx(float(slope) * 1500 * 3 / 128, rel=1e-5)
    assert (found[0][3] == 0).all()  # no row


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


@pytest.mark.usefixtures("_studies")
def test_study_of_elements_changes_one_part() -> None:
    """What it calls ElementTrust is that, a sure teacher's probabilities are its class, the rest by hand."""
    import elements

    draw = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 4, 5, 3, generator=draw)
    y = torch.randint(3, (4, 5), generator=draw)
    y[0, :2] = IGNORED
    channel, joint = torch.rand(2, 1, 3, 3, generator=draw)
    terms = {form: elements.Classes(form) for form in elements.FORMS} | {"": Believed()}
    for term in terms.values():
        term.channel, term.joint = channel / channel.sum(-1, keepdim=True), joint
    said = {form: term(Outputs(z, {}), Outputs(t, {}), Batch(z, y)) for form, term in terms.items()}
    torch.testing.assert_close(said[elements.WHOLE], said[""])
    assert all((said[form] - said[""]).abs().max() > 1e-3 for form in (elements.HARD, elements.REST, elements.SOFT))
    sure = F.one_hot(t.argmax(-1), 3).float()
    torch.testing.assert_close(
        terms[elements.SOFT].believed(y, sure), terms[elements.WHOLE].believed(y, sure), rtol=1e-5, atol=1e-6
    )
    y, p = torch.tensor([[0]]), torch.tensor([[[0.6, 0.3, 0.1]]])
    believed = joint[0, :, 0] * (channel / channel.sum(-1, keepdim=True))[0, :, 0]
    right = believed[0] / believed.sum()
    rest = torch.stack([right + (1 - right) * 0.6, (1 - right) * 0.3, (1 - right) * 0.1])
    torch.testing.assert_close(terms[elements.REST].believed(y, p)[0, 0], rest)
    counts = torch.tensor([[[6.0, 2.0], [1.0, 1.0]]])
    torch.testing.assert_close(elements.even(counts), torch.tensor([[[0.7, 0.3], [0.3, 0.7]]]))
    fixed = elements.CHANGED[elements.FIXED]["label_joint"](counts, None)
    torch.testing.assert_close(fixed, torch.tensor([[[0.68, 0.03], [0.12, 0.17]]]))


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
