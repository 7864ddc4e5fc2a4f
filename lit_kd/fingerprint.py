"""Short names of teachers and inputs: equal ones have the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_kd.checks import is_plain


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
    """Hex hash of a model's layers with their settings, and of its weights and buffers; not of its code."""
    digest = hashlib.sha256()
    for path, part in model.named_modules():
        # what torch itself keeps has an underscore, and changes with its version
        settings = {k: v for k, v in sorted(vars(part).items()) if is_plain(v) and k != "training" and k[0] != "_"}
        digest.update(f"{path}: {type(part).__module__}.{type(part).__qualname__} {settings}\n".encode())
    for path, value in {**model.state_dict(), **dict(model.named_buffers())}.items():
        digest.update(f"{path}: ".encode())
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(repr(value).encode())
        return
    digest.update(f"{value.dtype} {tuple(value.shape)} ".encode())
    digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
