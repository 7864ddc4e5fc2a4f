"""What a training epoch adds up: its loss terms, and whether all numbers were finite."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lit_kd.distiller.checks import check_finite

AT_ONCE = 32
"""Steps whose terms are added up together: one by one they took longer than a small network's loss."""


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
        self._steps: dict[tuple[str, ...], list[Tensor]] = {}  # by the terms' names, (terms, rows): not added up yet
        self._totals: dict[str, Tensor] = {}
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

        Raises:
            ValueError: If there is no term, or, where values are read, one that is not finite.
        """
        values = list(terms.values())
        if not values:
            raise ValueError("expected distill to return at least one loss term by name, found none")
        detached = [value.detach() for value in values]
        if all(value.shape == (rows,) for value in values):  # as a rule; then one mean is enough
            loss = functools.reduce(torch.add, values).mean()
            taken = torch.stack(detached)  # a copy: what a term is a part of may be large, or be written to
        else:
            loss = functools.reduce(torch.add, [value.mean() for value in values])
            taken = rows * torch.stack([value.float().mean() for value in detached]).unsqueeze(1)
        if self.reads and not math.isfinite(loss.item()):
            means = {name: value.mean() for name, value in zip(terms, detached, strict=True)}
            check_finite(means | {"train/loss": loss})
        self._rows += rows
        steps = self._steps.setdefault(tuple(terms), [])
        steps.append(taken)
        if len(steps) == AT_ONCE:
            self._add_up()
        return loss

    def _add_up(self) -> None:
        for names, steps in self._steps.items():
            totals = torch.cat(steps, dim=1).sum(1, dtype=torch.float32)  # bfloat16 cannot count far
            for name, total in zip(names, totals, strict=True):
                self._totals[name] = self._totals.get(name, 0) + total
        self._steps = {}

    def check(self) -> None:
        """Refuse what was not finite in this epoch. Stalls an accelerator."""
        check_finite(self._watched | self._sums())

    def means(self) -> dict[str, Tensor]:
        """Of each term and of their sum, ``train/loss``, over the rows of the epoch."""
        return {name: total / self._rows for name, total in self._sums().items()}

    def _sums(self) -> dict[str, Tensor]:
        self._add_up()
        if not self._totals:
            return {}
        # whatever a method calls its terms
        return self._totals | {"train/loss": functools.reduce(torch.add, self._totals.values())}
