"""Image data modules, on tiny files in the real formats."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from lit_kd.data import (
    Batch,
    CIFAR10DataModule,
    CIFAR100DataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
)
from lit_kd.data.vision import ImageTransform, random_crop, random_flip

torch.set_num_threads(1)


def gather(loader: Any) -> Batch:
    batches = list(loader)
    index = None if batches[0].index is None else torch.cat([b.index for b in batches])
    return Batch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]), index)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def write_mnist(root: Path, name: str, train: int = 100, test: int = 20) -> dict[str, np.ndarray]:
    """Write files in the idx format: a magic number, the sizes, the bytes."""
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    images = {}
    for prefix, n in (("train", train), ("t10k", test)):
        x = rng().integers(0, 256, (n, 28, 28), dtype=np.uint8)
        y = (np.arange(n) % 10).astype(np.uint8)
        x[:, 0, 0] = np.arange(n)  # names the row
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, n, 28, 28) + x.tobytes())
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + y.tobytes())
        images[prefix] = x
    return images


@pytest.mark.parametrize(
    ("kind", "name", "mean", "std"),
    [(MNISTDataModule, "MNIST", 0.1307, 0.3081), (FashionMNISTDataModule, "FashionMNIST", 0.2860, 0.3530)],
)
def test_mnist(tmp_path: Path, kind: Any, name: str, mean: float, std: float) -> None:
    images = write_mnist(tmp_path, name)
    data = kind(root=str(tmp_path), seed=0, batch_size=16, noise="asymmetric", noise_rate=1.0)
    assert data.input_shape == (1, 28, 28)
    assert data.num_classes == len(data.class_names) == 10
    data.setup()
    assert (data.train_size, data.meta_size) == (80, 10)
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "t10k": data.test_dataloader()}
    for part, loader in loaders.items():
        x, y, _ = gather(loader)
        raw = "t10k" if part == "t10k" else "train"
        rows = (x[:, 0, 0, 0] * std + mean).mul(255).round().long().numpy()
        expected = (images[raw][rows].astype(np.float32) / 255 - mean) / std
        np.testing.assert_allclose(x[:, 0], expected, rtol=1e-5, atol=1e-5)
        true = rows % 10
        if part != "train":
            np.testing.assert_array_equal(y, true)
        else:
            np.testing.assert_array_equal(y, [kind.confusable.get(c, c) for c in true])


def test_mnist_limit(tmp_path: Path) -> None:
    write_mnist(tmp_path, "MNIST")
    kept = []
    for seed in (0, 1):
        data = MNISTDataModule(root=str(tmp_path), limit=50, meta=10, val=10, seed=seed)
        data.setup()
        assert (data.train_size, data.meta_size) == (30, 10)
        assert torch.bincount(data.labels).tolist() == [4] * 10
        loaders = data.train_dataloader(), data.loader(data.parts.meta_rows()), data.val_dataloader()
        kept.append(sorted(torch.cat([gather(loader).x[:, 0, 0, 0] for loader in loaders]).tolist()))
    assert kept[0] == kept[1]  # the same fifty rows under both seeds


def test_download_is_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(self: Any) -> None:
        calls.append(self.root)
        write_mnist(Path(self.root), "MNIST")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    data = MNISTDataModule(root=str(tmp_path), download=True)
    data.setup()  # without a trainer it prepares
    assert calls == [str(tmp_path)]


def write_cifar(root: Path, kind: type, monkeypatch: pytest.MonkeyPatch, classes: int) -> np.ndarray:
    """Write pickles in the real layout, and let torchvision expect their checksums. Returns the training bytes."""
    source = getattr(datasets, kind.dataset)  # type: ignore[attr-defined]
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    key = "labels" if classes == 10 else "fine_labels"
    per_file = classes * 4
    everything = []

    def write(name: str, content: dict[str, Any]) -> str:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for which, entries in lists.items():
        for name, _ in getattr(source, which):
            x = rng().integers(0, 256, (per_file, 3072), dtype=np.uint8)
            x[:, 0] = len(everything)
            labels = [i % classes for i in range(per_file)]
            entries.append([name, write(name, {"data": x, key: labels})])
            if which == "train_list":
                everything.append(x)
        monkeypatch.setattr(source, which, entries)
    names = [f"class {i}" for i in range(classes)]
    meta = dict(source.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: names})
    monkeypatch.setattr(source, "meta", meta)
    return np.concatenate(everything).reshape(-1, 3, 32, 32)


@pytest.mark.parametrize(("kind", "classes"), [(CIFAR10DataModule, 10), (CIFAR100DataModule, 100)])
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, classes: int) -> None:
    raw = write_cifar(tmp_path, kind, monkeypatch, classes)
    data = kind(root=str(tmp_path), augment=False, meta=0, val=0, seed=0, limit=None)
    data.setup()
    assert data.num_classes == len(data.class_names) == classes
    assert data.input_shape == raw.shape[1:]
    x, y, index = gather(data.train_dataloader())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (kind.mean, kind.std))
    assert index is not None
    expected = (torch.from_numpy(raw)[index] / 255 - mean) / std
    torch.testing.assert_close(x, expected)
    assert torch.equal(y, index % classes)
    assert len(gather(data.test_dataloader()).y) == 4 * classes

    data = kind(root=str(tmp_path), seed=0, meta=classes, val=classes)
    data.setup()
    torch.manual_seed(0)
    a = gather(data.train_dataloader())
    b = gather(data.train_dataloader())
    assert torch.equal(a.index, b.index)
    assert not torch.equal(a.x, b.x)
    torch.manual_seed(0)
    assert torch.equal(gather(data.train_dataloader()).x, a.x)
    val = data.val_dataloader()
    assert torch.equal(gather(val).x, gather(val).x)


def test_missing_and_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"MNIST/raw the files of MNIST, found .*Set download=true"):
        MNISTDataModule(root=str(tmp_path)).setup()
    write_cifar(tmp_path, CIFAR10DataModule, monkeypatch, 10)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut off")
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-py the files of CIFAR10, found some .* damaged"):
        CIFAR10DataModule(root=str(tmp_path)).setup()


# As the data set's own page lists them; the classes are numbered by the alphabet.
SUPERCLASSES = """
    beaver dolphin otter seal whale / aquarium_fish flatfish ray shark trout / orchid poppy rose sunflower tulip /
    bottle bowl can cup plate / apple mushroom orange pear sweet_pepper / clock keyboard lamp telephone television /
    bed chair couch table wardrobe / bee beetle butterfly caterpillar cockroach / bear leopard lion tiger wolf /
    bridge castle house road skyscraper / cloud forest mountain plain sea / camel cattle chimpanzee elephant kangaroo /
    fox porcupine possum raccoon skunk / crab lobster snail spider worm / baby boy girl man woman /
    crocodile dinosaur lizard snake turtle / hamster mouse rabbit shrew squirrel /
    maple_tree oak_tree palm_tree pine_tree willow_tree / bicycle bus motorcycle pickup_truck train /
    lawn_mower rocket streetcar tank tractor"""


def test_cifar100_noise_stays_within_a_superclass() -> None:
    groups = [group.split() for group in SUPERCLASSES.split("/")]
    names = sorted(name for group in groups for name in group)
    assert (len(groups), len(names), {len(group) for group in groups}) == (20, 100, {5})
    data = CIFAR100DataModule(noise="asymmetric", noise_rate=0.4)
    matrix = data.noise_matrix()
    assert matrix is not None
    for group in groups:
        numbers = sorted(names.index(name) for name in group)
        expected = 0.6 * np.eye(5) + 0.4 * np.roll(np.eye(5), 1, axis=1)
        np.testing.assert_allclose(matrix[np.ix_(numbers, numbers)], expected)


class TestTransforms:
    def test_crops_are_windows(self) -> None:
        x = torch.randint(1, 256, (300, 2, 5, 6), dtype=torch.uint8)
        out = random_crop(x, 2)
        assert out.shape == x.shape
        found = set()
        for image, crop in zip(x, out, strict=True):
            padded = torch.zeros(2, 9, 10, dtype=torch.uint8)
            padded[:, 2:7, 2:8] = image
            matches = [(i, j) for i in range(5) for j in range(5) if torch.equal(padded[:, i : i + 5, j : j + 6], crop)]
            assert len(matches) == 1
            found.add(matches[0])
        assert len(found) == 25  # every window occurs, so each image has its own draw

    def test_flips_are_mirror_images(self) -> None:
        x = torch.randint(0, 256, (1000, 1, 3, 4), dtype=torch.uint8)
        out, mirrored = random_flip(x), torch.from_numpy(x.numpy()[..., ::-1].copy())
        flipped = (out == mirrored).flatten(1).all(1)
        assert torch.equal(out[~flipped], x[~flipped])
        assert 430 < flipped.sum() < 570

    def test_same_as_torchvision(self) -> None:
        from torchvision import transforms as t

        x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
        theirs = t.Compose([t.ToTensor(), t.Normalize(mean, std)])
        expected = torch.stack([theirs(image.permute(1, 2, 0).numpy()) for image in x])
        torch.testing.assert_close(ImageTransform(mean, std)(x), expected)


def write_folder(root: Path, splits: dict[str, list[str]], each: int = 10) -> None:
    """Images of one colour, which names the class (red) and the row (green)."""
    classes = sorted({c for names in splits.values() for c in names})
    for split, names in splits.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                colour = (classes.index(name) * 50, i * 20, 100 * (split == "val"))
                Image.new("RGB", (20, 16), colour).save(root / split / name / f"{i}.png")


def colours(x: Any) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x[:, :, 4, 4] * std + mean) * 255).round().long()


class TestImageFolder:
    abc = ("ant", "bee", "cat")

    def test_train_and_test(self, tmp_path: Path) -> None:
        # The test split lacks a class, so its own numbering differs.
        write_folder(tmp_path, {"train": [*self.abc], "test": ["bee", "cat"]})
        data = ImageFolderDataModule(root=str(tmp_path), image_size=8, meta=6, val=3, seed=0, batch_size=8)
        assert data.num_classes == 3
        assert data.class_names == [*self.abc]
        assert data.input_shape == (3, 8, 8)
        with pytest.warns(UserWarning, match="test: no images of class ant"):
            data.setup()
        assert (data.train_size, data.meta_size) == (21, 6)
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            x, y, _ = gather(loader)
            assert x.shape[1:] == (3, 8, 8)
            assert torch.equal(colours(x)[:, 0], y * 50)
        assert sorted(gather(data.test_dataloader()).y.tolist()) == [1] * 10 + [2] * 10

    def test_own_val(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {part: [*self.abc] for part in ("train", "val", "test")})
        data = ImageFolderDataModule(root=str(tmp_path), image_size=8, meta=0.5, seed=0, train_on_meta=True)
        data.setup()
        assert (data.train_size, data.meta_size, len(data.parts.val)) == (30, 15, 15)
        x, y, index = gather(data.train_dataloader())
        assert index is not None
        assert torch.equal(colours(x)[:, 2] == 100, index >= 30)
        assert torch.equal(colours(x)[:, 0], y * 50)
        assert (colours(gather(data.val_dataloader()).x)[:, 2] == 100).all()

    def test_val_in_place_of_test(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"train": [*self.abc], "val": [*self.abc]})
        data = ImageFolderDataModule(root=str(tmp_path), image_size=8, seed=0)
        data.setup()
        assert (data.train_size, data.meta_size, len(data.parts.val), len(data.parts.test)) == (24, 3, 3, 30)
        before = data.fingerprint
        moved = tmp_path.rename(tmp_path.with_name("moved"))
        same, other = (ImageFolderDataModule(root=str(moved), seed=0) for _ in range(2))
        same.setup()
        assert same.fingerprint == before
        (moved / "train/ant/0.png").rename(moved / "train/ant/00.png")
        other.setup()
        assert other.fingerprint != before

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"a folder train/ with one folder .* found no such folder"):
            ImageFolderDataModule(root=str(tmp_path))
        (tmp_path / "train").mkdir()
        with pytest.raises(FileNotFoundError, match=r"found no class folder in it\. Set root"):
            ImageFolderDataModule(root=str(tmp_path))
        write_folder(tmp_path, {"train": ["ant", "bee"]})
        with pytest.raises(FileNotFoundError, match="a folder test/ or val/ with"):
            ImageFolderDataModule(root=str(tmp_path)).setup()
        (tmp_path / "test").mkdir()
        with pytest.raises(FileNotFoundError, match=r"a folder test/ with .* found no class folder in it"):
            ImageFolderDataModule(root=str(tmp_path)).setup()
        write_folder(tmp_path, {"test": ["wasp"]})
        (tmp_path / "train/ant/0.png").rename(tmp_path / "test/loose.png")
        with pytest.raises(ValueError, match=r"class folders of train, found \['loose.png', 'wasp'\]: remove"):
            ImageFolderDataModule(root=str(tmp_path)).setup()

    def test_hidden_files_and_folders_are_left_out(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {part: [*self.abc] for part in ("train", "val", "test")})
        plain = ImageFolderDataModule(root=str(tmp_path), image_size=8, seed=0)
        plain.setup()
        picture = (tmp_path / "train/ant/0.png").read_bytes()
        for part in ("train", "val", "test"):
            for name in (".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir", "ant/.ipynb_checkpoints"):
                (tmp_path / part / name).mkdir()
                (tmp_path / part / name / "0-checkpoint.png").write_bytes(picture)
            (tmp_path / part / "bee/._0.png").write_bytes(b"junk")
            (tmp_path / part / ".DS_Store").touch()
        data = ImageFolderDataModule(root=str(tmp_path), image_size=8, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            data.setup()
        assert data.class_names == plain.class_names == [*self.abc]
        assert (data.train_size, data.meta_size, len(data.parts.val), len(data.parts.test)) == (30, 3, 27, 30)
        assert data.fingerprint == plain.fingerprint
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            x, y, _ = gather(loader)
            assert torch.equal(colours(x)[:, 0], y * 50)

    def test_a_class_without_images(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {part: [*self.abc] for part in ("train", "val", "test")})
        for file in (tmp_path / "val/ant").iterdir():
            file.unlink()
        shutil.rmtree(tmp_path / "test/bee")
        data = ImageFolderDataModule(root=str(tmp_path), image_size=8, seed=0)
        with (
            pytest.warns(UserWarning, match="val: no images of class ant"),
            pytest.warns(UserWarning, match="test: no images of class bee"),
        ):
            data.setup()
        for loader, classes in ((data.val_dataloader(), [1, 2]), (data.test_dataloader(), [0, 2])):
            x, y, _ = gather(loader)
            assert y.unique().tolist() == classes
            assert torch.equal(colours(x)[:, 0], y * 50)
        for file in (tmp_path / "train/cat").iterdir():
            file.rename(file.with_suffix(".jfif"))
        (tmp_path / "train/ant/notes.txt").touch()
        with (
            pytest.warns(UserWarning, match=r"train: left out 11 files .* as notes.txt"),
            pytest.raises(ValueError, match=r"images in each folder of .*train, found none in \['cat'\]: fill or"),
        ):
            ImageFolderDataModule(root=str(tmp_path)).setup()

    def test_links_and_folders_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_folder(tmp_path, {part: [*self.abc] for part in ("train", "test")})
        (tmp_path / "train/bee").rename(tmp_path / "elsewhere")
        (tmp_path / "train/bee").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
        data = ImageFolderDataModule(root=str(tmp_path), image_size=8, seed=0)
        data.setup()
        assert data.labels.bincount().tolist() == [9] * 3  # 10 each, but for val
        scan = os.scandir

        def refuse(path: Any) -> Any:
            if Path(path).name == "bee":
                raise PermissionError(f"cannot read {path}")
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(PermissionError, match="bee"):
            ImageFolderDataModule(root=str(tmp_path)).setup()

    def test_a_photograph_is_turned_as_its_camera_says(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {part: ["ant"] for part in ("train", "test")})
        top = np.zeros((8, 8, 3), dtype=np.uint8)
        top[:4] = 255  # white above black, and in the camera that was held sideways, left of black
        exif = Image.Exif()
        exif[0x112] = 6  # to be turned by 90 degrees clockwise
        for path in (tmp_path / "test/ant").iterdir():
            Image.fromarray(np.rot90(top).copy()).save(path, exif=exif)
        data = ImageFolderDataModule(root=str(tmp_path), image_size=8, seed=0)
        data.setup()
        x = gather(data.test_dataloader()).x
        assert (x[:, :, :4] > 2).all()
        assert (x[:, :, 4:] < -1.5).all()
