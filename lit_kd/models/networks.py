"""The distillation literature's networks for 32x32 images, which neither torchvision nor timm has.

They map (B, C, H, W) to logits (B, K), but for `dense_net` and `Tagger`. Convolutional ones have layers ``layer1`` to
``layer3``, ``pool`` (the mean over the image, (B, D)) and ``fc``. No ReLU works in place, so tapped features stay as
they are.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def mlp(in_features: int, hidden: Sequence[int], num_classes: int) -> nn.Sequential:
    """A multilayer perceptron with ReLU, from (B, ...) with F values each to (B, K)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width in hidden:
        layers += [nn.Linear(in_features, width), nn.ReLU()]
        in_features = width
    return nn.Sequential(*layers, nn.Linear(in_features, num_classes))


class TokenGRU(nn.Module):
    """A causal network of tokens, from ids (B, T) to logits (B, T, K), K being the vocabulary: one GRU of a width."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_classes, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of each token's next one."""
        logits: Tensor = self.fc(self.gru(self.embed(x))[0])
        return logits


class _Layers(nn.Sequential):
    """Layers by name, then ``pool`` and ``fc``; convolutions with He et al.'s normal initialisation."""

    fc: nn.Linear

    def __init__(self, features: int, num_classes: int, **layers: nn.Module) -> None:
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(OrderedDict(**layers, pool=pool, fc=nn.Linear(features, num_classes)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ConvNet(_Layers):
    """A small CNN: three stages of conv-BN-ReLU of widths w, 2w and 4w, average pooling by 2 between them."""

    def __init__(self, in_channels: int, width: int, num_classes: int) -> None:
        def stage(inputs: int, outputs: int, *tail: nn.Module) -> nn.Sequential:
            return nn.Sequential(_conv3x3(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU(), *tail)

        super().__init__(
            4 * width,
            num_classes,
            layer1=stage(in_channels, width, nn.AvgPool2d(2)),
            layer2=stage(width, 2 * width, nn.AvgPool2d(2)),
            layer3=stage(2 * width, 4 * width),
        )


def dense_net(in_channels: int, width: int, num_classes: int) -> nn.Sequential:
    """Three stages as `ConvNet`'s, then logits in each 4 x 4 pixels, which are interpolated: to (B, K, H, W).

    H and W must be multiples of 4.
    """
    stages = list(ConvNet(in_channels, width, num_classes))[:3]
    return nn.Sequential(*stages, nn.Conv2d(4 * width, num_classes, 1), nn.Upsample(scale_factor=4, mode="bilinear"))


class Tagger(nn.Sequential):
    """Symbols of a vocabulary embedded, and two convolutions over 5 places each: int64 (B, T) to (B, T, K)."""

    def __init__(self, symbols: int, width: int, num_classes: int) -> None:
        super().__init__(
            nn.Embedding(symbols, width),
            _AlongTime(nn.Conv1d(width, width, 5, padding=2)),
            nn.ReLU(),
            _AlongTime(nn.Conv1d(width, width, 5, padding=2)),
            nn.ReLU(),
            nn.Linear(width, num_classes),
        )


class _AlongTime(nn.Sequential):
    """A convolution over the second axis of (B, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x.mT).mT  # type: ignore[no-untyped-call]
        return found


class ResNet(_Layers):
    """A CIFAR ResNet of basic blocks (He et al., "Deep residual learning for image recognition", 4.2).

    Its depth is 6n + 2, for three stages of n blocks; `widths` are the channels after the stem and in each stage. As in
    RepDistiller's code, a shortcut that changes shape is a 1x1 convolution with BN, where He et al. pad with zeros.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int], in_channels: int, num_classes: int) -> None:
        super().__init__(
            widths[-1],
            num_classes,
            conv1=_conv3x3(in_channels, widths[0]),
            bn1=nn.BatchNorm2d(widths[0]),
            relu=nn.ReLU(),
            **_stages(_BasicBlock, (depth - 2) // 6, widths),
        )


class WideResNet(_Layers):
    """A wide ResNet of pre-activation blocks (Zagoruyko and Komodakis, "Wide residual networks"), no dropout.

    Its depth is 6n + 4, for three stages of n blocks; `widen` multiplies the stages' widths 16, 32 and 64.
    """

    def __init__(self, depth: int, widen: int, in_channels: int, num_classes: int) -> None:
        super().__init__(
            64 * widen,
            num_classes,
            conv1=_conv3x3(in_channels, 16),
            **_stages(_PreActBlock, (depth - 4) // 6, (16, 16 * widen, 32 * widen, 64 * widen)),
            # pre-activation blocks end in a sum, which BN and ReLU follow here
            bn1=nn.BatchNorm2d(64 * widen),
            relu=nn.ReLU(),
        )
        nn.init.zeros_(self.fc.bias)


class _BasicBlock(nn.Module):
    """conv-BN-ReLU-conv-BN, plus the shortcut, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class _PreActBlock(nn.Module):
    """BN-ReLU-conv-BN-ReLU-conv, plus the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        # an identity carries the raw sum; a convolution sees what the block's first one sees
        residual = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = residual + self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    # without bias, as a BatchNorm follows
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _stages(
    block: type[_BasicBlock] | type[_PreActBlock], blocks: int, widths: Sequence[int]
) -> dict[str, nn.Sequential]:
    """``layer1`` to ``layer3``, from a stem's width on; the second and the third halve the resolution."""
    stages = {}
    for number, stride in enumerate((1, 2, 2), 1):
        first = block(widths[number - 1], widths[number], stride)
        rest = [block(widths[number], widths[number], 1) for _ in range(blocks - 1)]
        stages[f"layer{number}"] = nn.Sequential(first, *rest)
    return stages
