"""Frozen teachers: modules, files, how they run, and a cache of their outputs."""

from lit_kd.teachers.adapted import AdaptedTeacher
from lit_kd.teachers.file import FileTeacher, write_predictions

__all__ = ["AdaptedTeacher", "FileTeacher", "write_predictions"]
