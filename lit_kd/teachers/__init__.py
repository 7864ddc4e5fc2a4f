"""Frozen teachers: modules, how they run, and a cache of their outputs."""

from lit_kd.teachers.adapted import AdaptedTeacher

__all__ = ["AdaptedTeacher"]
