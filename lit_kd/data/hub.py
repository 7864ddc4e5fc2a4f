"""Data sets in the format of Hugging Face that are on this machine; nothing is ever downloaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_kd.data.columns import Table
from lit_kd.data.labels import Labels
from lit_kd.data.rows import ItemRows, Rows
from lit_kd.data.tables import TableDataModule
from lit_kd.models.files import optional

VALIDATION = ("validation", "val", "valid", "dev")
Tokens = dict[str, list[int]]


class HFDatasetModule(TableDataModule):
    """A data set that ``datasets.save_to_disk`` wrote, or a folder of parquet, csv, json or image files.

    It needs the extra ``lit_kd[hf]``. Such a folder is read as ``datasets.load_dataset`` reads it, which keeps a copy
    in its cache. Nothing is downloaded: names of data sets or tokenizers on the Hub are refused. Say what the network
    reads by `images`, `text` or `features`. Classes are numbered as the data set says, or else sorted.

    Args:
        path: The folder.
        train: The split to train on.
        test: The split to test on, or the size of the one to hold out. Default: the split ``test``, or 0.2.
        val: The split for validation, or its size. Default: the split ``validation``, or 0.1.
        text: The column of texts. `x` is then a mapping: ``input_ids``, ``attention_mask`` and what else the tokenizer
            gives, ``(B, L)``, padded to the longest text of the batch.
        tokenizer: The folder of a tokenizer that ``save_pretrained`` wrote.
        max_length: Tokens of a text to keep.
        **shared: See `CSVDataModule`; `features` may be lists of equally many numbers, such as embeddings.
    """

    def __init__(
        self,
        path: str,
        train: str = "train",
        test: int | float | str | None = None,
        val: int | float | str | None = None,
        text: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        **shared: Any,
    ) -> None:
        splits = _splits(path)
        if test is None:
            test = "test" if "test" in splits else 0.2
        if val is None:
            val = next((name for name in VALIDATION if name in splits), 0.1)
        size = 0 if isinstance(test, str) else test
        super().__init__(size, val=0 if isinstance(val, str) else val, **shared)
        self.text = text
        self.max_length = max_length
        if text is not None and (tokenizer is None or self.features or self.images):
            raise ValueError(f"expected with text={text!r} a tokenizer, and neither features nor images: set them so")
        self.tokenizer: Any = None if tokenizer is None else _tokenizer(tokenizer)
        self.sets = {}
        for part, split in {"train": train, "val": val, "test": test}.items():
            if isinstance(split, str):
                if split not in splits:
                    raise ValueError(f"{path}: expected as {part} one of its splits {list(splits)}, found {split!r}")
                self.sets[part] = splits[split]
        self.media = [name for name, kind in self.sets["train"].features.items() if hasattr(kind, "decode_example")]
        kind = self.sets["train"].features.get(self.label)
        names: list[str] | None = getattr(kind, "names", None)
        tables = {part: self._table(f"{path}, {part}", rows) for part, rows in self.sets.items()}
        self.use(tables, names)

    def look(self) -> None:
        """Find out the shape of an input; that of a text is open."""
        if self.text is not None:
            return
        if self.media and self.images is None and self.features is None:
            raise ValueError(f"expected what to read, by images, text or features, found none: set images={self.media}")
        super().look()

    def rows(self, part: str, labels: Labels, augment: bool = False) -> Rows:
        """The inputs of a split: texts as tokens."""
        if self.text is None:
            return super().rows(part, labels, augment)
        texts = self._texts(part)
        found = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        items = [dict(zip(found, row, strict=True)) for row in zip(*found.values(), strict=True)]
        pairs = list(zip(items, labels.tolist(), strict=True))
        return ItemRows(pairs, partial(_padded, self.tokenizer))

    def pictures(self, part: str) -> Sequence[Any]:
        """The images of a split, not decoded yet."""
        self.tables[part].column(self.images or "", "images")
        return _Pictures(self._encoded(part), f"{self.tables[part].name}, {self.images!r}")

    def identity(self) -> bytes:
        """All features or texts; of images the first and the last."""
        if self.text is not None:
            return "\n".join(self._texts("train")).encode()
        if self.images is None:
            return super().identity()
        cells = self._encoded("train")
        return repr((cells[0], cells[len(cells) - 1])).encode()

    def _table(self, name: str, rows: Any) -> Table:
        """The columns of a split, classes by name; images are there by name alone, as they are read one by one."""
        columns = {c: [None] * len(rows) if c in self.media else list(rows[c]) for c in rows.column_names}
        names = getattr(rows.features.get(self.label), "names", None)
        if names is not None:
            columns[self.label] = [None if c is None or c < 0 else names[c] for c in columns[self.label]]
        return Table(name, columns)

    def _texts(self, part: str) -> list[str]:
        table = self.tables[part]
        texts = table.column(self.text or "", "text")
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{table.name}: expected a text in {self.text!r}, found {text!r} in row {row + 1}")
        return texts

    def _encoded(self, part: str) -> Any:
        from datasets import Image

        return self.sets[part].cast_column(self.images, Image(decode=False))[self.images]


class _Pictures(Sequence[Any]):
    """Encoded images as open files or paths."""

    def __init__(self, cells: Any, name: str) -> None:
        self.cells, self.name = cells, name

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, row: Any) -> Any:
        cell = self.cells[row] or {"bytes": b"", "path": None}
        return cell["path"] if cell["bytes"] is None else _Open(cell["bytes"], f"{self.name}, row {row + 1}")


class _Open(BytesIO):
    """The content of a file, and what messages call it."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.place = name

    def __str__(self) -> str:
        return self.place


def _padded(tokenizer: Any, items: list[tuple[Tokens, int]]) -> tuple[dict[str, Tensor], Tensor]:
    texts = tokenizer.pad([tokens for tokens, _ in items], return_tensors="pt")
    return dict(texts), torch.tensor([label for _, label in items])


def _splits(path: str) -> dict[str, Any]:
    """The splits of a data set on this machine."""
    datasets, folder = optional("datasets", "hf", "HFDatasetModule"), Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected the folder of a data set, found none at {path}: nothing is downloaded, so fetch it before, by "
            "datasets.load_dataset and save_to_disk"
        )
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    with _offline(datasets):
        found = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    splits = found if isinstance(found, dict) else {"train": found}
    return {str(name): rows.with_format(None) for name, rows in splits.items()}


def _tokenizer(path: str) -> Any:
    transformers, folder = optional("transformers", "hf", "text"), Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"expected the folder of a tokenizer, found none at {path}: nothing is downloaded, so fetch it before, by "
            "from_pretrained and save_pretrained"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{path}: expected a tokenizer with a padding token, found none: set its pad_token, and save it"
        )
    return tokenizer


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Let the library reach for nothing for a while: a folder's README may name files elsewhere."""
    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
