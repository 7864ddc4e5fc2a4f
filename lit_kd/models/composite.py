"""A student with a projector and a borrowed head (SimKD, 2203.14001)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lit_kd.models.build import last_linear
from lit_kd.models.taps import Tapped

Shape = Sequence[int]


class Composite(nn.Module):
    """Runs a body up to a tapped layer, projects the features and classifies them with another network's head.

    Args:
        body: The network; `build` freezes its own last linear layer.
        tap: The layer, see `lit_kd.models.taps.Tapped`; it gives vectors (d,) or maps (c, h, w) per sample.

    Examples:
        >>> student = Composite(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), "1")
        >>> student.build((8,), (16,), (16, 3))
        >>> Composite.from_spec(student.body, student.spec()).head
        Linear(in_features=16, out_features=3, bias=True)
    """

    projector: nn.Sequential
    head: nn.Linear

    def __init__(self, body: nn.Module, tap: str) -> None:
        super().__init__()
        self.body = body
        self.tap = tap
        self._tapped = Tapped(body, (tap,))
        self._shapes: list[list[int]] = []

    def build(self, student_features: Shape, teacher_features: Shape, head: nn.Linear | tuple[int, int]) -> None:
        """Make the projector and a frozen copy of the head, a layer or its number of inputs and outputs.

        Maps go through a 1x1, a 3x3 and a 1x1 convolution, each with BatchNorm and ReLU [code]; vectors through two
        linear layers with a ReLU between them [ours]. The student's maps are pooled if they are larger than the
        teacher's; the loss pools larger ones of the teacher.
        """
        given, wanted = tuple(student_features), tuple(teacher_features)
        head = copy.deepcopy(head) if isinstance(head, nn.Linear) else nn.Linear(*head)
        if len(given) != len(wanted) or len(given) not in (1, 3) or head.in_features != wanted[0]:
            raise ValueError(
                "expected features of student and teacher that are both (d,) or both (c, h, w), and a head for the "
                f"teacher's; found {given} and {wanted}, and a head of {head.in_features} inputs"
            )
        self._shapes = [list(given), list(wanted)]
        middle = max(1, wanted[0] // 2)
        layers: list[nn.Module] = []
        if len(given) == 3:
            size = min(given[1], wanted[1]), min(given[2], wanted[2])
            layers += [nn.AdaptiveAvgPool2d(size)] if size != given[1:] else []
            layers += [*_conv(given[0], middle, 1), *_conv(middle, middle, 3), *_conv(middle, wanted[0], 1)]
        else:
            # no last ReLU, which could not reach negative features
            layers += [nn.Linear(given[0], wanted[0]), nn.ReLU(), nn.Linear(wanted[0], wanted[0])]
        self.projector = nn.Sequential(*layers)
        self.head = head.requires_grad_(False)  # after the projector: it is the last linear layer
        last_linear(self.body)[1].requires_grad_(False)  # nothing reads its outputs

    @property
    def built(self) -> bool:
        """Whether there are a projector and a head."""
        return bool(self._shapes)

    def forward(self, *x: Tensor, **named: Tensor) -> Tensor:
        """The logits ``(B, K)`` for one tensor, or for a mapping that is passed as keywords."""
        if not self.built:
            raise ValueError("expected a student whose projector is built, found none: train it, or load a checkpoint")
        features: Tensor = self.projector(self._tapped(x[0] if x else named).features[self.tap])
        logits: Tensor = self.head(features.mean((2, 3)) if features.dim() == 4 else features)
        return logits

    def spec(self) -> dict[str, Any]:
        """The plain values that `from_spec` needs."""
        student, teacher = self._shapes
        head = [self.head.in_features, self.head.out_features]
        return {"tap": self.tap, "student_features": student, "teacher_features": teacher, "head": head}

    @classmethod
    def from_spec(cls, body: nn.Module, spec: Mapping[str, Any]) -> Composite:
        """Rebuild a composite around a body, with random weights."""
        composite = cls(body, spec["tap"])
        composite.build(spec["student_features"], spec["teacher_features"], (spec["head"][0], spec["head"][1]))
        return composite


def _conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
