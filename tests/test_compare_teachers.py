"""Recipes with several teachers, some of which learn from others."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import call, files, read_csv, read_yaml
from PIL import Image

from lit_kd.cli import compare as command
from lit_kd.cli.recipe import read_recipe
from lit_kd.data import DigitsDataModule
from lit_kd.models import load_student
from lit_kd.report.evidence import picks_right
from lit_kd.report.runs import Job

SUPERVISED, KD = {"class_path": "Supervised"}, {"class_path": "KD"}
CHAIN: dict[str, Any] = {
    "defaults": {
        "trainer": {"max_epochs": 1, "limit_train_batches": 4, "accelerator": "cpu"},
        "data": {"class_path": "DigitsDataModule"},
        "model": {"init_args": {"student": "mlp-8"}},
    },
    "teachers": {
        "big": {"model": SUPERVISED},
        "small": {"teacher": "big", "model": KD},
        "other": {"model": SUPERVISED, "data": {"init_args": {"noise": "symmetric", "noise_rate": 0.5}}},
    },
    "methods": {
        "Labels": {"model": SUPERVISED},
        "TAKD": {"teacher": "small", "model": KD},
        "Two": {"teacher": ["other", "big"], "model": KD},
        "All": {"model": {"class_path": "ALMKD"}},
    },
}
TAUGHT = {
    **{"teacher big": [], "teacher small": ["teacher big"], "teacher other": [], "Labels": []},
    **{"TAKD": ["teacher small"], "Two": ["teacher other", "teacher big"]},
    "All": ["teacher big", "teacher small", "teacher other"],
}
CHAINED = Path("runs") / "chain"


def compare(*args: object) -> None:
    Path("chain.yaml").write_text(yaml.safe_dump(CHAIN, sort_keys=False))
    call("compare", "chain.yaml", "--jobs", 1, *(args or ("--seeds", 0)))


def folder(row: str) -> Path:
    return CHAINED / row.lower().replace(" ", "-") / "seed-0"


def renewed(before: dict[Path, tuple[int, bytes]]) -> set[str]:
    """Whose results are not those of before."""
    now = files(CHAINED)
    results = {row: folder(row) / "result.json" for row in TAUGHT}
    return {row for row, path in results.items() if path in now and before.get(path) != now[path]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        compare()
    return path


@pytest.fixture
def _again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_again")
class TestChain:
    def test_every_student_learned_from_its_teachers(self) -> None:
        rows = read_csv(CHAINED / "results.csv")
        assert [row["method"] for row in rows] == list(TAUGHT)
        data = DigitsDataModule(seed=0)
        data.setup()
        x = torch.cat([batch.x for batch in data.test_dataloader()])
        for row in rows:
            expected = [str(folder(teacher) / "best.ckpt") for teacher in TAUGHT[row["method"]]]
            options = read_yaml(folder(row["method"]) / "config.yaml")["model"]["init_args"]
            assert options.get("teacher", []) == (expected[0] if len(expected) == 1 else expected)
            if expected:
                with torch.no_grad():
                    student = load_student(folder(row["method"]) / "best.ckpt")(x)
                    teacher = torch.stack([load_student(Path(path))(x).softmax(1) for path in expected]).mean(0)
                agree = (student.argmax(1) == teacher.argmax(1)).double().mean().item()
                assert float(row["teacher_agreement"]) == pytest.approx(agree, abs=1e-6)
            else:
                assert not row["teacher_agreement"]

    def test_who_was_right_about_which_sample(self) -> None:
        data = DigitsDataModule(seed=0)
        data.setup()
        x, index = (torch.cat(parts) for parts in zip(*((b.x, b.index) for b in data.train_dataloader()), strict=True))
        x = x[index.argsort()]
        kept = np.load(folder("All") / "samples.npz")
        assert (kept["true"] == data.clean_labels[: data.train_size].numpy()).all()
        with torch.no_grad():
            said = [load_student(folder(teacher) / "best.ckpt")(x).argmax(1).numpy() for teacher in TAUGHT["All"]]
        assert (kept["teachers"] == np.stack(said, axis=1)).all()
        rows = {row["method"]: row for row in read_csv(CHAINED / "results.csv")}
        assert {name for name, row in rows.items() if row["picks_right"]} == {"All"}
        assert float(rows["All"]["picks_right"]) == pytest.approx(
            picked(kept["weights"][:, 1:], kept["teachers"] == kept["true"][:, None]), abs=1e-6
        )

    def test_pictures_and_table(self) -> None:
        assert {path.name for path in CHAINED.glob("*.png")} == {"accuracy.png", "weights-all.png", "teachers-all.png"}
        with Image.open(CHAINED / "teachers-all.png") as image:
            assert len(set(image.convert("L").tobytes())) > 20  # something is drawn
        lines = (CHAINED / "table.md").read_text().splitlines()[2:]
        assert [line.split(" | ")[0].strip("| ") for line in lines] == list(TAUGHT)
        assert not [line for line in lines[:3] if "**" in line]  # the best of the methods is bold, no teacher

    def test_nothing_is_trained_twice_even_elsewhere(self) -> None:
        shutil.move(CHAINED, "moved")
        before = files(Path("moved"))
        compare("--seeds", 0, "--root", ".", "--name", "moved")
        results = {path for path in before if path.name in ("result.json", "config.yaml")}
        assert {path: files(Path("moved"))[path] for path in results} == {path: before[path] for path in results}

    def test_who_comes_after_a_renewed_teacher_is_renewed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder("teacher small") / "result.json").unlink()
        before = files(CHAINED)
        train = command._train

        def stopped(job: Job) -> Any:
            if job.method == "All":
                raise KeyboardInterrupt
            return train(job)

        with monkeypatch.context() as patch:
            patch.setattr(command, "_train", stopped)
            with pytest.raises(KeyboardInterrupt):
                compare()
        assert renewed(before) == {"teacher small", "TAKD"}
        compare()
        assert renewed(before) == {"teacher small", "TAKD", "All"}


def picked(weights: np.ndarray, right: np.ndarray) -> float:
    """Row by row, and tie by tie."""
    shares = []
    for row, known in zip(weights.tolist(), right.tolist(), strict=True):
        if 0 < sum(known) < len(known):
            heaviest = [k for k, weight in enumerate(row) if weight == max(row)]
            shares.append(sum(known[k] for k in heaviest) / len(heaviest))
    return sum(shares) / len(shares)


def test_picks_right() -> None:
    draw = np.random.default_rng(0)
    weights, right = draw.integers(0, 3, (200, 3)) / 2, draw.random((200, 3)) < 0.5
    assert picks_right(weights, right) == pytest.approx(picked(weights, right), abs=1e-6)
    right[:] = right[:, :1]
    assert picks_right(weights, right) is None  # they never differ


def test_nobody_starts_before_the_teachers_are_done(tmp_path: Path) -> None:
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(CHAIN, sort_keys=False))
    recipe = read_recipe(tmp_path / "chain.yaml")
    jobs = {job.method: job for job in recipe.jobs(tmp_path, [3], {})}
    assert {method: list(job.teachers) for method, job in jobs.items()} == TAUGHT
    for job in jobs.values():
        assert all(jobs[teacher].wave < job.wave and jobs[teacher].is_teacher for teacher in job.teachers)
    assert jobs["teacher big"].wave == jobs["teacher other"].wave  # side by side


class TestRecipes:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"teachers": {}}, "expected teachers, a mapping of names to configs; found {}"),
            ({"teacher": {"model": SUPERVISED}}, "expected either teacher or teachers, found both"),
            ({"teachers": {"big": {"model": {}}}}, "teacher big: expected a model.class_path such as KD; found none"),
            ({"teachers": {"Big": CHAIN["teachers"]["big"], **CHAIN["teachers"]}}, "differ in letters and digits"),
            ({"methods": {"M": {"model": KD, "teacher": "bog"}}}, r"M: .* some of \['big', 'small', 'other'\].*'bog'"),
            ({"methods": {"M": {"model": KD, "teacher": []}}}, "M: expected as teacher one or some of"),
            ({"methods": {"M": {"model": SUPERVISED, "teacher": "big"}}}, "M: expected no teacher for Supervised"),
            ({"teachers": {"a": {"model": KD, "teacher": "b"}, "b": {"model": KD, "teacher": "a"}}},  # a circle
             r"teacher a: expected as teacher one or some of \[\], those above it; found \['b'\]"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_found_before_anything_is_trained(
        self, change: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        (tmp_path / "chain.yaml").write_text(yaml.safe_dump({**CHAIN, **change}, sort_keys=False))
        with pytest.raises(ValueError, match=message):
            call("compare", tmp_path / "chain.yaml", "--root", tmp_path / "runs")
        assert not (tmp_path / "runs").exists()

    def test_a_file_of_ones_own_is_no_teacher_of_the_recipe(self, tmp_path: Path) -> None:
        recipe = copy.deepcopy(CHAIN)
        recipe["methods"]["Own"] = {"model": {**KD, "init_args": {"teacher": "own.ckpt"}}}
        (tmp_path / "chain.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        *_, job = read_recipe(tmp_path / "chain.yaml").jobs(tmp_path, [0], {})
        assert job.config["model"]["init_args"]["teacher"] == "own.ckpt"
        assert job.teachers == ()
