"""A model together with the inner layers whose features are wanted."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_kd.models.build import last_linear
from lit_kd.types import PENULTIMATE, Inputs, Outputs, read_logits, run_model


class Tapped:
    """A model that also gives the features of some layers; its hooks live only while it runs.

    Taps are module paths, as ``"layer3.0"``, or `lit_kd.types.PENULTIMATE`.
    """

    def __init__(self, model: nn.Module, taps: Sequence[str] = ()) -> None:
        self.model = model
        self.layers = {tap: self._find(tap) for tap in taps}

    def _find(self, tap: str) -> nn.Module:
        if tap == PENULTIMATE:
            return last_linear(self.model)[1]
        layers: dict[str, nn.Module] = dict(self.model.named_modules())
        if tap not in layers:
            near = difflib.get_close_matches(tap, layers, n=5) or list(layers)[1:6]
            raise ValueError(f"no layer {tap!r} in {type(self.model).__name__}; the nearest are {near}")
        return layers[tap]

    def __call__(self, x: Inputs, call: Callable[..., Any] | None = None) -> Outputs:
        """Run the model on a batch, or ``call`` in its place; a ValueError if it does not take the batch."""
        features: dict[str, Tensor] = {}
        hooks = [_attach(layer, tap, features) for tap, layer in self.layers.items()]
        try:
            out = run_model(call or self.model, x)
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:  # layers may raise any
            if "memory" in str(error):
                raise
            raise ValueError(
                f"expected {type(self.model).__name__} to take inputs of shape {_shape(x)}, found that it does not "
                f"({type(error).__name__}: {error}): give a model made for such inputs, or other data"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        return Outputs(read_logits(self.model, out), features)


def _shape(x: Any) -> str:
    if isinstance(x, Mapping):
        return ", ".join(f"{name}: {_shape(part)}" for name, part in x.items()) or "{}"
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def _attach(layer: nn.Module, tap: str, features: dict[str, Tensor]) -> RemovableHandle:
    if tap == PENULTIMATE:

        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            features[tap] = inputs[0] if inputs else named["input"]

        return layer.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        features[tap] = output

    return layer.register_forward_hook(after)
