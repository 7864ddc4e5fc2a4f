"""Data sets in the format of Hugging Face, from folders alone."""

from __future__ import annotations

import io
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from commands import QUIET, call, configs
from methods import build, trainer
from PIL import Image
from test_data_modules import gather
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from lit_kd.data import UNLABELED, HFDatasetModule
from lit_kd.models.images import ImageInput

NAMES = ["dog", "cat", "ant"]  # in this order, which is not that of the alphabet
WORDS = ["[PAD]", "[UNK]", *"abcdefgh"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def pixels(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (10, 12, 3), dtype=np.uint8)


def table(rows: int) -> datasets.Dataset:
    kinds = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "size": datasets.Value("int32"),
            "embedding": datasets.List(datasets.Value("float32"), 4),
            "label": datasets.ClassLabel(names=NAMES),
            "name": datasets.Value("string"),
        }
    )
    cells = {
        "image": [Image.fromarray(pixels(row)) for row in range(rows)],
        "text": [" ".join("abcdefgh"[: 1 + row % 5]) for row in range(rows)],
        "size": list(range(rows)),
        "embedding": np.random.default_rng(0).normal(size=(rows, 4)).tolist(),
        "label": [row % 3 for row in range(rows)],
        "name": [f"n{row}" for row in range(rows)],
    }
    return datasets.Dataset.from_dict(cells, kinds)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    table(60).save_to_disk(folder / "one")
    parts = {"train": table(60), "validation": table(12), "test": table(9)}
    datasets.DatasetDict(parts).save_to_disk(folder / "three")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    for name, pad in (("tokenizer", {"pad_token": "[PAD]"}), ("unpadded", {})):
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **pad).save_pretrained(folder / name)
    return str(folder)


def ready(path: str, **options: Any) -> HFDatasetModule:
    data = HFDatasetModule(path, **({"seed": 0} | options))
    data.setup()
    return data


def test_features(saved: str) -> None:
    data = ready(f"{saved}/one", features=["size", "embedding"], id="name")
    assert (data.class_names, data.input_shape) == (NAMES, (5,))
    x, y, index = gather(data.test_dataloader())
    rows = [int(data.parts.ids[i][1:]) for i in index]
    assert len(rows) == 12
    assert y.tolist() == [row % 3 for row in rows]
    raw = np.concatenate([np.arange(60)[:, None], np.random.default_rng(0).normal(size=(60, 4))], axis=1)
    kept = np.delete(raw, rows, axis=0)
    np.testing.assert_allclose(x, ((raw - kept.mean(0)) / kept.std(0))[rows], rtol=1e-4, atol=1e-5)


def test_splits(saved: str) -> None:
    data = ready(f"{saved}/three", features=["size"], meta=3)
    assert (data.train_size, data.meta_size, len(data.parts.val), len(data.parts.test)) == (60, 3, 9, 9)
    data = ready(f"{saved}/three", features=["size"], val=0.1, test=0.2, meta=0.1)
    assert (data.train_size, data.meta_size, len(data.parts.val), len(data.parts.test)) == (36, 6, 6, 12)
    assert len(ready(f"{saved}/three", features=["size"], test="validation", val=6).parts.test) == 12


def test_images(saved: str) -> None:
    data = ready(f"{saved}/three", images="image", image_size=8, augment=False, meta=0)
    x, y, _ = gather(data.test_dataloader())
    file = io.BytesIO()
    Image.fromarray(pixels(4)).save(file, "png")
    images = data.image_input or ImageInput(1, 1, [0], [1])
    assert torch.equal(x[4], images.transform()(images.open(file)))
    assert y.tolist() == [row % 3 for row in range(9)]
    trainer(max_epochs=1).fit(build("kd", teachers=["mlp-8"], input_shape=[3, 8, 8]), data)


def test_texts(saved: str) -> None:
    data = ready(f"{saved}/one", text="text", tokenizer=f"{saved}/tokenizer", max_length=4, id="name", batch_size=12)
    [batch] = data.test_dataloader()
    assert {*batch.x} >= {"input_ids", "attention_mask"}
    rows = [int(data.parts.ids[i][1:]) for i in batch.index]
    longest = max(min(1 + row % 5, 4) for row in rows)
    for row, tokens, mask in zip(rows, batch.x["input_ids"], batch.x["attention_mask"], strict=True):
        words = min(1 + row % 5, 4)
        assert tokens.tolist() == [*range(2, 2 + words), *[0] * (longest - words)]
        assert mask.tolist() == [1] * words + [0] * (longest - words)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    nets = [BertForSequenceClassification(BertConfig(vocab_size=10, num_labels=3, **sizes)) for _ in range(2)]
    three = ready(f"{saved}/three", text="text", tokenizer=f"{saved}/tokenizer", meta=3)
    for fed in (data, three):
        trainer(max_epochs=1).fit(build("almkd-robust", nets[0], [nets[1]], input_shape=None), fed)


@pytest.mark.parametrize("kind", ["parquet", "csv", "json"])
def test_a_folder_of_files(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for split, rows in (("train", 60), ("test", 9)):
        plain = table(rows).remove_columns("image" if kind == "parquet" else ["image", "embedding"])
        getattr(plain, f"to_{kind}")(folder / f"{split}.{kind}")
    data = ready(str(folder), features=["size"])
    assert (len(data.parts.test), data.num_classes) == (9, 3)
    assert data.class_names == (NAMES if kind == "parquet" else ["0", "1", "2"])


def test_a_missing_label(tmp_path: Path) -> None:
    def hide(row: dict[str, Any]) -> dict[str, Any]:
        return {"label": {4: None, 5: -1}.get(row["size"], row["label"])}

    table(60).map(hide).save_to_disk(tmp_path / "hidden")
    data = ready(str(tmp_path / "hidden"), features=["size"])
    assert [data.parts.ids[i] for i in np.flatnonzero(data.labels == UNLABELED)] == ["4", "5"]


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "a name on the Hub": ("imdb", {}, r"the folder of a data set, found none at .*imdb: nothing is downloaded"),
    "nothing to read": ("one", {}, r"expected what to read, by images, text or features.*set images=\['image'\]"),
    "no tokenizer": (
        "one",
        {"text": "text"},
        r"expected with text='text' a tokenizer, and neither features nor images",
    ),
    "a tokenizer of the Hub": (
        "one",
        {"text": "text", "tokenizer": "bert-base-uncased"},
        r"the folder of a tokenizer, found none at bert-base-uncased: nothing is downloaded",
    ),
    "no padding": ("one", {"text": "text", "tokenizer": "unpadded"}, r"expected a tokenizer with a padding token"),
    "no text": ("one", {"text": "size", "tokenizer": "tokenizer"}, r"expected a text in 'size', found 0 in row 1"),
    "no split": ("three", {"train": "all"}, r"expected as train one of its splits \['train', 'validation', 'test'\]"),
    "no image": ("one", {"images": "picture"}, r"expected the column 'picture', found image, text, size, .*set images"),
    "a text as feature": ("one", {"features": ["text"]}, r"a finite number in each row of 'text', found 'a' in row 1"),
    "an image as feature": (
        "one",
        {"features": ["image"]},
        r"a finite number in each row of 'image', found None in row",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str, saved: str) -> None:
    path, options, match = BAD[name]
    if options.get("tokenizer") in ("tokenizer", "unpadded"):
        options = options | {"tokenizer": f"{saved}/{options['tokenizer']}"}
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        ready(f"{saved}/{path}", **options)


def test_no_images_in_it(tmp_path: Path) -> None:
    rows = table(30).cast_column("image", datasets.Image(decode=False)).to_list()
    rows[3]["image"]["bytes"] = b"no picture"
    kinds = table(3).features
    datasets.Dataset.from_list(rows, kinds).save_to_disk(tmp_path / "damaged")
    data = ready(str(tmp_path / "damaged"), images="image", image_size=8)
    with pytest.raises(ValueError, match=r"expected an image in .*damaged, train, 'image', row 4, found another file"):
        data.parts.source.plain.fetch([3])


def test_command_line(saved: str) -> None:
    options = (f"--data.path={saved}/three", "--data.images=image", "--data.image_size=8", "--trainer.max_epochs=1")
    call("fit", *configs("supervised", "hf_dataset"), *options, "--data.meta=3", "--model.student=mlp-8", *QUIET)
    assert list(Path().rglob("last.ckpt"))
