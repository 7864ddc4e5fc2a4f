"""What a method believes about each training sample, across processes and resumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes; the tensor itself where there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def all_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, equally many each; the same rows where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)
    return rows


def of_first_process(tensor: Tensor) -> Tensor:
    """The first process's values, of the same shape in all; written into the tensor itself."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, src=0)
    return tensor


class SampleTable:
    """Named columns with one row a training sample, addressed by sample index.

    Every process writes the rows of its own batches; `sync` makes the copies equal. Not a `torch.nn.Module`: as a
    buffer it would be overwritten by the first process's copy at each forward.

    Args:
        size: Number of rows: the training samples, then the trusted meta rows.
        fingerprint: Names the data set that the rows belong to, see `lit_kd.data.DataModule.fingerprint`.

    Examples:
        >>> table = SampleTable(4, "digits")
        >>> table.add("weights", torch.tensor([0.9, 0.1]))
        >>> table.write(torch.tensor([2]), weights=torch.tensor([[0.0, 1.0]]))
        >>> table["weights"][1:3]
        tensor([[0.9000, 0.1000],
                [0.0000, 1.0000]])
    """

    def __init__(self, size: int, fingerprint: str) -> None:
        self.size = size
        self.fingerprint = fingerprint
        self.columns: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        """Small values that concern all rows; every process must set the same."""
        self._written: dict[str, Tensor] = {}

    def add(self, name: str, start: Tensor) -> None:
        """Add a column whose every row is ``start``; a column that is there already keeps its values.

        Raises:
            ValueError: If the column is there with rows of another shape.
        """
        if name not in self.columns:
            self.columns[name] = start.expand(self.size, *start.shape).clone()
        found = self.columns[name].shape[1:]
        if found != start.shape:
            raise ValueError(
                f"expected rows of shape {tuple(start.shape)} in column {name!r} of the sample table, found "
                f"{tuple(found)}: train with as many teachers as before, or start without the checkpoint"
            )

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __setitem__(self, name: str, column: Tensor) -> None:
        """Replace a whole column: every process must do the same."""
        self.columns[name] = column
        self._written.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def write(self, index: Tensor, **values: Tensor) -> None:
        """Set rows of columns.

        Args:
            index: Row numbers, ``(B,)``.
            **values: Per column the new rows, ``(B, ...)``.
        """
        for name, rows in values.items():
            column = self.columns[name]
            column[index] = rows.to(column.dtype)
            if name not in self._written:
                self._written[name] = torch.zeros(self.size, dtype=torch.bool, device=column.device)
            self._written[name][index] = True

    def sync(self) -> None:
        """Give every process the rows that others wrote since the last time: call it on all of them together.

        A row that several processes wrote, a duplicate that pads uneven data, gets the mean of their values.
        """
        for name, written in self._written.items():
            column = self.columns[name]
            mask = written.view(-1, *[1] * (column.dim() - 1))
            count = all_sum(written.int()).view_as(mask)
            total = all_sum(column.where(mask, 0))
            mean = torch.div(total, count.clamp(min=1), rounding_mode=None if total.is_floating_point() else "floor")
            self.columns[name] = torch.where(count > 0, mean.to(column.dtype), column)
        self._written = {}

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Map every column, for example to another device."""
        self.columns = {name: fn(column) for name, column in self.columns.items()}
        self.shared = {name: fn(value) for name, value in self.shared.items()}
        self._written = {name: fn(mask) for name, mask in self._written.items()}

    def state_dict(self) -> dict[str, Any]:
        """The table as primitives and tensors, for a checkpoint."""
        columns = {name: column.cpu() for name, column in self.columns.items()}
        shared = {name: value.cpu() for name, value in self.shared.items()}
        return {"size": self.size, "fingerprint": self.fingerprint, "columns": columns, "shared": shared}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> SampleTable:
        """The table that `state_dict` described."""
        table = cls(state["size"], state["fingerprint"])
        table.columns = dict(state["columns"])
        table.shared = dict(state["shared"])
        return table

    def check(self, size: int, fingerprint: str) -> None:
        """Refuse data other than the table's own.

        Raises:
            ValueError: If size or fingerprint differ.
        """
        if (self.size, self.fingerprint) != (size, fingerprint):
            raise ValueError(
                f"the sample table belongs to another data set: expected {self.size} rows with fingerprint "
                f"{self.fingerprint[:12]}, found {size} rows with fingerprint {fingerprint[:12]}. Use the data, split, "
                "noise and seed that the table was made with, or start without its checkpoint and with a new model."
            )
