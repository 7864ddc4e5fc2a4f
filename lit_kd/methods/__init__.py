"""The methods, one file each."""

from lit_kd.methods.almkd import ALMKD
from lit_kd.methods.kd import KD
from lit_kd.methods.label_revision import LabelRevision
from lit_kd.methods.posterior import PosteriorDistillation
from lit_kd.methods.rad import RobustActiveDistillation
from lit_kd.methods.slam import SLaM
from lit_kd.methods.supervised import Supervised
from lit_kd.methods.weighted import WeightedDistillation

__all__ = [
    "ALMKD",
    "KD",
    "LabelRevision",
    "PosteriorDistillation",
    "RobustActiveDistillation",
    "SLaM",
    "Supervised",
    "WeightedDistillation",
]
