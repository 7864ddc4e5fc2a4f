"""Your own tables: rows with a label, and features or a picture each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_kd.data.base import DataModule
from lit_kd.data.columns import Table
from lit_kd.data.folder import MEAN, STD, image_rows
from lit_kd.data.labels import Labels, Positions
from lit_kd.data.partition import Source, hold_out
from lit_kd.data.rows import Rows, TensorRows
from lit_kd.models.images import ImageInput
from lit_kd.types import UNLABELED


class TableDataModule(DataModule):
    """What all tables have in common; a subclass makes them and calls `use`.

    Args:
        test: Size of the test split, a fraction or a count, where there is no table of test rows. It is the same under
            every seed.
        label: The column of labels, names or numbers. Classes are what the training table has, sorted, numbers by
            value. A training row with an empty cell or -1 has no label.
        id: The column of the rows' names, each once. Default: a row's position.
        features: The columns that the network reads, names or patterns such as ``pixel_*``. Default: all numeric ones
            but for label, id and trusted. They are standardised by `mean` and `std`.
        images: The column of pictures to read in their place.
        trusted: The column that marks training rows, by true or 1, whose labels are known to be right: they are the
            meta split. Default: the meta split is drawn by `meta`.
        image_size: Height and width of pictures in pixels.
        augment: Train on random crops of random size and on random mirror images.
        meta: Size of the meta split, see `DataModule`. Default: 0.1, or what is `trusted`.
        **shared: See `DataModule`.

    Attributes:
        columns: The names of the features.
        mean: Their means over the training table without the test rows held out, ``(d,)``: the same under every seed.
        std: Their standard deviations, likewise; 1 where a feature is constant.
    """

    def __init__(
        self,
        test: int | float = 0.2,
        label: str = "label",
        id: str | None = None,
        features: list[str] | None = None,
        images: str | None = None,
        trusted: str | None = None,
        image_size: int = 64,
        augment: bool = True,
        meta: int | float | None = None,
        **shared: Any,
    ) -> None:
        if trusted is not None and meta is not None:
            raise ValueError(f"expected either trusted or meta, found {trusted!r} and {meta}: remove one")
        if features is not None and images is not None:
            raise ValueError(f"expected either features or images, found {features} and {images!r}: remove one")
        super().__init__(meta=0.1 if meta is None else meta, **shared)
        self.test = test
        self.label = label
        self.id = id
        self.features = features
        self.images = images
        self.trusted_column = trusted
        self.image_size = image_size
        self.augment = augment
        self.columns: list[str] = []

    def use(self, tables: Mapping[str, Table], classes: list[str] | None = None) -> None:
        """Take the tables ``train`` and, if there are any, ``val`` and ``test``; `classes` by number, if known."""
        for table in tables.values():
            if not len(table):
                raise ValueError(f"{table.name}: expected rows, found none below the columns {table.listed()}")
        self.tables, train = tables, tables["train"]
        self.class_names = classes or train.classes(self.label)
        self.num_classes = len(self.class_names)
        self.look()

    def look(self) -> None:
        """Find out the shape of an input."""
        if self.images is not None:
            self.image_input = ImageInput(3, self.image_size, MEAN, STD)
            self.input_shape = self.image_input.shape
            return
        train, others = self.tables["train"], {self.label, *filter(None, (self.id, self.trusted_column))}
        self.columns = train.numeric(self.features, others)
        left = [name for name in train.columns if name not in {*others, *self.columns}]
        if not self.columns:
            raise ValueError(
                f"{train.name}: expected columns of numbers, found {train.listed()}: set images to a column of pictures"
            )
        self.left = left if self.features is None else []
        self.raw = {part: table.numbers(self.columns) for part, table in self.tables.items()}
        widths = {part: x.shape[1] for part, x in self.raw.items()}
        if len({*widths.values()}) > 1:
            raise ValueError(f"expected as many features in each table, found {widths}: make its lists equally long")
        self.input_shape = (widths["train"],)

    def load(self) -> Source:
        """Check labels, ids and marks, and make the rows."""
        names = self.class_names or []
        labels = {part: table.labels(self.label, names, part == "train") for part, table in self.tables.items()}
        ids = {part: table.ids(self.id) for part, table in self.tables.items()}
        self._check_ids(ids)
        trusted, size = self._trusted(labels["train"]), 0 if "test" in self.tables else self.test
        if self.images is None and self.columns:
            self._standardise(hold_out(labels["train"], size, trusted)[0])
        rows = {part: self.rows(part, y) for part, y in labels.items()}
        source = Source(self.rows("train", labels["train"], self.augment), rows["train"], labels["train"])
        source.test, source.test_labels, source.test_size = rows.get("test"), labels.get("test"), size
        source.val, source.val_labels = rows.get("val"), labels.get("val")
        if "val" in rows:
            source.val_train = self.rows("val", labels["val"], self.augment)
        source.ids, source.val_ids, source.test_ids = ids["train"], ids.get("val"), ids.get("test")
        source.meta, source.identity = trusted, self.identity()
        return source

    def rows(self, part: str, labels: Labels, augment: bool = False) -> Rows:
        """The inputs of a table."""
        if self.image_input is None:
            return TensorRows(self.x[part])
        return image_rows(self.pictures(part), labels, self.image_input, augment)

    @abstractmethod
    def pictures(self, part: str) -> Sequence[Any]:
        """The picture of each row of a table, as `ImageInput.open` reads it."""

    def identity(self) -> bytes:
        """What tells these training rows from others."""
        features: bytes = self.x["train"].numpy().tobytes()
        return features

    def _standardise(self, tested: Positions) -> None:
        kept = np.delete(self.raw["train"], tested, axis=0)
        self.mean, std = kept.mean(axis=0), kept.std(axis=0)
        self.std = np.where(std > 0, std, 1.0)
        scaled = {part: ((x - self.mean) / self.std).astype(np.float32) for part, x in self.raw.items()}
        self.x = {part: torch.from_numpy(x) for part, x in scaled.items()}
        told, left = (shorten(", ".join(names), 80) for names in (self.columns, self.left))
        also = f"; left out, as they hold no numbers: {left}" if left else ""
        rank_zero_info(f"{self.tables['train'].name}: the features are {told}, standardised by {len(kept)} rows{also}")

    def _check_ids(self, ids: Mapping[str, list[str] | None]) -> None:
        """Refuse a name that two tables have: a row of both would be trained on and measured."""
        where: dict[str, str] = {}
        for part, own in ids.items():
            for name in own or ():
                if where.setdefault(name, part) != part:
                    raise ValueError(
                        f"expected ids that differ from those of {self.tables[where[name]].name} in "
                        f"{self.tables[part].name}, found {name!r} in both: remove the row from one, or "
                        "give each row an id of its own"
                    )

    def _trusted(self, labels: Labels) -> Positions | None:
        """The rows that are marked as trusted, if there is a column of marks."""
        if self.trusted_column is None:
            return None
        table = self.tables["train"]
        rows = np.flatnonzero(table.marked(self.trusted_column))
        if not len(rows):
            raise ValueError(f"{table.name}: expected trusted rows marked in {self.trusted_column!r}, found none")
        bare = rows[labels[rows] == UNLABELED]
        if len(bare):
            raise ValueError(
                f"{table.name}: expected a label in each trusted row, found none in row {bare[0] + 1} ({len(bare)} "
                "such rows): label them, or trust them not"
            )
        cut = [part for part in ("test", "val") if part not in self.tables and getattr(self, part)]
        if cut:
            rank_zero_warn(
                f"the {' and '.join(cut)} rows are cut from those that {self.trusted_column!r} does not mark: some "
                "of their labels may be wrong, and what is measured on them too low. Give tables of checked rows"
            )
        return rows


class CSVDataModule(TableDataModule):
    r"""Tables in .csv files, with a line of names on top, or .parquet files.

    Args:
        train: The path of the training table.
        test: The path of a table of test rows, or the size of the test split to hold out.
        val: The path of a table of validation rows, or the size of that split.
        **shared: Of the columns, `label`, `id`, `features`, `images` (paths relative to the table's folder), `trusted`;
            `image_size`, `augment`; and all options of `DataModule`.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "train.csv")
        >>> rows = "".join(f"{i},{i % 7},{'even' if i % 2 == 0 else 'odd'}\n" for i in range(60))
        >>> _ = path.write_text("a,b,label\n" + rows)
        >>> data = CSVDataModule(str(path))
        >>> data.setup()
        >>> data.class_names, data.input_shape, data.train_size
        (['even', 'odd'], (2,), 36)
    """

    def __init__(self, train: str, test: int | float | str = 0.2, val: int | float | str = 0.1, **shared: Any) -> None:
        own = {part: path for part, path in (("val", val), ("test", test)) if isinstance(path, str)}
        size = 0 if isinstance(test, str) else test
        super().__init__(size, val=0 if isinstance(val, str) else val, **shared)
        self.use({part: Table.read(path) for part, path in {"train": train, **own}.items()})

    def pictures(self, part: str) -> list[Path]:
        """The files that the column of images names."""
        table = self.tables[part]
        folder, cells = Path(table.name).parent, table.column(self.images or "", "images")
        files = [folder / Path(str(cell)).expanduser() for cell in cells]
        lacking = [row for row, file in enumerate(files) if not file.is_file()]
        if lacking:
            row = lacking[0]
            raise FileNotFoundError(
                f"{table.name}: expected paths of images, relative to its folder, in {self.images!r}, found "
                f"{cells[row]!r} in row {row + 1} ({len(lacking)} such rows), which is no file: correct them"
            )
        return files

    def identity(self) -> bytes:
        """The features, or the paths of the images."""
        if self.images is None:
            return super().identity()
        return "\n".join(map(str, self.tables["train"].column(self.images, "images"))).encode()
