"""What is learned from one source, the label or a teacher: one unweighted number a sample.

A term says which features it reads, which parts are trained along, and what it keeps of each sample.
"""

from lit_kd.data.labels import TaskName
from lit_kd.terms.base import Term, TermSet, Weighed, Weights
from lit_kd.terms.classes import ClassInformation
from lit_kd.terms.comparative import Comparative
from lit_kd.terms.deferral import Deferral
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
from lit_kd.terms.levels import MultiLevel
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
from lit_kd.terms.maps import Attention, Selectivity, SoftmaxRegression, Variational
from lit_kd.terms.noise import ELR, SOP, ForwardCorrection
from lit_kd.terms.online import OnlineTeacher
from lit_kd.terms.own_labels import USKD
from lit_kd.terms.regression import GaussianError, SquaredError, TeacherBound, TeacherError
from lit_kd.terms.relations import Affinity, Relational, Similarity
from lit_kd.terms.smoothing import Brier, SmoothedCrossEntropy, TeacherFree
from lit_kd.terms.stages import ClassMaps, Review, ScaleDecoupled
from lit_kd.terms.subclasses import Subclasses
from lit_kd.terms.task import Task
from lit_kd.terms.tasks import TASKS
from lit_kd.terms.temperature import LearnedTemperature

__all__ = [
    "ELR",
    "KL",
    "SOP",
    "TASKS",
    "USKD",
    "Affinity",
    "Attention",
    "BatchCorrelation",
    "BernoulliCrossEntropy",
    "BernoulliKL",
    "Brier",
    "ClassInformation",
    "ClassMaps",
    "Comparative",
    "Contrastive",
    "Correlation",
    "CrossEntropy",
    "DecoupledKL",
    "Deferral",
    "ForwardCorrection",
    "GaussianError",
    "GeneralizedCrossEntropy",
    "HardLabel",
    "Hint",
    "LabelTerm",
    "LearnedTemperature",
    "LogitTerm",
    "Mixed",
    "MultiLevel",
    "NormalisedKL",
    "OnlineTeacher",
    "Relational",
    "Review",
    "Revised",
    "ScaleDecoupled",
    "Selectivity",
    "Similarity",
    "SmoothedCrossEntropy",
    "SoftTarget",
    "SoftmaxRegression",
    "SquaredError",
    "Subclasses",
    "SuperLoss",
    "Task",
    "TaskName",
    "TaylorCrossEntropy",
    "TeacherBound",
    "TeacherError",
    "TeacherFree",
    "TeacherLabel",
    "Term",
    "TermSet",
    "Variational",
    "Weighed",
    "Weights",
]
