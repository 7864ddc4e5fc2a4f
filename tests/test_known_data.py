"""What a network knows of the data it was trained on is compared with the data that it meets."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUIET, call, configs
from methods import Blobs, build, trainer
from test_data_vision import write_folder

from lit_kd import Distiller, Supervised
from lit_kd.models import load_student
from lit_kd.models.images import ImageInput

LEARNED = ["ant", "bee", "cat"]
SHIFTED = ["bee", "cat", "dog"]


def named(names: list[str] | None, mean: float = 0.0, shape: tuple[int, ...] = (1, 4, 4), seed: int = 0) -> Blobs:
    data = Blobs(seed=seed)
    data.class_names, data.input_shape = names, shape
    data.image_input = ImageInput(1, 4, [mean], [1.0])
    return data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Distiller]:
    """A network that has learned, and its checkpoint."""
    path, model, fitted = tmp_path_factory.mktemp("run") / "a.ckpt", build("supervised"), trainer(max_epochs=1)
    fitted.fit(model, named(LEARNED))
    fitted.save_checkpoint(path)
    return path, model


def student(of: Any, **options: Any) -> Distiller:
    return Supervised(of, num_classes=3, input_shape=[1, 4, 4], **options)


def teach(teacher: Any, data: Blobs) -> None:
    trainer(max_epochs=1).fit(build("kd", teachers=[teacher]), data)


Meet = Callable[[Path, Distiller, Blobs], Any]
MEETINGS: dict[str, tuple[str, Meet]] = {
    "a teacher's path": ("teacher .*a.ckpt", lambda path, _, data: teach(str(path), data)),
    "a teacher's network": ("teacher 0", lambda path, _, data: teach(load_student(path), data)),
    "a teacher trained just now": ("teacher 0", lambda _, model, data: teach(model.student, data)),
    "a teacher with its method": ("teacher 0", lambda _, model, data: teach(model, data)),
    "simkd's teacher": (
        "teacher .*a.ckpt",
        lambda path, _, data: trainer(max_epochs=1).fit(build("simkd", teachers=[str(path)]), data),
    ),
    "a start from a checkpoint": (
        "the student",
        lambda path, _, data: trainer(max_epochs=1).fit(student(str(path)), data),
    ),
    "a test of a checkpoint": (
        "the student",
        lambda path, _, data: trainer().test(student("mlp-8"), data, ckpt_path=path, verbose=False),
    ),
    "predictions of a checkpoint": (
        "the student",
        lambda path, _, data: trainer().predict(student("mlp-8"), data, ckpt_path=path),
    ),
    "a validation of what was loaded": (
        "the student",
        lambda path, _, data: trainer().validate(Supervised.load_from_checkpoint(path), data, verbose=False),
    ),
    "a test after the training": ("the student", lambda _, model, data: trainer().test(model, data, verbose=False)),
    "a resumed training": ("the student", lambda path, _, data: trainer().fit(student("mlp-8"), data, ckpt_path=path)),
}


@pytest.fixture(params=MEETINGS)
def meeting(request: pytest.FixtureRequest) -> tuple[str, Meet]:
    return MEETINGS[request.param]


def test_classes_in_another_order_are_refused(meeting: tuple[str, Meet], run: tuple[Path, Distiller]) -> None:
    who, meet = meeting
    with pytest.raises(ValueError, match=f"{who} learned them, found that class 0 is 'bee', was 'ant': number them so"):
        meet(*run, named(SHIFTED))


def test_other_names_and_inputs_are_told(meeting: tuple[str, Meet], run: tuple[Path, Distiller]) -> None:
    who, meet = meeting
    other = named(["ant", "bee", "tomcat"], mean=0.5)
    found = r"class 2 is 'tomcat', was 'cat'; image_input is .*0\.5.*, was .*0\.0.*: is that meant"
    with pytest.warns(UserWarning, match=f"data that {who} learned from, found that {found}"):
        meet(*run, other)


@pytest.mark.parametrize("names", [LEARNED, None])
def test_equal_or_unknown_data_raise_no_alarm(
    names: list[str] | None, meeting: tuple[str, Meet], run: tuple[Path, Distiller]
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is that meant")
        meeting[1](*run, named(names))


def test_networks_are_compared_where_data_have_no_names(run: tuple[Path, Distiller], tmp_path: Path) -> None:
    content = torch.load(run[0], weights_only=True)
    content["data"]["class_names"] = SHIFTED
    torch.save(content, tmp_path / "b.ckpt")
    found = "learned them, found that class 0 is 'ant', was 'bee'"
    for first, teachers in (("mlp-8", [run[0], tmp_path / "b.ckpt"]), (run[0], [tmp_path / "b.ckpt"])):
        with pytest.raises(ValueError, match=f"teacher .*b.ckpt {found}"):
            trainer().fit(build("kd-teachers", str(first), list(map(str, teachers))), named(None))


def test_shapes_and_tasks_are_told(run: tuple[Path, Distiller]) -> None:
    with pytest.warns(UserWarning, match=r"found that input_shape is \[4, 4\], was \[1, 4, 4\]: is that meant"):
        trainer().test(student("mlp-8"), named(LEARNED, shape=(4, 4)), ckpt_path=run[0], verbose=False)
    content = torch.load(run[0], weights_only=True)
    content["hyper_parameters"]["task"] = "multilabel"
    other = run[0].with_name("several.ckpt")
    torch.save(content, other)
    with pytest.warns(UserWarning, match="found that task is classification, was multilabel: is that meant"):
        teach(load_student(other), named(LEARNED))


def test_other_rows_are_told_where_a_training_goes_on(run: tuple[Path, Distiller]) -> None:
    with pytest.warns(UserWarning, match="the student learned from, found that rows, labels or their split differ"):
        trainer().fit(student("mlp-8"), named(LEARNED, seed=1), ckpt_path=run[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is that meant")
        trainer().test(student("mlp-8"), named(LEARNED, seed=1), ckpt_path=run[0], verbose=False)
        teach(str(run[0]), named(LEARNED, seed=1))


@pytest.mark.parametrize("damage", ["text", {"class_names": "abc"}, {"class_names": ["one"], "input_shape": 3}])
def test_a_damaged_description_stops_no_test(damage: Any, run: tuple[Path, Distiller], tmp_path: Path) -> None:
    torch.save(torch.load(run[0], weights_only=True) | {"data": damage}, tmp_path / "a.ckpt")
    trainer().test(student("mlp-8"), named(LEARNED), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_folders_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "a", dict.fromkeys(("train", "test"), LEARNED))
    write_folder(tmp_path / "b", dict.fromkeys(("train", "test"), SHIFTED))
    tiny = (*QUIET, "--model.student=cnn-2", "--data.image_size=8", "--trainer.max_epochs=1")
    call("fit", *configs("supervised", "image_folder"), *tiny, "--data.root=a", "--checkpoint.dirpath=t")
    with pytest.raises(ValueError, match=r"teacher t/last.ckpt learned them, found that class 0 is 'bee', was 'ant'"):
        call("fit", *configs("kd", "image_folder"), *tiny, "--data.root=b", "--model.teacher=t/last.ckpt")
    with pytest.raises(ValueError, match="the student learned them, found that class 0 is 'bee', was 'ant'"):
        call("test", *configs("supervised", "image_folder"), *tiny, "--data.root=b", "--ckpt_path=t/last.ckpt")
