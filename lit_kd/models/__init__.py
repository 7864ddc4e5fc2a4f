"""Networks: by name, from checkpoints, with taps on inner layers, for export. Imports torchvision and timm late."""

from .build import build_model, last_linear
from .checkpoint import Network, load_student, resolve_model, student_name

__all__ = ["Network", "build_model", "last_linear", "load_student", "resolve_model", "student_name"]
