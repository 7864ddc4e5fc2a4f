"""Closed forms of forward-mode derivatives against torch's own formulas, and what else runs while they last."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from lit_kd.exact import exact_derivative, moment
from lit_kd.forward_mode import FewPasses


def derivative(
    norm: Any, x: Tensor, affine: bool, dual: tuple[bool, ...], running: bool, drawn: torch.dtype | None = None
) -> list[Tensor | None]:
    """Output, its derivative, and the running statistics after it."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=drawn or x.dtype).to(x.dtype)

    channels = x.shape[1]
    given = [x, normal(channels), normal(channels)]
    tangents = [normal(*tensor.shape) for tensor in given]
    statistics = [torch.zeros(channels, dtype=x.dtype), torch.ones(channels, dtype=x.dtype)] if running else [None] * 2
    with torch.no_grad(), forward_ad.dual_level():
        pairs = zip(given, tangents, dual, strict=True)
        tensors = [forward_ad.make_dual(t, tangent) if with_it else t for t, tangent, with_it in pairs]
        out = norm(tensors[0], *statistics, *(tensors[1:] if affine else (None, None)))
        return [t if t is None else t.clone() for t in (*forward_ad.unpack_dual(out), *statistics)]


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 2), (4, 3, 2, 2, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(shape: tuple[int, ...], training: bool) -> None:
    def norm(*tensors: Any) -> Tensor:
        return F.batch_norm(*tensors, training=training, momentum=0.3, eps=1e-3)

    def by_ours(*tensors: Any) -> Tensor:
        with FewPasses():
            return norm(*tensors)

    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 7
    for affine, running, *dual in itertools.product([False, True], repeat=5):
        if running or training:
            found, expected = (derivative(n, x, affine, tuple(dual), running) for n in (by_ours, norm))
            for mine, torchs in zip(found, expected, strict=True):
                assert (mine is None) == (torchs is None)
                if mine is not None:
                    torch.testing.assert_close(mine, torchs, rtol=1e-12, atol=1e-12)


def test_rounds_no_worse_than_torchs() -> None:
    def norm(*tensors: Any) -> Tensor:
        return F.batch_norm(*tensors, training=True)

    x = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 30  # far from 0
    torchs = derivative(norm, x, True, (True, True, True), False)[1]
    with FewPasses():
        mine = derivative(norm, x, True, (True, True, True), False)[1]
        exact = derivative(norm, x.double(), True, (True, True, True), False, torch.float32)[1]
    assert exact is not None
    assert mine is not None
    assert torchs is not None
    assert (mine - exact).norm() < 2 * (torchs - exact).norm()


def test_layout_stays() -> None:
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    seen: list[Tensor] = []
    net[1].register_forward_hook(lambda _, __, out: seen.extend(forward_ad.unpack_dual(out)))
    exact_derivative(net, x, moment(net), dict(net.named_parameters()))
    assert len(seen) == 2
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
