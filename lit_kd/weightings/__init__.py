"""How ALM-KD turns the meta-gradient into weights: one rule a file."""

from lit_kd.weightings.amal import Amal
from lit_kd.weightings.base import MetaStep, Rule
from lit_kd.weightings.paper import Paper
from lit_kd.weightings.robust import Robust

__all__ = ["Amal", "MetaStep", "Paper", "Robust", "Rule"]
