"""Networks by name."""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from .files import optional
from .networks import ConvNet, ResNet, WideResNet, mlp

_RESNETS: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    **{f"resnet{depth}": (depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": (depth, (32, 64, 128, 256)) for depth in (8, 32)},
}
_FAMILIES = {
    "mlp": "mlp-H[-H...] with hidden widths H of 1 or more, as mlp-256-128",
    "cnn": "cnn-W with a first width W of 1 or more, as cnn-16",
    "wrn": "wrn-D-W with a depth D of 6n + 4 (10, 16, 22, 28, 40) and a factor W of 1 or more, as wrn-40-2",
}
# compared with an unknown name, as patterns resemble nothing
_EXAMPLES = ["mlp-32", "mlp-256-128", "cnn-16", "wrn-16-1", "wrn-16-2", "wrn-40-1", "wrn-40-2", "wrn-28-10"]


def model_names() -> list[str]:
    """The names that `build_model` knows: fixed ones, and a pattern for each family."""
    return ["mlp-H[-H...]", "cnn-W", *_RESNETS, "wrn-D-W", "torchvision/NAME", "timm/NAME"]


def build_model(name: str, num_classes: int, input_shape: Sequence[int] | None = None) -> nn.Module:
    """Build a network from (B, *input_shape) to logits (B, K), with fresh weights; none are ever downloaded.

    Args:
        name: One of `model_names`, as ``mlp-256-128``, ``cnn-16``, ``resnet20``, ``wrn-40-2``, ``torchvision/resnet18``
            or ``timm/resnet18``. Names without a slash are networks for small images: ``resnet32`` is the CIFAR one.
        num_classes: The number of logits K.
        input_shape: Of one sample, (C, H, W), by default (3, 32, 32). An mlp needs it, and also takes (F,).
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be 1 or more, found {num_classes}")
    shape = None if input_shape is None else tuple(input_shape)
    if shape is not None and (not shape or min(shape) < 1):
        raise ValueError(f"input_shape must be (C, H, W) or (F,) with sizes of 1 or more, found {shape}")
    library, _, member = name.partition("/")
    if library in ("torchvision", "timm") and member:
        build = _torchvision_model if library == "torchvision" else _timm_model
        return build(member, num_classes, _image_shape(name, shape))
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
    if numbers and family in _FAMILIES:
        raise ValueError(f"unknown model {name!r}: expected {_FAMILIES[family]}")
    raise _unknown(name, [*_RESNETS, *_EXAMPLES, *(f"torchvision/{other}" for other in _torchvision_names())])


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """The path and the layer that gives the logits: the last `nn.Linear` in registration order.

    Wrong for a network with a second head (timm's ``deit_*_distilled``) or a convolution at its end (SqueezeNet).
    """
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"{type(model).__name__} has no nn.Linear as its classifier: use a network that ends in one")
    return linears[-1]


def _torchvision_names() -> list[str]:
    from torchvision import models  # slow to import

    names: list[str] = models.list_models(module=models)
    return names


def _torchvision_model(member: str, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    if member not in _torchvision_names():
        raise _unknown(member, _torchvision_names(), "torchvision/")
    if shape[0] != 3:
        raise ValueError(f"torchvision/{member} takes 3 channels, found input_shape {shape}: use a timm/ name")
    import torchvision

    options: dict[str, Any] = {}
    if member in ("googlenet", "inception_v3"):  # no auxiliary heads, which give a tuple; init_weights, or they warn
        options = {"aux_logits": False, "init_weights": True}
    elif member.startswith("vit_"):
        options = {"image_size": shape[1]}
    elif member.startswith("maxvit"):
        options = {"input_size": shape[1:]}
    try:
        model: nn.Module = torchvision.models.get_model(member, weights=None, num_classes=num_classes, **options)
    except (AssertionError, ValueError) as err:
        raise ValueError(f"torchvision/{member} cannot be built for input_shape {shape}: {err}") from err
    return model


def _timm_model(member: str, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    timm = optional("timm", "timm", f"timm/{member}")
    if not timm.is_model(member):  # "hf-hub:" names too, which timm would look for on the network
        raise _unknown(member, timm.list_models(), "timm/")
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": shape[0]}
    try:
        config = timm.get_pretrained_cfg(member)
        if config is not None and config.fixed_input_size:
            options["img_size"] = shape[1:]
        model: nn.Module = timm.create_model(member, pretrained=False, **options)
    except (AssertionError, RuntimeError, ValueError) as err:  # RuntimeError: a tag of weights it has not
        raise ValueError(f"timm/{member} cannot be built for input_shape {shape}: {err}") from err
    return model


def _image_shape(name: str, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if shape is not None and len(shape) != 3:
        raise ValueError(f"{name} takes images: expected input_shape (C, H, W), found {shape}")
    return shape or (3, 32, 32)


def _unknown(name: str, known: Sequence[str], library: str = "") -> ValueError:
    near = difflib.get_close_matches(name.lower(), known)
    near.sort(key=lambda other: -sum(a == b for a, b in zip(other, name.lower(), strict=False)))
    if f"torchvision/{name}" in known:  # as resnet18 and resnet50, which are not among the CIFAR networks
        near.insert(0, f"torchvision/{name}")
    hint = f"; did you mean {', '.join(library + other for other in near)}?" if near else "."
    return ValueError(f"unknown model {library + name!r}{hint} Known: {', '.join(model_names())}")
