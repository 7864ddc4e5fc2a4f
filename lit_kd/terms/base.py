"""What a term is, and the terms of a method together."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lit_kd.data.table import SampleTable
from lit_kd.losses import standardised
from lit_kd.types import Batch, Outputs

TINY = 1e-12
CLASSES: tuple[str, ...] = ("classification", "dense", "tokens")
"""Tasks whose labels are classes, one of a row, a pixel or a token."""
SAMPLES: tuple[str, ...] = ("classification", "multilabel", "regression")
"""Tasks whose labels are of a whole sample."""
Weights = Sequence[float] | Tensor
"""Of the label, then of each source: numbers, or ``(B, S + 1)``."""
Weighed = tuple[list[Tensor], Weights, Mapping[str, Tensor]]
"""The terms of label and sources, how much each counts, and extra terms by name."""


class Term(nn.Module):
    """What is learned from one source, the label or a teacher: one unweighted number a sample.

    A term overrides `forward`, and the other hooks where it needs them. Its parameters are trained with the student
    and saved for resume; the exported student has none of them. Each teacher has a copy of the term.

    Args:
        weight: A constant factor.
    """

    reads_teacher: ClassVar[bool] = True
    """Whether the source is a teacher; else it is the label, and ``teacher`` is ``None`` in all hooks."""
    couples_batch: ClassVar[bool] = False
    """Whether `forward` gives one number for the batch, ``()``: then it cannot be weighted by sample."""
    tasks: ClassVar[tuple[str, ...]] = ()
    """The tasks whose labels or logits it can read; none named: all."""
    keeps_rows: ClassVar[bool] = False
    """Whether it keeps state by sample, for which `start` is called."""
    decays: ClassVar[bool] = True
    """Whether the optimizer's weight decay is for its parameters, too."""
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

    def scaled(self, values: Tensor, source: Outputs | None, batch: Batch) -> Tensor:
        """What `forward` gave, times the constant factor and, where inputs are mixed, the row's share.

        It is 0 for rows that the source does not speak of.
        """
        values = self.weight * batch.by_share(values)
        return values if source is None or source.known is None else values * source.known

    @property
    def reads_features(self) -> bool:
        """Whether more than logits is compared: then only ALM-KD's meta-gradient ``exact`` can weigh it."""
        return bool(self.student_taps or self.teacher_taps)

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make parts whose shapes follow from a batch's outputs, before the optimizer is made."""

    def start(self, table: SampleTable, labels: Tensor) -> None:
        """Add columns to the table of state by sample, before the training; keep the table to read it later.

        The labels are those given for the rows that are trained on, which are the table's first, ``(N,)``.
        """

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The term of each sample, ``(B,)``, 0 where the sample lacks what it needs; without side effects."""
        raise NotImplementedError(f"{type(self).__name__} must override forward()")

    def update(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> None:
        """Renew state by sample with a training batch; called without gradients."""


def check_templates(
    method: str, settled: Sequence[str], term: Term | None, label_term: Term | None, extra: Sequence[Term] | None
) -> tuple[Term | None, Term | None, tuple[Term, ...]]:
    """What a user gave, the last as a tuple; refuses what is no term, and what a method does not take."""
    given = {"term": term, "label_term": label_term, "extra": extra}
    refused = [name for name in settled if given[name] not in (None, [])]
    if refused:
        raise ValueError(f"expected no {refused[0]}: {method} has its own, found {given[refused[0]]}")
    every = (term, label_term, *(extra if isinstance(extra, Sequence) else [extra]))
    wrong = [one for one in every if not (one is None or isinstance(one, Term))]
    if wrong or isinstance(extra, Term):
        found = repr(wrong[0] if wrong else extra)
        raise ValueError(f"expected terms, such as lit_kd.terms.KL(), and a list of them as extra, found {found}")
    return term, label_term, tuple(extra or ())


class TermSet(nn.Module):
    """The terms of a method: that of the label, one for each source, copied, and extra ones.

    Extra terms that read teachers are copied for each source too, and averaged. A ValueError if a term is in the wrong
    place, cannot do the task, or compares features with those of several ``teachers`` that were made one source.
    """

    def __init__(
        self,
        label: Term,
        each: Term,
        extra: Sequence[Term],
        sources: int,
        task: str = "classification",
        teachers: int = 1,
    ) -> None:
        super().__init__()
        for term in (label, each, *extra):
            if term in extra and term.reads_teacher and not sources:
                raise ValueError(f"expected as extra terms of the label, as no teacher is compared, found {term.name}")
            if term in extra and term.name in ("label", "teacher", "loss"):
                raise ValueError(f"expected an extra term of a name of its own in the logs, found {term.name!r}")
            if term.reads_teacher and term.teacher_taps and sources < teachers:
                raise ValueError(f"expected one teacher for {type(term).__name__}, as their mean has no features")
            if term.tasks and task not in term.tasks:
                raise ValueError(f"expected terms for {task}, found {type(term).__name__}, for {', '.join(term.tasks)}")

        places = (each, "term", "teacher", "label_term"), (label, "label_term", "label", "term")
        for term, name, source, other in places:
            if term.reads_teacher != (source == "teacher"):
                found = f"{type(term).__name__}: pass it as {other}"
                raise ValueError(f"expected as {name} a term of the {source}, found {found}")

        def copies(term: Term, name: str) -> nn.ModuleList:
            made = [copy.deepcopy(term) for _ in range(sources if term.reads_teacher else 1)]
            for k, one in enumerate(made):
                one.key = f"{name}_{one.name}_{k}"
            return nn.ModuleList(made)

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

    def check(self, method: str, by_sample: bool, mixed: bool, classes: int) -> None:
        """Refuse, before the training, what does not fit mixed rows, weights by sample, or two classes."""
        for term in self if mixed else ():
            if term.couples_batch or type(term).update is not Term.update:
                does = "compares the rows of a batch" if term.couples_batch else "keeps what it saw of each row"
                raise ValueError(
                    f"expected rows that are not mixed: {type(term).__name__} {does}. Leave out mix, or it"
                )
        for term in self.weighted if by_sample else ():
            if term.couples_batch:
                found = f"{method} cannot weigh {type(term).__name__} by sample: it couples the rows of a batch"
                raise ValueError(f"{found}. Instead, pass it as extra")
        if any(getattr(term, "standardise", False) for term in self):
            standardised(torch.zeros(1, classes))

    @property
    def temperature(self) -> float:
        """At which teachers are averaged or revised: that of the term that compares them, or 1."""
        return float(getattr(self.each[0], "temperature", 1.0)) if len(self.each) else 1.0

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
        values = []
        for term, source in self._with_sources(sources):
            values.append(term.scaled(term(student, source, batch), source, batch))
            wanted = () if term.couples_batch else (len(student.logits),)
            if values[-1].shape != wanted:
                found = f"{type(term).__name__} gave {tuple(values[-1].shape)}"
                raise ValueError(f"expected one number a sample, or one with couples_batch; {found}, not {wanted}")
        own = 1 + len(self.each)
        losses, rest, extra = values[:own], values[own:], dict[str, Tensor]()
        for terms in self._groups[2:]:
            whole = len(terms) < 2 or all(source.known is None for source in sources)
            speak = len(terms) if whole else torch.stack([source.speaks for source in sources]).sum(0).clamp(min=1)
            mean = torch.stack(rest[: len(terms)]).sum(0) / speak
            extra[terms[0].name] = extra[terms[0].name] + mean if terms[0].name in extra else mean
            rest = rest[len(terms) :]
        return losses, extra

    @torch.no_grad()
    def update(self, student: Outputs, sources: Sequence[Outputs], batch: Batch) -> None:
        """See `Term.update`."""
        for term, source in self._with_sources(sources):
            if type(term).update is not Term.update:
                term.update(student, source, batch)


def heard(weights: Weights, sources: Sequence[Outputs]) -> Weights:
    """Constant weights for each row, ``(B, S + 1)``, where a source does not speak of all rows; others as they are.

    The shares of those that are silent go to those that speak, in proportion; where none speaks, the label counts 1, as
    without a teacher [ours].
    """
    if isinstance(weights, Tensor) or all(source.known is None for source in sources):
        return weights
    known = torch.stack([source.speaks for source in sources], dim=1)
    label, *shares = weights
    each = known * torch.tensor(shares, device=known.device)
    each = each * sum(shares) / each.sum(1, keepdim=True).clamp(min=TINY)
    own = torch.where(known.any(1, keepdim=True), label, 1.0)
    return torch.cat([own, each], dim=1)


def row_losses(losses: Sequence[Tensor], weights: Weights, extra: Mapping[str, Tensor]) -> Tensor:
    """The loss of each row, ``(B,)``, whose mean is `weighted_means`'s ``loss``; of the same arguments."""
    each: Sequence[float | Tensor] = weights.unbind(1) if isinstance(weights, Tensor) else weights
    total = torch.zeros_like(losses[0])
    for term in [*(weight * loss for weight, loss in zip(each, losses, strict=True)), *extra.values()]:
        total = total + term
    return total


def weighted_means(losses: Sequence[Tensor], weights: Weights, extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means over a batch of what is learned, with their graph: ``label``, ``teacher``, extra terms, and ``loss``.

    Losses are those of the label and of each source, ``(B,)`` or ``()`` each; extra terms count as they are. A
    ValueError if a term that couples the batch is to be weighted by sample.
    """
    if isinstance(weights, Tensor) and any(loss.dim() == 0 for loss in losses):
        raise ValueError(
            "expected terms of one number a sample, as they are weighted by sample, found one that couples the batch: "
            "pass it as extra, which has a constant weight"
        )
    each: Sequence[float | Tensor] = weights.unbind(1) if isinstance(weights, Tensor) else weights
    if len(each) != len(losses):
        raise ValueError(f"expected {len(losses)} weights, of the label and of each source, found {len(each)}")
    label, *taught = [(weight * loss).mean() for weight, loss in zip(each, losses, strict=True)]
    means = {"label": label} | ({"teacher": torch.stack(taught).sum()} if taught else {})
    means |= {name: term.mean() for name, term in extra.items()}
    return means | {"loss": torch.stack(list(means.values())).sum()}
