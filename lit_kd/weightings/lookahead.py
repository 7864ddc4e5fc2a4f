"""What ALM-KD's meta-step needs of the student in training: at its last layer, or through all its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_kd.data.table import all_sum
from lit_kd.models import last_linear
from lit_kd.models.taps import Tapped
from lit_kd.trust.exact import (
    Derivative,
    MetaInputs,
    central_derivative,
    exact_derivative,
    moment,
    whole_network_derivative,
)
from lit_kd.trust.meta import Head, MetaRows, last_layer_derivative
from lit_kd.types import PENULTIMATE, Batch, Outputs, evaluating


class LookAhead(ABC):
    """How the meta-step looks ahead."""

    taps: tuple[str, ...] = ()
    """Layers of the student whose features are wanted."""

    @abstractmethod
    def __init__(self, student: nn.Module, meta_rows: float, laid_out: Callable[[Batch], Batch]) -> None:
        """For a student, so many meta rows of each process in the validation loss, and how it reads a batch."""

    @property
    @abstractmethod
    def parameter(self) -> Tensor:
        """Whose learning rate the look-ahead takes."""

    def on_epoch(self) -> None:  # noqa: B027 - not all need it
        """An epoch starts."""

    def before(self) -> None:  # noqa: B027
        """The student is about to see a training batch."""

    @abstractmethod
    def check(self, train: Batch, student: Outputs) -> None:
        """Refuse a student that it is not made for: once, before the first update."""

    @abstractmethod
    def derivative(
        self, train: Batch, student: Outputs, meta: Batch, used: Tensor
    ) -> Callable[[Tensor, float], Tensor]:
        """What `lit_kd.weightings.MetaStep` wants.

        Args:
            train: The training batch.
            student: What the student gave for it, with its graph.
            meta: The meta batch of the same step.
            used: Sample indices of the training batches of all processes: a row must not vouch for itself.
        """


class LastLayer(LookAhead):
    """At the last layer, on features of the meta batches of the latest steps."""

    taps = (PENULTIMATE,)

    def __init__(self, student: nn.Module, meta_rows: float, laid_out: Callable[[Batch], Batch]) -> None:
        self.student = student
        self.meta_rows = meta_rows
        self.laid_out = laid_out
        self.path, self.layer = last_linear(student)
        self._rows: deque[tuple[Tensor, Tensor, Tensor]] = deque()

    @property
    def parameter(self) -> Tensor:
        """The layer's weight."""
        return self.layer.weight

    def on_epoch(self) -> None:
        """Meta rows of the last epoch are gone, as they are for a run that is resumed here."""
        self._rows.clear()

    def check(self, train: Batch, student: Outputs) -> None:
        """Is the layer taken for the last one really the one that gives the logits?"""
        if not Head.of(self.layer).gives(student.logits, student.features.get(PENULTIMATE)):
            raise ValueError(
                f"expected the student's logits to be the output of its last linear layer, {self.path!r}; found "
                "others. The meta-gradient is taken at that layer: let the student end in torch.nn.Linear, or use "
                "meta_gradient: exact"
            )

    def derivative(
        self, train: Batch, student: Outputs, meta: Batch, used: Tensor
    ) -> Callable[[Tensor, float], Tensor]:
        """In closed form."""
        assert meta.index is not None
        with evaluating(self.student):  # so that the meta rows leave no trace in running statistics
            features = Tapped(self.student, self.taps)(self.laid_out(meta).x).features[PENULTIMATE].float()
        self._rows.append((features, meta.y, meta.index))
        held = sum(len(y) for _, y, _ in self._rows)
        while held - len(self._rows[0][1]) >= self.meta_rows:
            held -= len(self._rows.popleft()[1])
        rows = [torch.cat(parts) for parts in zip(*self._rows, strict=True)]
        meta_rows = MetaRows(rows[0], rows[1], keep=~torch.isin(rows[2], used))
        head = Head.of(self.layer)
        features = student.features[PENULTIMATE].detach().float()
        return partial(last_layer_derivative, head, features, meta_rows, all_sum=all_sum)


class WholeNetwork(LookAhead):
    """Through all layers, on the meta batch of the same step: rows of earlier ones would cost passes of their own."""

    how: Derivative = staticmethod(exact_derivative)

    def __init__(self, student: nn.Module, meta_rows: float, laid_out: Callable[[Batch], Batch]) -> None:
        self.student = student
        self.laid_out = laid_out

    @property
    def parameter(self) -> Tensor:
        """The last one: there is one learning rate for all of them."""
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad][-1]

    def before(self) -> None:
        """Keep what the pass depends on."""
        self.moment = moment(self.student)

    def check(self, train: Batch, student: Outputs) -> None:
        """Does the student support the derivative, and can its pass be repeated?"""
        trainable = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        found, logits = self.how(self.student, self.laid_out(train).x, self.moment, trainable)[0], student.logits
        if (found - logits).norm() > 0.05 * logits.norm():
            rank_zero_warn(
                f"a second pass of {type(self.student).__name__} over a batch gives other logits, though buffers and "
                "random numbers are the same: the meta-gradient is that of another pass than the student learns from"
            )

    def derivative(
        self, train: Batch, student: Outputs, meta: Batch, used: Tensor
    ) -> Callable[[Tensor, float], Tensor]:
        """By `lit_kd.trust.exact.whole_network_derivative`."""
        assert meta.index is not None
        rows = MetaInputs(self.laid_out(meta).x, meta.y, keep=~torch.isin(meta.index, used))
        return partial(
            whole_network_derivative,
            self.student,
            self.laid_out(train).x,
            self.moment,
            student.logits,
            rows,
            derivative=self.how,
            all_sum=all_sum,
        )


class CentralDifferences(WholeNetwork):
    """The same for students whose operators have no forward mode."""

    how: Derivative = staticmethod(central_derivative)


LOOK_AHEADS: dict[str, type[LookAhead]] = {
    "last_layer": LastLayer,
    "exact": WholeNetwork,
    "central": CentralDifferences,
}
