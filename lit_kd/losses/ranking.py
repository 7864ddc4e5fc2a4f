"""Rankings of items: pairs of which one should score higher, and groups of items by popularity."""

import torch
import torch.nn.functional as F
from torch import Tensor


def popularity_groups(counts: Tensor, groups: int) -> Tensor:
    """The group of each item, ``(I,)``, 0 for the most popular: each has about the same number of interactions.

    An item belongs where the middle of its interactions falls, if those of all items are laid side by side by
    popularity. A ValueError if a group would be empty. Counts are interactions of each item, ``(I,)``.

    Examples:
        >>> popularity_groups(torch.tensor([1, 6, 2, 3]), 2).tolist()
        [1, 0, 1, 1]
    """
    order = counts.argsort(descending=True, stable=True)
    sorted_counts = counts[order].double()
    middle = sorted_counts.cumsum(0) - sorted_counts / 2
    found = torch.empty_like(order)
    found[order] = (groups * middle / sorted_counts.sum()).long().clamp(max=groups - 1)
    if not 1 <= groups <= len(counts) or not counts.any() or len(set(found.tolist())) < groups:
        raise ValueError(
            f"expected interactions that can be divided into {groups} groups of items, found {len(counts)} items and "
            f"{int(counts.sum())} interactions, {int(counts.max())} with one item: lower groups"
        )
    return found


def draw_pairs(scores: Tensor, among: Tensor, pairs: int, sharpness: float = 20.0) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of two items for each row, the one of the higher score first; and whether there are two, bool.

    The items of a pair are drawn one after the other, with probabilities proportional to ``exp(-rank / sharpness)``
    of an item's place in the row's ranking [code], and never the same twice [ours].

    Args:
        scores: Of items, ``(B, I)``.
        among: Which may be drawn, bool ``(B, I)``.
        pairs: P.
        sharpness: In places of the ranking, above 0.

    Returns:
        Positions of the first and of the second items, ``(B, P)`` each, and which pairs are there, ``(B, P)``.
    """
    order = scores.masked_fill(~among, -torch.inf).argsort(dim=1, descending=True)
    ranks = order.argsort(dim=1)
    logits = (-ranks / sharpness).masked_fill(~among, -torch.inf).unsqueeze(1)
    # the largest two of logits with Gumbel noise are such a draw
    noise = -torch.empty(len(scores), pairs, scores.shape[1], device=scores.device).exponential_().log()
    found = (logits + noise).topk(2, dim=2)
    two = found.indices
    place = ranks.unsqueeze(1).expand(-1, pairs, -1).gather(2, two)
    first, second = two.gather(2, place.argsort(dim=2)).unbind(2)
    return first, second, found.values.isfinite().all(2)


def pairwise_loss(scores: Tensor, first: Tensor, second: Tensor, there: Tensor) -> Tensor:
    """``-log sigmoid(s_first - s_second)``, the mean over a row's pairs that are there, ``(B,)``; 0 without any."""
    losses = F.softplus(scores.gather(1, second) - scores.gather(1, first)) * there
    return losses.sum(1) / there.sum(1).clamp(min=1)
