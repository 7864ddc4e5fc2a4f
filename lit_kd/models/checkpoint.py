"""The student of a finished run, read back from its checkpoint: today's student is tomorrow's teacher."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from lit_kd.models.files import check_checkpoint_file
from lit_kd.models.images import ImageInput

from .build import build_model

if TYPE_CHECKING:
    Network: TypeAlias = nn.Module | str
else:
    # what a config can say; with nn.Module here, the help of every method would list each module known to Python
    Network = str

_SUFFIXES = (".ckpt", ".pt", ".pth")
_PREFIX = "student."
_IN_PYTHON = "rebuild the network in Python, load its weights and pass the nn.Module itself"


@dataclass(frozen=True)
class SavedStudent:
    """A finished run's student, and what its checkpoint tells about it.

    Attributes:
        model: On the CPU, in eval mode.
        name: As for `build_model`.
        num_classes: K.
        input_shape: (C, H, W) or (F,); None if the run did not know.
        class_names: K names; None if the data had none.
        image_input: How an image file becomes an input; None if inputs are no images, or the data did not tell.
    """

    model: nn.Module
    name: str
    num_classes: int
    input_shape: tuple[int, ...] | None
    class_names: list[str] | None
    image_input: ImageInput | None


def load_student(path: str | Path) -> nn.Module:
    """Rebuild the student network of a lit_kd checkpoint.

    A checkpoint names its student in ``hyper_parameters`` (``student``, ``num_classes``, ``input_shape``, as
    for `build_model`) and holds its weights in ``state_dict`` under ``student.``. It is read with
    ``weights_only=True``, so that a file from elsewhere cannot run code.

    Args:
        path: The checkpoint.

    Returns:
        The network on the CPU in eval mode, its parameters as trainable as when built. The global random
        state is left as it was: a run's student starts alike whether its teacher was loaded or not.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not such a checkpoint; the message says what to do instead.
    """
    return read_student(Path(path)).model


def student_name(path: str | os.PathLike[str]) -> tuple[str, list[int] | None]:
    """The name of a checkpoint's student and the input shape it was built for, as for `build_model`."""
    hparams = read_checkpoint(Path(path))["hyper_parameters"]
    return hparams["student"], hparams.get("input_shape")


def resolve_model(spec: Network, num_classes: int, input_shape: Sequence[int] | None = None) -> nn.Module:
    """Turn what a user gave as a student or teacher into a network.

    Args:
        spec: A network, which is returned as it is; the path of a lit_kd checkpoint (any existing file, or a
            name that ends in .ckpt, .pt or .pth), for `load_student`; or a name, for `build_model`.
        num_classes: The number of logits K.
        input_shape: (C, H, W) or (F,), as for `build_model`; a checkpoint brings its own.

    Returns:
        The network, from (B, *input_shape) to logits (B, K).

    Raises:
        FileNotFoundError: A checkpoint's file is missing.
        ValueError: The name is unknown, or the checkpoint is unfit or of another number of classes.

    >>> resolve_model("mlp-8", num_classes=3, input_shape=(4,))[-1].out_features
    3
    """
    if isinstance(spec, nn.Module):
        return spec
    if not isinstance(spec, (str, os.PathLike)):
        raise ValueError(f"expected a network: an nn.Module, a model's name or a checkpoint's path; found {spec!r}")
    spec = os.fspath(spec)
    if not spec.endswith(_SUFFIXES) and not Path(spec).is_file():
        return build_model(spec, num_classes, input_shape)
    student = read_student(Path(spec))
    if student.num_classes != num_classes:
        raise ValueError(
            f"{spec}: a network with another class count: it gives {student.num_classes} logits, this task has "
            f"{num_classes} classes. Pass a checkpoint trained on this task's classes"
        )
    return student.model


def read_student(path: Path) -> SavedStudent:
    """The student of the checkpoint at ``path``; raises as `load_student` does."""
    checkpoint = read_checkpoint(path)
    state, hparams = checkpoint.get("state_dict"), checkpoint.get("hyper_parameters", {})
    if not isinstance(state, dict) or not isinstance(hparams, dict):
        raise ValueError(
            f"{path}: expected a Lightning checkpoint with 'state_dict' and 'hyper_parameters', found the "
            f"keys {_some(checkpoint)}. For a bare state_dict, {_IN_PYTHON}"
        )
    weights = {k.removeprefix(_PREFIX): v for k, v in state.items() if str(k).startswith(_PREFIX)}
    if not weights:
        raise ValueError(
            f"{path}: expected weights under '{_PREFIX}' in its state_dict, found {_some(state)}. Pass a "
            f"checkpoint that lit_kd wrote; for any other, {_IN_PYTHON}"
        )
    name = hparams.get("student")
    if not isinstance(name, str) or name.endswith(_SUFFIXES):
        raise ValueError(
            f"{path}: expected a model's name as hyper_parameters['student'], as resnet20, found "
            f"{textwrap.shorten(repr(name), 60)}. The student of this run was a live nn.Module or itself a "
            f"checkpoint: {_IN_PYTHON}; lit_kd.models.export.export_student exports that one"
        )
    num_classes, input_shape = hparams.get("num_classes"), hparams.get("input_shape")
    if not isinstance(num_classes, int):
        raise ValueError(
            f"{path}: expected a number as hyper_parameters['num_classes'], found {num_classes!r}: {_IN_PYTHON}"
        )
    try:
        # The weights drawn here are overwritten at once, so their draws must not show in the global state.
        with torch.random.fork_rng(devices=[]):
            model = build_model(name, num_classes, input_shape)
    except ValueError as err:
        raise ValueError(f"{path}: its student cannot be built: {err}") from err
    try:
        model.load_state_dict(weights)
    except RuntimeError as err:
        raise ValueError(
            f"{path}: its weights do not fit the student that it names, {name} with {num_classes} classes "
            f"and input_shape {input_shape}: {textwrap.shorten(str(err), 500)}. If another version of lit_kd "
            f"wrote it, use that version; else {_IN_PYTHON}"
        ) from err
    data = checkpoint.get("data")
    data = data if isinstance(data, dict) else {}  # older checkpoints tell nothing of the data
    names, images, shape = data.get("class_names"), data.get("image_input"), input_shape or data.get("input_shape")
    try:
        image_input = None if images is None else ImageInput(**images)
        if names is not None and (len(names) != num_classes or not all(isinstance(name, str) for name in names)):
            raise ValueError(f"expected {num_classes} class names, found {textwrap.shorten(repr(names), 60)}")
    except (TypeError, ValueError) as err:
        raise ValueError(f"{path}: what it tells about its data is damaged: {err}") from err
    return SavedStudent(model.eval(), name, num_classes, tuple(shape) if shape else None, names, image_input)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The file's dict, read without running any code that it may hold."""
    check_checkpoint_file(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as err:  # a foreign file makes the unpickler raise anything: KeyError, EOFError, ...
        unsafe = re.search(r"GLOBAL (\S+)", str(err))
        if unsafe:
            raise ValueError(
                f"{path}: expected tensors, numbers and strings, found a pickled {unsafe[1]}, which is not "
                f"loaded since unpickling can run code. If you made the file, {_IN_PYTHON}"
            ) from err
        raise ValueError(
            f"{path}: not a file that torch.save wrote, or a damaged one ({type(err).__name__}). Expected a "
            "checkpoint of a lit_kd run"
        ) from err
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path}: expected a Lightning checkpoint, a dict, found a {type(checkpoint).__name__}: {_IN_PYTHON}"
        )
    return checkpoint


def _some(keys: dict[str, Any]) -> str:
    """The first few keys, for a message."""
    return ", ".join(map(repr, list(keys)[:4])) + (", ..." if len(keys) > 4 else "") if keys else "none"
