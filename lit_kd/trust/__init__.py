"""Which rows of a pool to ask the teacher about: the game of Robust Active Distillation, and the rules it is against.

Pure functions of NumPy arrays: they run once a round, on the host, in float64. They know nothing of Lightning.
Shapes: n rows in the pool, b queries, C classes, D features. Probabilities are the student's.
"""

from lit_kd.trust.game import dep_round, guaranteed_gain, rad_distribution, rad_marginals
from lit_kd.trust.queries import badge, cluster_margin, coreset, entropy, margin, margin_gain, uniform

__all__ = [
    "badge",
    "cluster_margin",
    "coreset",
    "dep_round",
    "entropy",
    "guaranteed_gain",
    "margin",
    "margin_gain",
    "rad_distribution",
    "rad_marginals",
    "uniform",
]
