"""Rows of arrays that are computed once and read often: in memory, or in files that survive a kill."""

from __future__ import annotations

import json
import shutil
import uuid
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lit_kd.models.files import write_whole

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
Precision = Literal["float32", "float16"]

ABOUT = "about.json"
CHECKSUMS = "checksums"


class RowStore:
    """Arrays in memory, filled row by row in any order.

    Args:
        rows: R.
        shapes: Of one row of each array, by name.
        dtype: Of the arrays.

    Attributes:
        arrays: By name, ``(R, ...)``; 0 in rows that are not written.

    Examples:
        >>> store = RowStore(3, {"logits": (2,)}, "float32")
        >>> store.write(np.array([2]), {"logits": np.ones((1, 2), np.float32)})
        >>> store.written(np.arange(3))
        array([False, False,  True])
    """

    arrays: dict[str, Array]

    def __init__(self, rows: int, shapes: Mapping[str, tuple[int, ...]], dtype: Precision) -> None:
        self.arrays = {name: np.zeros((rows, *shape), dtype) for name, shape in shapes.items()}
        self._written = np.zeros(rows, dtype=bool)

    def write(self, index: Indices, values: Mapping[str, Array]) -> None:
        """Set rows.

        Args:
            index: Row numbers, ascending, ``(B,)``.
            values: New rows of every array, ``(B, ...)``, of its dtype.
        """
        for name, array in self.arrays.items():
            array[index] = values[name]
        self._written[index] = True

    def written(self, index: Indices) -> npt.NDArray[np.bool_]:
        """Which of the rows ``(B,)`` are there, ``(B,)``."""
        return self._written[index]

    def finished(self) -> dict[str, Array]:
        """The arrays, to be read from now on."""
        return self.arrays


class RowFiles(RowStore):
    """Arrays in files, read through memory maps: ``NAME.npy`` each, and a checksum a row, 0 where it is not written.

    The checksum is written after the row. So a row that a kill, a full disk or a failing one has torn counts as not
    written, and writing can be taken up where it ended. The folder appears with all its files or not at all. Processes
    may write at the same time: different rows, or the same rows to the same effect.

    Args:
        folder: Made if it is not there.
        rows: R.
        shapes: Of one row of each array, by name.
        dtype: Of the arrays.
        about: What else a reader may want to know, kept beside them; JSON.

    Raises:
        ValueError: If the folder holds other or damaged files.
        OSError: If it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        rows: int,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: Precision,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        kinds = {name: (dtype, (rows, *shape)) for name, shape in shapes.items()} | {CHECKSUMS: ("uint32", (rows,))}
        described = {"format": 1, "rows": rows, "dtype": dtype, "arrays": {n: list(s) for n, s in shapes.items()}}
        described |= about or {}
        if not folder.exists():
            _make(folder, kinds, described)
        if _read(folder / ABOUT) != described:
            raise ValueError(
                f"{folder}: expected rows of {_short(described)}, found {_short(_read(folder / ABOUT))}. {_CURE}"
            )
        opened = {name: _open(folder / f"{name}.npy", kind, "r") for name, kind in kinds.items()}
        self._offsets = {name: array.offset for name, array in opened.items()}
        # plain views: rows of a memmap are objects that take longer to make than to read
        self._checksums: Array = np.asarray(opened.pop(CHECKSUMS))
        self.arrays = {name: np.asarray(array) for name, array in opened.items()}

    def write(self, index: Indices, values: Mapping[str, Array]) -> None:
        """Set rows; through the file, as on a full disk a write through the map would end the process."""
        parts = [np.ascontiguousarray(values[name], array.dtype) for name, array in self.arrays.items()]
        try:
            for name, part in zip(self.arrays, parts, strict=True):
                self._put(name, index, part)
            self._put(CHECKSUMS, index, _checksums(parts))
        except OSError as error:
            done = int((self._checksums != 0).sum())
            raise OSError(
                f"{self.folder}: could not be written ({error.strerror}); its {done} of {len(self._checksums)} rows "
                f"stay. All need {self.missing_bytes(len(self._checksums)) >> 20} MiB: make room, or take another "
                "directory"
            ) from error

    def _put(self, name: str, index: Indices, rows: Array) -> None:
        with (self.folder / f"{name}.npy").open("r+b") as file:
            for run in np.split(np.arange(len(index)), np.flatnonzero(np.diff(index) != 1) + 1):
                if len(run):
                    file.seek(self._offsets[name] + int(index[run[0]]) * rows[0].nbytes)
                    file.write(rows[run[0] : run[-1] + 1].data)

    def written(self, index: Indices) -> npt.NDArray[np.bool_]:
        """Which of the rows ``(B,)`` are there and sound, ``(B,)``: reads them all."""
        there: npt.NDArray[np.bool_] = self.begun(index)
        rows = index[there]
        there[there] = _checksums([_Picked(array, rows) for array in self.arrays.values()]) == self._checksums[rows]
        return there

    def begun(self, index: Indices) -> npt.NDArray[np.bool_]:
        """Which of the rows ``(B,)`` were written, sound or not, ``(B,)``."""
        return np.asarray(self._checksums[index] != 0)

    def finished(self) -> dict[str, Array]:
        """The arrays, to be read from now on; torch wants them writable: what is written stays in memory."""
        kinds = {name: (str(array.dtype), array.shape) for name, array in self.arrays.items()}
        return {name: np.asarray(_open(self.folder / f"{name}.npy", kind, "c")) for name, kind in kinds.items()}

    def missing_bytes(self, rows: int) -> int:
        """How much room so many rows take, in bytes."""
        return rows * sum(int(array[0].nbytes) for array in (*self.arrays.values(), self._checksums))

    def check_room(self, rows: int) -> None:
        """Refuse to begin what cannot end.

        Raises:
            OSError: If so many more rows do not fit on the disk.
        """
        free, needed = shutil.disk_usage(self.folder).free, self.missing_bytes(rows)
        if needed > free:
            raise OSError(
                f"{self.folder}: expected {needed >> 20} MiB of free disk space for {rows} rows, found {free >> 20}: "
                "make room, or take another directory"
            )


class _Picked:
    """Some rows of an array, without a copy of all of them."""

    def __init__(self, array: Array, rows: Indices) -> None:
        self.array = array
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> Array:
        row: Array = self.array[self.rows[item]]
        return row


def _checksums(parts: Sequence[Array | _Picked]) -> npt.NDArray[np.uint32]:
    """Of each row of all arrays together, never 0."""
    found = np.empty(len(parts[0]), np.uint32)
    for row in range(len(found)):
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part[row].data, checksum)
        found[row] = checksum or 1
    return found


def _make(folder: Path, kinds: Mapping[str, tuple[str, tuple[int, ...]]], about: Mapping[str, Any]) -> None:
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    try:
        part.mkdir(parents=True)
        for name, (dtype, shape) in kinds.items():
            np.lib.format.open_memmap(part / f"{name}.npy", "w+", np.dtype(dtype), shape)  # takes no room yet
        write_whole(part / ABOUT, json.dumps(about, indent=1))
        part.rename(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if not folder.exists():  # else another process was faster
            raise OSError(f"{folder}: could not be made ({error.strerror}): take another directory") from error


def _open(path: Path, kind: tuple[str, tuple[int, ...]], mode: Literal["r", "c"]) -> np.memmap[Any, Any]:
    dtype, shape = kind
    try:
        array: Any = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected an array, found none or a damaged one ({error}). {_CURE}") from error
    if not isinstance(array, np.memmap) or (array.dtype, array.shape) != (np.dtype(dtype), shape):
        raise ValueError(f"{path}: expected {dtype} of shape {shape}, found {array.dtype} of {array.shape}. {_CURE}")
    return array


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected what the folder holds, found no such file ({error}). {_CURE}") from error


def _short(about: Any) -> str:
    return json.dumps(about)[:300]


_CURE = "It is another's, or damaged: take another directory, or remove the folder, to have it filled again"
