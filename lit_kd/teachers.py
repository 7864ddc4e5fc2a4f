"""Frozen teachers: none, one or many."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lit_kd.features import Outputs, Tapped


class Teachers:
    """Teachers in eval mode, without gradients.

    Deliberately not a `torch.nn.Module`: what holds it has no teacher among its parameters, so none reaches an
    optimizer, a checkpoint, a gradient synchronisation or a switch to training mode.

    Args:
        models: The teachers; they are put into eval mode and frozen.
        taps: Layers whose features are wanted, see `lit_kd.features.Tapped`.
    """

    def __init__(self, models: Sequence[nn.Module] = (), taps: Sequence[str] = ()) -> None:
        self.models = [model.eval().requires_grad_(False) for model in models]
        self._tapped = [Tapped(model, taps) for model in self.models]

    def __len__(self) -> int:
        return len(self.models)

    def __call__(self, x: Tensor | Mapping[str, Tensor]) -> list[Outputs]:
        """The outputs of every teacher for a batch, without gradients."""
        if not self._tapped:
            return []
        # not inference_mode: its tensors may not take part in a loss that is differentiated
        with torch.no_grad():
            return [tapped(x) for tapped in self._tapped]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move every parameter and buffer, as `torch.nn.Module._apply` does: device and dtype follow the student's."""
        for model in self.models:
            model._apply(fn)  # type: ignore[no-untyped-call]
