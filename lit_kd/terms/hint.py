"""What is learned from a teacher's inner layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.losses import hint_loss
from lit_kd.terms.base import Term
from lit_kd.types import PENULTIMATE, Batch, Outputs


class Hint(Term):
    """The mean squared error between the student's features, through an adapter, and the teacher's (FitNet, 1412.6550).

    The adapter follows from the shapes [code]: for maps a convolution, of stride 2 where the student's map is twice as
    large, transposed where it is half as large, then BatchNorm and ReLU; for vectors and sequences of tokens a linear
    layer [ours], as a ReLU could not reach negative features.

    Args:
        student_tap: A layer of the student, see `lit_kd.models.taps.Tapped`.
        teacher_tap: A layer of the teacher.
        adapt: Whether there is an adapter. Without one, larger maps are pooled to the size of the smaller.
        weight: A constant factor.
    """

    reads_features = True

    def __init__(
        self,
        student_tap: str = PENULTIMATE,
        teacher_tap: str = PENULTIMATE,
        adapt: bool = True,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.student_taps, self.teacher_taps = (student_tap,), (teacher_tap,)
        self.adapter: nn.Module | None = None
        self.adapt = adapt

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the adapter."""
        assert teacher is not None
        if self.adapt:
            s, t = student.features[self.student_taps[0]].shape[1:], teacher.features[self.teacher_taps[0]].shape[1:]
            self.adapter = adapter(tuple(s), tuple(t))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The mean over all elements of a sample's features, ``(B,)``."""
        assert teacher is not None
        s, t = student.features[self.student_taps[0]], teacher.features[self.teacher_taps[0]]
        if self.adapter is not None:
            s = self.adapter(s)
        elif s.dim() == 4 and t.dim() == 4:
            size = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
            s, t = (f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in (s, t))
        return hint_loss(s, t)


def adapter(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Module:
    """The layers from features of one shape to those of another, see `Hint`.

    Args:
        student: Of one sample: ``(d,)``, ``(tokens, d)`` or ``(c, h, w)``.
        teacher: Likewise, of as many axes.

    Raises:
        ValueError: If there are no such layers.

    Examples:
        >>> adapter((8, 4, 4), (16, 4, 4))[0]
        Conv2d(8, 16, kernel_size=(1, 1), stride=(1, 1), bias=False)
    """
    if len(student) == len(teacher) == 3:
        (c, h, w), (channels, height, width) = student, teacher
        conv: nn.Module | None = None
        if (h, w) == (2 * height, 2 * width):
            conv = nn.Conv2d(c, channels, 3, stride=2, padding=1, bias=False)
        elif (2 * h, 2 * w) == (height, width):
            conv = nn.ConvTranspose2d(c, channels, 4, stride=2, padding=1, bias=False)
        elif h >= height and w >= width:
            conv = nn.Conv2d(c, channels, (1 + h - height, 1 + w - width), bias=False)
        if conv is not None:
            return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())
    elif len(student) == len(teacher) and student[:-1] == teacher[:-1]:
        return nn.Linear(student[-1], teacher[-1])
    raise ValueError(
        "expected features that an adapter can bring together, both (d,), (tokens, d) or (c, h, w), found "
        f"{student} of the student and {teacher} of the teacher: tap other layers"
    )
