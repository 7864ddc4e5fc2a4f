"""What a term is, and the terms of a method together."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lit_kd.data.table import SampleTable
from lit_kd.types import Batch, Outputs

Weights = Sequence[float] | Tensor
"""Of the label, then of each source: numbers, or ``(B, S + 1)``."""


class Term(nn.Module):
    """What is learned from one source, the label or a teacher: one unweighted number a sample.

    A term overrides `forward`, and the other hooks where it needs them. Its parameters are trained with the student
    and saved for resume; the exported student has none of them. Each teacher has a copy of the term.

    Args:
        weight: A constant factor.
    """

    reads_teacher: ClassVar[bool] = True
    """Whether the source is a teacher; else it is the label, and ``teacher`` is ``None`` in all hooks."""
    reads_features: ClassVar[bool] = False
    """Whether more than logits is compared: then only ALM-KD's meta-gradient ``exact`` can weigh it."""
    couples_batch: ClassVar[bool] = False
    """Whether `forward` gives one number for the batch, ``()``: then it cannot be weighted by sample."""
    tasks: ClassVar[tuple[str, ...]] = ()
    """The tasks whose labels or logits it can read; none named: all."""
    keeps_rows: ClassVar[bool] = False
    """Whether it keeps state by sample, for which `start` is called."""
    student_taps: tuple[str, ...] = ()
    """Layers of the student whose features `forward` reads, see `lit_kd.models.taps.Tapped`."""
    teacher_taps: tuple[str, ...] = ()
    """The same of the teacher."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.name = re.sub("(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        """In logs, where the term is an extra one."""
        self.key = self.name
        """Begins the names of its columns in the table; each copy has its own."""

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make parts whose shapes follow from a batch's outputs, before the optimizer is made."""

    def start(self, table: SampleTable, labels: Tensor) -> None:
        """Add columns to the table of state by sample, before the training; keep the table to read it later.

        Args:
            table: The table.
            labels: Given labels of the rows that are trained on, which are the table's first, ``(N,)``.
        """

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The term of each sample, ``(B,)``, 0 where the sample lacks what it needs; without side effects."""
        raise NotImplementedError(f"{type(self).__name__} must override forward()")

    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Renew state by sample with a training batch; called without gradients."""


class TermSet(nn.Module):
    """The terms of a method: one of the label, one of each source, and extra ones.

    Args:
        label: Of the label.
        each: Copied for each source.
        extra: Further ones; those that read teachers are copied for each source, and averaged.
        sources: How many sources there are.
        task: Name of the task.

    Raises:
        ValueError: If a term is in the wrong place, or cannot do the task.
    """

    def __init__(
        self, label: Term, each: Term, extra: Sequence[Term], sources: int, task: str = "classification"
    ) -> None:
        super().__init__()
        for term in (label, each, *extra):
            if term in extra and term.reads_teacher and not sources:
                raise ValueError(f"expected as extra terms of the label, as there is no teacher, found {term.name}")
            if term.tasks and task not in term.tasks:
                raise ValueError(f"expected terms for {task}, found {type(term).__name__}, for {', '.join(term.tasks)}")

        def copies(term: Term, name: str) -> nn.ModuleList:
            made = [copy.deepcopy(term) for _ in range(sources if term.reads_teacher else 1)]
            for k, one in enumerate(made):
                one.key = f"{name}_{one.name}_{k}"
            return nn.ModuleList(made)

        if not each.reads_teacher or label.reads_teacher:
            wrong, name = (each, "term") if not each.reads_teacher else (label, "label_term")
            raise ValueError(
                f"expected as {name} a term of the {'teacher' if wrong is each else 'label'}, found "
                f"{type(wrong).__name__}: pass it as {'label_term' if wrong is each else 'term'}"
            )
        self.label = copies(label, "label")
        self.each = copies(each, "each")
        self.extra = nn.ModuleList([copies(term, f"extra_{i}") for i, term in enumerate(extra)])

    @property
    def _groups(self) -> list[list[Term]]:
        groups = [self.label, self.each, *cast(Iterable[nn.ModuleList], self.extra)]
        return [cast(list[Term], list(group)) for group in groups]

    def __iter__(self) -> Iterator[Term]:
        return chain.from_iterable(self._groups)

    @property
    def weighted(self) -> list[Term]:
        """Those of the label and of the sources, which the method weighs."""
        return [term for group in self._groups[:2] for term in group]

    @property
    def has_parts(self) -> bool:
        """Whether `build` does something."""
        return any(type(term).build is not Term.build for term in self)

    def taps(self, whose: str) -> tuple[str, ...]:
        """The layers of the ``"student"`` or of the ``"teacher"`` that terms read."""
        return tuple(dict.fromkeys(tap for term in self for tap in getattr(term, f"{whose}_taps")))

    def _with_sources(self, sources: Sequence[Outputs]) -> Iterator[tuple[Term, Outputs | None]]:
        for terms in filter(None, self._groups):
            yield from zip(terms, sources if terms[0].reads_teacher else [None], strict=True)

    def build(self, student: Outputs, sources: Sequence[Outputs]) -> None:
        """See `Term.build`."""
        for term, source in self._with_sources(sources):
            term.build(student, source)

    def forward(
        self, student: Outputs, sources: Sequence[Outputs], batch: Batch
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The terms of the label and of each source, ``(B,)`` or ``()`` each, and the extra ones by name."""
        values = [term.weight * term(student, source, batch) for term, source in self._with_sources(sources)]
        own = 1 + len(self.each)
        losses, rest, extra = values[:own], values[own:], dict[str, Tensor]()
        for terms in self._groups[2:]:
            mean = torch.stack(rest[: len(terms)]).mean(0)
            extra[terms[0].name] = extra[terms[0].name] + mean if terms[0].name in extra else mean
            rest = rest[len(terms) :]
        return losses, extra

    @torch.no_grad()
    def update(self, student: Outputs, sources: Sequence[Outputs], batch: Batch) -> None:
        """See `Term.update`."""
        for term, source in self._with_sources(sources):
            if type(term).update is not Term.update:
                term.update(student, source, batch)


def weighted_means(losses: Sequence[Tensor], weights: Weights, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means over a batch of what is learned, with their graph: ``label``, ``teacher``, extra terms, and ``loss``.

    Args:
        losses: The terms of the label and of each source, ``(B,)`` or ``()`` each.
        weights: What each counts.
        extra: Terms that count as they are, by name.

    Raises:
        ValueError: If a term that couples the batch is to be weighted by sample.
    """
    if isinstance(weights, Tensor) and any(loss.dim() == 0 for loss in losses):
        raise ValueError(
            "expected terms of one number a sample, as they are weighted by sample, found one that couples the batch: "
            "pass it as extra, which has a constant weight"
        )
    each: Sequence[float | Tensor] = weights.unbind(1) if isinstance(weights, Tensor) else weights
    label, *taught = [(weight * loss).mean() for weight, loss in zip(each, losses, strict=True)]
    means = {"label": label} | ({"teacher": torch.stack(taught).sum()} if taught else {})
    means |= {name: term.mean() for name, term in extra.items()}
    return means | {"loss": torch.stack(list(means.values())).sum()}
