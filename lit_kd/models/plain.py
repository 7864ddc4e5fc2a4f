"""What a checkpoint that is loaded with ``weights_only`` can hold: plain values."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np

from lit_kd.models.images import ImageInput


def is_plain(value: Any) -> bool:
    """Whether a value consists of numbers, strings, lists and mappings.

    Examples:
        >>> is_plain({"lr": 0.1, "widths": [1, 2]}), is_plain(print)
        (True, False)
    """
    if isinstance(value, Mapping):
        return all(is_plain(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return value is None or isinstance(value, (str, int, float, bool))


def keep_plain(values: MutableMapping[str, Any]) -> None:
    """Remove what is not plain; paths, numpy's numbers and dataclasses become plain values."""
    for name, value in list(values.items()):
        if isinstance(value, os.PathLike):
            values[name] = os.fspath(value)
        elif isinstance(value, np.generic):
            values[name] = value.item()
        elif is_dataclass(value) and not isinstance(value, type):
            values[name] = asdict(value)
        elif not is_plain(value):
            del values[name]


def about_data(data: Any, num_classes: int) -> dict[str, Any]:
    """What a user of a student must know of its data: class names, input shape, how an image becomes an input."""
    names, shape, images = (getattr(data, name, None) for name in ("class_names", "input_shape", "image_input"))
    known = isinstance(names, (list, tuple, np.ndarray)) and len(names) == num_classes
    return {
        "class_names": [" ".join(str(name).split()) for name in names] if known and names is not None else None,
        "input_shape": [int(size) for size in shape] if shape else None,
        "image_input": images.plain() if isinstance(images, ImageInput) else None,
    }
