"""What a training epoch adds up: its loss terms, and whether all numbers were finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lit_kd.checks import check_finite


class Ledger:
    """Sums over an epoch's rows: Lightning's own take a millisecond a term and step.

    Attributes:
        reads: Whether the values of this batch are read at once, and refused if they are not finite. Else they are
            added up, for `check`: reading would stall an accelerator.
    """

    def __init__(self) -> None:
        self.reads = False
        self.clear()

    def clear(self) -> None:
        """A new epoch."""
        self._terms: dict[tuple[str, ...], Tensor] = {}  # a step's terms together: few operations
        self._watched: dict[str, Tensor] = {}
        self._rows = 0

    def watch(self, name: str, values: Tensor) -> None:
        """Refuse values that are not finite, at the latest when `check` is called."""
        total = values.detach().sum(dtype=torch.float32)
        if self.reads:
            if not math.isfinite(total.item()):
                check_finite({name: total})
        else:
            self._watched[name] = self._watched.get(name, 0) + total

    def add(self, terms: Mapping[str, Tensor], rows: int) -> Tensor:
        """Take down a batch's loss terms.

        Args:
            terms: By name, of each sample or scalars.
            rows: Of the batch.

        Returns:
            The sum of their means, with its graph.
        """
        names, values = tuple(terms), list(terms.values())
        if all(value.shape == values[0].shape for value in values):  # as a rule; then one mean is enough
            means = torch.stack(values).view(len(values), -1).mean(1)
        else:
            means = torch.stack([value.mean() for value in values])
        taken = means.detach().float()  # bfloat16 cannot count far
        if names in self._terms:
            self._terms[names].add_(taken, alpha=rows)
        else:
            self._terms[names] = rows * taken
        self._rows += rows
        loss = means.sum()
        if self.reads and not math.isfinite(loss.item()):
            check_finite(dict(zip((*names, "train/loss"), (*taken, taken.sum()), strict=True)))
        return loss

    def check(self) -> None:
        """Refuse what was not finite in this epoch. Stalls an accelerator."""
        check_finite(self._watched | self._sums())

    def means(self) -> dict[str, Tensor]:
        """Of each term and of their sum, ``train/loss``, over the rows of the epoch."""
        return {name: total / self._rows for name, total in self._sums().items()}

    def _sums(self) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for names, totals in self._terms.items():
            for name, total in zip(names, totals, strict=True):
                sums[name] = sums.get(name, 0) + total
        if self._terms:  # whatever a method calls its terms
            sums["train/loss"] = torch.stack([totals.sum() for totals in self._terms.values()]).sum()
        return sums
