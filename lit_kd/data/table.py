"""Values that a method keeps for each training sample, across processes and resumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if _several() else (0, 1)


def all_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    if _several():
        torch.distributed.all_reduce(tensor)
    return tensor


def all_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes, equally many each."""
    if not _several():
        return rows
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def of_first_process(tensor: Tensor) -> Tensor:
    """Replace a tensor by the first process's, in place."""
    if _several():
        torch.distributed.broadcast(tensor, src=0)
    return tensor


class SampleTable:
    """Named columns with one row per training sample, addressed by sample index.

    Each process calls `write` for the rows of its own batches and `sync` now and then, or `exchange` for both at once.

    Args:
        size: Number of rows: the training samples, then the trusted meta rows.
        fingerprint: Of the data set that the rows belong to, see `lit_kd.data.DataModule.fingerprint`.

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
        """Small values that concern all rows, equal in all processes."""
        self.maker = ""
        """What makes the weights: another rule cannot continue with them."""
        self._written: dict[str, Tensor] = {}

    def add(self, name: str, start: Tensor, rows: bool = False) -> None:
        """Add a column; one that is there already keeps its values.

        `start` is the first value of each row, ``(...)``; with `rows`, the whole column, ``(N, ...)``, equal in all
        processes.
        """
        shape = start.shape if rows else (self.size, *start.shape)
        found = self.columns[name] if name in self else start.expand(shape)
        if found.shape != shape or len(found) != self.size:
            raise ValueError(
                f"expected {self.size} rows of shape {tuple(shape[1:])} in column {name!r} of the sample table, found "
                f"{len(found)} of shape {tuple(found.shape[1:])}: train with as many teachers as before, or start "
                "without the checkpoint"
            )
        self.columns[name] = found if name in self else found.clone()

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __setitem__(self, name: str, column: Tensor) -> None:
        """Replace a whole column; every process must do the same."""
        self.columns[name] = column
        self._written.pop(name, None)

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def write(self, index: Tensor, **values: Tensor) -> None:
        """Set rows ``index``, ``(B,)``, of columns to ``(B, ...)``, in this process alone until `sync`."""
        for name, rows in values.items():
            column = self.columns[name]
            column[index] = rows.to(column.dtype)
            if name not in self._written:
                self._written[name] = torch.zeros(self.size, dtype=torch.bool, device=column.device)
            self._written[name][index] = True

    def sync(self) -> None:
        """Give every process what any wrote since the last call, the mean of several; all must call it together."""
        for name, written in self._written.items():
            column = self.columns[name]
            mask = written.view(-1, *[1] * (column.dim() - 1))
            count = all_sum(written.int()).view_as(mask)
            total = all_sum(column.where(mask, 0))
            mean = torch.div(total, count.clamp(min=1), rounding_mode=None if total.is_floating_point() else "floor")
            self.columns[name] = torch.where(count > 0, mean.to(column.dtype), column)
        self._written = {}

    def exchange(self, index: Tensor, **values: Tensor) -> None:
        """Write in all processes at once; all must call it together, with equally many rows each."""
        # of a repeated index, the last row of the last process counts, so all copies stay equal
        index, order = all_rows(index).sort(stable=True)
        last = index.diff(append=index.new_full((1,), -1)) != 0
        for name, rows in values.items():
            column = self.columns[name]
            column[index[last]] = all_rows(rows.to(column.dtype))[order[last]]

    def means(self, rows: int) -> dict[str, Tensor]:
        """The mean weights of label and teachers over the first rows, and the noise rate; where these are known."""
        found = {"noise_rate": self.shared["noise_rate"]} if "noise_rate" in self.shared else {}
        if "weights" in self:
            label, *teachers = self["weights"][:rows].mean(0)
            found |= {"label_weight": label, "teacher_weight": label.new_zeros(()) + sum(teachers)}
        return found

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Map every column, e.g. to another device."""
        for values in (self.columns, self.shared, self._written):
            values.update({name: fn(value) for name, value in values.items()})

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values and tensors."""
        columns, shared = ({k: value.cpu() for k, value in part.items()} for part in (self.columns, self.shared))
        about = {"size": self.size, "fingerprint": self.fingerprint, "maker": self.maker}
        return {**about, "columns": columns, "shared": shared}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> SampleTable:
        """Rebuild a table from its `state_dict`."""
        table = cls(state["size"], state["fingerprint"])
        table.columns = dict(state["columns"])
        table.shared = dict(state["shared"])
        table.maker = state["maker"]
        return table

    def check(self, size: int, fingerprint: str) -> None:
        """Raise a ValueError for data other than the table's own."""
        if (self.size, self.fingerprint) != (size, fingerprint):
            raise ValueError(
                f"the sample table belongs to another data set: expected {self.size} rows with fingerprint "
                f"{self.fingerprint[:12]}, found {size} rows with fingerprint {fingerprint[:12]}. Use the data, split, "
                "noise and seed that the table was made with, or start without its checkpoint and with a new model."
            )
