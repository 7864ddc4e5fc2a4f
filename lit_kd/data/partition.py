"""Splits a source of rows into train, meta, val and test parts, with noisy and clean labels."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_kd.data.noise import corrupt
from lit_kd.data.rows import Indexed, JoinedRows, Rows
from lit_kd.data.seeds import derive_seed
from lit_kd.data.splits import Labels, Positions, count_rows, stratified_split
from lit_kd.types import UNLABELED


@dataclass
class Source:
    """What a data module loads, before it is split.

    Attributes:
        train: The pool of ``n`` training rows, with augmentation if any.
        plain: The same rows without augmentation; may be the same object.
        labels: True labels of the pool, integers ``(n,)``; of a `multilabel` data module, 0 or 1, ``(n, C)``. A row of
            `UNLABELED` marks a missing label, and is always a training row.
        test: The data set's own test rows, if any.
        test_labels: Their labels.
        test_size: Without own test rows, the fraction or count of the pool to hold out as such.
        val: The data set's own validation rows, if any; the meta rows are then cut from them.
        val_labels: Their labels.
        val_train: The validation rows augmented, for meta rows that are trained on. Default: `val`.
        unlike: The error message if meta rows must not be trained on.
        identity: Bytes that tell this data set from another, for the fingerprint.
    """

    train: Rows
    plain: Rows
    labels: Labels
    test: Rows | None = None
    test_labels: Labels | None = None
    test_size: int | float = 0
    val: Rows | None = None
    val_labels: Labels | None = None
    val_train: Rows | None = None
    unlike: str | None = None
    identity: bytes = b""


@dataclass(frozen=True)
class Partition:
    """The parts of a data set, with ``N`` training and ``M`` meta rows.

    Attributes:
        augmented: Rows to train on.
        plain: The same rows without augmentation.
        positions: Positions of train, meta and val in both of these.
        given: Labels that the training sees, of training, then of meta rows: ``(N + M,)`` or ``(N + M, C)``.
        clean: The true labels of the same rows.
        val: Validation rows.
        test: Test rows.
        fingerprint: Hash of indices, given labels and the source's `identity`.
        rows_fingerprint: The same without labels.
        unlike: See `Source`.
    """

    augmented: Rows
    plain: Rows
    positions: dict[str, Positions]
    given: Tensor
    clean: Tensor
    val: Indexed
    test: Indexed
    fingerprint: str
    rows_fingerprint: str
    unlike: str | None = None

    def train_rows(self, meta: bool) -> Indexed:
        """The training rows, followed by the meta rows if `meta`; a ValueError if those must not be trained on."""
        if meta and self.unlike is not None:
            raise ValueError(self.unlike)
        parts = ("train", "meta") if meta else ("train",)
        positions = np.concatenate([self.positions[part] for part in parts])
        return Indexed(self.augmented, positions, self.given[: len(positions)], torch.arange(len(positions)))

    def plain_rows(self, index: Tensor) -> Indexed:
        """Training rows and, behind them, meta rows, without augmentation."""
        positions = np.concatenate([self.positions["train"], self.positions["meta"]])
        return Indexed(self.plain, positions[index.numpy()], self.given[index], index)

    def meta_rows(self) -> Indexed:
        """The meta rows without augmentation."""
        return self.plain_rows(torch.arange(len(self.positions["train"]), len(self.given)))


def partition(
    source: Source,
    num_classes: int,
    meta: int | float,
    val: int | float,
    matrix: npt.NDArray[np.float64] | None,
    seed: int,
    labeled: int | float | None = None,
    multilabel: bool = False,
) -> Partition:
    """Split a source, corrupt its training labels and hide some; arguments as of `DataModule`, with its matrix."""

    def checked(labels: Labels | None, rows: Rows, name: str, missing: bool = False) -> Labels:
        assert labels is not None, f"a Source with {name} rows has their labels"
        shape = (len(rows), num_classes) if multilabel else (len(rows),)
        return check_labels(labels, shape, 2 if multilabel else num_classes, name, missing)

    labels = checked(source.labels, source.train, "training", missing=True)
    if len(source.plain) != len(source.train):
        raise ValueError(f"expected as many plain as augmented rows, found {len(source.plain)} and {len(source.train)}")
    augmented, plain, clean = source.train, source.plain, labels
    split_seed = derive_seed(seed, "split")
    known = np.flatnonzero(has_label(labels))
    total = len(known)
    # the same test rows under every seed: no teacher of another seed was trained on what tests a student
    held = stratified_split(labels[known], {"test": source.test_size}, seed=0, rest="pool")
    test_positions, known = known[held["test"]], known[held["pool"]]
    if source.val is None:
        # fractions are of all labeled rows, test rows included
        sizes = {"meta": count_rows(meta, total, "meta"), "val": count_rows(val, total, "val")}
        parts = stratified_split(labels[known], sizes, split_seed)
        positions = {name: known[part] for name, part in parts.items()}
    else:
        own = checked(source.val_labels, source.val, "validation")
        # one numbering for both: the validation rows follow the pool
        augmented = JoinedRows(augmented, source.val_train or source.val)
        plain = JoinedRows(plain, source.val)
        clean = np.concatenate([labels, own])
        parts = stratified_split(own, {"meta": meta}, split_seed, rest="val")
        positions = {"train": known} | {name: part + len(labels) for name, part in parts.items()}
    positions["train"] = np.sort(np.concatenate([positions["train"], np.flatnonzero(~has_label(labels))]))

    truth = clean[np.concatenate([positions["train"], positions["meta"]])]
    given, n = truth.copy(), len(positions["train"])
    if matrix is not None:
        given[:n] = corrupt(truth[:n], matrix, derive_seed(seed, "noise"))
    if labeled is not None:
        # chosen by the given labels, after the noise: the choice must not show the truth
        given[:n] = keep_labels(given[:n], labeled, derive_seed(seed, "labeled"))

    if source.test is None:
        test = Indexed(source.plain, test_positions, torch.from_numpy(labels[test_positions]), None)
    else:
        test_labels = checked(source.test_labels, source.test, "test")
        test = Indexed(source.test, np.arange(len(test_labels)), torch.from_numpy(test_labels), None)
    return Partition(
        augmented=augmented,
        plain=plain,
        positions=positions,
        given=torch.from_numpy(given),
        clean=torch.from_numpy(truth),
        val=Indexed(plain, positions["val"], torch.from_numpy(clean[positions["val"]]), None),
        test=test,
        fingerprint=_fingerprint(source, positions, given, num_classes),
        rows_fingerprint=_fingerprint(source, positions, given[:0], 0),
        unlike=source.unlike,
    )


def has_label(labels: Labels) -> npt.NDArray[np.bool_]:
    """Which rows have a label, ``(n,)``."""
    known: npt.NDArray[np.bool_] = labels != UNLABELED
    return known if known.ndim == 1 else np.asarray(known.all(axis=1))


def keep_labels(given: Labels, labeled: int | float, seed: int) -> Labels:
    """Keep a fraction or count of the labels, about the same share of each class; the others become `UNLABELED`.

    Examples:
        >>> (keep_labels(np.arange(12) % 3, 0.5, seed=0) != UNLABELED).sum()
        np.int64(6)
    """
    known = np.flatnonzero(has_label(given))
    count = count_rows(labeled, len(known), "labeled")
    classes = len(np.unique(given[known])) if given.ndim == 1 else 1
    if not max(1, classes) <= count <= len(known):
        raise ValueError(
            f"expected labeled to keep at least one training label a class ({classes}) and at most all "
            f"({len(known)}), found {labeled}, {count} labels. Give a count or a fraction between, or None to keep all."
        )
    if count == len(known):
        return given.copy()
    kept = known[stratified_split(given[known], {"labeled": count}, seed)["labeled"]]
    left = np.full_like(given, UNLABELED)
    left[kept] = given[kept]
    return left


def check_labels(
    labels: npt.ArrayLike, shape: tuple[int, ...], num_classes: int, name: str, missing: bool = False
) -> Labels:
    """Return labels as int64; raise a ValueError unless they have this shape and lie in ``[0, num_classes)``.

    Rows of `UNLABELED` pass where labels may be `missing`.
    """
    y = np.asarray(labels)
    if y.shape != shape or y.dtype.kind not in "iu":
        each = "one integer label" if len(shape) == 1 else f"{shape[1]} labels, 0 or 1,"
        raise ValueError(f"expected {each} for each of {shape[0]} {name} rows, found {y.dtype} of shape {y.shape}")
    table = y[:, None] if y.ndim == 1 else y
    wrong = ((table < 0) | (table >= num_classes)).any(axis=1)
    if missing:
        wrong &= (table != UNLABELED).any(axis=1)
    if wrong.any():
        row = wrong.argmax()
        also = f" (or {UNLABELED} for a missing one)" if missing else ""
        raise ValueError(
            f"expected {name} labels in [0, {num_classes}){also}, found {y[row].tolist()} in row {row} "
            f"({wrong.sum()} such rows). Give the right num_classes, or count the classes from 0."
        )
    return y.astype(np.int64)


def _fingerprint(source: Source, positions: dict[str, Positions], given: Labels, num_classes: int) -> str:
    sizes = [num_classes, *(len(part) for part in positions.values())]
    digest = hashlib.sha256(repr(sizes).encode())
    for array in (positions["train"], positions["meta"], given):
        digest.update(array.astype("<i8").tobytes())
    digest.update(source.identity)
    return digest.hexdigest()
