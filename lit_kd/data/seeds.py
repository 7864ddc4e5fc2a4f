"""Where the seeds come from."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng


def resolve_seed(seed: int | None) -> int:
    """The seed itself; if it is None, the one given to ``seed_everything``, or else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


def derive_seed(seed: int, purpose: str) -> int:
    """A seed in ``[0, 2**32)`` for one purpose, the same on every machine: split and noise share no random numbers."""
    return int.from_bytes(hashlib.sha256(f"{purpose}/{seed}".encode()).digest()[:4], "big")


def seed_epoch(epoch: int, rank: int) -> None:
    """Seed torch from the seed of ``seed_everything``, the epoch and the process; do nothing without that seed."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    if seed is not None:
        torch.manual_seed(int(np.random.SeedSequence([int(seed), epoch, rank]).generate_state(1)[0]))


@contextmanager
def seeded(purpose: str) -> Iterator[None]:
    """Draw torch's random numbers from the seed and the purpose for a while; afterwards they go on as before."""
    with isolate_rng():
        torch.manual_seed(derive_seed(resolve_seed(None), purpose))
        yield
