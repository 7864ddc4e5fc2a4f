"""Networks by name."""

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


def build_model(name: str, num_classes: int, input_shape: Sequence[int] | None = None) -> nn.Module:
    """Build a network from (B, *input_shape) to logits (B, K), with fresh weights; none are ever downloaded.

    Args:
        name: As ``mlp-256-128``, ``cnn-16``, ``resnet20``, ``wrn-40-2``, ``torchvision/resnet18`` or ``timm/resnet18``.
            Names without a slash are networks for small images: ``resnet32`` is the CIFAR one.
        num_classes: The number of logits K.
        input_shape: Of one sample, (C, H, W), by default (3, 32, 32). An mlp needs it, and also takes (F,).
    """
    shape = tuple(input_shape or (3, 32, 32))
    library, _, member = name.partition("/")
    if library == "torchvision":
        return _torchvision_model(member, num_classes, shape)
    if library == "timm":
        return _timm_model(member, num_classes, shape)
    if name in _RESNETS:
        return ResNet(*_RESNETS[name], shape[0], num_classes)
    sizes = [int(size) for size in re.findall("[0-9]+", name)]
    if re.fullmatch("mlp(-[1-9][0-9]*)+", name):
        if input_shape is None:
            raise ValueError(f"{name} needs input_shape, (F,) or (C, H, W), to size its first layer")
        return mlp(math.prod(shape), sizes, num_classes)
    if re.fullmatch("cnn-[1-9][0-9]*", name):
        return ConvNet(shape[0], sizes[0], num_classes)
    if re.fullmatch("wrn-[1-9][0-9]+-[1-9][0-9]*", name) and sizes[0] % 6 == 4:
        return WideResNet(sizes[0], sizes[1], shape[0], num_classes)
    known = f"mlp-H[-H...], cnn-W, {', '.join(_RESNETS)}, wrn-D-W with D = 6n + 4, torchvision/NAME, timm/NAME"
    raise ValueError(f"expected a model of {known}; found unknown model {name!r}")


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """The path and the layer that gives the logits: the last `nn.Linear` in registration order.

    Wrong for a network with a second head (timm's ``deit_*_distilled``) or a convolution at its end (SqueezeNet).
    """
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise ValueError(f"{type(model).__name__} has no nn.Linear as its classifier: use a network that ends in one")
    return linears[-1]


def _torchvision_model(member: str, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    from torchvision import models  # slow to import

    known = models.list_models(module=models)  # classifiers; others would download a backbone
    if member not in known:
        raise ValueError(f"expected after torchvision/ one of {', '.join(known)}; found unknown model {member!r}")
    options: dict[str, Any] = {}
    if member in ("googlenet", "inception_v3"):  # no auxiliary heads, which give a tuple; init_weights, or they warn
        options = {"aux_logits": False, "init_weights": True}
    elif member.startswith("vit_"):
        options = {"image_size": shape[-1]}
    elif member.startswith("maxvit"):
        options = {"input_size": shape[1:]}
    model: nn.Module = models.get_model(member, weights=None, num_classes=num_classes, **options)
    return model


def _timm_model(member: str, num_classes: int, shape: tuple[int, ...]) -> nn.Module:
    timm = optional("timm", "timm", f"timm/{member}")
    if not timm.is_model(member):  # "hf-hub:" names too, which timm would look for on the network
        raise ValueError(f"expected after timm/ one of timm.list_models(); found unknown model {member!r}")
    config = timm.get_pretrained_cfg(member)
    options = {"img_size": shape[1:]} if config is not None and config.fixed_input_size else {}
    model: nn.Module = timm.create_model(
        member, pretrained=False, num_classes=num_classes, in_chans=shape[0], **options
    )
    return model
