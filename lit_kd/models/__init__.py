"""Networks: by name, from checkpoints, with taps on inner layers, for export. Imports torchvision and timm late."""

from .build import build_model, last_linear
from .checkpoint import load_student, student_name
from .classes import adapt
from .given import Network, is_path, load_teacher, resolve_model

__all__ = [
    "Network",
    "adapt",
    "build_model",
    "is_path",
    "last_linear",
    "load_student",
    "load_teacher",
    "resolve_model",
    "student_name",
]
