"""Short names of teachers and inputs: equal ones have the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_kd.distiller.checks import is_plain

TORCHS = {*vars(nn.Module()), "_compiled_call_impl"}
"""Attributes that each module has."""


def of_all(*parts: str) -> str:
    """Hex hash of several texts in their order.

    Examples:
        >>> of_all("a", "b") == of_all("ab")
        False
    """
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def of_inputs(x: Any) -> str:
    """Hex hash of a batch's inputs, a tensor or nested containers of them: values, dtypes, shapes and names."""
    digest = hashlib.sha256(repr(list(x)).encode() if isinstance(x, Mapping) else b"")
    for leaf in tree_leaves(dict(x) if isinstance(x, Mapping) else x):
        _add(digest, leaf)
    return digest.hexdigest()


def of_teacher(model: nn.Module) -> str:
    """Hex hash of a model's layers with their settings, tensors and functions by name; not of its code."""
    digest = hashlib.sha256()
    for path, part in model.named_modules():
        digest.update(f"{path}: {_name(type(part))}\n".encode())
        # what torch itself keeps has an underscore, and changes with its version
        theirs = type(part).__module__.split(".")[0] == "torch"
        for key, value in sorted(vars(part).items()):
            if key in TORCHS or (theirs and key[0] == "_"):
                continue
            if is_plain(value) or isinstance(value, Tensor):
                digest.update(f"{key}: ".encode())
                _add(digest, value)
            elif callable(value) and hasattr(value, "__qualname__"):
                digest.update(f"{key}: {_name(value)}\n".encode())
    for path, value in {**model.state_dict(), **dict(model.named_buffers())}.items():
        digest.update(f"{path}: ".encode())
        _add(digest, value)
    return digest.hexdigest()


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', None)}.{value.__qualname__}"


def _add(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
    digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
