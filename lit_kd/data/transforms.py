"""Transforms of a whole batch of images at once, each image with its own random draw."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


class ImageTransform:
    """Bytes to normalised floats, with random crops and flips if asked for.

    Draws come from torch's global generator on the CPU, wherever the images are.

    Args:
        mean: Mean of each channel, on the scale ``[0, 1]``.
        std: Standard deviation of each channel, on that scale.
        padding: Pad with black pixels on every side, then crop a random window of the old size; 0: no crop.
        flip: Mirror a random half of the images left to right.
    """

    def __init__(self, mean: list[float], std: list[float], padding: int = 0, flip: bool = False) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.white = torch.tensor(255.0)  # no number: a GPU would multiply by its reciprocal, and round otherwise
        self.padding = padding
        self.flip = flip

    def __call__(self, x: Tensor) -> Tensor:
        """Transform bytes ``(B, C, H, W)`` to floats of the same shape."""
        if self.padding:
            x = random_crop(x, self.padding)
        if self.flip:
            x = random_flip(x)
        white, mean, std = (part.to(x.device) for part in (self.white, self.mean, self.std))
        return (x.float() / white - mean) / std


def random_crop(x: Tensor, padding: int) -> Tensor:
    """Shift each image of ``(B, C, H, W)`` by up to `padding` pixels each way, filling with zeros."""
    b, _, h, w = x.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, b)).to(x.device)
    rows = top[:, None] + torch.arange(h, device=x.device)
    columns = left[:, None] + torch.arange(w, device=x.device)
    # The channel axis moves to the end while three index tensors pick image, row and column.
    padded = pad(x, (padding,) * 4).permute(0, 2, 3, 1)
    image = torch.arange(b, device=x.device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def random_flip(x: Tensor) -> Tensor:
    """Mirror each image of ``(B, C, H, W)`` left to right with probability one half."""
    chosen = (torch.rand(len(x)) < 0.5).to(x.device)
    return torch.where(chosen.view(-1, 1, 1, 1), x.flip(-1), x)
