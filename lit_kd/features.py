"""What a model gives: logits, and the features of inner layers on request."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_kd.models import last_linear

PENULTIMATE = "penultimate"
"""The tap on what the last linear layer reads."""


class Outputs(NamedTuple):
    """What a model gives for a batch.

    Attributes:
        logits: ``(B, C)``, unnormalised.
        features: Features by tap name: the output of the layer at that module path, or, for `PENULTIMATE`, the
            input of the last linear layer.
    """

    logits: Tensor
    features: Mapping[str, Tensor]


def logits_of(model: Callable[..., Any], x: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Call a model with a tensor, or with a mapping as keyword arguments, and read its logits.

    Args:
        model: Returns logits ``(B, C)``, or an object with them as ``.logits``.
        x: The batch.

    Returns:
        Logits, ``(B, C)``.

    Raises:
        TypeError: If the model returns something else.
    """
    return _logits(model, _run(model, x))


def _run(model: Callable[..., Any], x: Tensor | Mapping[str, Tensor]) -> Any:
    return model(**x) if isinstance(x, Mapping) else model(x)


def _logits(model: Callable[..., Any], out: Any) -> Tensor:
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"expected {type(model).__name__} to return logits, a tensor, or an object with .logits; "
            f"found {type(out).__name__}. Wrap the model in a module that returns its logits."
        )
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """For a while a model is in evaluation mode; then each of its parts is in its own mode again."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


class Tapped:
    """A model together with the layers whose features are wanted.

    Hooks live only while the model runs, so nothing is left behind on it: it can be pickled and shared.

    Args:
        model: The model.
        taps: Module paths (``"layer3.0"``) or `PENULTIMATE`.

    Raises:
        ValueError: If the model has no such layer.
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

    def __call__(self, x: Tensor | Mapping[str, Tensor]) -> Outputs:
        """Run the model on a batch.

        Raises:
            ValueError: If the model does not take it.
        """
        features: dict[str, Tensor] = {}
        hooks = [_attach(layer, tap, features) for tap, layer in self.layers.items()]
        try:
            out = _run(self.model, x)
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
        ) as error:  # whatever layers say of a wrong shape
            from lightning.pytorch.utilities.memory import is_oom_error  # heavy, and export needs none of it

            if is_oom_error(error):  # the CPU allocator's is a bare RuntimeError
                raise
            raise ValueError(
                f"expected {type(self.model).__name__} to take inputs of shape {_shape(x)}, found that it does not "
                f"({type(error).__name__}: {error}). Give a model made for such inputs, or other data"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        return Outputs(_logits(self.model, out), features)


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
