"""What a checkpoint holds: plain values only, and a student that can be a teacher."""

import os
import re
import textwrap
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_kd.models.files import CHECKPOINTS
from lit_kd.models.images import ImageInput

from .build import build_model
from .classes import is_class_path
from .subclasses import Subclassed
from .taps import Composite

_PREFIX = "student."
_DATA = "lit_kd_data"  # the attribute of a network that tells of the data it was trained on
_IN_PYTHON = "rebuild the network in Python, load its weights and pass the nn.Module itself"


@dataclass(frozen=True)
class SavedStudent:
    """A finished run's student, on the CPU in eval mode, and what its checkpoint tells about it."""

    model: nn.Module
    name: str
    num_classes: int
    task: str
    input_shape: tuple[int, ...] | None
    class_names: list[str] | None
    image_input: ImageInput | None


def load_student(path: str | Path) -> nn.Module:
    """The student of a lit_kd checkpoint, on the CPU in eval mode."""
    return read_student(Path(path)).model


def student_name(path: str | os.PathLike[str]) -> tuple[str, list[int] | None]:
    """A checkpoint's student's name and input shape, as for `build_model`."""
    checkpoint = read_checkpoint(Path(path))
    if checkpoint.get("composite"):
        raise ValueError(
            f"{path}: expected a student to train on, found one that SimKD or LELP has extended: use it as a teacher"
        )
    hparams = checkpoint["hyper_parameters"]
    return hparams["student"], hparams.get("input_shape")


def read_student(path: Path) -> SavedStudent:
    """Rebuild a checkpoint's student from its name and weights; global random numbers stay as they are."""
    checkpoint = read_checkpoint(path)
    state, hparams = (checkpoint.get(part) or {} for part in ("state_dict", "hyper_parameters"))
    weights = {k.removeprefix(_PREFIX): v for k, v in state.items() if str(k).startswith(_PREFIX)}
    if not weights:
        raise ValueError(
            f"{path}: expected a lit_kd checkpoint, with weights under '{_PREFIX}' in its state_dict, found the keys "
            f"{textwrap.shorten(', '.join(map(str, state or checkpoint)) or 'none', 80)}: {_IN_PYTHON}"
        )
    name, num_classes, input_shape = (hparams.get(key) for key in ("student", "num_classes", "input_shape"))
    if isinstance(name, dict) or is_class_path(name):  # a file must not say which code to run
        raise ValueError(
            f"{path}: expected a student with a model's name, found a class of yours, {name}: give it as class_path, "
            "with checkpoint and prefix 'student.', or load it by lit_kd.models.load_teacher"
        )
    if not isinstance(name, str) or Path(name).suffix in CHECKPOINTS or not isinstance(num_classes, int):
        raise ValueError(
            f"{path}: expected hyper_parameters with a model's name as student, and num_classes, found "
            f"{textwrap.shorten(repr(name), 60)} and {num_classes!r}: if it was a live nn.Module, {_IN_PYTHON}"
        )
    try:
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten at once
            model = build_model(name, num_classes, input_shape)
            model = completed(model, checkpoint.get("composite"))
        model.load_state_dict(weights)
    except (KeyError, RuntimeError, TypeError, ValueError) as err:
        raise ValueError(
            f"{path}: its weights do not fit the student that it names, {name} with {num_classes} classes and "
            f"input_shape {input_shape}: {textwrap.shorten(str(err), 500)}"
        ) from err
    data, task = checkpoint.get("data") or {}, hparams.get("task", "classification")
    remember_data(model, {**data, "task": task})
    names, images = known_names(data.get("class_names"), num_classes), data.get("image_input")
    shape = tuple(input_shape or data.get("input_shape") or ()) or None
    return SavedStudent(model.eval(), name, num_classes, task, shape, names, ImageInput(**images) if images else None)


def completed(model: nn.Module, spec: Mapping[str, Any] | None) -> nn.Module:
    """A network as SimKD or LELP made it a part of their student, whose ``composite`` the spec is; weights are new."""
    if not spec:
        return model
    if "subclasses" in spec:
        return Subclassed(model, spec["subclasses"])
    made = Composite(model, spec["tap"])
    made.rebuild(spec)
    return made


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The file's dict, read without running any code in it."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as err:  # a foreign file makes the unpickler raise anything: KeyError, EOFError, ...
        unsafe = re.search(r"GLOBAL (\S+)", str(err))
        if unsafe:
            raise ValueError(f"{path}: found a pickled {unsafe[1]}, which can run code: {_IN_PYTHON}") from err
        raise ValueError(f"{path}: not a file that torch.save wrote, or a damaged one ({type(err).__name__})") from err
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: expected a Lightning checkpoint, a dict, found a {type(checkpoint).__name__}")
    return checkpoint


def is_plain(value: Any) -> bool:
    """Whether a value consists of numbers, strings, lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(is_plain(v) for v in value)
    return type(value) in (type(None), str, int, float, bool)


def as_plain(value: Any) -> Any:
    """Paths, numpy's numbers, dataclasses and anybody's lists and mappings as plain values; others as they are."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Enum):
        return as_plain(value.value)
    if isinstance(value, Mapping):
        return {as_plain(key): as_plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        parts = [as_plain(part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def keep_plain(values: MutableMapping[str, Any]) -> None:
    """Convert values to plain ones, and remove those that cannot be."""
    for name, value in list(values.items()):
        values[name] = as_plain(value)
        if not is_plain(values[name]):
            del values[name]


def known_names(names: object, num_classes: int) -> list[str] | None:
    """Class names as a list of one-line texts; None if they are not one name per class."""
    if not isinstance(names, (list, tuple, np.ndarray)) or len(names) != num_classes:
        return None
    return [" ".join(str(name).split()) for name in names]


def about_data(data: Any, num_classes: int) -> dict[str, Any]:
    """What a student's user must know of its data: class names, how inputs are made, and a hash of the rows."""
    names, shape, images = (getattr(data, name, None) for name in ("class_names", "input_shape", "image_input"))
    rows = getattr(data, "fingerprint", None)
    return {
        "class_names": known_names(names, num_classes),
        "input_shape": [int(size) for size in shape] if shape else None,
        "image_input": asdict(images) if isinstance(images, ImageInput) else None,
        "fingerprint": rows if isinstance(rows, str) else None,
    }


def remember_data(network: nn.Module, told: object) -> None:
    """Note with a network what is known of the data it was trained on, see `about_data`."""
    setattr(network, _DATA, told if isinstance(told, dict) else {})


def compare_data(who: str, network: nn.Module, data: Mapping[str, Any], resumed: bool = False) -> dict[str, Any]:
    """Compare what is known of the data that a network was trained on with the data of now, as of `about_data`.

    A ValueError if a class has another number now; a warning for other names and inputs and, if `resumed`, other rows.
    Returns what is known of the data, or else what the network knows.
    """
    within = (getattr(network, name, None) for name in ("student", "body", "network"))  # of a method, and of wrappers
    parts = [part for part in (network, *within) if isinstance(part, nn.Module)]
    told: dict[str, Any] = next((vars(part)[_DATA] for part in parts if _DATA in vars(part)), {})
    now = data.get("class_names") or []
    before = known_names(told.get("class_names"), len(now)) or now
    apart = [f"class {c} is {now[c]!r}, was {name!r}" for c, name in enumerate(before) if name != now[c]][:1]
    still = {*now}
    if any(name in still and name != now[c] for c, name in enumerate(before)):
        raise ValueError(
            f"expected the classes in the order in which {who} learned them, found that {apart[0]}: number them so, "
            "those of an image folder by the folders' names, or train anew"
        )
    known = {name: data.get(name) or told.get(name) for name in {*data, *told}}
    other = [name for name in known if told.get(name) not in (None, known[name])]
    apart += [
        f"{name} is {known[name]}, was {told[name]}" for name in ("input_shape", "image_input", "task") if name in other
    ]
    if resumed and "fingerprint" in other:
        apart.append("rows, labels or their split differ")
    if apart:
        from lightning.pytorch.utilities import rank_zero_warn  # late: networks do without it

        rank_zero_warn(f"expected the data that {who} learned from, found that {'; '.join(apart)}: is that meant?")
    return known


def drop_unknown(state: dict[str, Any], own: Mapping[str, Any], prefixes: tuple[str, ...]) -> None:
    """Remove what a state has under some prefixes and a module lacks."""
    for key in [key for key in state if key.startswith(prefixes) and key not in own]:
        del state[key]
