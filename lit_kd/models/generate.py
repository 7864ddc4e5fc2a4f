"""Sequences of tokens: labels aligned with their inputs, and sampling from networks.

A row of ids ``(T,)`` is a prompt, a response, and behind the response's end token padding. A network that reads tokens
up to t gives at t the logits of token ``t + 1``; so the label at t is token ``t + 1``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_kd.types import IGNORED, Inputs

NextToken = Callable[[Inputs, Tensor], Tensor]
"""From inputs up to some token and uniform numbers, ``(B, 2)``, to the next token, ``(B,)``."""


def next_tokens(ids: Tensor, response: Tensor, end: int) -> Tensor:
    """The labels of sequences, int64 ``(B, T)``: at t token ``t + 1``, where that is of the response.

    All else is `IGNORED`: the prompt, what stands behind the response's first end token, and the last position.

    Args:
        ids: Tokens, int64 ``(B, T)``.
        response: Which of them are of the response, bool ``(B, T)``; behind the end token it may say anything.
        end: The token that ends a response; it is learned, too.

    Examples:
        >>> next_tokens(torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[False, False, True, True, True]]), end=0)
        tensor([[-100,    7,    0, -100, -100]])
    """
    ends = ((ids == end) & response).long()
    kept = response & (ends.cumsum(1) - ends == 0)
    return F.pad(ids.masked_fill(~kept, IGNORED)[:, 1:], (0, 1), value=IGNORED)


def response_of(y: Tensor) -> Tensor:
    """Which tokens are behind the prompt, bool ``(B, T)``, from labels of `next_tokens`; none where all is ignored."""
    return F.pad((y != IGNORED)[:, :-1], (1, 0)).cumsum(1) > 0


def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Draw a token of each row, ``(B,)``, by the inverse of the distribution function.

    Args:
        logits: ``(B, C)``.
        uniform: Numbers in [0, 1), ``(B,)``: the same ones draw the same tokens.
        temperature: T > 0, by which logits are divided.
        top_p: In (0, 1]: draw among the fewest likeliest tokens whose probabilities sum up to at least that.
    """
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    below = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(below >= top_p, 0).cumsum(-1)
    place = torch.searchsorted(kept, uniform.unsqueeze(-1) * kept[:, -1:], right=True)
    last = (probabilities.gt(0) & (below < top_p)).sum(-1, keepdim=True) - 1  # rounding must not lead beyond
    return order.gather(-1, place.minimum(last)).squeeze(-1)


def sampler(logits: Callable[[Inputs], Tensor], temperature: float = 1.0, top_p: float = 1.0) -> NextToken:
    """Draws from a network, a function from inputs to logits ``(B, t, C)``, with the first uniform number."""

    def drawn(x: Inputs, uniform: Tensor) -> Tensor:
        return draw_tokens(logits(x)[:, -1], uniform[:, 0], temperature, top_p)

    return drawn


def ids_of(x: Inputs) -> Tensor:
    """The tokens ``(B, T)`` of a batch: the inputs themselves, or the entry ``input_ids``; else a ValueError."""
    ids = x if isinstance(x, Tensor) else x.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        found = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else sorted(x)
        raise ValueError(f"expected tokens as inputs, integers (B, T), alone or as input_ids, found {found}")
    return ids


def with_ids(x: Inputs, ids: Tensor, written: Tensor) -> Inputs:
    """A batch with other tokens; an ``attention_mask`` attends to all that are ``written``, bool ``(B, T)``."""
    if isinstance(x, Tensor):
        return ids
    mask = {"attention_mask": x["attention_mask"].masked_fill(written, 1)} if "attention_mask" in x else {}
    return {**x, "input_ids": ids, **mask}


def _up_to(x: Inputs, length: int) -> Inputs:
    return x[:, :length] if isinstance(x, Tensor) else {name: part[:, :length] for name, part in x.items()}


@torch.no_grad()
def respond(x: Inputs, y: Tensor, end: int, next_token: NextToken, uniform: Tensor) -> tuple[Inputs, Tensor]:
    """New responses to the prompts of a batch, each as long as the batch's width at most.

    Args:
        x: Inputs, see `ids_of`. Prompts may have any length, and padding may stand before or behind.
        y: Their labels, ``(B, T)``, which say where the prompt ends; a row that is ignored wholly stays as it is.
        end: The token that ends a response, and fills what stands behind it.
        next_token: Such as `sampler` gives.
        uniform: Numbers in [0, 1), ``(B, T, 2)``, two for each token.

    Returns:
        Inputs and labels, as `next_tokens` makes them.
    """
    written = response_of(y)
    ids = ids_of(x).masked_fill(written, end)
    open_rows = written.any(1)
    for t in range(int((~written).sum(1).min()) if open_rows.any() else ids.shape[1], ids.shape[1]):
        tokens = next_token(_up_to(with_ids(x, ids, written), t), uniform[:, t])
        ids[:, t] = tokens.where(open_rows & written[:, t], ids[:, t])
        open_rows &= ~(written[:, t] & (ids[:, t] == end))
        if not open_rows.any():
            break
    return with_ids(x, ids, written), next_tokens(ids, written, end)
