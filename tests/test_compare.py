"""The command ``lit-kd compare``: its numbers, and what it does when it is run again."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import call, files, read_csv, read_yaml
from comparison import FOLDERS, NASTY, RECIPE, TINY, again, changed, compare, finished, trained, training
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.metrics import roc_auc_score

from lit_kd import __version__
from lit_kd.cli.main import main
from lit_kd.data import DigitsDataModule
from lit_kd.models import load_student
from lit_kd.report.comparison import summary

LABELS = {"model": {"class_path": "Supervised"}}
ADAM = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3}}
TERMS = {"model": {"class_path": "KD", "init_args": {"extra": [{"class_path": "DecoupledKL"}], "optimizer": ADAM}}}


@pytest.fixture
def _again(tmp_path_factory: pytest.TempPathFactory) -> None:
    again(tmp_path_factory)


@pytest.mark.usefixtures("_again")
class TestResults:
    def test_a_row_for_each_single_result(self) -> None:
        rows = read_csv(TINY / "results.csv")
        assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in FOLDERS for s in "01"]
        assert list(rows[0]) == [
            *("method", "seed", "test_accuracy", "test_accuracy_last", "ece", "teacher_agreement", "seconds"),
            *("nll", "noise_auc", "noise_rate", "noise_rate_estimated"),
            *("slope_unsure", "offset_unsure", "slope_sure", "offset_sure"),
        ]
        for row in rows:
            single = json.loads((training(row) / "result.json").read_text())
            assert single.pop("lit_kd") == __version__
            assert set(single) <= set(row)
            assert row == {name: "" if single.get(name) is None else str(single[name]) for name in row}

    def test_the_numbers_are_those_of_the_checkpoints(self) -> None:
        best_is_last = []
        for row in read_csv(TINY / "results.csv"):
            data = DigitsDataModule(seed=int(row["seed"]), noise="symmetric", noise_rate=0.3)
            data.setup()
            x, y = (torch.cat(parts) for parts in zip(*((b.x, b.y) for b in data.test_dataloader()), strict=True))
            with torch.no_grad():
                best, last = (load_student(training(row) / f"{name}.ckpt")(x) for name in ("best", "last"))
                teacher = load_student(TINY / "teacher" / f"seed-{row['seed']}" / "best.ckpt")(x)
            assert float(row["test_accuracy"]) == pytest.approx(accuracy(best, y), abs=1e-6)
            assert float(row["test_accuracy_last"]) == pytest.approx(accuracy(last, y), abs=1e-6)
            assert float(row["nll"]) == pytest.approx(torch.nn.functional.cross_entropy(best, y).item(), rel=1e-5)
            if row["method"] == "teacher":
                assert not row["teacher_agreement"]
            else:
                assert float(row["teacher_agreement"]) == pytest.approx(accuracy(best, teacher.argmax(1)), abs=1e-6)
            if row["method"] == "ALM-KD":
                noisy = (data.labels != data.clean_labels)[: data.train_size]
                kept = np.load(training(row) / "samples.npz")
                assert (kept["noisy"] == noisy.numpy()).all()
                assert (kept["label"] == data.labels[: data.train_size].numpy()).all()
                assert float(row["noise_rate"]) == pytest.approx(noisy.double().mean().item())
                expected = roc_auc_score(kept["noisy"], -kept["weights"][:, 0])
                assert float(row["noise_auc"]) == pytest.approx(expected, abs=1e-6)
            [path] = training(row).glob("lightning_logs/version_*/metrics.csv")
            validated = [float(epoch["val/accuracy"]) for epoch in read_csv(path) if epoch["val/accuracy"]]
            epoch = torch.load(training(row) / "best.ckpt", weights_only=True)["epoch"]
            assert epoch == int(np.argmax(validated))
            best_is_last.append(epoch == 1)
        assert not all(best_is_last)  # else this could not tell the one from the other

    def test_the_table_has_means_and_deviations(self) -> None:
        rows = read_csv(TINY / "results.csv")
        lines = (TINY / "table.md").read_text().splitlines()
        head, rule, *cells = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
        assert head == ["method", "accuracy", "at last", "ECE", "agrees", "AUC", "time, s"]
        assert set(rule) == {"---"}
        measured = {"accuracy": ("test_accuracy", 1), "at last": ("test_accuracy_last", 1), "ECE": ("ece", 1)}
        measured |= {"agrees": ("teacher_agreement", 1), "AUC": ("noise_auc", 2), "time, s": ("seconds", 0)}
        for method, line in zip(FOLDERS, cells, strict=True):
            for title, cell in zip(head[1:], line[1:], strict=True):
                name, digits = measured[title]
                values = np.array([float(r[name]) for r in rows if r["method"] == method and r[name]])
                values *= 100 if digits == 1 else 1
                expected = f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}" if len(values) else ""
                assert cell.strip("*") == expected

    def test_all_students_that_are_best_as_printed_are_bold(self) -> None:
        accuracies = {"teacher": 0.99, "A": 0.9512, "B": 0.9508, "C": 0.9502}
        by_method: Any = {m: [{"test_accuracy": a, "test_accuracy_last": 0.5 + a / 10}] for m, a in accuracies.items()}
        rows = summary(by_method, ["teacher"])[1]
        assert [row[1] for row in rows] == ["99.0", "**95.1**", "**95.1**", "95.0"]
        assert [row[2] for row in rows] == ["59.9", "**59.5**", "**59.5**", "**59.5**"]


def accuracy(logits: torch.Tensor, y: torch.Tensor) -> float:
    return (logits.argmax(1) == y).double().mean().item()


def numbers() -> list[dict[str, str]]:
    """results.csv without what depends on the machine's load."""
    return [{name: row[name] for name in row if name != "seconds"} for row in read_csv(TINY / "results.csv")]


@pytest.mark.usefixtures("_again")
class TestAgain:
    def test_what_has_no_result_is_trained_again(self) -> None:
        results, lost, broken = numbers(), TINY / FOLDERS[NASTY] / "seed-1", TINY / "alm-kd" / "seed-0"
        (lost / "result.json").unlink()
        shutil.rmtree(broken)  # as an interrupted run leaves it
        (broken / "lightning_logs").mkdir(parents=True)
        (broken / "config.yaml").write_text("model: {cla")
        (broken / "best.ckpt").write_bytes(b"half a che")
        (broken / "last-v1.ckpt").write_bytes(b"")
        before = files(TINY)
        compare()
        assert trained(before) == {f"{FOLDERS[NASTY]}/seed-1", "alm-kd/seed-0"}
        assert not (broken / "last-v1.ckpt").exists()
        assert numbers() == results

    def test_a_new_method_and_a_new_seed_train_alone(self) -> None:
        before, results = files(TINY), numbers()
        compare(changed(Labels=LABELS), "--seeds", 0, 2)
        new = {f"{folder}/seed-2" for folder in FOLDERS.values()} | {"labels/seed-0", "labels/seed-2"}
        assert trained(before) == new
        assert numbers()[:6:2] == [row for row in results if row["seed"] == "0"]

    def test_lists_and_another_optimizer_class(self) -> None:
        compare(changed(Terms=TERMS), "--seeds", 0)
        before = files(TINY)
        assert (TINY / "terms" / "seed-0" / "result.json") in before
        assert read_yaml(TINY / "terms/seed-0/config.yaml")["model"]["init_args"]["optimizer"] == ADAM  # no momentum
        compare(changed(Terms=TERMS), "--seeds", 0)
        assert trained(before) == set()

    def test_a_changed_recipe_is_refused(self) -> None:
        before = files(TINY)
        weight = changed(**{NASTY: {"model": {"class_path": "KD", "init_args": {"weight": 0.7}}}})
        with pytest.raises(ValueError, match=r"seed-0 holds a result of another config\. .*another --name") as found:
            compare(weight)
        assert str(found.value).splitlines()[1:] == ["-     weight: 0.7", "+     weight: 0.5"]
        less = copy.deepcopy(RECIPE)
        del less["defaults"]["data"]["init_args"]["noise_rate"]
        with pytest.raises(ValueError, match=r"found \(\+\):\n\+     noise_rate: 0.3$"):
            compare(less)
        with pytest.raises(ValueError, match=r"max_epochs: 3\n.*max_epochs: 2"):
            compare(RECIPE, "--max_epochs", 3)
        with pytest.raises(ValueError, match=r"noise_rate: 0.4\n.*noise_rate: 0.3"):
            compare(RECIPE, "--set", "data.init_args.noise_rate=0.4")
        assert files(TINY) == before

    def test_another_name_is_another_comparison(self) -> None:
        before = files(TINY)
        compare({**RECIPE, "teacher": None, "methods": {0.5: RECIPE["teacher"]}}, "--seeds", 1, "--name", "other")
        assert files(TINY) == before
        [row] = read_csv(Path("runs") / "other" / "results.csv")
        expected = read_csv(TINY / "results.csv")[1] | {"method": "0.5"}
        assert {**row, "seconds": ""} == {name: expected[name] for name in row} | {"seconds": ""}
        config = read_yaml(Path("runs") / "other" / "0.5" / "seed-1" / "config.yaml")
        assert config["model"]["init_args"] == RECIPE["defaults"]["model"]["init_args"] | {"student": "mlp-16"}


@pytest.mark.usefixtures("_again")
class TestFailures:
    def test_a_failing_method_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = files(TINY)
        broken = {"model": {"class_path": "KD", "init_args": {"weight": 1.5}}}
        Path("tiny.yaml").write_text(yaml.safe_dump(changed(Broken=broken, Never=LABELS), sort_keys=False))
        monkeypatch.setattr(sys, "argv", ["lit-kd", "compare", "tiny.yaml", "--jobs", "1", "--seeds", "0"])
        with pytest.raises(SystemExit) as done:
            main()
        assert "expected a weight in [0, 1]" in str(done.value.code)
        assert "\nin the training of Broken, seed 0\n" in str(done.value.code)
        assert before.items() <= files(TINY).items()  # the report of before included

    def test_so_is_one_in_another_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before, fork = files(TINY), multiprocessing.get_context("fork")  # spares the seconds that imports take
        monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
        far = {**LABELS, "trainer": {"overfit_batches": 1.5}}
        with pytest.raises(MisconfigurationException, match="overfit_batches") as failed:
            compare(changed(**{"Far A": far, "Far B": far}), "--jobs", 2, "--seeds", 0)
        assert failed.value.__notes__[0] in ("in the training of Far A, seed 0", "in the training of Far B, seed 0")
        assert before.items() <= files(TINY).items()

    def test_an_unknown_option_is_found_before_anything_is_trained(self) -> None:
        before = files(TINY)
        typo = {"model": {"class_path": "KD", "init_args": {"wieght": 0.5}}}
        with pytest.raises(ValueError, match=r"Typo: (.|\n)*wieght"):
            compare(changed(Fine=LABELS, Typo=typo))
        assert files(TINY) == before


@pytest.mark.slow
def test_killed_while_two_train_side_by_side(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = {**LABELS, "trainer": {"callbacks": [{"class_path": "commands.Hold"}]}}
    recipe = {**RECIPE, "seeds": [0], "methods": {"Held": held, **RECIPE["methods"]}}
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    Path("hold").touch()
    results = {TINY / folder / "seed-0" / "result.json" for folder in FOLDERS.values()}
    parent = subprocess.Popen(
        [sys.executable, "-m", "lit_kd", "compare", "tiny.yaml", "--jobs", "2"],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 200
        while not all(path.is_file() for path in {TINY / "held" / "seed-0" / "config.yaml", *results}):
            assert parent.poll() is None, parent.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers = children(parent.pid)
    finally:
        parent.kill()  # -9
    parent.communicate(timeout=20)  # until no process holds its output any more
    assert len(workers) >= 2
    assert not [pid for pid in workers if runs(pid)]
    assert set(TINY.rglob("result.json")) == results

    before = files(TINY)
    Path("hold").unlink()
    time.sleep(0.3)
    assert files(TINY) == before  # nobody goes on
    compare(recipe)
    assert trained(before) == {"held/seed-0"}
    side_by_side = [row for row in numbers() if row["method"] != "Held"]
    monkeypatch.chdir(finished(tmp_path_factory))
    assert side_by_side == [row for row in numbers() if row["seed"] == "0"]


def test_killed_twice(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """At moments drawn by chance; forked, which spares the seconds that imports take."""
    draw = random.Random(0)
    done: dict[Path, tuple[int, int, bytes]] = {}
    for wanted in (1, 2):  # of 3; the teacher comes first
        running = multiprocessing.get_context("fork").Process(target=compare, args=(RECIPE, "--seeds", 0))
        running.start()
        deadline = time.monotonic() + 200
        while len(stamps()) < wanted and running.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))  # anywhere in the next training
        running.kill()  # -9
        running.join()
        assert done.items() <= stamps().items()
        done = stamps()
    compare(RECIPE, "--seeds", 0)
    assert done.items() <= stamps().items()  # neither lost nor trained again
    assert len(stamps()) == 3
    now = numbers()
    monkeypatch.chdir(finished(tmp_path_factory))
    assert now == [row for row in numbers() if row["seed"] == "0"]


def stamps() -> dict[Path, tuple[int, int, bytes]]:
    """Every finished run's result, with what changes if it is written again."""
    found = {path: path.stat() for path in TINY.glob("*/*/result.json")}
    return {path: (stat.st_ino, stat.st_mtime_ns, path.read_bytes()) for path, stat in found.items()}


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = (line.split() for line in listed.splitlines())
    return [int(child) for child, parent in pairs if int(parent) == pid]


def runs(pid: int) -> bool:
    """Whether there is such a process, and it is more than an entry that nobody has collected."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


class TestRecipes:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"metods": {}}, r"tiny.yaml: expected a mapping with the keys defaults, methods, .*; found \['metods'\]"),
            ({"methods": None}, "expected methods, a mapping of names to configs; found None"),
            ({"methods": {"KD": None}}, r"tiny.yaml, KD: expected a mapping with the keys data, .*; found \[None\]"),
            ({"methods": {"KD": {"model": {}}}}, "tiny.yaml, KD: expected a model.class_path such as KD; found none"),
            ({"teacher": "resnet20"}, "tiny.yaml: expected as teacher a config, or files that are there; found"),
            ({"defaults": {"seed": 1}}, "tiny.yaml, defaults: expected a mapping with the keys data, model, trainer"),
            ({"seeds": 3}, "tiny.yaml: expected seeds, a list of whole numbers; found 3"),
            ({"seeds": ["a"]}, "expected seeds, a list of whole numbers"),
            ({"methods": {"Teacher": {"model": {"class_path": "KD"}}}}, "names that differ in letters and digits"),
        ],
    )
    def test_a_mistake_is_found_before_anything_is_trained(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            compare({**RECIPE, **change})
        assert not Path("runs").exists()

    @pytest.mark.parametrize("text", ["methods: {KD", "- KD", ""])
    def test_other_files(self, text: str) -> None:
        Path("tiny.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"tiny.yaml: expected (YAML|a mapping)"):
            call("compare", "tiny.yaml")

    @pytest.mark.parametrize("option", ["labeled=50", "data.init_args.labeled", "seeds.a=1", "data..a=1"])
    def test_not_an_override(self, option: str) -> None:
        with pytest.raises(ValueError, match=rf"expected KEY=VALUE with a key of .*; found {option!r}"):
            compare(RECIPE, "--set", option)
