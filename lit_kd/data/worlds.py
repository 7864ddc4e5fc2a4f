"""Small worlds that are drawn: items that users like, sequences of symbols in noise. Each seed draws its own."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_kd.data.base import DataModule
from lit_kd.data.partition import Source
from lit_kd.data.rows import TensorRows
from lit_kd.data.seeds import derive_seed
from lit_kd.types import IGNORED


@dataclass(eq=False)
class UserRows:
    """A row is a user: its number, and the items that it is known to have, bool ``(n, I)``, which nobody recommends."""

    seen: Tensor

    def __len__(self) -> int:
        return len(self.seen)

    def fetch(self, positions: list[int]) -> dict[str, Tensor]:
        """``user``, ``(B,)``, and ``seen``, ``(B, I)``."""
        users = torch.as_tensor(positions, dtype=torch.int64)
        return {"user": users, "seen": self.seen[users]}


class PopularItemsDataModule(DataModule):
    """Implicit feedback with a popularity bias: what users like, seen through what is popular.

    An affinity is the product of a user's and an item's hidden features, 6 normal numbers each; a user likes the tenth
    of all items of the highest affinity. A user meets each item with a probability that falls with the item's place in
    a fixed order of popularity, ``place^-0.7``, which has nothing to do with affinity, and interacts with those that it
    likes and meets. Each row is a user, its labels are 0 or 1 for each item:

    - training: the interactions, but for one in five, and at least one;
    - validation: these others, as a site could do;
    - test: all else that the user likes, popular or not, which only a drawn world can tell.

    Args:
        users: U, at least 2.
        items: I, at least 20.
        **shared: See `DataModule`; ``meta`` stays 0, and noise is not meant.
    """

    task = "multilabel"

    def __init__(self, users: int = 400, items: int = 200, **shared: Any) -> None:
        super().__init__(**({"meta": 0} | shared))
        if users < 2 or items < 20:
            raise ValueError(f"expected at least 2 users and 20 items, found {users} and {items}")
        self.users, self.num_classes = users, items

    def load(self) -> Source:
        """Draw the world."""
        draw = np.random.default_rng(derive_seed(self._seed, "popular items"))
        affinity = draw.standard_normal((self.users, 6)) @ draw.standard_normal((self.num_classes, 6)).T
        likes = affinity >= np.quantile(affinity, 0.9, axis=1, keepdims=True)
        popularity = draw.permutation(np.arange(1, self.num_classes + 1.0)) ** -0.7
        chance = np.minimum(1, popularity * (self.num_classes / 2 / popularity.sum()))  # half of all are met
        liked_best = np.where(likes, popularity, 0).argmax(1)  # so that nobody has nothing
        had = likes & (draw.random(likes.shape) < chance)
        held = had & (draw.random(likes.shape) < 0.2)
        had[np.arange(self.users), liked_best], held[np.arange(self.users), liked_best] = True, False
        train = had & ~held
        nothing, known, all_known = (UserRows(torch.from_numpy(seen)) for seen in (np.zeros_like(had), train, had))
        return Source(
            nothing,
            nothing,
            train.astype(np.int64),
            val=known,
            val_labels=held.astype(np.int64),
            test=all_known,
            test_labels=(likes & ~had).astype(np.int64),
            identity=b"popular items" + likes.tobytes(),
        )


class SymbolSequencesDataModule(DataModule):
    """Symbols that last some frames each, in noise, and the sequence of symbols as the target.

    A sequence has 3 to 6 of the symbols 1 to ``symbols``, of which neighbours differ; each lasts 1 to 3 frames, behind
    which is silence for 0 or 1 frame, and to the end. A frame is the symbol's prototype, a fixed vector of norm 1, or 0
    in silence, plus normal noise. Inputs are ``(B, 24, 8)``; the target is ``(B, 24)``, `lit_kd.types.IGNORED` behind
    its end. Class 0 is CTC's blank.

    Args:
        sequences: Number of sequences.
        symbols: V, from 2 to 8.
        spread: Standard deviation of the noise in each of a frame's 8 numbers, at least 0.
        test: Size of the test split, a fraction or a count.
        **shared: See `DataModule`; ``meta`` is 0 by default.
    """

    task = "tokens"
    input_shape = (24, 8)

    def __init__(
        self, sequences: int = 900, symbols: int = 6, spread: float = 0.4, test: int | float = 400, **shared: Any
    ) -> None:
        super().__init__(**({"meta": 0, "val": 100} | shared))
        if not 2 <= symbols <= 8 or spread < 0 or sequences < 1:
            found = f"{sequences}, {symbols} and {spread}"
            raise ValueError(f"expected at least 1 sequence, 2 to 8 symbols, and a spread of at least 0, found {found}")
        self.sequences, self.num_classes, self.spread, self.test = sequences, symbols + 1, spread, test

    def load(self) -> Source:
        """Draw the sequences."""
        draw = np.random.default_rng(derive_seed(self._seed, "symbol sequences"))
        steps, size = self.input_shape
        prototypes = np.zeros((self.num_classes, size))
        prototypes[1:] = np.linalg.qr(draw.standard_normal((size, size)))[0][: self.num_classes - 1]
        shown = np.zeros((self.sequences, steps), dtype=np.int64)
        targets = np.full((self.sequences, steps), IGNORED)
        for frames, target in zip(shown, targets, strict=True):
            length, at, last = int(draw.integers(3, 7)), 0, 0
            for place in range(length):
                last = int(draw.choice(np.setdiff1d(np.arange(1, self.num_classes), last)))
                lasts = int(draw.integers(1, 4))
                target[place], frames[at : at + lasts] = last, last
                at += lasts + int(draw.integers(0, 2))
        x = prototypes[shown] + self.spread * draw.standard_normal((self.sequences, steps, size))
        rows = TensorRows(torch.from_numpy(x.astype(np.float32)))
        return Source(rows, rows, targets, test_size=self.test, identity=b"symbol sequences" + x.tobytes())
