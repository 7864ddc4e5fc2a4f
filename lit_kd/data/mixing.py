"""MixUp and CutMix whose rows are known, so that each keeps its own label and weights."""

import torch
from torch import Tensor, nn

from lit_kd.types import Batch, MixedBatch, Pairs, check_choice


def as_mix(mix: str | nn.Module | None) -> nn.Module | None:
    """A transform of torchvision by its short name, or one's own."""
    if mix is None or isinstance(mix, nn.Module):
        return mix
    check_choice("mix", mix, ("mixup", "cutmix"))
    from torchvision.transforms import v2  # takes long to import

    transform: nn.Module = v2.MixUp() if mix == "mixup" else v2.CutMix()
    return transform


def mixed(batch: Batch, mix: nn.Module) -> Batch:
    """The mixtures of a batch's images, and the pairs of a mixture and a row that is part of it."""
    x, size = batch.x, len(batch.y)
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        found = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"expected images to mix, floating-point (B, channels, height, width), found {found}")
    x, shares = mix(x, torch.eye(size, device=x.device))  # in the place of labels: whose label has which share?
    every = torch.arange(size, device=x.device)
    main = shares.argmax(0)
    counts = shares > 0
    counts[main, every] = True  # no row is without a pair
    inputs, rows = counts.nonzero(as_tuple=True)
    positions = (counts.flatten().cumsum(0) - 1).view_as(counts)[main, every]
    pairs = Pairs(inputs, rows, shares[counts] * (len(rows) / size), positions)
    made = MixedBatch(x, batch.y[rows], None if batch.index is None else batch.index[rows])
    made.parts = pairs
    return made
