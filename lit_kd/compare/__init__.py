"""``lit-kd compare``: a recipe's teachers and methods, trained side by side at several seeds."""

from lit_kd.compare.command import main

__all__ = ["main"]
