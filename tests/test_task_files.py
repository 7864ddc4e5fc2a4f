"""What is written and read of every task: exported students, predictions, teachers, the command line's runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from commands import QUIET, call, read_csv, version
from lightning import seed_everything
from methods import trainer
from test_export import run
from test_methods_tasks import SIZES, Few, Net

from lit_kd import KD, Supervised
from lit_kd.models.export import export_student

ELEMENTS = ("dense", "tokens")
every_task = pytest.mark.parametrize("task", SIZES)


def shape(task: str) -> list[int]:
    return [6] if task == "tokens" else [1, 4, 4]


@pytest.mark.parametrize("kind", ["onnx", "torch_export", "safetensors"])
@pytest.mark.parametrize("task", ["dense", "tokens", "regression"])
def test_export(task: str, kind: str, tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    model = Supervised(Net(task), num_classes=SIZES[task], task=task)
    trainer(max_epochs=1).fit(model, Few(task))
    path = tmp_path / {"onnx": "s.onnx", "torch_export": "s.pt2", "safetensors": "s.safetensors"}[kind]
    export_student(model.student, path, kind, input_shape=shape(task))
    x = torch.randint(5, (3, 6)) if task == "tokens" else torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        expected = model.eval()(x)
    if kind == "safetensors":
        again = Net(task).eval()
        again.load_state_dict(safetensors.torch.load_file(path))
        found = again(x)
    else:
        found = run(path, "", x)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@every_task
def test_command_line(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit, test and predict, from a config; the teacher is a checkpoint of the same class."""
    monkeypatch.chdir(tmp_path)
    net = f'{{"class_path": "test_methods_tasks.Net", "init_args": {{"task": "{task}"}}}}'
    given = ("--model.task", task, "--model.student", net, "--data=test_methods_tasks.Few", f"--data.task={task}")
    call("fit", "--model=Supervised", *given, *QUIET, "--trainer.max_epochs=2")
    best = version(0) / "checkpoints" / "best.ckpt"
    teacher = net[:-1] + f', "checkpoint": "{best}", "prefix": "student."}}'
    call("fit", "--model=KD", *given, "--model.teacher", teacher, *QUIET, "--trainer.max_epochs=1")
    saved = version(1) / "config.yaml", version(1) / "checkpoints" / "best.ckpt"
    call("validate", "--config", saved[0], "--ckpt_path", saved[1])
    call("predict", "--config", saved[0], "--ckpt_path", saved[1])
    [measured] = read_csv(version(2) / "metrics.csv")
    rows = read_csv(Path("predictions.csv"))
    data = Few(task)
    data.setup()
    x, y, _ = next(iter(data.test_dataloader()))
    assert [int(row["row"]) for row in rows] == list(range(len(y)))
    assert f"val/{'r2' if task == 'regression' else 'accuracy'}" in measured
    assert "val/teacher_agreement" in measured
    network = Net(task).eval()
    weights = torch.load(saved[1], weights_only=True)["state_dict"]
    network.load_state_dict({k.removeprefix("student."): v for k, v in weights.items() if k.startswith("student.")})
    with torch.no_grad():
        logits = network(x)
    if task == "regression":
        found = torch.tensor([[float(row[f"value_{d}"]) for d in range(2)] for row in rows])
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    elif task in ELEMENTS:
        classes = torch.tensor([[int(c) for c in row["class"].split()] for row in rows])
        assert torch.equal(classes, logits.argmax(-1 if task == "tokens" else 1).flatten(1))
        assert all(len(row["probability"].split()) == y[0].numel() for row in rows)


@every_task
@pytest.mark.parametrize("other", ["classification", "tokens", "regression"])
def test_a_teacher_of_another_task_is_refused(task: str, other: str, tmp_path: Path) -> None:
    """A checkpoint says which it is of."""
    if task == other:
        return
    path, classes = tmp_path / "teacher.ckpt", SIZES[task]
    content: dict[str, Any] = {"student": "mlp-4", "num_classes": classes, "input_shape": [16], "task": other}
    weights = {f"student.{k}": v for k, v in Supervised(**content).student.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": content}, path)
    model = KD(Net(task), str(path), num_classes=classes, task=task)
    with pytest.raises(ValueError, match=f"teacher.ckpt: expected a network for {task}, found one for {other}: give"):
        trainer().fit(model, Few(task))


@every_task
def test_a_teacher_whose_logits_are_of_another_task_is_refused(task: str) -> None:
    """A module does not say which it is of; its outputs do."""
    wrong = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 7))
    if task == "tokens":
        wrong = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Flatten())
    model = KD(Net(task), wrong, num_classes=SIZES[task], task=task)
    with pytest.raises(ValueError, match=r"expected teacher 0's logits of shape .*, found"):
        trainer().fit(model, Few(task))


@every_task
def test_a_file_of_classes_is_no_teacher(task: str, tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    path.write_text("id,label\n" + "".join(f"{row},0\n" for row in range(32)))
    model = KD(Net(task), str(path), num_classes=SIZES[task], task=task)
    expected = "a column tokens" if task == "tokens" else f"one class a sample, or tokens, .* is a file, found {task}"
    with pytest.raises(ValueError, match=f"expected {expected}"):
        trainer().fit(model, Few(task))


@every_task
def test_a_teacher_is_cached(task: str, tmp_path: Path) -> None:
    weights = []
    for cache in (None, "memory", str(tmp_path)):
        seed_everything(0, verbose=False)
        model = KD(Net(task), Net(task), num_classes=SIZES[task], task=task, teacher_cache=cache)
        trainer(max_epochs=2).fit(model, Few(task))
        weights.append(torch.cat([p.detach().flatten() for p in model.student.parameters()]))
    torch.testing.assert_close(weights[1], weights[0])
    torch.testing.assert_close(weights[2], weights[0])


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
    given = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)).replace("logger=False", "accelerator='cpu'")
    there: dict[str, Any] = {}
    exec(given, there)
    assert there["data"].task == "dense"
    assert there["model"].task.name == "tokens"
