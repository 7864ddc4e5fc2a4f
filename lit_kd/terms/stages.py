"""What is learned from maps: fused over the stages of a network, by class, and by region."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_kd.losses import class_map_loss, pyramid_loss, regional_logits
from lit_kd.models.taps import STAGES
from lit_kd.terms.base import Term
from lit_kd.terms.features import FeatureTerm, gives_logits
from lit_kd.terms.logits import KL, LogitTerm, Mixed
from lit_kd.terms.maps import MapTerm
from lit_kd.types import CLASS_MAPS, PENULTIMATE, Batch, Outputs, class_labels


class Fusion(nn.Module):
    """Brings one stage of the student, with what is carried from the stage above, to the teacher's shape [code].

    Args:
        given: Channels of the student's maps.
        width: Of what is carried.
        wanted: Channels of the teacher's maps.
        fuse: Whether something is carried from above.
    """

    def __init__(self, given: int, width: int, wanted: int, fuse: bool) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(given, width, 1, bias=False), nn.BatchNorm2d(width))
        self.outer = nn.Sequential(nn.Conv2d(width, wanted, 3, padding=1, bias=False), nn.BatchNorm2d(wanted))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuse else None
        for conv in (self.inner[0], self.outer[0]):
            nn.init.kaiming_uniform_(cast(Tensor, conv.weight), a=1)

    def forward(self, x: Tensor, carried: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Maps of the teacher's size and channels, and what to carry on."""
        x = self.inner(x)
        if self.attention is not None:
            assert carried is not None
            carried = F.interpolate(carried, x.shape[2:], mode="nearest")
            own, above = self.attention(torch.cat([x, carried], dim=1)).split(1, dim=1)
            x = x * own + carried * above
        x = F.interpolate(x, tuple(size), mode="nearest")
        return self.outer(x), x


class Review(MapTerm):
    """The student's stages, each fused with those above it, against the teacher's (ReviewKD, arXiv 2104.09044) [code].

    From the last stage to the first, see `Fusion`; each is compared by `lit_kd.losses.pyramid_loss`, and the losses are
    summed. The authors compare with the teacher's maps before the ReLU [code]; here with the layers' outputs [ours], so
    their weights need not fit. Vectors are maps of size 1. Layers are given from the first to the last.
    """

    takes_vectors = True

    def __init__(
        self,
        student_taps: Sequence[str] = (*STAGES, PENULTIMATE),
        teacher_taps: Sequence[str] = (*STAGES, PENULTIMATE),
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_taps, teacher_taps, weight)

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Make the fusions."""
        pairs = self.pairs(student, teacher)
        width, last = min(512, pairs[-1][0].shape[1]), len(pairs) - 1
        self.fusions = nn.ModuleList(Fusion(s.shape[1], width, t.shape[1], k < last) for k, (s, t) in enumerate(pairs))

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The sum over the stages, ``(B,)``."""
        pairs, carried, losses = self.pairs(student, teacher), None, []
        if self.training and len(student.logits) == 1 and any(f[0, 0].numel() == 1 for pair in pairs for f in pair):
            cure = "let the training loader leave it out, drop_last=True, or set another batch_size"
            raise ValueError(f"expected batches of several rows, which BatchNorm of vectors needs, found one: {cure}")
        for fusion, (s, t) in zip(reversed(list(self.fusions)), reversed(pairs), strict=True):
            made, carried = fusion(s, carried, t.shape[2:])
            losses.append(pyramid_loss(made, t))
        return torch.stack(losses).sum(0)


class HeadTerm(FeatureTerm):
    """A function of both networks' class maps: of what each one's last linear layer makes of each place of a map."""

    least = 1
    """The least height and width of a map."""

    def __init__(self, student_tap: str, teacher_tap: str, weight: float) -> None:
        super().__init__(CLASS_MAPS + student_tap, CLASS_MAPS + teacher_tap, weight)

    def class_maps(self, student: Outputs, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        """Those of student and teacher, ``(B, C, h, w)``."""
        s, t = (f[..., None, None] if f.dim() == 2 else f for f in self.features(student, teacher))
        return s, t

    def build(self, student: Outputs, teacher: Outputs | None) -> None:
        """Refuse layers that the last linear layers do not read, and maps that are too small; a ValueError."""
        assert teacher is not None
        taps = [tap.removeprefix(CLASS_MAPS) for tap in (*self.student_taps, *self.teacher_taps)]
        maps = self.class_maps(student, teacher)
        for who, out, tap, found in zip(("student", "teacher"), (student, teacher), taps, maps, strict=True):
            if not gives_logits(found, out.logits, bias=False):
                raise ValueError(
                    f"expected the {who}'s last linear layer to read the mean of its layer {tap!r}, found that it does "
                    "not: choose the layer before the pooling, the last map"
                )
            if min(found.shape[2:]) < self.least:
                size = " x ".join(str(n) for n in found.shape[2:])
                raise ValueError(
                    f"expected maps of at least {self.least} x {self.least} from the {who}'s layer {tap!r}, found "
                    f"{size}: let the network read larger images, or compare coarser regions"
                )


class ClassMaps(HeadTerm):
    """Class activation maps against the teacher's (CAT-KD, CVPR 2023), see `lit_kd.losses.class_map_loss`.

    Gradients reach the student's last linear layer, too.

    Args:
        student_tap: The layer whose mean over the image the student's last linear layer reads.
        teacher_tap: The same of the teacher.
        normalise: Compare maps of norm 1, so that no network's scale counts.
        weight: A constant factor.
    """

    def __init__(
        self, student_tap: str = "layer3", teacher_tap: str = "layer3", normalise: bool = True, weight: float = 1.0
    ) -> None:
        super().__init__(student_tap, teacher_tap, weight)
        self.normalise, self.least = normalise, 2 if normalise else 1  # of norm 1, a single place has a sign alone

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """Their mean squared error, ``(B,)``."""
        return class_map_loss(*self.class_maps(student, teacher), self.normalise)


class ScaleDecoupled(HeadTerm):
    """Any term of logits, on each region of the last map (SDD, arXiv 2403.13512), see `lit_kd.losses.regional_logits`.

    It is the mean over all regions of all scales, 21 by default. A region counts twice where the teacher is right about
    the label in the region and wrong on the whole, or the reverse [code]. Where the term is not finite, neither is
    this; the authors' code takes 0. It sums DKD over the regions: there, a weight of 21 is theirs.

    Args:
        term: Of logits, one number a sample; by default `KL` at temperature 4.
        student_tap: The layer whose mean over the image the student's last linear layer reads.
        teacher_tap: The same of the teacher.
        scales: k of each division of the map into k by k regions.
        weight: A constant factor.
    """

    tasks = ("classification",)

    def __init__(
        self,
        term: Term | None = None,
        student_tap: str = "layer3",
        teacher_tap: str = "layer3",
        scales: Sequence[int] = (1, 2, 4),
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_tap, teacher_tap, weight)
        term = KL() if term is None else term
        hooks = type(term).build is not Term.build or type(term).update is not Term.update
        own = hooks or term.keeps_rows or [*term.parameters()] or isinstance(term, Mixed)
        if own or not isinstance(term, LogitTerm) or term.couples_batch or "classification" not in term.tasks:
            found = f"such as KL(), found {type(term).__name__}"
            raise ValueError(f"expected a term of logits of one number a sample, without state or parts, {found}")
        if not scales or min(scales) < 1:
            raise ValueError(f"expected scales of whole numbers from 1, such as [1, 2, 4], found {list(scales)}")
        self.term, self.temperature = term, term.temperature
        self.scales, self.least = tuple(scales), max(scales)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Tensor:
        """The mean over the regions, ``(B,)``."""
        assert teacher is not None
        pairs = zip((student, teacher), self.class_maps(student, teacher), strict=True)
        s, t = (regional_logits(out.logits, maps, self.scales) for out, maps in pairs)
        rows, regions = s.shape[:2]
        each = Batch(batch.x, batch.y.repeat_interleave(regions, 0))
        values = self.term(Outputs(s.flatten(0, 1), {}), Outputs(t.flatten(0, 1), {}), each).view(rows, regions)
        y = class_labels(batch.y)
        apart = (t.argmax(-1) == y.unsqueeze(1)) != (teacher.logits.argmax(-1) == y).unsqueeze(1)
        found: Tensor = self.term.weight * (values * (1 + apart.float())).mean(1)
        return found
