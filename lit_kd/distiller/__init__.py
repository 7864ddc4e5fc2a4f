"""The base of every method: steps, state by row, trainable parts, learners, metrics, checkpoints."""

from lit_kd.distiller.base import Distiller

__all__ = ["Distiller"]
