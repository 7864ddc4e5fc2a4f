"""Groups of rows: whose they are, and how the worst fares."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lit_kd.models.files import read_columns


class WorstGroupAccuracy(Metric):
    """The accuracy of the group that is recognised worst, of those that there are; groups are numbers below `groups`.

    A row's group is its class, unless `of` holds the groups of the rows of the next update, ``(B,)`` or more, -1 where
    it is unknown: such rows do not count.
    """

    right: Tensor
    rows: Tensor

    def __init__(self, groups: int, of: Tensor | None = None) -> None:
        super().__init__()
        self.of = of
        for name in ("right", "rows"):
            self.add_state(name, torch.zeros(groups), "sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """From probabilities ``(B, C)`` and classes."""
        groups = target if self.of is None else self.of[: len(target)]
        member = F.one_hot(groups.clamp(min=0), len(self.rows)).to(self.rows) * (groups >= 0).unsqueeze(1)
        hit = (preds.argmax(-1) == target).to(self.right)
        self.right, self.rows = self.right + (hit.unsqueeze(1) * member).sum(0), self.rows + member.sum(0)

    def compute(self) -> Tensor:
        """In [0, 1]."""
        return torch.where(self.rows > 0, self.right / self.rows, 1).min()


def read_groups(path: str, ids: Sequence[str]) -> tuple[Tensor, list[str]]:
    """The groups of rows by their ids, numbers ``(N,)``, and the groups' names, sorted.

    The file is a .csv or .parquet table with the columns ``id`` and ``group``; it may tell of further rows. A
    ValueError if a row is not there, or twice.
    """
    columns = read_columns(Path(path))
    if not {"id", "group"} <= columns.keys():
        raise ValueError(f"{path}: expected the columns id and group, found {', '.join(columns) or 'none'}")
    told = dict(zip(map(str, columns["id"]), map(str, columns["group"]), strict=True))
    if len(told) < len(columns["id"]):
        raise ValueError(f"{path}: expected each id once, found {len(columns['id'])} rows of {len(told)} ids")
    missing = [name for name in ids if not told.get(name)]
    if missing:
        found = f"none for {len(missing)}, such as {missing[0]!r}"
        raise ValueError(f"{path}: expected a group for each of the data's {len(ids)} rows, found {found}")
    names = sorted({told[name] for name in ids})
    number = {name: k for k, name in enumerate(names)}
    return torch.tensor([number[told[name]] for name in ids]), names
