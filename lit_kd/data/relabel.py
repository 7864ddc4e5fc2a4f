"""Labels that a person, or ``lit-kd audit``, has corrected."""

from pathlib import Path
from textwrap import shorten

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_kd.data.columns import Table, as_text, class_number
from lit_kd.data.partition import Partition
from lit_kd.types import UNLABELED

DROPPED = ("", str(UNLABELED), "drop")


def relabel(parts: Partition, path: str | Path, num_classes: int, class_names: list[str] | None) -> None:
    """Replace the given labels of some rows by those of a .csv or .parquet table with the columns ``id`` and ``label``.

    Rows are found by `Partition.ids`; those that the table leaves out keep their labels, and its other columns are not
    read. A label is a class name, or else a class number, unless the names are numbers. An empty one, -1 or ``drop``
    takes the label away: losses of labels then pass over the row, and teachers are still asked about it. This is the
    last word, after noise and `labeled`. Trusted rows are corrected too, and cannot lose their label. Validation and
    test rows are refused.
    """
    table = Table.read(path)
    if parts.given.dim() > 1 or parts.source.soft is not None:
        raise ValueError(f"{path}: expected one class a sample, found several or soft labels: remove labels")
    ids = [str(cell) for cell in table.column("id", "the id's name")]
    cells = table.column("label", "the label's name")
    where = {name: index for index, name in reversed([*enumerate(parts.ids)])}  # training rows win
    rows, trained = len(parts.given), len(parts.positions["train"])
    numbers = {cell: class_number(cell, class_names, num_classes) for cell in dict.fromkeys(cells)}
    numbers |= {cell: UNLABELED for cell, c in numbers.items() if c is None and as_text(cell) in DROPPED}
    seen: set[str] = set()
    for name, cell in zip(ids, cells, strict=True):
        index = where.get(name, -1)
        if index < 0:
            problem = f"ids of training rows, found {name!r}, which no row has: are they of other data?"
        elif name in seen:
            problem = f"each id once, found {name!r} again: keep one"
        elif index >= rows:
            problem = (
                f"ids of training rows, found {name!r} of a validation or test row, whose label stays: give the data "
                "the seed, meta and val of the run that chose the ids, or remove it"
            )
        elif numbers[cell] is None:
            known = shorten(", ".join(class_names or map(str, range(num_classes))), 80)
            problem = f"a class ({known}) or none as label, found {as_text(cell)!r} for {name!r}: correct it"
        elif index >= trained and numbers[cell] == UNLABELED:
            problem = f"a label for each trusted row, found none for {name!r}: give one, or remove the id"
        else:
            seen.add(name)
            continue
        raise ValueError(f"{path}: expected {problem}")
    index = torch.tensor([where[name] for name in ids], dtype=torch.int64)
    labels = torch.tensor([numbers[cell] for cell in cells], dtype=torch.int64)
    before = parts.given[index]
    parts.replace_labels(index, labels, num_classes)
    lost = int(((labels == UNLABELED) & (before != UNLABELED)).sum())
    changed = int((labels != before).sum()) - lost
    rank_zero_info(f"{path}: {changed} labels changed and {lost} taken away, of {rows} rows")
