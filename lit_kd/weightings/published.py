"""The two published rules of ALM-KD: gradient steps on the weights of each sample."""

from typing import Literal

import torch
from torch import Tensor

from lit_kd.data.seeds import derive_seed, resolve_seed
from lit_kd.data.table import SampleTable
from lit_kd.types import check_choice
from lit_kd.weightings.base import MetaStep, Rule, has_label


class Amal(Rule):
    """Independent weights in [0, 2] (AMAL, AAAI 2023) [code]: a sample can be switched off.

    For the first four, ``None`` takes a constant of AMAL's code: 0.9, 1500, 5 and 0; with ``version="first"`` that of
    arXiv 2202.03250 v1: random, 2000, 10 and 0.25. There, weights are updated in a separate pass in eval mode; here, in
    the training steps of the same epochs [ours].

    Args:
        version: ``"amal"`` or ``"first"``.
        start_weight: The teachers' weight before the first update; random ones are uniform in [0, 1].
        step_size: At a batch of 128; it scales with the batch, as the meta-gradient of a sample carries 1 / B.
        repeats: Steps a batch; each look-ahead starts from the same student.
        train_share: The training loss's part in the gradient, in [0, 1]; the validation loss has the rest.
        warmup_epochs: Epochs before the first update; ``None``: a twentieth of the training, or of 100 epochs if it is
            longer and may stop early; 10 if its length is unknown. The authors take 10 of 200 [ours].
        every: Weights are updated in one of so many epochs; ``None``: as many as the default of ``warmup_epochs``.
    """

    meta_rows = 1000

    def __init__(
        self,
        version: Literal["amal", "first"] = "amal",
        start_weight: float | None = None,
        step_size: float | None = None,
        repeats: int | None = None,
        train_share: float | None = None,
        warmup_epochs: int | None = None,
        every: int | None = None,
    ) -> None:
        check_choice("version", version, ("amal", "first"))
        own = (0.9, 1500.0, 5, 0.0) if version == "amal" else (None, 2000.0, 10, 0.25)
        self.start_weight = own[0] if start_weight is None else start_weight
        self.step_size = own[1] if step_size is None else step_size
        self.repeats = own[2] if repeats is None else repeats
        self.train_share = own[3] if train_share is None else train_share
        self.warmup_epochs = warmup_epochs
        self.every = every
        self.twentieth = 10

    def first_weights(self, shares: Tensor) -> Tensor:
        """Weights before the first update, ``(N, K + 1)``, from the weight of a teacher alone, ``(N, K)``."""
        return torch.cat([1 - shares[:, :1], shares], dim=1)

    def move(self, weights: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """One step against the gradient ``(B, K + 1)``, back into the allowed set."""
        return (weights - rate * gradient).clamp(0, 2)

    def start(self, table: SampleTable, teachers: int, trusted: Tensor, labels: Tensor, epochs: int | None) -> None:
        """Add the weights."""
        self.twentieth = max(1, round((epochs or 200) / 20))
        fresh = "weights" not in table
        table.add("weights", torch.zeros(teachers + 1))
        if fresh:
            draw = torch.Generator().manual_seed(derive_seed(resolve_seed(None), "start weights"))
            drawn = torch.rand(table.size, 1, generator=draw)
            shares = drawn if self.start_weight is None else torch.full_like(drawn, self.start_weight)
            table["weights"] = self.first_weights(shares.expand(-1, teachers))

    def active(self, epoch: int) -> bool:
        """After the warm-up, one epoch of ``every``."""
        first = self.twentieth if self.warmup_epochs is None else self.warmup_epochs
        return epoch >= first and (epoch - first) % (self.every or self.twentieth) == 0

    def observe(self, table: SampleTable, step: MetaStep) -> None:
        """Repeated steps on the weights of the batch."""
        weights = table["weights"][step.index]
        for _ in range(self.repeats):
            gradient = step.gradient(weights)
            if step.known is not None:  # as if it did no end of harm: it stays at 0
                gradient[:, 1:] = gradient[:, 1:].where(step.known, torch.finfo(gradient.dtype).max)
            weights = self.move(weights, gradient, self.step_size * step.batch_size / 128)
        weights[:, 0] *= has_label(step.y)  # a label that is missing has no gradient, nor weight
        table.write(step.index, weights=weights)


class Paper(Amal):
    """Convex weights (arXiv 2202.03250 v1): teachers have ``lam_k >= 0``, of sum at most 1, the label has the rest.

    Its options are those of `Amal`. For one teacher the projection is a clamp to [0, 1]; for several it is the
    Euclidean one [ours].
    """

    def first_weights(self, shares: Tensor) -> Tensor:
        """``(1 - lam, lam)``; several teachers share lam equally."""
        return _with_label(shares / shares.shape[1])

    def move(self, weights: Tensor, gradient: Tensor, rate: float) -> Tensor:
        """A projected gradient step on the shares: what a teacher gains, the label loses."""
        return _with_label(project(weights[:, 1:] - rate * (gradient[:, 1:] - gradient[:, :1])))


def project(shares: Tensor) -> Tensor:
    """The nearest point with ``shares >= 0`` and ``sum <= 1``, row by row, ``(B, K)``.

    Examples:
        >>> project(torch.tensor([[1.7], [-0.2], [0.4]])).flatten()
        tensor([1.0000, 0.0000, 0.4000])
    """
    inside = shares.clamp(min=0)
    # a common shift does not move the nearest point of the simplex; this one keeps huge steps exact
    shifted = shares - shares.amax(1, keepdim=True)
    ordered = shifted.sort(dim=1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, shares.shape[1] + 1, device=shares.device)
    last = (ordered > excess).sum(1, keepdim=True).clamp(min=1) - 1  # 0 for nan only, which stays nan
    on_simplex = (shifted - excess.gather(1, last)).clamp(min=0)
    return torch.where(inside.sum(1, keepdim=True) <= 1, inside, on_simplex)


def _with_label(shares: Tensor) -> Tensor:
    return torch.cat([1 - shares.sum(1, keepdim=True), shares], dim=1)
