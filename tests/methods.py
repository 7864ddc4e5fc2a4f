"""Every method, on a tiny problem that each can learn: a new method is one more line of METHODS."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Tensor, nn

from lit_kd import (
    ALMKD,
    CATKD,
    CRD,
    CTKD,
    DIST,
    DKD,
    DOT,
    GLC,
    KD,
    L2RW,
    LELP,
    MCMI,
    NKD,
    PKT,
    RKD,
    SDD,
    SRRL,
    VID,
    WSLD,
    AdversarialKD,
    AttentionTransfer,
    Batch,
    ComparativeKD,
    CoTeaching,
    CrowdLabels,
    Distiller,
    FitNet,
    GroupDistil,
    JoCoR,
    LabelRevision,
    LossDivider,
    MetaWeightNet,
    MixKD,
    MultiLevelKD,
    MutualLearning,
    Outputs,
    ReviewKD,
    RobustActiveDistillation,
    SimilarityPreserving,
    SimKD,
    SLaM,
    Supervised,
    WeightedDistillation,
)
from lit_kd.data import DataModule, Source, TensorRows
from lit_kd.models import build_model
from lit_kd.models.networks import mlp
from lit_kd.terms import ELR, SOP, USKD, DecoupledKL, Hint, TeacherFree
from lit_kd.types import PENULTIMATE
from lit_kd.weightings import Amal, Paper


class Mapped(nn.Sequential):
    """A network whose ``layer1`` gives maps, and behind it an MLP."""

    def __init__(self, rest: nn.Module | None = None) -> None:
        layer1 = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.dirac_(layer1.weight)
        super().__init__(OrderedDict(layer1=layer1, rest=rest or mlp(16, [8], CLASSES)))


def with_maps(student: nn.Module | str) -> nn.Module | str:
    """A student like the given one, for methods that an MLP has nothing for."""
    if isinstance(student, str):
        return "methods.Mapped" if student == "mlp-8" else student
    return student if hasattr(student, "layer1") else Mapped(student)


class Pooled(nn.Sequential):
    """A network whose last linear layer reads the mean of a map of 2 by 2 places."""

    def __init__(self) -> None:
        last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))
        super().__init__(OrderedDict(layer1=nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU()), last=last))


def on_places(method: Any, student: Any, teachers: Sequence[Any], one: dict[str, Any], **options: Any) -> Distiller:
    """Of networks with a last map of 2 by 2 places; a given CNN's map is one place, for which there are options."""
    if student == "mlp-8":
        taught: Distiller = method("methods.Pooled", [copy.deepcopy(_trained()[2])], **_taps("layer1"), **options)
        return taught
    given: Distiller = method(student, teachers, **_taps(PENULTIMATE), **(options | one))
    return given


def _taps(tap: str) -> dict[str, str]:
    return {"student_tap": tap, "teacher_tap": tap}


METHODS: dict[str, Callable[..., Distiller]] = {
    "supervised": lambda student, teachers, **base: Supervised(student, **base),
    "kd": lambda student, teachers, **base: KD(student, teachers[0], **base),
    "kd-teachers": lambda student, teachers, **base: KD(student, teachers, drop=0.25, **base),
    "group-distil": lambda student, teachers, **base: GroupDistil(student, teachers, rate=0.1, **base),
    "adversarial": lambda student, teachers, **base: AdversarialKD(student, teachers, steps=2, **base),
    "adversarial-teacher": lambda student, teachers, **base: AdversarialKD(
        student, teachers[0], attack="teacher", **base
    ),
    "mcmi": lambda student, teachers, **base: MCMI(student, **base),
    "weighted": lambda student, teachers, **base: WeightedDistillation(student, teachers[0], **base),
    "slam": lambda student, teachers, **base: SLaM(student, teachers[0], normalise=True, **base),
    "kd-revised": lambda student, teachers, **base: KD(student, teachers[0], revise=0.8, select=0.7, **base),
    "label-revision": lambda student, teachers, **base: LabelRevision(student, teachers[0], form="kl", **base),
    "label-revision-selected": lambda student, teachers, **base: LabelRevision(
        student, teachers, form="kl", cross_entropy="all", select=0.7, **base
    ),
    "almkd-robust": lambda student, teachers, **base: ALMKD(student, teachers[0], rule="robust", **base),
    "almkd-paper": lambda student, teachers, **base: ALMKD(
        student, teachers[0], rule=Paper(warmup_epochs=1, every=1), **base
    ),
    "almkd-amal": lambda student, teachers, **base: ALMKD(
        student, teachers, rule=Amal(warmup_epochs=1, every=1), **base
    ),
    "l2rw": lambda student, teachers, **base: L2RW(student, **base),
    "meta-weight-net": lambda student, teachers, **base: MetaWeightNet(student, **base),
    "co-teaching": lambda student, teachers, **base: CoTeaching(
        student, **({"peers": ["mlp-12"], "noise_rate": 0.3, "ramp_epochs": 2} | base)
    ),
    "jocor": lambda student, teachers, **base: JoCoR(
        student, agreement=0.5, **({"peers": ["mlp-12"], "noise_rate": 0.3, "ramp_epochs": 2} | base)
    ),
    "crowd-labels": lambda student, teachers, **base: CrowdLabels(student, teachers, **base),
    "loss-divider": lambda student, teachers, **base: LossDivider(student, **({"warmup_epochs": 1} | base)),
    "rad": lambda student, teachers, **base: RobustActiveDistillation(
        student, teachers[0], **({"budget": 12, "rounds": 1} | base)
    ),
    "elr": lambda student, teachers, **base: Supervised(student, label_term=ELR(), **base),
    "sop": lambda student, teachers, **base: Supervised(student, label_term=SOP(200.0, 200.0), **base),
    "glc": lambda student, teachers, **base: GLC(student, **base),
    "dkd": lambda student, teachers, **base: DKD(student, teachers[0], beta=0.5, warmup_epochs=1, **base),
    "nkd": lambda student, teachers, **base: NKD(student, teachers, **base),
    "dist": lambda student, teachers, **base: DIST(student, teachers, **({"weight": 0.1} | base)),
    "wsld": lambda student, teachers, **base: WSLD(student, teachers, **base),
    "ctkd": lambda student, teachers, **base: CTKD(student, teachers, **({"ramp_epochs": 1} | base)),
    "multi-level": lambda student, teachers, **base: MultiLevelKD(student, teachers, **base),
    "dot": lambda student, teachers, **base: DOT(student, teachers[0], **base),
    "teacher-free": lambda student, teachers, **base: Supervised(student, label_term=TeacherFree(), **base),
    "uskd": lambda student, teachers, **base: Supervised(student, label_term=USKD(PENULTIMATE, mu=0.1), **base),
    "fitnet": lambda student, teachers, **base: FitNet(student, teachers, weight=1.0, **base),
    "crd": lambda student, teachers, **base: CRD(student, teachers[0], negatives=16, **base),
    "attention-transfer": lambda student, teachers, **base: AttentionTransfer(
        with_maps(student), teachers[0], student_taps=["layer1"], teacher_taps=["layer1"], weight=1.0, **base
    ),
    "similarity-preserving": lambda student, teachers, **base: SimilarityPreserving(
        student, teachers, weight=1.0, **base
    ),
    "pkt": lambda student, teachers, **base: PKT(student, teachers, weight=100.0, **base),
    "rkd": lambda student, teachers, **base: RKD(student, teachers, distance=0.5, angle=0.5, **base),
    "vid": lambda student, teachers, **base: VID(
        student, teachers, student_taps=[PENULTIMATE], teacher_taps=[PENULTIMATE], weight=0.1, **base
    ),
    "srrl": lambda student, teachers, **base: SRRL(student, teachers, weight=0.3, **base),
    "review-kd": lambda student, teachers, **base: ReviewKD(
        with_maps(student),
        teachers[0],
        student_taps=["layer1", PENULTIMATE],
        teacher_taps=["layer1", PENULTIMATE],
        warmup_epochs=1,
        **base,
    ),
    "cat-kd": lambda student, teachers, **base: on_places(
        CATKD, student, teachers, {"normalise": False, "weight": 0.1}, **base
    ),
    "sdd": lambda student, teachers, **base: on_places(SDD, student, teachers, {"scales": [1]}, scales=[1, 2], **base),
    "comparative-kd": lambda student, teachers, **base: ComparativeKD(student, teachers, **base),
    "lelp": lambda student, teachers, **base: LELP(student, teachers[0], subclasses=2, **base),
    "mutual": lambda student, teachers, **base: MutualLearning(student, **({"peers": ["mlp-12"]} | base)),
    "simkd": lambda student, teachers, **base: SimKD(student, teachers[0], **base),
    "mixkd": lambda student, teachers, **base: MixKD(student, teachers[0], weight=0.5, **base),
    "almkd-decoupled": lambda student, teachers, **base: ALMKD(
        student, teachers[0], rule=Paper(warmup_epochs=1, every=1), term=DecoupledKL(beta=2.0), **base
    ),
    "almkd-hint": lambda student, teachers, **base: ALMKD(
        student, teachers[0], rule=Paper(warmup_epochs=1, every=1), term=Hint(weight=0.3), meta_gradient="exact", **base
    ),
    "almkd-revised": lambda student, teachers, **base: ALMKD(
        student, teachers, rule=Paper(warmup_epochs=1, every=1), revise=0.8, select=0.7, **base
    ),
}

SHAPE = (1, 4, 4)
CLASSES = 3


def build(
    method: str,
    student: nn.Module | str = "mlp-8",
    teachers: Sequence[nn.Module | str] | None = None,
    **base: Any,
) -> Distiller:
    """A method with a tiny student and trained teachers."""
    teachers = list(trained_teachers() if teachers is None else teachers)
    return METHODS[method](student, teachers, **({"num_classes": CLASSES, "input_shape": list(SHAPE)} | base))


def trainer(**options: Any) -> Trainer:
    """A trainer on one CPU that writes nothing."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    short = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "num_sanity_val_steps": 0}
    return Trainer(**(short | quiet | options))


def blobs(rows: int = 120) -> tuple[Tensor, Tensor]:
    """Three clouds of points, well apart: inputs ``(rows, 1, 4, 4)`` and labels."""
    draw = torch.Generator().manual_seed(7)
    y = torch.arange(rows) % CLASSES
    return torch.randn(CLASSES, *SHAPE, generator=draw)[y] + 0.5 * torch.randn(rows, *SHAPE, generator=draw), y


class Blobs(DataModule):
    """48 training, 24 meta, 24 validation and 24 test rows.

    Half of the training rows lose their label where a method cannot do without such rows.
    """

    num_classes = CLASSES
    input_shape = SHAPE

    def __init__(self, **shared: Any) -> None:
        super().__init__(**({"batch_size": 8, "meta": 24, "val": 24} | shared))

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None and isinstance(self.trainer.lightning_module, RobustActiveDistillation):
            self.labeled = self.labeled or 24
        super().setup(stage)

    def load(self) -> Source:
        x, y = blobs()
        return Source(TensorRows(x), TensorRows(x), y.numpy(), test_size=24, identity=b"blobs")


@functools.cache
def _trained() -> list[nn.Module]:
    x, y = blobs()
    teachers = []
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name in ("cnn-2", "mlp-16", "pooled"):
            teacher = Pooled() if name == "pooled" else build_model(name, CLASSES, SHAPE)
            optimizer = torch.optim.Adam(teacher.parameters(), lr=0.02)
            for _ in range(40):
                optimizer.zero_grad()
                F.cross_entropy(teacher(x), y).backward()
                optimizer.step()
            teacher.zero_grad()
            teachers.append(teacher)
    return teachers


def trained_teachers() -> list[nn.Module]:
    """A CNN with BatchNorm and an MLP, in training mode: to freeze them is the library's duty."""
    return copy.deepcopy(_trained()[:2])


def weighted_terms(model: Distiller, student: Outputs, teachers: Sequence[Outputs], batch: Batch) -> dict[str, Tensor]:
    """What of the loss is the label's and the teachers', ``(B,)`` each, in a method that no trainer has set up."""
    model.terms = model.terms or model.make_terms()
    sources = model.sources(student, list(teachers), batch)
    losses, _ = model.terms(student, sources, batch)
    weights = model.weigh(student, sources, batch)
    each = weights.unbind(1) if isinstance(weights, Tensor) else weights
    label, *taught = [weight * loss for weight, loss in zip(each, losses, strict=True)]
    return {"label": label} | ({"teacher": torch.stack(taught).sum(0)} if taught else {})
