"""States of gymnasium's CartPole, labelled by a policy that balances it, and what a policy earns there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_kd.data.base import DataModule
from lit_kd.data.partition import Source
from lit_kd.data.rows import TensorRows
from lit_kd.data.seeds import derive_seed

SCALES = (0.5, 0.5, 0.05, 0.5)
"""What position (m), speed (m/s), angle (rad) and its speed (rad/s) are divided by: networks read numbers near 1."""


class BalancingPolicy(nn.Module):
    """A policy by hand: logits ``(B, 2)`` of pushing left and right, from scaled states ``(B, 4)``.

    It pushes to the side of ``angle + angle's speed`` and, a little, of position and speed, which are scaled. The sign
    is the action; the size says how sure it is.
    """

    weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor([0.1, 0.4, 1.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        m = 2 * x @ self.weights
        return torch.stack([-m, m], dim=1)


def make_env() -> Any:
    """CartPole, which ends after 500 steps; a ValueError without gymnasium."""
    try:
        import gymnasium
    except ImportError as error:
        raise ValueError("expected the package gymnasium, found none: pip install gymnasium") from error
    return gymnasium.make("CartPole-v1")


def scaled(state: Any) -> Tensor:
    """A state as networks read it, ``(1, 4)``."""
    return torch.tensor(np.asarray(state) / SCALES, dtype=torch.float32).unsqueeze(0)


@torch.no_grad()
def returns(policy: Callable[[Tensor], Tensor], noise: float = 0.0, episodes: int = 20, seed: int = 0) -> list[float]:
    """The return of each episode, from 1 to 500 steps upright, if the policy sees scaled states with noise.

    Args:
        policy: From states ``(1, 4)`` to logits ``(1, 2)``, in evaluation mode; the more probable action is taken.
        noise: Of each of the four numbers in each step, uniform in ``[-noise, noise]``, at least 0.
        episodes: How many, at least 1.
        seed: Of starts and noise.
    """
    if noise < 0 or episodes < 1:
        raise ValueError(f"expected noise of at least 0 and at least 1 episode, found {noise} and {episodes}")
    env, found = make_env(), []
    draw = torch.Generator().manual_seed(derive_seed(seed, "observation noise"))
    for episode in range(episodes):
        state, _ = env.reset(seed=derive_seed(seed, f"episode {episode}"))
        total, over = 0.0, False
        while not over:
            seen = scaled(state) + noise * (2 * torch.rand(1, 4, generator=draw) - 1)
            state, reward, fell, ended, _ = env.step(int(policy(seen).argmax()))
            total, over = total + float(reward), fell or ended
        found.append(total)
    return found


class CartPoleDataModule(DataModule):
    """States that `BalancingPolicy` comes through, and its actions: 4 scaled numbers, 2 classes. Needs gymnasium.

    Args:
        states: How many, at least 1.
        explore: With which probability, in [0, 1], a random action is taken in place of the policy's.
        test: Size of the test split, a fraction or a count.
        **shared: See `DataModule`; ``meta`` is 0 by default.
    """

    num_classes = 2
    input_shape = (4,)

    def __init__(self, states: int = 1000, explore: float = 0.3, test: int | float = 0.2, **shared: Any) -> None:
        super().__init__(**({"meta": 0} | shared))
        if states < 1 or not 0 <= explore <= 1:
            raise ValueError(f"expected at least 1 state, and explore in [0, 1], found {states} and {explore}")
        self.states, self.explore, self.test, self.class_names = states, explore, test, ["left", "right"]

    def load(self) -> Source:
        """Let the policy act."""
        env, policy, rows = make_env(), BalancingPolicy(), list[Tensor]()
        draw = np.random.default_rng(derive_seed(self._seed, "exploration"))
        over = True
        while len(rows) < self.states:
            if over:
                state, _ = env.reset(seed=derive_seed(self._seed, f"states {len(rows)}"))
            rows.append(scaled(state))
            action = int(policy(rows[-1]).argmax())
            state, _, fell, ended, _ = env.step(int(draw.integers(2)) if draw.random() < self.explore else action)
            over = fell or ended
        x = torch.cat(rows)
        y = policy(x).argmax(1).numpy()
        return Source(TensorRows(x), TensorRows(x), y, test_size=self.test, identity=b"cartpole" + x.numpy().tobytes())
