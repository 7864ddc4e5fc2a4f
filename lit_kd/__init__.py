"""Knowledge distillation in PyTorch Lightning for when the supervision cannot be trusted."""

from typing import TYPE_CHECKING, Any

from lit_kd.version import __version__

if TYPE_CHECKING:
    from lit_kd.distiller import Distiller
    from lit_kd.methods import (
        ALMKD,
        CATKD,
        CRD,
        CTKD,
        DIST,
        DKD,
        DOT,
        GKD,
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
        ComparativeKD,
        CoTeaching,
        CrowdLabels,
        Distilled,
        ElementTrust,
        FitNet,
        GroupDistil,
        JoCoR,
        LabelRevision,
        LossDivider,
        MetaWeightNet,
        MixKD,
        MultiLevelKD,
        MutualLearning,
        OnlineKD,
        OracleCTC,
        ReviewKD,
        RobustActiveDistillation,
        SequenceKD,
        SimilarityPreserving,
        SimKD,
        SLaM,
        SpeculativeKD,
        StepByStep,
        Supervised,
        UnKD,
        WeightedDistillation,
        cross_predict,
        cross_relabel,
    )
    from lit_kd.report.audit import audit
    from lit_kd.teachers import FileTeacher, write_predictions
    from lit_kd.types import Batch, Outputs

__all__ = [
    "ALMKD",
    "CATKD",
    "CRD",
    "CTKD",
    "DIST",
    "DKD",
    "DOT",
    "GKD",
    "GLC",
    "KD",
    "L2RW",
    "LELP",
    "MCMI",
    "NKD",
    "PKT",
    "RKD",
    "SDD",
    "SRRL",
    "VID",
    "WSLD",
    "AdversarialKD",
    "AttentionTransfer",
    "Batch",
    "CoTeaching",
    "ComparativeKD",
    "CrowdLabels",
    "Distilled",
    "Distiller",
    "ElementTrust",
    "FileTeacher",
    "FitNet",
    "GroupDistil",
    "JoCoR",
    "LabelRevision",
    "LossDivider",
    "MetaWeightNet",
    "MixKD",
    "MultiLevelKD",
    "MutualLearning",
    "OnlineKD",
    "OracleCTC",
    "Outputs",
    "ReviewKD",
    "RobustActiveDistillation",
    "SLaM",
    "SequenceKD",
    "SimKD",
    "SimilarityPreserving",
    "SpeculativeKD",
    "StepByStep",
    "Supervised",
    "UnKD",
    "WeightedDistillation",
    "__version__",
    "audit",
    "cross_predict",
    "cross_relabel",
    "write_predictions",
]


def __getattr__(name: str) -> Any:
    """Import torch and Lightning only when something needs them: ``lit-kd --version`` answers at once."""
    if name not in __all__:
        raise AttributeError(f"module 'lit_kd' has no attribute {name!r}")
    if name == "audit":
        from lit_kd.report.audit import audit

        return audit
    from lit_kd import distiller, methods, teachers, types

    return next(getattr(m, name) for m in (methods, distiller, teachers, types) if hasattr(m, name))
