"""What is learned from a teacher's maps of features, and from what its last layer makes of the student's."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.losses import attention_loss, hint_loss, information_loss, selectivity_loss
from lit_kd.losses.maps import pooled_alike
from lit_kd.models.taps import STAGES
from lit_kd.terms.base import Term
from lit_kd.terms.features import FeatureTerm, adapter, gives_logits
from lit_kd.types import PENULTIMATE, Batch, Outputs, full


class MapTerm(Term):
    """The sum over pairs of layers of a loss on a map of the student and one of the teacher, ``(B, c, h, w)``.

    Args:
        student_taps: Layers of the student, see `lit_kd.models.taps.Tapped`; by default `layer1` to
            `layer3`, which our convolutional networks and the ResNets of torchvision and timm have.
        teacher_taps: As many layers of the teacher, in the same order.
        weight: A constant factor.
    """

    takes_vectors = False  # as maps of one pixel

    def __init__(
        self, student_taps: Sequence[str] = STAGES, teacher_taps: Sequence[str] = STAGES, weight: float = 1.0
    ) -> None:
        super().__init__(weight)
        if isinstance(student_taps, str) or not 0 < len(student_taps) == len(teacher_taps):
            raise ValueError(
                "expected lists of as many layers of the student as of the teacher, at least one, found "
                f"{student_taps} and {teacher_taps}"
            )
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Refuse features that are no maps."""
        self.pairs(student, teacher)

    def pairs(self, student: Outputs, teacher: Outputs | None) -> list[tuple[Tensor, Tensor]]:
        """The maps of student and teacher."""
        assert teacher is not None
        ours = [self._as_map("student", tap, student.features[tap]) for tap in self.student_taps]
        theirs = [self._as_map("teacher", tap, teacher.features[tap]) for tap in self.teacher_taps]
        return list(zip(ours, theirs, strict=True))

    def _as_map(self, whose: str, tap: str, features: Tensor) -> Tensor:
        if features.dim() == 2 and self.takes_vectors:
            return features[..., None, None]
        if features.dim() != 4:
            raise ValueError(
                f"expected maps (c, h, w) of layer {tap!r} of the {whose}, found {tuple(features.shape[1:])}: tap a "
                "convolution or what follows it. A network without one has no maps: take FitNet, CRD, PKT, RKD or SRRL"
            )
        return features

    def loss(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The loss of each sample, ``(B,)``, from the maps of a pair, which has a number."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The sum of `loss` over the pairs."""
        return torch.stack([self.loss(s, t, k) for k, (s, t) in enumerate(self.pairs(student, teacher))]).sum(0)


class Attention(MapTerm):
    """Where in the image features are large (AT), see `lit_kd.losses.attention_loss`."""

    def loss(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """Squared error of the attention."""
        return attention_loss(full(student), full(teacher))


class Selectivity(MapTerm):
    """What the channels select (NST), see `lit_kd.losses.selectivity_loss`; a weight of 50 in the benchmarks [code]."""

    def loss(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """Discrepancy of the channels."""
        with torch.autocast(student.device.type, enabled=False):
            return selectivity_loss(full(student), full(teacher))


class Variational(MapTerm):
    """A trained normal distribution of the teacher's maps, given the student's (VID), see `information_loss`.

    The mean is that of three 1x1 convolutions with a ReLU between them, and each channel has a variance of its own, at
    first 5. Both are trained along. Vectors are taken as maps of one pixel.
    """

    takes_vectors = True

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make regressors and variances."""
        self.regressors, self.raw_variances = nn.ModuleList(), nn.ParameterList()
        for s, t in self.pairs(student, teacher):
            widths, layers = [s.shape[1], *[t.shape[1]] * 3], list[nn.Module]()
            for inputs, outputs in pairwise(widths):
                layers += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.ReLU()]
            self.regressors.append(nn.Sequential(*layers[:-1]))
            self.raw_variances.append(nn.Parameter(torch.full((t.shape[1],), 5.0).expm1().log()))

    def variance(self, pair: int) -> Tensor:
        """Of each channel of the teacher's map, ``(c,)``."""
        return F.softplus(full(self.raw_variances[pair])) + 1e-5

    def loss(self, student: Tensor, teacher: Tensor, pair: int) -> Tensor:
        """The negative logarithm of the density, but for a constant."""
        s, t = pooled_alike(student, teacher)
        return information_loss(full(self.regressors[pair](s)), full(t), self.variance(pair))


class SoftmaxRegression(FeatureTerm):
    """The student's features, through a connector, in the place of the teacher's, and before its last layer (SRRL).

    The sum of two squared errors: of the features, maps averaged over the image, and of the logits that the teacher's
    last layer makes of them. The layer is frozen, but gradients flow through it. `lit_kd.SRRL` sets `head`.

    Args:
        student_tap: A layer of the student, see `lit_kd.models.taps.Tapped`. Its maps are connected by a 1x1
            convolution with BatchNorm and ReLU [code], vectors by a linear layer [ours].
        weight: A constant factor.
    """

    head: tuple[nn.Linear, ...] = ()
    """The teacher's last layer; in a tuple, it is no submodule."""

    def __init__(self, student_tap: str = PENULTIMATE, weight: float = 1.0) -> None:
        super().__init__(student_tap, PENULTIMATE, weight)

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the connector."""
        assert teacher is not None
        s, t = self.features(student, teacher)
        if not self.head:
            raise ValueError("expected a term that knows the teacher's last layer, found none: train with lit_kd.SRRL")
        if s.dim() not in (2, 4):
            found = f"layer {self.student_taps[0]!r} of the student, found {tuple(s.shape[1:])}"
            raise ValueError(f"expected vectors or maps of {found}: tap another layer, such as {PENULTIMATE!r}")
        if not gives_logits(self.head[0](t), teacher.logits):
            raise ValueError(
                "expected a teacher whose last linear layer gives its logits, found that it does not: name the layer, "
                "lit_kd.models.adapt(teacher, head='fc')"
            )
        self.connector = adapter(tuple(s.shape[1:]), (t.shape[1], *s.shape[2:]))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """Both errors of each sample, ``(B,)``."""
        assert teacher is not None
        s, t = self.features(student, teacher)
        found = self.connector(s)
        found = found.mean((2, 3)) if found.dim() == 4 else found
        return hint_loss(full(found), full(t)) + hint_loss(full(self.head[0](found)), full(teacher.logits))
