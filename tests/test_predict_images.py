"""``lit-kd predict CHECKPOINT IMAGES``: files become inputs as in the training's evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import call, read_csv
from methods import trainer
from PIL import Image
from test_data_vision import write_mnist

from lit_kd import Supervised
from lit_kd.data import DataModule, FashionMNISTDataModule, ImageFolderDataModule
from lit_kd.models.images import ImageInput


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random pictures of many sizes, modes and formats."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, each in (("train", 8), ("test", 4)):
        for number, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                size = (int(rng.integers(9, 30)), int(rng.integers(9, 30)), 4)
                picture = Image.fromarray(rng.integers(0, 128, size, dtype=np.uint8) + 100 * number, "RGBA")
                mode, suffix = [("RGB", "png"), ("L", "png"), ("RGB", "jpg"), ("RGBA", "png")][i % 4]
                picture.convert(mode).save(root / split / name / f"{i}.{suffix}")
    return root


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "student.ckpt"
    train(images(folder), path)
    return path


def images(folder: Path) -> ImageFolderDataModule:
    return ImageFolderDataModule(root=str(folder), image_size=12, meta=2, val=2, batch_size=4, seed=0)


def train(data: DataModule, path: Path) -> None:
    assert data.input_shape is not None
    fitted = trainer(max_epochs=3)
    fitted.fit(Supervised("cnn-4", num_classes=data.num_classes, input_shape=list(data.input_shape)), data)
    fitted.save_checkpoint(path)


def by_lightning(checkpoint: Path, data: DataModule) -> tuple[list[int], list[float]]:
    """Classes and probabilities of the test rows."""
    batches = trainer().predict(Supervised.load_from_checkpoint(checkpoint), datamodule=data)
    assert batches is not None
    classes, probabilities = (torch.cat([batch[key] for batch in batches]) for key in ("class", "probability"))
    return classes.tolist(), probabilities.tolist()


def assert_equal(rows: Sequence[dict[str, str]], names: Sequence[str], expected: tuple[list[int], list[float]]) -> None:
    assert [row["class"] for row in rows] == [names[c] for c in expected[0]]
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected[1], abs=2e-6)


def test_as_the_trainer_predicts(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    data = images(folder)
    call("predict", checkpoint, folder / "test", "--output", tmp_path / "p.csv")
    rows = read_csv(tmp_path / "p.csv")
    assert list(rows[0]) == ["file", "class", "probability"]
    expected = by_lightning(checkpoint, data)
    files = [Path(path).relative_to(folder / "test").as_posix() for path in data.parts.test.rows.dataset.files]
    assert [row["file"] for row in rows] == sorted(files) == files
    assert len({row["probability"] for row in rows}) == 8  # it does look at the pictures
    assert_equal(rows, ["ant", "bee"], expected)


def test_grey_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    raw = write_mnist(tmp_path, "FashionMNIST")
    data = FashionMNISTDataModule(root=str(tmp_path), seed=0)
    train(data, Path("f.ckpt"))
    Path("out").mkdir()
    for i, image in enumerate(raw["t10k"]):
        Image.fromarray(image).save(f"out/{i:03}.png")
    call("predict", "f.ckpt", "out")
    assert data.class_names is not None
    assert_equal(read_csv(Path("predictions.csv")), data.class_names, by_lightning(Path("f.ckpt"), data))
    with pytest.raises(FileExistsError, match=r"predictions.csv is there already"):
        call("predict", "f.ckpt", "out")


def test_unreadable_images_are_reported(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(folder / "test", tmp_path / "own"))
    (own / "empty.png").touch()
    (own / "other.jpg").write_text("hello")
    whole = (own / "ant" / "0.png").read_bytes()
    (own / "cut.png").write_bytes(whole[: len(whole) // 2])
    (own / "notes.txt").touch()
    (own / ".ipynb_checkpoints").mkdir()
    for hidden in (own / "._0.png", own / ".ipynb_checkpoints" / "0-checkpoint.png"):
        hidden.write_bytes(whole)
    call("predict", checkpoint, own, "--output", tmp_path / "p.csv")
    printed = capsys.readouterr()
    assert "8 images classified" in printed.out
    assert "3 unreadable, 1 other files left out" in printed.out
    skipped = [line for line in printed.err.splitlines() if line.startswith("skipped")]
    assert [Path(line.split(":")[0].split()[1]).name for line in skipped] == ["cut.png", "empty.png", "other.jpg"]
    call("predict", checkpoint, folder / "test", "--output", tmp_path / "q.csv")
    assert (tmp_path / "p.csv").read_text() == (tmp_path / "q.csv").read_text()

    bad = tmp_path / "bad"
    bad.mkdir()
    (own / "cut.png").rename(bad / "cut.png")
    with pytest.raises(ValueError, match="expected images, found none of 1 files readable"):
        call("predict", checkpoint, bad, "--output", tmp_path / "r.csv")
    assert not (tmp_path / "r.csv").exists()


def test_errors(checkpoint: Path, teacher_file: Path, folder: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "p.csv")
    with pytest.raises(ValueError, match="expected a checkpoint that tells how an image becomes its input"):
        call("predict", teacher_file, folder, *out)
    with pytest.raises(FileNotFoundError, match="no directory at"):
        call("predict", checkpoint, tmp_path / "gone", *out)
    (tmp_path / "a.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"expected images \(.*\), found 1 other files"):
        call("predict", checkpoint, tmp_path, *out)
    with pytest.raises(FileNotFoundError, match=r"No such file.*gone\.ckpt"):
        call("predict", tmp_path / "gone.ckpt", folder, *out)


def test_a_damaged_description(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["data"]["image_input"]["std"] = [0.0, 1.0, 1.0]
    torch.save(content, tmp_path / "c.ckpt")
    with pytest.raises(ValueError, match="expected 1 or 3 channels"):
        call("predict", tmp_path / "c.ckpt", folder, "--output", tmp_path / "p.csv")


@pytest.mark.parametrize("channels", [1, 3])
def test_greys_of_more_than_8_bits(channels: int, tmp_path: Path) -> None:
    byte = np.arange(256, dtype=np.uint8).reshape(16, 16)
    word = byte.astype(np.uint16) * 257  # 0 stays 0, and white is white
    Image.fromarray(byte).save(tmp_path / "8.png")
    Image.fromarray(word).save(tmp_path / "16.png")
    Image.fromarray(word).save(tmp_path / "16.tif")
    (tmp_path / "16.pgm").write_bytes(b"P5 16 16 65535\n" + word.astype(">u2").tobytes())
    big = Image.frombytes("I;16B", (16, 16), word.astype(">u2").tobytes())
    big.save(tmp_path / "big.tif")
    Image.fromarray(word.astype(np.int32)).save(tmp_path / "32.tif")
    Image.fromarray(byte.astype(np.float32) / 255).save(tmp_path / "float.tif")
    images = ImageInput(channels, 16, [0.0] * channels, [1.0] * channels)
    expected = torch.from_numpy(byte / np.float32(255)).expand(channels, 16, 16)
    for path in tmp_path.iterdir():
        assert torch.equal(images.transform()(images.open(path)), expected), path

    for wrong in (-0.1, 1.1, np.nan):
        Image.fromarray(np.full((2, 2), wrong, dtype=np.float32)).save(tmp_path / "wrong.tif")
        with pytest.raises(ValueError, match=r"expected grey values in \[0, 1\], found"):
            images.open(tmp_path / "wrong.tif")


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif(turn: int, tmp_path: Path) -> None:
    seen = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    # how the camera stored what is seen: its row 0 and its column 0 are these sides of the picture
    stored = {
        1: seen,
        2: seen[:, ::-1],
        3: seen[::-1, ::-1],
        4: seen[::-1],
        5: seen.transpose(1, 0, 2),
        6: np.rot90(seen),
        7: seen[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(seen, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x112] = turn
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(ImageInput(3, 5, [0.0] * 3, [1.0] * 3).open(tmp_path / "a.png"), seen)


@pytest.mark.parametrize("wrong", [{"channels": 2}, {"size": 0}, {"mean": [0.1, 0.2]}, {"std": [-1.0]}])
def test_image_input_is_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match="expected 1 or 3 channels, a size of 1 or more, and a mean and a positive std"
    ):
        ImageInput(**({"channels": 1, "size": 8, "mean": [0.0], "std": [1.0]} | wrong))  # type: ignore[arg-type]
