"""Networks as users give them: modules, names, class paths, and checkpoints of anybody's."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from torch import Tensor, nn

from lit_kd.models.build import build_model
from lit_kd.models.checkpoint import read_checkpoint, read_student, student_name
from lit_kd.models.classes import adapt
from lit_kd.models.files import CHECKPOINTS

if TYPE_CHECKING:
    Network: TypeAlias = nn.Module | str | dict[str, Any]
else:
    # what a config can say; with nn.Module, the help of every method would list each known module
    Network = str | dict[str, Any]


def is_path(spec: Any) -> TypeGuard[str | os.PathLike[str]]:
    """Whether a network is given as a file, not as a module or a model's name."""
    return isinstance(spec, (str, os.PathLike)) and (Path(spec).suffix in CHECKPOINTS or Path(spec).is_file())


def resolve_model(
    spec: Network,
    num_classes: int,
    input_shape: Sequence[int] | None = None,
    task: str | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """The network that a user gave.

    It is a module; a name for `build_model`; the path of a lit_kd checkpoint; the import path of a class of modules,
    ``"my_project.Net"``; or a mapping with its ``class_path``, its ``init_args``, of which ``num_classes`` may be left
    out, and what `load_teacher` takes: ``checkpoint``, ``prefix``, ``logits``, ``head``.
    """
    if pretrained and not (isinstance(spec, str) and spec.startswith(("timm/", "hf/", "hf-causal/"))):
        raise ValueError(f"expected pretrained only with timm/NAME or hf/NAME, found {spec!r}: load weights in Python")
    if isinstance(spec, nn.Module):
        return spec
    if not isinstance(spec, (str, os.PathLike, Mapping)):
        raise ValueError(f"expected a network: an nn.Module, a name, a path or a class_path; found {spec!r}")
    if not is_path(spec):
        model = build_model(spec, num_classes, input_shape, pretrained)
        if isinstance(spec, Mapping) and spec.get("checkpoint"):
            load_weights(model, spec["checkpoint"], spec.get("prefix"))
        return model
    student = read_student(Path(spec))
    if student.num_classes != num_classes:
        raise ValueError(f"{spec}: expected a network for {num_classes} classes, found one for {student.num_classes}")
    if task not in (None, student.task):
        raise ValueError(f"{spec}: expected a network for {task}, found one for {student.task}: give another")
    return student.model


def remembered(spec: Network, input_shape: list[int] | None) -> dict[str, Any]:
    """Hyperparameters of a student, of which a checkpoint's stands by itself: no other files, no downloads."""
    if is_path(spec):
        name, shape = student_name(spec)
        return {"student": name, "input_shape": shape, "pretrained": False}
    if isinstance(spec, Mapping):
        spec = {key: value for key, value in spec.items() if key not in ("checkpoint", "prefix")}
    return {"student": spec, "input_shape": input_shape, "pretrained": False}


def load_weights(model: nn.Module, path: str | os.PathLike[str], prefix: str | None = None) -> None:
    """Load weights of a Lightning checkpoint, or of a file of weights alone, which may have more than the network's.

    Args:
        model: The network.
        path: A file that `torch.save` wrote; no code in it is run.
        prefix: Begins the names of the network's weights in the file. ``None``: found out.
    """
    state, own = read_checkpoint(Path(path)), model.state_dict()
    state = state.get("state_dict", state)
    first = next(iter(own), "a network with weights")
    guesses = {name.removesuffix(first) for name in state if name.endswith(first)} if prefix is None else {prefix}
    fitting = [guess for guess in sorted(guesses) if all(guess + name in state for name in own)]
    if len(fitting) != 1:
        found = textwrap.shorten(", ".join(map(str, state)), 200)
        wanted = f"one prefix of {first}, ..." if prefix is None else f"names such as {prefix + first}"
        raise ValueError(f"{path}: expected {wanted}, found {fitting or found}: pass prefix=, and a network that fits")
    weights: dict[str, Tensor] = {name: state[fitting[0] + name] for name in own}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit the network: {textwrap.shorten(str(error), 500)}") from error


def load_teacher(
    path: str | os.PathLike[str],
    network: nn.Module,
    prefix: str | None = None,
    logits: int | str | None = None,
    head: str | None = None,
) -> nn.Module:
    """A network with the weights of a checkpoint of anybody's, see `load_weights` and `adapt`."""
    load_weights(network, path, prefix)
    return adapt(network, logits, head).eval()
