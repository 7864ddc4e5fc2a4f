"""The networks of the small worlds: matrix factorisation, and a recurrent one that may read its target."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MatrixFactorisation(nn.Module):
    """Scores of all items for a user: the product of their features, ``(B, I)``, and minus infinity for items seen.

    Args:
        users: U.
        num_classes: I, the number of items.
        features: Of each user and item, at least 1.
    """

    def __init__(self, users: int, num_classes: int, features: int = 10) -> None:
        super().__init__()
        if min(users, num_classes, features) < 1:
            raise ValueError(f"expected at least 1 user, item and feature, found {users}, {num_classes}, {features}")
        self.users, self.items = nn.Embedding(users, features), nn.Embedding(num_classes, features)
        for part in (self.users, self.items):
            nn.init.normal_(part.weight, std=0.1)

    def forward(self, user: Tensor, seen: Tensor) -> Tensor:
        """From the users' numbers, ``(B,)``, and which items each is known to have, bool ``(B, I)``."""
        scores: Tensor = self.users(user) @ self.items.weight.T
        return scores.masked_fill(seen, -torch.inf)


class FrameNet(nn.Module):
    """A GRU in both directions over frames: logits ``(B, T, C)``.

    Args:
        features: Of each frame.
        num_classes: C, of which class 0 is CTC's blank.
        hidden: Width of the GRU in each direction.
        oracle: Whether it also reads how often the target has each symbol. It does not read their order [ours]: so
            what it says of a frame must come from the frames, and it cannot just copy its target.
    """

    def __init__(self, features: int, num_classes: int, hidden: int = 16, oracle: bool = False) -> None:
        super().__init__()
        self.num_classes, self.oracle = num_classes, oracle
        self.gru = nn.GRU(features + oracle * num_classes, hidden, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * hidden, num_classes)

    def forward(self, frames: Tensor, target: Tensor | None = None) -> Tensor:
        """From frames ``(B, T, F)`` and, for an oracle, targets ``(B, L)``, negative behind their end."""
        if self.oracle:
            if target is None:
                raise ValueError("expected frames and targets, as the network is an oracle, found frames alone")
            known = F.one_hot(target.clamp(min=0), self.num_classes) * (target >= 0).unsqueeze(-1)
            counts = known.sum(1, keepdim=True).expand(-1, frames.shape[1], -1)
            frames = torch.cat([frames, counts.to(frames)], dim=-1)
        logits: Tensor = self.fc(self.gru(frames)[0])
        return logits
