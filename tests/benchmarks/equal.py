"""Losses of lit_kd and of torchdistill on the same tensors, in float64: one table; a part of ``make bench``.

Where the two follow other conventions, the line says so, and the figure of torchdistill is converted.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torchdistill.losses import mid_level as theirs

from lit_kd.losses import (
    affinity_loss,
    angle_loss,
    attention_loss,
    contrastive_loss,
    correlation_loss,
    cross_entropy,
    distance_loss,
    hint_loss,
    information_loss,
    kd_loss,
    pyramid_loss,
    similarity_loss,
    standardised,
)

B, C, LARGEST = 16, 10, 1e-6
LOGITS: tuple[str, str, str, str] = ("net", "output", "net", "output")


def said(value: Any, path: str = "net") -> dict[str, dict[str, Any]]:
    """What torchdistill's hooks give."""
    return {path: {"output": value}}


def given(loss: Any, s: Any, t: Any, *y: Tensor) -> Tensor:
    """Its value."""
    found: Tensor = loss(said(s), said(t), *y)
    return found


def contrast(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """CRD with the same memories and negatives, and both divided by the mean score."""
    rows, negatives = 40, 12
    crd = theirs.CRDLoss("net", "rows", "net", s.shape[1], rows, negatives, rows).double()
    index, s, t = torch.arange(B), F.normalize(s), F.normalize(t)
    others = torch.randint(B, rows, (B, negatives))
    told = {"pos_idx": index, "contrast_idx": torch.cat([index.unsqueeze(1), others], dim=1)}
    ours = torch.zeros(B, dtype=torch.float64)
    for one, memory in (s, crd.memory_v2), (t, crd.memory_v1):
        scores = (torch.einsum("bd,bkd->bk", one, memory[told["contrast_idx"]]) / crd.params[1].item()).exp()
        scores = scores / (rows * scores.mean())
        ours = ours + contrastive_loss(scores[:, 0], scores[:, 1:], rows)
    return ours.mean(), crd({**said(s), "rows": {"input": told}}, said(t))


def table() -> list[tuple[str, Tensor, Tensor, str]]:
    """Name, ours, theirs, what is converted."""
    torch.manual_seed(0)
    z, t = 2 * torch.randn(2, B, C, dtype=torch.float64)
    y = torch.randint(C, (B,))
    f, g = torch.randn(B, 12, dtype=torch.float64), torch.randn(B, 20, dtype=torch.float64)
    maps, larger = torch.randn(B, 6, 4, 4, dtype=torch.float64), torch.randn(B, 8, 4, 4, dtype=torch.float64)
    mean, variance = torch.randn(B, 8, 4, 4, dtype=torch.float64), torch.rand(8, dtype=torch.float64) + 0.1
    pair = {"student": {"path": "net", "io": "output"}, "teacher": {"path": "net", "io": "output"}}
    kd = 0.3 * cross_entropy(z, y).mean() + 0.7 * kd_loss(z, t, 4.0).mean()
    plain = kd_loss(standardised(z), standardised(t), 2.0).mean()
    p, q = (logits.div(4.0).softmax(-1) for logits in (z, t))
    dist = 16 * (correlation_loss(p, q).mean() + correlation_loss(p.mT, q.mT).mean())
    spread = variance.view(1, -1, 1, 1).expand_as(mean)
    with patch.object(theirs, "normalize", lambda rows, norm: F.normalize(rows)):
        similar = given(theirs.SPKDLoss("net", "net", "batchmean"), f, g)
    kd_theirs = theirs.KDLoss(*LOGITS, temperature=4.0, alpha=0.3)
    plain_theirs = theirs.LogitStdKDLoss(*LOGITS, temperature=2.0, beta=9.0)
    review = theirs.HierarchicalContextLoss(*LOGITS)
    distances, angles = (theirs.RKDLoss("net", "net", *factors, "mean") for factors in ((1, 0), (0, 1)))
    added = "our eps is added to norms, theirs is their least"
    return [
        ("KD", kd, given(kd_theirs, z, t, y), "alpha is the label's share"),
        ("KD, standardised", plain, 4 * given(plain_theirs, z, t), "times T^2"),
        ("DIST", dist, given(theirs.DISTLoss(*LOGITS, tau=4.0), z, t), added),
        ("FitNet", hint_loss(mean, larger).mean(), F.mse_loss(mean, larger), "theirs is torch's"),
        ("AT", attention_loss(maps, larger).mean(), given(theirs.ATLoss({"one": pair}), maps, larger), ""),
        ("SP", similarity_loss(f, g), similar, "they divide by the sum of absolute values, the authors by the norm"),
        ("PKT", affinity_loss(f, g), given(theirs.PKTLoss(*LOGITS), f.clone(), g.clone()), "they add eps to norms"),
        ("RKD, distances", distance_loss(f, g), given(distances, f, g), ""),
        ("RKD, angles", angle_loss(f, g), given(angles, f, g), ""),
        (
            "VID",
            information_loss(mean, larger, variance).mean(),
            given(theirs.VIDLoss({"one": pair}), (mean, spread), larger),
            "",
        ),
        ("ReviewKD", pyramid_loss(mean, larger).mean(), given(review, (mean, None), larger), "fusion apart"),
        ("CRD", *contrast(f, torch.randn(B, 12, dtype=torch.float64)), "the same memories and negatives"),
    ]


def main() -> None:
    """Print the table; an AssertionError where two losses differ by more than 1e-6."""
    print("loss | lit_kd | torchdistill | difference | convention")
    for name, ours, other, convention in table():
        difference = abs(float(ours) - float(other))
        print(f"{name} | {float(ours):.6f} | {float(other):.6f} | {difference:.0e} | {convention}")
        assert difference <= LARGEST * max(1, abs(float(other))), f"{name} differs by {difference}"


if __name__ == "__main__":
    main()
