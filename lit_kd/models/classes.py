"""Networks by the import path of their class, and where their logits and their head are."""

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

KEYS = ("class_path", "init_args", "checkpoint", "prefix", "logits", "head")


def is_class_path(name: Any) -> bool:
    """Whether a network is given by an import path, as ``"my_project.Net"``."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name) is not None


def build_class(spec: Mapping[str, Any], num_classes: int) -> nn.Module:
    """The network that a mapping describes, see `lit_kd.models.given.resolve_model`, but for its weights."""
    unknown = sorted(spec.keys() - set(KEYS))
    if unknown or "class_path" not in spec:
        raise ValueError(f"expected a network's class_path and some of {KEYS[1:]}, found {unknown or dict(spec)}")
    kind, args = _import_class(spec["class_path"]), dict(spec.get("init_args") or {})
    if "num_classes" in inspect.signature(kind).parameters:
        args.setdefault("num_classes", num_classes)
    return adapt(kind(**args), spec.get("logits"), spec.get("head"))


def _import_class(path: str) -> type[nn.Module]:
    """A class of modules: nothing else that an import path names is called."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"expected the import path of a class, found {path!r}, which cannot be imported ({error}): if it lies in "
            "the present directory, run python -m lit_kd"
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"expected the import path of a class of nn.Module, found {path!r}, a {type(found).__name__}")
    return found


def adapt(model: nn.Module, logits: int | str | None = None, head: str | None = None) -> nn.Module:
    """Tell how to read a network, and return it.

    Args:
        model: The network.
        logits: Position or key of the logits in what it returns, where that is a tuple or a mapping.
        head: Path of the linear layer that gives the logits, where it is not the one whose output equals them.
    """
    if logits is not None:
        model.lit_kd_logits = logits  # type: ignore[assignment]  # modules take any attribute
    if head is not None:
        if not isinstance(dict(model.named_modules()).get(head), nn.Linear):
            linears = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
            raise ValueError(f"expected as head the path of an nn.Linear, one of {linears}, found {head!r}")
        model.lit_kd_head = head  # type: ignore[assignment]
    return model


def check_numbers(kind: type, options: Mapping[str, object]) -> None:
    """Raise a ValueError for a number in quotes, where a class says that an option of that name is no text."""
    taken = [option for base in kind.__mro__ for option in inspect.signature(base.__init__).parameters.values()]  # type: ignore[misc]
    numbers = {one.name for one in taken if one.annotation is not one.empty and "str" not in str(one.annotation)}
    for name, value in options.items():
        if name in numbers and isinstance(value, str) and re.fullmatch(r"[+-]?\d*\.?\d+([eE][+-]?\d+)?", value):
            raise ValueError(f"expected as {name} a number, found the text {value!r}: leave out the quotes")
