"""Splits a source of rows into train, meta, val and test parts, with noisy and clean labels."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_kd.data.labels import (
    Labels,
    Matrix,
    Positions,
    corrupt,
    count_rows,
    has_label,
    keep_labels,
    strata,
    stratified_split,
)
from lit_kd.data.rows import Indexed, JoinedRows, Rows
from lit_kd.data.seeds import derive_seed
from lit_kd.types import UNLABELED


@dataclass
class Source:
    """What a data module loads, before it is split."""

    train: Rows  # the pool of n training rows, with augmentation if any
    plain: Rows  # the same without augmentation
    labels: Labels  # true ones of the pool, (n,), or 0 and 1, (n, C); rows of `UNLABELED` are always trained on
    test: Rows | None = None  # own test rows
    test_labels: Labels | None = None
    test_size: int | float = 0  # else, the fraction or count of the pool to hold out as such
    val: Rows | None = None  # own validation rows; the meta rows are then cut from them
    val_labels: Labels | None = None
    val_train: Rows | None = None  # the same augmented, for meta rows that are trained on; else `val`
    unlike: str | None = None  # the error message if meta rows must not be trained on
    soft: Tensor | None = None  # probabilities, (n, C), to train with in the place of labels; with own `val`
    meta: Positions | None = None  # rows of the pool, with labels, that are the meta split; else it is cut
    identity: bytes = b""  # what tells this data set from another
    ids: Sequence[str] | None = None  # names of the pool's rows, such as files; else their positions
    val_ids: Sequence[str] | None = None  # of own validation rows; else val/0, val/1, ...
    test_ids: Sequence[str] | None = None  # of own test rows, likewise
    given: Labels | None = None  # what the training sees of the pool in the place of its labels, (n, ...)


class Partition:
    """A source split by `meta` and `val`, its training labels corrupted and some hidden; see `DataModule`.

    Attributes:
        source: What was split.
        augmented: Rows to train on, the pool and then the source's own validation rows.
        plain: The same rows without augmentation.
        positions: Positions of the ``N`` training, ``M`` meta and the validation rows in both of these.
        given: Labels that the training sees, of training, then of meta rows: ``(N + M,)`` or ``(N + M, C)``.
        clean: The true labels of the same rows.
        knows_truth: Whether labels were made noisy or hidden, so that `clean` tells more than the source's labels do.
        val: Validation rows.
        test: Test rows.
        fingerprint: Hash of indices, given labels and the source's `identity`.
        rows_fingerprint: The same without labels.
        ids: The name of each row: of training, meta, validation, then test rows, in the order of indices.
    """

    positions: dict[str, Positions]

    def __init__(
        self,
        source: Source,
        num_classes: int,
        meta: int | float,
        val: int | float,
        matrix: Matrix | None,
        seed: int,
        labeled: int | float | None,
        task: str,
    ) -> None:
        if source.soft is not None and (matrix is not None or labeled is not None):
            raise ValueError("expected class numbers as labels to make noisy or hide, found soft labels: remove noise")
        if task not in ("classification", "multilabel") and (matrix is not None or labeled is not None):
            raise ValueError(f"expected no noise and no labeled with the task {task}: let the data module's load do it")
        checked = partial(check_labels, num_classes=num_classes, task=task)
        labels = checked(source.labels, source.train, "training", missing=True)
        if len(source.plain) != len(source.train):
            found = f"{len(source.plain)} and {len(source.train)}"
            raise ValueError(f"expected as many plain as augmented rows, found {found}")
        self.source, self.augmented, self.plain, clean = source, source.train, source.plain, labels
        split_seed = derive_seed(seed, "split")
        groups = strata(labels, task)
        tested, known = hold_out(groups, source.test_size, source.meta)
        total = len(tested) + len(known)
        meta = meta if source.meta is None else 0
        if source.val is None:
            # fractions are of all labeled rows, test rows included
            sizes = {"meta": count_rows(meta, total, "meta"), "val": count_rows(val, total, "val")}
            parts = stratified_split(groups[known], sizes, split_seed)
            self.positions = {name: known[part] for name, part in parts.items()}
        else:
            own = checked(source.val_labels, source.val, "validation")
            # one numbering for both: the validation rows follow the pool
            self.augmented = JoinedRows(source.train, source.val_train or source.val)
            self.plain = JoinedRows(source.plain, source.val)
            clean = np.concatenate([labels, own])
            parts = stratified_split(strata(own, task), {"meta": meta}, split_seed, rest="val")
            self.positions = {"train": known} | {name: part + len(labels) for name, part in parts.items()}
        if source.meta is not None:
            self.positions["meta"] = source.meta
        train = np.sort(np.concatenate([self.positions["train"], np.flatnonzero(~has_label(groups))]))
        self.positions["train"] = train

        truth = clean[np.concatenate([train, self.positions["meta"]])]
        given, n = truth.copy(), len(train)
        if source.given is not None:
            given[:n] = checked(source.given, source.train, "given", missing=True)[train]
        if matrix is not None:
            given[:n] = corrupt(truth[:n], matrix, derive_seed(seed, "noise"))
        if labeled is not None:
            # chosen by the given labels, after the noise: the choice must not show the truth
            given[:n] = keep_labels(given[:n], labeled, derive_seed(seed, "labeled"))
        self.knows_truth = matrix is not None or not np.array_equal(given, truth, equal_nan=truth.dtype.kind == "f")
        self.given, self.clean = torch.from_numpy(given), torch.from_numpy(truth)
        self.fingerprint = self._fingerprint(given, num_classes)
        self.rows_fingerprint = self._fingerprint(given[:0], 0)

        own_ids = [*named(source.ids, len(labels)), *named(source.val_ids, len(clean) - len(labels), "val/")]
        held_out = self.positions["val"]
        test, test_labels, test_ids = source.plain, labels, own_ids
        if source.test is not None:
            test, test_labels = source.test, checked(source.test_labels, source.test, "test")
            tested, test_ids = np.arange(len(test_labels)), named(source.test_ids, len(test_labels), "test/")
        n = len(held_out)
        index = len(truth) + torch.arange(n + len(tested))
        self.val = Indexed(self.plain, held_out, torch.from_numpy(clean[held_out]), index[:n])
        self.test = Indexed(test, tested, torch.from_numpy(test_labels[tested]), index[n:])
        own = np.concatenate([train, self.positions["meta"], held_out])
        self.ids = [*(own_ids[p] for p in own), *(test_ids[p] for p in tested)]

    def train_rows(self, meta: bool) -> Indexed:
        """The training rows, followed by the meta rows if `meta`; a ValueError if those must not be trained on."""
        if meta and self.source.unlike is not None:
            raise ValueError(self.source.unlike)
        parts = ("train", "meta") if meta else ("train",)
        positions = np.concatenate([self.positions[part] for part in parts])
        labels = self.given[: len(positions)] if self.source.soft is None else self.source.soft[positions]
        return Indexed(self.augmented, positions, labels, torch.arange(len(positions)))

    def rows(self, index: Tensor, augmented: bool = False) -> Indexed:
        """Training rows and, behind them, meta rows, without augmentation unless it is asked for."""
        positions = np.concatenate([self.positions["train"], self.positions["meta"]])
        return Indexed(self.augmented if augmented else self.plain, positions[index.numpy()], self.given[index], index)

    def meta_rows(self) -> Indexed:
        """The meta rows without augmentation."""
        return self.rows(torch.arange(len(self.positions["train"]), len(self.given)))

    def replace_labels(self, index: Tensor, labels: Tensor, num_classes: int) -> None:
        """Give some training and meta rows other labels, ``(B,)``.

        Where nobody made noise, nobody knows the truth either: the new labels are then the best that is known of it.
        """
        self.given[index] = labels
        unknown = (self.clean[index] == UNLABELED) | (not self.knows_truth)
        self.clean[index] = labels.where(unknown & (labels != UNLABELED), self.clean[index])
        self.fingerprint = self._fingerprint(self.given.numpy(), num_classes)

    def _fingerprint(self, given: Labels, num_classes: int) -> str:
        sizes = [num_classes, *(len(part) for part in self.positions.values())]
        digest = hashlib.sha256(repr(sizes).encode())
        for array in (self.positions["train"], self.positions["meta"], given):
            digest.update(array.astype("<f8" if array.dtype.kind == "f" else "<i8").tobytes())
        digest.update(self.source.identity)
        return digest.hexdigest()


def hold_out(labels: Labels, size: int | float, meta: Positions | None = None) -> tuple[Positions, Positions]:
    """Positions of so many test rows, and of the other rows that have a label; `meta` rows are among neither.

    The test rows are the same under every seed: no teacher of another seed was trained on what tests a student.
    """
    known = np.flatnonzero(has_label(labels))
    known = known if meta is None else np.setdiff1d(known, meta)
    held = stratified_split(labels[known], {"test": size}, seed=0, rest="pool")
    return known[held["test"]], known[held["pool"]]


def named(ids: Sequence[str] | None, rows: int, prefix: str = "") -> list[str]:
    """The names of rows, by default their positions behind a prefix; a ValueError unless each has one of its own."""
    found = [f"{prefix}{row}" for row in range(rows)] if ids is None else [str(name) for name in ids]
    if len(found) != rows or len(set(found)) < len(found):
        twice = next((name for name, times in Counter(found).items() if times > 1), None)
        also = "" if twice is None else f", {twice!r} more than once"
        raise ValueError(f"expected an id of its own for each of {rows} rows, found {len(found)} ids{also}")
    return found


def check_labels(
    labels: npt.ArrayLike | None, rows: Rows, name: str, num_classes: int, task: str, missing: bool = False
) -> Labels:
    """Return the labels of rows as int64, or numbers as float32; a ValueError unless shape and values are right.

    Rows of `UNLABELED` pass where labels may be `missing`. Pixels, tokens and numbers are for the task to check.
    """
    y, multilabel = np.asarray(labels), task == "multilabel"
    if not multilabel and task != "classification":
        kinds, dtype = ("f", np.float32) if task == "regression" else ("iu", np.int64)
        if y.shape[:1] != (len(rows),) or y.ndim < 2 or y.dtype.kind not in kinds:
            found = f"{y.dtype} of shape {y.shape}"
            raise ValueError(f"expected labels of the task {task} for each of {len(rows)} {name} rows, found {found}")
        return y.astype(dtype)
    shape, high = (len(rows), *[num_classes] * multilabel), 2 if multilabel else num_classes
    if y.shape != shape or y.dtype.kind not in "iu":
        each = f"{num_classes} labels, 0 or 1," if multilabel else "one integer label"
        raise ValueError(f"expected {each} for each of {len(rows)} {name} rows, found {y.dtype} of shape {y.shape}")
    table = y[:, None] if y.ndim == 1 else y
    wrong = ((table < 0) | (table >= high)).any(axis=1)
    if missing:
        wrong &= (table != UNLABELED).any(axis=1)
    if wrong.any():
        row = wrong.argmax()
        also = f" (or {UNLABELED} for a missing one)" if missing else ""
        raise ValueError(
            f"expected {name} labels in [0, {high}){also}, found {y[row].tolist()} in row {row} "
            f"({wrong.sum()} such rows). Give the right num_classes, or count the classes from 0."
        )
    return y.astype(np.int64)
