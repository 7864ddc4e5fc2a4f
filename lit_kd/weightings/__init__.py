"""How much each source counts for each sample: ALM-KD's rules, which turn the meta-gradient into weights."""

from lit_kd.weightings.base import MetaStep, Rule
from lit_kd.weightings.published import Amal, Paper
from lit_kd.weightings.reweighting import L2RW, MetaWeightNet
from lit_kd.weightings.robust import Robust

__all__ = ["L2RW", "Amal", "MetaStep", "MetaWeightNet", "Paper", "Robust", "Rule"]
