"""How ALM-KD turns the meta-gradient into weights: one rule a file."""

from lit_kd.rules.amal import Amal
from lit_kd.rules.base import MetaStep, Rule
from lit_kd.rules.paper import Paper
from lit_kd.rules.robust import Robust

__all__ = ["Amal", "MetaStep", "Paper", "Robust", "Rule"]
