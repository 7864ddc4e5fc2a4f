"""Plain values, which a checkpoint that is loaded with ``weights_only`` can hold."""

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
    """Convert paths, numpy's numbers and dataclasses to plain values, and remove the rest."""
    for name, value in list(values.items()):
        if isinstance(value, os.PathLike):
            values[name] = os.fspath(value)
        elif isinstance(value, np.generic):
            values[name] = value.item()
        elif is_dataclass(value) and not isinstance(value, type):
            values[name] = asdict(value)
        elif not is_plain(value):
            del values[name]


def known_names(names: object, num_classes: int) -> list[str] | None:
    r"""Class names as a list of one-line texts; None if they are not one name per class.

    Examples:
        >>> known_names(np.array(["a", "b\n c"]), 2), known_names({0: "a", 1: "b"}, 2)
        (['a', 'b c'], None)
    """
    if not isinstance(names, (list, tuple, np.ndarray)) or len(names) != num_classes:
        return None
    return [" ".join(str(name).split()) for name in names]


def about_data(data: Any, num_classes: int) -> dict[str, Any]:
    """What a student's user must know of its data: class names, input shape and how an image becomes an input."""
    names, shape, images = (getattr(data, name, None) for name in ("class_names", "input_shape", "image_input"))
    return {
        "class_names": known_names(names, num_classes),
        "input_shape": [int(size) for size in shape] if shape else None,
        "image_input": images.plain() if isinstance(images, ImageInput) else None,
    }


def drop_unknown(state: dict[str, Any], own: Mapping[str, Any], prefixes: tuple[str, ...]) -> None:
    """Remove what a state has under some prefixes and a module lacks."""
    for key in [key for key in state if key.startswith(prefixes) and key not in own]:
        del state[key]
