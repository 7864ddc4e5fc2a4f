"""Recipes with several teachers, some of which learn from others; and points of the plane, whose regions are drawn."""

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
from comparison import ALMKD, again, compare
from matplotlib.figure import Figure
from PIL import Image

from lit_kd.cli import training as command
from lit_kd.cli.recipe import read_recipe
from lit_kd.data import SpiralDataModule
from lit_kd.models import load_student
from lit_kd.report import comparison
from lit_kd.report.evidence import picks_right
from lit_kd.report.runs import Job

SUPERVISED, KD = {"class_path": "Supervised"}, {"class_path": "KD"}
NOISE = {"noise": "symmetric", "noise_rate": 0.3}
CHAIN: dict[str, Any] = {
    "name": "chain",
    "seeds": [1],
    "defaults": {
        "trainer": {"max_epochs": 1, "limit_train_batches": 4, "accelerator": "cpu"},
        "data": {"class_path": "SpiralDataModule", "init_args": NOISE},
        "model": {"init_args": {"student": "mlp-8"}},
    },
    "teachers": {
        "big": {"model": SUPERVISED},
        "small": {"teacher": "big", "model": KD},
        "other": {"model": SUPERVISED, "data": {"init_args": {"noise_rate": 0.5}}},
    },
    "methods": {
        "Two": {"teacher": ["other", "big"], "model": KD},
        "All": {"model": ALMKD},
    },
}
TAUGHT = {
    **{"teacher big": [], "teacher small": ["teacher big"], "teacher other": []},
    "Two": ["teacher other", "teacher big"],
    "All": ["teacher big", "teacher small", "teacher other"],
}
CHAINED = Path("runs") / "chain"


def folder(row: str) -> Path:
    return CHAINED / row.lower().replace(" ", "-") / "seed-1"


def renewed(before: dict[Path, tuple[int, bytes]]) -> set[str]:
    """Whose results are not those of before."""
    now = files(CHAINED)
    results = {row: folder(row) / "result.json" for row in TAUGHT}
    return {row for row, path in results.items() if path in now and before.get(path) != now[path]}


def spirals() -> SpiralDataModule:
    data = SpiralDataModule(seed=1, **NOISE)  # type: ignore[arg-type]
    data.setup()
    return data


@pytest.fixture
def _again(tmp_path_factory: pytest.TempPathFactory) -> None:
    again(tmp_path_factory, CHAIN)


@pytest.mark.usefixtures("_again")
class TestChain:
    def test_every_student_learned_from_its_teachers(self) -> None:
        rows = read_csv(CHAINED / "results.csv")
        assert [row["method"] for row in rows] == list(TAUGHT)
        x = torch.cat([batch.x for batch in spirals().test_dataloader()])
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
        data = spirals()
        x = data.parts.plain.fetch(data.parts.positions["train"].tolist())
        kept = np.load(folder("All") / "samples.npz")
        assert (kept["true"] == data.clean_labels[: data.train_size].numpy()).all()
        with torch.no_grad():
            said = [load_student(folder(teacher) / "best.ckpt")(x).argmax(1).numpy() for teacher in TAUGHT["All"]]
        assert (kept["teachers"] == np.stack(said, axis=1)).all()
        rows = {row["method"]: row for row in read_csv(CHAINED / "results.csv")}
        assert {name for name, row in rows.items() if row["picks_right"]} == {"All"}
        expected = picked(kept["weights"][:, 1:], kept["teachers"] == kept["true"][:, None])
        assert float(rows["All"]["picks_right"]) == pytest.approx(expected, abs=1e-6)

    def test_pictures_and_table(self) -> None:
        pictures = {f"{name}.png" for name in ("accuracy", "regions", "weights-all", "teachers-all")}
        assert {path.name for path in CHAINED.glob("*.png")} == pictures
        for path in CHAINED.glob("*.png"):
            with Image.open(path) as image:
                assert min(image.size) > 300
                assert len(set(image.convert("L").tobytes())) > 20  # something is drawn
            assert path.stat().st_size < 200_000
        lines = (CHAINED / "table.md").read_text().splitlines()[2:]
        assert [line.split(" | ")[0].strip("| ") for line in lines] == list(TAUGHT)
        assert not [line for line in lines[:3] if "**" in line]  # the best of the methods is bold, no teacher

    def test_nothing_is_trained_twice_even_elsewhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.move(CHAINED, "moved")
        before, kept, chart = files(Path("moved")), [], comparison.regions_chart
        monkeypatch.setattr(comparison, "regions_chart", lambda done: kept.append(chart(done)) or kept[-1])
        compare(CHAIN, "--root", ".", "--name", "moved")
        now = files(Path("moved"))
        for path, state in before.items():
            if path.name != "report.html":  # has the name as its title
                assert now[path][1] == state[1]  # the pictures are drawn again, and as they were
                assert now[path] == state or path.parent.name == "moved"
        Path("runs").mkdir(exist_ok=True)
        shutil.move("moved", CHAINED)
        check_regions(kept[0])

    def test_who_comes_after_a_renewed_teacher_is_renewed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder("teacher small") / "result.json").unlink()
        before = files(CHAINED)
        train = command.train

        def stopped(job: Job) -> Any:
            if job.method == "All":
                raise KeyboardInterrupt
            return train(job)

        monkeypatch.setattr(command, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            compare(CHAIN)
        assert renewed(before) == {"teacher small"}
        assert not (folder("All") / "result.json").exists()  # next time it is trained


def check_regions(figure: Figure) -> None:
    """The best KD student and ALM-KD's: what they decide for where, and the training points."""
    rows = {row["method"]: row for row in read_csv(CHAINED / "results.csv")}
    best = max(("teacher small", "Two"), key=lambda method: float(rows[method]["test_accuracy"]))
    panels = [axes for axes in figure.axes if axes.get_title()]
    titles = [f"{name}: {100 * float(rows[name]['test_accuracy']):.1f}%" for name in (best, "All")]
    assert [axes.get_title() for axes in panels] == titles
    assert f"{best} is the KD student with the best" in " ".join(figure.get_supxlabel().split())
    data = spirals()
    batch = data.parts.train_rows(meta=False).__getitems__(list(range(data.train_size)))
    row_of = {tuple(point): row for row, point in enumerate(batch.x.tolist())}  # type: ignore[union-attr]
    noisy = (data.labels != data.clean_labels).numpy()
    for axes, method in zip(panels, (best, "All"), strict=True):
        student = load_student(folder(method) / "best.ckpt")
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
        if method == "All":
            weights = np.load(folder(method) / "samples.npz")["weights"][:, 0]
            np.testing.assert_array_equal(dots.get_array(), weights[shown])
            assert dots.get_clim() == (0, max(1, weights.max()))
        else:
            face = dots.get_facecolors()[:, :3]
            labels = batch.y[shown].numpy()
            assert len(np.unique(np.column_stack([face, labels]), axis=0)) == len(np.unique(labels)) == 4


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


class TestRecipes:
    @staticmethod
    def jobs(recipe: dict[str, Any]) -> dict[str, Job]:
        Path("chain.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        jobs = list(read_recipe(Path("chain.yaml")).jobs(Path("runs"), [3, 3], {}))
        assert len({job.folder for job in jobs}) == len(jobs)  # a seed that is named twice trains once
        return {job.method: job for job in jobs}

    def test_nobody_starts_before_the_teachers_are_done(self) -> None:
        jobs = self.jobs(CHAIN)
        assert {method: list(job.teachers) for method, job in jobs.items()} == TAUGHT
        for job in jobs.values():
            assert all(jobs[teacher].wave < job.wave and jobs[teacher].is_teacher for teacher in job.teachers)
        assert jobs["teacher big"].wave == jobs["teacher other"].wave  # side by side

    def test_a_file_of_ones_own_is_no_teacher_of_the_recipe(self) -> None:
        recipe = copy.deepcopy(CHAIN)
        recipe["methods"]["Own"] = {"model": {**KD, "init_args": {"teacher": "own.ckpt"}}}
        job = self.jobs(recipe)["Own"]
        assert (job.config["model"]["init_args"]["teacher"], job.teachers) == ("own.ckpt", ())

    def test_files_of_answers_are_teachers_too(self) -> None:
        """Named among the teachers, by a method, or for the whole recipe; none of them is trained."""
        Path("gpt.csv").write_text("id,label\n0,1\n")
        anna = {"class_path": "lit_kd.FileTeacher", "init_args": {"path": "votes.csv", "label": "anna"}}
        recipe = copy.deepcopy(CHAIN)
        recipe["teachers"] = {"gpt": "gpt.csv", **recipe["teachers"]}
        recipe["teachers"]["small"]["teacher"] = ["big", "gpt"]
        recipe["methods"] = {
            "All": {"model": KD},
            "Own": {"teacher": ["gpt.csv", "big", anna], "model": KD},
            "Votes": {"teacher": anna, "model": KD},
        }
        jobs = self.jobs(recipe)
        assert set(jobs) == {"teacher big", "teacher small", "teacher other", "All", "Own", "Votes"}
        path = {name: f"runs/teacher-{name}/seed-3/best.ckpt" for name in ("big", "small", "other")}
        expected = {
            "teacher small": (["teacher big", "teacher gpt"], [path["big"], "gpt.csv"]),
            "All": (["teacher gpt", *TAUGHT["All"]], ["gpt.csv", *path.values()]),
            "Own": (["gpt.csv", "teacher big", "votes.csv anna"], ["gpt.csv", path["big"], anna]),
            "Votes": (["votes.csv anna"], anna),
        }
        for name, (teachers, given) in expected.items():
            assert (list(jobs[name].teachers), jobs[name].config["model"]["init_args"]["teacher"]) == (teachers, given)
        del recipe["teachers"]
        recipe["methods"] = {"All": {"model": KD}, "One": {"teacher": "gpt.csv", "model": KD}}
        for teacher, heard in ("gpt.csv", "gpt.csv"), (["gpt.csv", anna], ["gpt.csv", anna]):
            jobs = self.jobs(recipe | {"teacher": teacher})
            assert {name: job.config["model"]["init_args"]["teacher"] for name, job in jobs.items()} == {
                "All": heard,
                "One": "gpt.csv",
            }

    def test_a_finished_student_knows_its_file(self) -> None:
        """The comparison's folder may have moved since, but not the file."""
        Path("gpt.csv").write_text("id,label\n0,1\n")
        recipe = copy.deepcopy(CHAIN)
        recipe["methods"] = {"Both": {"teacher": ["gpt.csv", "big"], "model": KD}}
        job = self.jobs(recipe)["Both"]
        for path, same in (("gpt.csv", True), ("other/gpt.csv", False)):
            before = copy.deepcopy(job.config)
            before["model"]["init_args"]["teacher"] = [path, "before/teacher-big/seed-3/best.ckpt"]
            job.folder.mkdir(parents=True, exist_ok=True)
            (job.folder / "config.yaml").write_text(yaml.safe_dump(before))
            (job.folder / "result.json").write_text("{}")
            if same:
                assert command.finished(job) == {}
            else:
                with pytest.raises(ValueError, match=r"another config(.|\n)*other/gpt.csv"):
                    command.finished(job)

    def test_methods_without_a_teacher(self) -> None:
        recipe = copy.deepcopy(CHAIN)
        recipe["methods"]["None"] = {"model": {"class_path": "L2RW"}, "teacher": []}
        recipe["methods"]["Never"] = {"model": {"class_path": "CoTeaching"}}
        jobs = self.jobs(recipe)
        assert jobs["None"].teachers == jobs["Never"].teachers == ()
        assert "teacher" not in str(jobs["None"].config | jobs["Never"].config)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"teachers": {}}, "expected teachers, a mapping of names to configs; found {}"),
            ({"teacher": {"model": SUPERVISED}}, "expected either teacher or teachers, found both"),
            ({"teachers": {"big": {"model": {}}}}, "teacher big: expected a model.class_path such as KD; found none"),
            ({"teachers": {"Big": CHAIN["teachers"]["big"], **CHAIN["teachers"]}}, "differ in letters and digits"),
            ({"teachers": {"gpt": "none.csv"}}, "a config, or files that are there; found 'none.csv'"),
            ({"methods": {"M": {"model": KD, "teacher": "bog"}}}, r"M: .* some of \['big', 'small', 'other'\].*'bog'"),
            ({"methods": {"M": {"model": SUPERVISED, "teacher": "big"}}}, "M: expected no teacher for Supervised"),
            ({"teachers": {"a": {"model": KD, "teacher": "b"}, "b": {"model": KD, "teacher": "a"}}},  # a circle
             r"teacher a: expected as teacher one or some of \[\], those above it, or a file; found \['b'\]"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_found_before_anything_is_trained(self, change: dict[str, Any], message: str) -> None:
        Path("chain.yaml").write_text(yaml.safe_dump({**CHAIN, **change}, sort_keys=False))
        with pytest.raises(ValueError, match=message):
            call("compare", "chain.yaml")
        assert not Path("runs").exists()
