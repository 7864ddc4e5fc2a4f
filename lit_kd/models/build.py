"""Networks by name."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from .classes import build_class, is_class_path
from .files import optional
from .networks import ConvNet, ResNet, Tagger, TokenGRU, WideResNet, dense_net, mlp

_RESNETS: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    **{f"resnet{depth}": (depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": (depth, (32, 64, 128, 256)) for depth in (8, 32)},
}


def build_model(
    name: str | Mapping[str, Any],
    num_classes: int,
    input_shape: Sequence[int] | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Build a network from (B, *input_shape) to logits (B, K), with fresh weights unless ``pretrained``.

    Args:
        name: As ``mlp-256-128``, ``cnn-16``, ``resnet20``, ``wrn-40-2``; for pixels ``seg-8``; for tokens ``gru-64``,
            which predicts the next, and ``tagger-24-32`` for 24 symbols; ``torchvision/resnet18``, ``timm/resnet18``;
            ``hf/NAME`` or ``hf-causal/NAME``, a classifier or a causal language model of Hugging Face whose
            configuration is at hand, in its cache or a directory; or the import path of a class, or a mapping, see
            `lit_kd.models.given.resolve_model`.
            Names without a slash are networks for small images: ``resnet32`` is the CIFAR one.
        num_classes: The number of logits K.
        input_shape: Of one sample, (C, H, W), by default (3, 32, 32). An mlp needs it, and also takes (F,).
        pretrained: Download the weights, of timm and Hugging Face; else nothing is ever downloaded.
    """
    if isinstance(name, Mapping):
        return build_class(name, num_classes)
    if is_class_path(name):
        return build_class({"class_path": name}, num_classes)
    if isinstance(input_shape, int):
        raise ValueError(f"expected as input_shape a list, [F] or [C, H, W], found {input_shape}")
    shape = tuple(input_shape or (3, 32, 32))
    library, _, member = name.partition("/")
    if library in ("hf", "hf-causal"):
        return (_hf_model if library == "hf" else _hf_causal)(member, num_classes, pretrained)
    if library == "torchvision":
        return _torchvision_model(member, num_classes, shape)
    if library == "timm":
        return _timm_model(member, num_classes, shape, pretrained)
    if name in _RESNETS:
        return ResNet(*_RESNETS[name], shape[0], num_classes)
    sizes = [int(size) for size in re.findall("[0-9]+", name)]
    if re.fullmatch("mlp(-[1-9][0-9]*)+", name):
        if input_shape is None:
            raise ValueError(f"{name} needs input_shape, (F,) or (C, H, W), to size its first layer")
        return mlp(math.prod(shape), sizes, num_classes)
    if re.fullmatch("cnn-[1-9][0-9]*", name):
        return ConvNet(shape[0], sizes[0], num_classes)
    if re.fullmatch("gru-[1-9][0-9]*", name):
        return TokenGRU(sizes[0], num_classes)
    if re.fullmatch("wrn-[1-9][0-9]+-[1-9][0-9]*", name) and sizes[0] % 6 == 4:
        return WideResNet(sizes[0], sizes[1], shape[0], num_classes)
    if re.fullmatch("seg-[1-9][0-9]*", name):
        return dense_net(shape[0], sizes[0], num_classes)
    if re.fullmatch("tagger-[1-9][0-9]*-[1-9][0-9]*", name):
        return Tagger(sizes[0], sizes[1], num_classes)
    small = f"mlp-H[-H...], cnn-W, seg-W, gru-W, tagger-SYMBOLS-W, {', '.join(_RESNETS)}, wrn-D-W with D = 6n + 4"
    known = f"{small}, torchvision/NAME, timm/NAME, hf/NAME, hf-causal/NAME"
    raise ValueError(f"expected a model of {known}; found unknown model {name!r}, and no file of that name")


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """The path and the layer that gives the logits: what `adapt` or `find_head` told, or the last `nn.Linear`."""
    head = getattr(model, "lit_kd_head", None)
    if head is not None:
        return head, cast(nn.Linear, model.get_submodule(head))
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


def _timm_model(member: str, num_classes: int, shape: tuple[int, ...], pretrained: bool) -> nn.Module:
    timm = optional("timm", "timm", f"timm/{member}")
    if not timm.is_model(member):  # "hf-hub:" names too, which timm would look for on the network
        raise ValueError(f"expected after timm/ one of timm.list_models(); found unknown model {member!r}")
    config = timm.get_pretrained_cfg(member)
    options = {"img_size": shape[1:]} if config is not None and config.fixed_input_size else {}
    with _downloads(f"timm/{member}"):
        model: nn.Module = timm.create_model(
            member, pretrained=pretrained, num_classes=num_classes, in_chans=shape[0], **options
        )
    return model


def _hf_model(member: str, num_classes: int, pretrained: bool) -> nn.Module:
    hub = optional("transformers", "hf", f"hf/{member}")
    with _downloads(f"hf/{member}"):
        config = hub.AutoConfig.from_pretrained(member, num_labels=num_classes, local_files_only=not pretrained)
        images = type(config) in hub.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        kind = hub.AutoModelForImageClassification if images else hub.AutoModelForSequenceClassification
        if not pretrained:
            return cast(nn.Module, kind.from_config(config))
        # of another number of classes, the head is a new one
        return cast(nn.Module, kind.from_pretrained(member, config=config, ignore_mismatched_sizes=True))


def _hf_causal(member: str, num_classes: int, pretrained: bool) -> nn.Module:
    hub = optional("transformers", "hf", f"hf-causal/{member}")
    with _downloads(f"hf-causal/{member}"):
        config = hub.AutoConfig.from_pretrained(member, local_files_only=not pretrained)
        if config.vocab_size != num_classes:
            found = f"found {config.vocab_size} in hf-causal/{member}"
            raise ValueError(f"expected a vocabulary of num_classes={num_classes} tokens, {found}: set num_classes")
        kind = hub.AutoModelForCausalLM
        return cast(nn.Module, kind.from_pretrained(member) if pretrained else kind.from_config(config))


@contextmanager
def _downloads(name: str) -> Iterator[None]:
    """Say what to do where something is not at hand."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"expected {name}'s files on this machine, or pretrained=true and a network to download them, found "
            f"neither: download them elsewhere into the library's cache, or name a directory ({error})"
        ) from error
