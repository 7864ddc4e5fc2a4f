"""Where the seeds come from."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch


def resolve_seed(seed: int | None) -> int:
    """Return `seed`, or if it is None the one given to ``seed_everything``, or 0 if that was never called.

    Examples:
        >>> resolve_seed(3)
        3
    """
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


def derive_seed(seed: int, purpose: str) -> int:
    """Derive a seed for one purpose, so that e.g. the split and the noise do not share their random numbers.

    Returns:
        An integer in ``[0, 2**32)``, the same on every machine.

    Examples:
        >>> derive_seed(0, "noise") == derive_seed(0, "split")
        False
    """
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}".encode()).digest()[:4], "big")


def seed_epoch(epoch: int, rank: int) -> None:
    """Seed torch from the seed given to ``seed_everything``, the epoch and the process; do nothing if there is none."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is not None:
        torch.manual_seed(int(np.random.SeedSequence([int(seed), epoch, rank]).generate_state(1)[0]))
