"""From a name to a network."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .networks import ConvNet, ResNet, WideResNet, mlp

_RESNETS: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    **{f"resnet{depth}": (depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": (depth, (32, 64, 128, 256)) for depth in (8, 32)},
}
# What each family expects, for messages.
_FAMILIES = {
    "mlp": "mlp-H[-H...] with hidden widths H of 1 or more, as mlp-256-128",
    "cnn": "cnn-W with a first width W of 1 or more, as cnn-16",
    "wrn": "wrn-D-W with a depth D of 6n + 4 (10, 16, 22, 28, 40) and a factor W of 1 or more, as wrn-40-2",
}
# Members to compare an unknown name with, since a pattern resembles nothing.
_EXAMPLES = ["mlp-32", "mlp-256-128", "cnn-16", "wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2", "wrn-28-10"]
_CIFAR = (3, 32, 32)


def model_names() -> list[str]:
    """The names that `build_model` knows: the fixed ones, and a pattern for each family.

    >>> "resnet8x4" in model_names(), "wrn-D-W" in model_names()
    (True, True)
    """
    return ["mlp-H[-H...]", "cnn-W", *_RESNETS, "wrn-D-W", "torchvision/NAME", "timm/NAME"]


def build_model(name: str, num_classes: int, input_shape: Sequence[int] | None = None) -> nn.Module:
    """Build a student or a teacher by its name, with fresh weights (none is ever downloaded).

    Args:
        name: One of `model_names`: ``mlp-256-128``, ``cnn-16``, ``resnet20``, ``resnet8x4``, ``wrn-40-2``,
            ``torchvision/resnet18``, ``timm/resnet18``, ... A name without a slash is a network for small
            images: ``resnet32`` is the CIFAR network.
        num_classes: The number of logits K.
        input_shape: (C, H, W) or (F,), without the batch axis. None means (3, 32, 32), except to an mlp,
            which needs to be told. Only an mlp takes anything but images, and only some transformers are
            bound to H and W.

    Returns:
        A network in training mode from (B, *input_shape) to logits (B, K).

    Raises:
        ValueError: The name is unknown or malformed, or the network cannot take such inputs.
        ImportError: The name is timm's, and timm is not installed.

    >>> build_model("mlp-32", num_classes=10, input_shape=(1, 8, 8))[-1]
    Linear(in_features=32, out_features=10, bias=True)
    >>> sum(p.numel() for p in build_model("resnet20", num_classes=100).parameters())
    278324
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, found {num_classes}")
    shape = None if input_shape is None else tuple(input_shape)
    if shape is not None and (not shape or min(shape) < 1):
        raise ValueError(f"input_shape must be (C, H, W) or (F,) with sizes of 1 or more, found {shape}")

    library, _, member = name.partition("/")
    if library == "torchvision" and member:
        return _torchvision_model(member, num_classes, _image_shape(name, shape))
    if library == "timm" and member:
        return _timm_model(member, num_classes, _image_shape(name, shape))
    if name in _RESNETS:
        return ResNet(*_RESNETS[name], _image_shape(name, shape)[0], num_classes)

    family, *numbers = name.split("-")
    sizes = [int(n) for n in numbers if re.fullmatch("[1-9][0-9]*", n)]
    if sizes and len(sizes) == len(numbers):
        if family == "mlp":
            if shape is None:
                raise ValueError(f"{name} needs input_shape, (F,) or (C, H, W), to size its first layer")
            return mlp(math.prod(shape), sizes, num_classes)
        if family == "cnn" and len(sizes) == 1:
            return ConvNet(_image_shape(name, shape)[0], sizes[0], num_classes)
        if family == "wrn" and len(sizes) == 2 and sizes[0] >= 10 and sizes[0] % 6 == 4:
            return WideResNet(sizes[0], sizes[1], _image_shape(name, shape)[0], num_classes)

    expected = f"; expected {_FAMILIES[family]}" if numbers and family in _FAMILIES else ""
    near = _nearest(name, [*_RESNETS, *_EXAMPLES])
    # The commonest slip: a bare name means the CIFAR network, and resnet18 or resnet50 are not among those.
    if not expected and name in _torchvision_names():
        near = [f"torchvision/{name}", *near]
    raise ValueError(f"unknown model {name!r}{expected}{_did_you_mean(near)} Known: {', '.join(model_names())}")


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """Find the layer that gives the logits, taken to be the last `nn.Linear` in registration order.

    That holds for every network written here and for nearly all of torchvision and timm; not for one that
    registers a second head later (timm's ``deit_*_distilled``) or ends in a convolution (SqueezeNet).

    Args:
        model: Any network.

    Returns:
        The layer's path, as for ``model.get_submodule``, and the layer.

    Raises:
        ValueError: The network has no `nn.Linear`.

    >>> last_linear(build_model("cnn-16", num_classes=10))
    ('fc', Linear(in_features=64, out_features=10, bias=True))
    """
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to take as its classifier: name the layer itself, "
            "or use a network that ends in one"
        )
    return linears[-1]


def _torchvision_names() -> list[str]:
    import torchvision  # here, not above: it is slow to import and most names need none of it

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def _torchvision_model(member: str, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    names = _torchvision_names()
    if member not in names:
        raise _unknown_member("torchvision", member, names)
    if shape[0] != 3:
        raise ValueError(
            f"torchvision/{member} takes 3 channels, found input_shape {shape}: use a timm/ name, which "
            "adapts to any number of channels, or repeat the channel in the data"
        )
    import torchvision

    options: dict[str, Any] = {}
    if member in ("googlenet", "inception_v3"):
        # With auxiliary heads they return a named tuple in training, which is not logits.
        # init_weights is their default, spelled out because they warn about a default that will change.
        options = {"aux_logits": False, "init_weights": True}
    elif member.startswith("vit_"):  # the length of a position embedding follows from the image
        options = {"image_size": shape[1]}
    elif member.startswith("maxvit"):
        options = {"input_size": shape[1:]}
    try:
        model: nn.Module = torchvision.models.get_model(member, weights=None, num_classes=num_classes, **options)
    except (AssertionError, ValueError) as err:
        raise ValueError(f"torchvision/{member} cannot be built for input_shape {shape}: {err}") from err
    return model


def _timm_model(member: str, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    try:
        import timm
    except ImportError as err:
        raise ImportError(f"timm/{member} needs timm, an optional extra: pip install 'lit_kd[timm]'") from err

    # Also keeps out timm's "hf-hub:" names, which would reach for the network.
    if not timm.is_model(member):
        raise _unknown_member("timm", member, timm.list_models())
    options: dict[str, Any] = {}
    try:
        pretrained_cfg = timm.get_pretrained_cfg(member)
        if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
            options = {"img_size": shape[1:]}
        model: nn.Module = timm.create_model(
            member, pretrained=False, num_classes=num_classes, in_chans=shape[0], **options
        )
    except (AssertionError, RuntimeError, ValueError) as err:  # RuntimeError: a tag of weights it has not
        raise ValueError(f"timm/{member} cannot be built for input_shape {shape}: {err}") from err
    return model


def _image_shape(name: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if shape is None:
        return _CIFAR
    if len(shape) != 3:
        raise ValueError(f"{name} takes images: expected input_shape (C, H, W), found {shape}")
    return shape


def _unknown_member(library: str, member: str, names: Sequence[str]) -> ValueError:
    near = [f"{library}/{n}" for n in _nearest(member, names)]
    return ValueError(
        f"unknown model '{library}/{member}': {library} has no such classifier{_did_you_mean(near)} "
        f"Known: {', '.join(model_names())}"
    )


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {', '.join(near)}?" if near else "."


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    """The three names most like ``name``; of those equally alike, the ones with the nearest first number.

    >>> _nearest("resnet21", ["resnet14", "resnet20", "resnet32", "cnn-16"])
    ['resnet20', 'resnet14', 'resnet32']
    """

    def number(text: str) -> int:
        found = re.search("[0-9]+", text)
        return int(found[0]) if found else 0

    def distance(other: str) -> tuple[float, int]:
        alike = difflib.SequenceMatcher(None, other, name.lower()).ratio()
        return -alike, abs(number(other) - number(name))

    return sorted(difflib.get_close_matches(name.lower(), list(names), n=12, cutoff=0.5), key=distance)[:3]
