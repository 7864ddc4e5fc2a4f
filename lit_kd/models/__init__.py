"""Students and teachers by name, and the student of a checkpoint as the teacher of another.

`build` turns a name into a network, `networks` holds those written here (multilayer perceptrons, a small
CNN, the field's CIFAR ResNets and wide ResNets), `checkpoint` reads a student back. Importing this package
imports neither torchvision nor timm: a name that starts with ``torchvision/`` or ``timm/`` does.
"""

from __future__ import annotations

from .build import build_model, last_linear, model_names
from .checkpoint import Network, load_student, resolve_model, student_name

__all__ = ["Network", "build_model", "last_linear", "load_student", "model_names", "resolve_model", "student_name"]
