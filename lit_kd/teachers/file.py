"""Teachers that are files: what somebody or something said of the rows, once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lit_kd.data import DataModule
from lit_kd.models import Network, resolve_model
from lit_kd.models.checkpoint import about_data, compare_data, known_names
from lit_kd.models.files import check_new, write_columns
from lit_kd.models.taps import Tapped
from lit_kd.teachers.answers import Options, read_answers
from lit_kd.teachers.likeliest import Source, as_columns
from lit_kd.types import IGNORED, Batch, Outputs, evaluating

if TYPE_CHECKING:
    from lit_kd.distiller.base import Distiller


class FileTeacher(nn.Module):
    """A teacher that is a file: labels or probabilities that a person, an API or another program gave.

    It is a .csv or .parquet table with a row for each sample, joined by the data's ids, `data.parts.ids`: file names of
    image folders, a table's own ids, else the row's number in the data set. Or it is a folder that a `teacher_cache`
    wrote. A row that the file lacks, or whose cells are empty, has no say: the teacher's share goes to other teachers,
    and where none speaks, to the label. Which columns are read, the first that there are:

    - ``prob_CLASS`` for each class: probabilities;
    - ``class_1, logprob_1, class_2, logprob_2, ...``: log-probabilities of the likeliest classes; the rest is spread
      evenly over the others;
    - ``label`` or ``class``, and if it is there ``confidence`` or ``probability``: a class, and its probability; the
      rest is spread evenly. Without a confidence it is 1.

    For tokens there are the columns ``tokens`` and ``logprobs``, each a list with a list for each token of the row's
    response: the numbers of the likeliest tokens, and their log-probabilities; the rest is spread evenly.

    A class is written by its name, if the data have names, or its number from 0. A probability of 0 counts as 1e-6, or
    as the least other one of the row, so that logits are finite [ours]. Formats, examples and what cannot be done with
    a file: docs/teacher_files.md.

    Args:
        path: The file.
        id: The column of ids; by default ``id`` or ``file``.
        label: The column of classes, such as one annotator's of several; then no probabilities are looked for.
        confidence: The column of its probabilities, in [0, 1].
        probabilities: The names of columns of probabilities, with a star for the class.
    """

    width: int  # C
    known: Tensor  # which training and meta rows it speaks of, (N + M,)
    place: Tensor  # of each row of the data the file's row, or -1, (R,)
    values: Tensor
    classes: Tensor | None
    rest: Tensor | None
    starts: Tensor | None  # of tokens: where in the values each row of the file begins, and the end, (F + 1,)

    def __init__(
        self,
        path: str | os.PathLike[str],
        id: str | None = None,
        label: str | None = None,
        confidence: str | None = None,
        probabilities: str = "prob_*",
    ) -> None:
        super().__init__()
        self.path, self.options = Path(path), Options(id, label, confidence, probabilities)
        for name in ("place", "values", "classes", "rest", "starts"):
            self.register_buffer(name, None)
        self.counts: dict[str, int] = {}
        """How many rows of each split it speaks of, of the training it is part of."""
        self.tokens = False  # whether it speaks of many in a row
        self.whole = self.complete = False  # whether it speaks of all rows, and of all training and meta rows

    def join(self, data: DataModule, num_classes: int, training: bool = True, tokens: bool = False) -> str:
        """Read the file for these data, anew; returns what is missing, for a warning, or nothing.

        A ValueError if the file cannot be read, or if, for a training, it speaks of no training row, or of other
        numbers of tokens.
        """
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: expected a file of a teacher's answers, found none")
        names = known_names(data.class_names, num_classes)
        answers = read_answers(Source(self.path, num_classes, names, tokens), self.options)
        parts = data.parts
        row_of = {name: row for row, name in enumerate(answers.ids)}
        self._ids = answers.ids
        self.place = torch.tensor([row_of.get(name, -1) for name in parts.ids])
        _, self.values, self.classes, self.rest, lengths = answers
        self.starts = None if lengths is None else F.pad(lengths.cumsum(0), (1, 0))
        self.tokens = tokens
        sizes = {"train": data.train_size, "meta": data.meta_size, "val": len(parts.val), "test": len(parts.test)}
        known = self.place >= 0
        spoken = [int(part.sum()) for part in torch.split(known, list(sizes.values()))]
        self.counts = dict(zip(sizes, spoken, strict=True))
        self.known = known[: len(data.labels)]
        self.whole, self.complete = bool(known.all()), bool(self.known.all())
        if training and not self.counts["train"]:
            matched = f"{sum(spoken)} of {len(answers.ids)} ids of the data"
            raise ValueError(
                f"{self.path}: expected ids of training rows, such as {', '.join(map(repr, parts.ids[:3]))}, found "
                f"{', '.join(map(repr, answers.ids[:3]))} ({matched}): name the column with id='...', or write "
                "data.parts.ids"
            )
        if self.starts is not None:
            self._tokens_of(self.place[: len(data.labels)], data.labels)
        lacks = [f"{self.counts[name]} of {sizes[name]} {name} rows" for name in ("train", "meta", "val")]
        lacks = [told for told, name in zip(lacks, sizes, strict=False) if self.counts[name] < sizes[name]]
        unknown = len(answers.ids) - sum(spoken)
        lacks += [f"{unknown} rows that the data do not have"] if unknown else []
        return f"{self.path} speaks of {', '.join(lacks)}: what it lacks has no say" if lacks else ""

    def answers(self, batch: Batch, training: bool = False) -> Outputs:
        """What it says of a batch; nothing without an index, or without data."""
        device, shape = batch.y.device, (*batch.y.shape[: 2 if self.tokens else 1], self.width)
        if batch.index is None or not self.counts:
            return Outputs(
                torch.zeros(shape, device=device), {}, torch.zeros(shape[0], dtype=torch.bool, device=device)
            )
        at = self.place[batch.index.to(self.place.device)]
        if self.starts is None:
            said = self._said(at.clamp(min=0))
            logits = said.where((at >= 0).view(-1, *[1] * (said.dim() - 1)), 0)
        else:
            counted, rows = self._tokens_of(at, batch.y.to(at.device))
            logits = torch.zeros(shape, device=at.device)
            logits[counted] = self._said(rows)
        sure = self.complete if training else self.whole
        return Outputs(logits.to(device), {}, None if sure else (at >= 0).to(device))

    def _said(self, rows: Tensor) -> Tensor:
        """Logits of all classes, of some rows of the file or, where it has these, of its tokens."""
        said = self.values[rows]
        if self.classes is None or self.rest is None:
            return said
        return self.rest[rows].unsqueeze(1).expand(-1, self.width).scatter(1, self.classes[rows], said)

    def _tokens_of(self, at: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens ``(B, T)`` it speaks of, and for each of these the place in its values; rows as in `place`."""
        assert self.starts is not None
        counted = (y != IGNORED) & (at >= 0).unsqueeze(1)
        lengths, found = counted.sum(1), self.starts.diff()[at.clamp(min=0)]
        if len(wrong := ((lengths > 0) & (lengths != found)).nonzero()):
            row = int(wrong[0])
            raise ValueError(
                f"{self.path}: expected a list for each of the {lengths[row]} tokens of a row's response, found "
                f"{found[row]} for {self._ids[int(at[row])]!r}: its first to its end token"
            )
        return counted, (self.starts[at.clamp(min=0)].unsqueeze(1) + counted.cumsum(1) - 1)[counted]


def check_file_teachers(module: Distiller) -> None:
    """Refuse methods and terms that want more of a teacher than its answers about rows; a ValueError."""
    name, terms = type(module).__name__, module.terms or ()
    if module.task.name not in ("classification", "tokens"):
        raise ValueError(
            "expected one class a sample, or tokens, with a teacher that is a file, found "
            f"{module.task.name}: give a network"
        )
    for term in terms:
        if term.teacher_taps:
            raise ValueError(
                f"expected a network as the teacher, as {type(term).__name__} reads its layers, found a file: choose "
                "a term of logits, such as KL"
            )
    if module.changes_batches:
        raise ValueError(f"expected no mix with a teacher that is a file, as {name} asks it about inputs of no row")
    if getattr(module, "select", None) is not None:
        raise ValueError("expected no select with a teacher that is a file, as rows are scored at its last layer")


def join_files(module: Distiller, teachers: list[FileTeacher], stage: str) -> None:
    """Read the files for the module's data, and say once what they lack; outside of training they may lack all."""
    data, tokens = module.datamodule, module.task.name == "tokens"
    for teacher in teachers:
        teacher.width, teacher.counts = module.num_classes, {}
        if stage == "fit":
            missing = teacher.join(module.data, module.num_classes, tokens=tokens)
            coupled = [type(term).__name__ for term in module.terms or () if term.couples_batch and term.reads_teacher]
            if coupled and not teacher.complete:
                raise ValueError(
                    f"{teacher.path}: expected answers for all training and meta rows, as {coupled[0]} compares the "
                    f"rows of a batch, found that it speaks of {teacher.counts['train']} and {teacher.counts['meta']}: "
                    "choose another term"
                )
            if missing:
                rank_zero_warn(missing)
        else:
            split = "val" if stage == "validate" else "test"
            if isinstance(data, DataModule) and teacher.path.exists():
                teacher.join(data, module.num_classes, training=False, tokens=tokens)
            if not speaks_of(teacher, split):
                rank_zero_warn(f"{teacher.path} says nothing of the {split} rows: evaluating without the agreement")
        teacher.to(module.device)


def speaks_of(teacher: nn.Module, split: str) -> bool:
    """Whether a teacher says something of rows of a split; of rows that a wrapped module keeps for itself no file."""
    return not isinstance(teacher, FileTeacher) or teacher.counts.get(split, 0) > 0


def write_predictions(
    path: str | os.PathLike[str], teacher: Network, data: DataModule, overwrite: bool = False, top_k: int = 20
) -> None:
    """Write what a network says of all rows, without augmentation, as a table that `FileTeacher` reads.

    Its columns are ``id`` and a probability ``prob_CLASS`` for each class, or ``tokens`` and ``logprobs``. A wrapped
    module's own test rows are left out, as they have no ids. A ValueError or FileExistsError for a path that cannot be
    used.

    Args:
        path: A .csv or .parquet file.
        teacher: A module, the path of a lit_kd checkpoint, or what else a teacher may be but a file.
        data: A data module of `lit_kd.data`.
        overwrite: Whether a file that is there may be replaced.
        top_k: Of tokens, at least 1: how many of the likeliest at each place are written.
    """
    path = Path(path)
    if top_k < 1:
        raise ValueError(f"expected top_k of at least 1, found {top_k}")
    check_new(path, overwrite)
    data.setup()
    shape = None if data.input_shape is None else list(data.input_shape)
    model = resolve_model(teacher, data.num_classes, shape)
    compare_data("the teacher", model, about_data(data, data.num_classes))
    parts, found = data.parts, list[tuple[Tensor, Tensor]]()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with isolate_rng(), torch.no_grad(), evaluating(model):
        for rows in (parts.rows(torch.arange(len(data.labels))), parts.val, parts.test):
            batches = data.loader(rows) if len(rows) else ()
            found += [(Tapped(model)(batch.to(device).x).logits.cpu(), batch.y) for batch in batches]
    columns: Mapping[str, Any]
    if data.task == "tokens":
        columns = as_columns(found, top_k, as_text=path.suffix == ".csv")
    else:
        table = torch.cat([logits for logits, _ in found]).double().softmax(-1)
        names = known_names(data.class_names, data.num_classes) or [str(c) for c in range(data.num_classes)]
        columns = {f"prob_{name}": table[:, c].tolist() for c, name in enumerate(names)}
    write_columns(path, {"id": parts.ids, **columns}, overwrite)
