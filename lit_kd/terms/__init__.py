"""What is learned from one source, the label or a teacher: one unweighted number a sample.

A term says which features it reads, which parts are trained along, and what it keeps of each sample.
"""

from lit_kd.terms.base import Term, TermSet, Weighed, Weights
from lit_kd.terms.features import Contrastive, Hint
from lit_kd.terms.labels import (
    BernoulliCrossEntropy,
    CrossEntropy,
    GeneralizedCrossEntropy,
    LabelTerm,
    SoftTarget,
    SuperLoss,
    TaylorCrossEntropy,
)
from lit_kd.terms.logits import (
    KL,
    BatchCorrelation,
    BernoulliKL,
    Correlation,
    DecoupledKL,
    HardLabel,
    LogitTerm,
    Mixed,
    NormalisedKL,
    Revised,
    TeacherLabel,
)
from lit_kd.terms.noise import ELR, SOP, ForwardCorrection
from lit_kd.terms.task import TASKS, Task

__all__ = [
    "ELR",
    "KL",
    "SOP",
    "TASKS",
    "BatchCorrelation",
    "BernoulliCrossEntropy",
    "BernoulliKL",
    "Contrastive",
    "Correlation",
    "CrossEntropy",
    "DecoupledKL",
    "ForwardCorrection",
    "GeneralizedCrossEntropy",
    "HardLabel",
    "Hint",
    "LabelTerm",
    "LogitTerm",
    "Mixed",
    "NormalisedKL",
    "Revised",
    "SoftTarget",
    "SuperLoss",
    "Task",
    "TaylorCrossEntropy",
    "TeacherLabel",
    "Term",
    "TermSet",
    "Weighed",
    "Weights",
]
