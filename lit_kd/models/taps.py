"""Models run with taps on inner layers, once more with other parameters, or cut at a tap for another head."""

import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from lit_kd.models.build import last_linear
from lit_kd.models.subclasses import class_head
from lit_kd.types import CLASS_MAPS, PENULTIMATE, Inputs, Outputs, evaluating, full, read_logits, run_model

STAGES = ("layer1", "layer2", "layer3")
"""The stages of the convolutional networks of `lit_kd.models.networks`, and the first of torchvision's ResNets."""


class Tapped:
    """A model that also gives the features of some layers; its hooks live only while it runs.

    Taps are module paths, as ``"layer3.0"``, or `lit_kd.types.PENULTIMATE`; `lit_kd.types.CLASS_MAPS` before either.
    """

    def __init__(self, model: nn.Module, taps: Sequence[str] = (), channels_last: bool = False) -> None:
        self.model, self.channels_last = model, channels_last
        self.layers = {tap: self._find(tap.removeprefix(CLASS_MAPS)) for tap in taps}

    def _find(self, tap: str) -> nn.Module:
        if tap == PENULTIMATE:
            return last_linear(self.model)[1]
        layers: dict[str, nn.Module] = dict(self.model.named_modules())
        if tap not in layers:
            near = difflib.get_close_matches(tap, layers, n=5) or list(layers)[1:6]
            convolves = any(isinstance(layer, nn.Conv2d) for layer in layers.values())
            cure = "" if convolves else "; without a convolution it has no maps: take FitNet, CRD, PKT or RKD"
            raise ValueError(f"no layer {tap!r} in {type(self.model).__name__}; the nearest are {near}{cure}")
        return layers[tap]

    def listen(self, features: dict[str, Tensor]) -> list[RemovableHandle]:
        """Keep the features of each pass, whoever runs it, until the hooks are removed."""
        heads = {tap: class_head(self.model) for tap in self.layers if tap.startswith(CLASS_MAPS)}
        keep = [(layer, partial(_keep, features, tap, heads.get(tap))) for tap, layer in self.layers.items()]
        return [layer.register_forward_hook(hook, with_kwargs=True) for layer, hook in keep]

    def laid_out(self, x: Inputs) -> Inputs:
        """A batch as the model reads it: images ``(B, C, H, W)`` channels last, where that is wanted."""
        images = self.channels_last and isinstance(x, Tensor) and x.dim() == 4
        return x.contiguous(memory_format=torch.channels_last) if images else x  # type: ignore[union-attr]

    def __call__(self, x: Inputs, call: Callable[..., Any] | None = None) -> Outputs:
        """Run the model on a batch, or ``call`` in its place; a ValueError if it does not take the batch."""
        features: dict[str, Tensor] = {}
        hooks = self.listen(features)
        try:
            out = run_model(call or self.model, self.laid_out(x))
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:  # layers may raise any
            if "memory" in str(error):
                raise
            cure = "give a model made for such inputs, or other data"
            if "more than 1 value per channel" in str(error):  # BatchNorm's
                cure = "let the training loader leave out a batch of one row, drop_last=True, or set another batch_size"
            raise ValueError(
                f"expected {type(self.model).__name__} to take the data's inputs, found that it does not "
                f"({type(error).__name__}: {error}): {cure}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        for tap, feature in features.items():
            if not isinstance(feature, Tensor):
                found = f"{tap!r} of {type(self.model).__name__} gives a {type(feature).__name__}"
                raise ValueError(f"expected taps on layers that give a tensor, found that {found}: tap the layer after")
        return Outputs(read_logits(self.model, out), features)


def _keep(
    features: dict[str, Tensor],
    tap: str,
    head: nn.Linear | None,
    layer: nn.Module,
    inputs: tuple[Any, ...],
    named: dict[str, Any],
    output: Any,
) -> None:
    """A hook: keep a layer's output, or the only input of the last linear layer; class maps where the head fits."""
    found = [*inputs, *named.values()][0] if tap.removeprefix(CLASS_MAPS) == PENULTIMATE else output
    if head is not None and isinstance(found, Tensor) and found.shape[1:2] == (head.in_features,):
        found = F.linear(found.movedim(1, -1), head.weight).movedim(-1, 1)
    features[tap] = found


def unsure_of_head(model: nn.Module) -> bool:
    """Whether `find_head` has something to find."""
    return not hasattr(model, "lit_kd_head") and sum(isinstance(layer, nn.Linear) for layer in model.modules()) > 1


def find_head(model: nn.Module, x: Inputs) -> None:
    """Remember which linear layer's output is the logits of some rows, where it is one."""
    linears = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    with torch.no_grad(), evaluating(model):
        logits, features, _ = Tapped(model, linears)(x)
    equal = [path for path, out in features.items() if out.shape == logits.shape and torch.equal(out, logits)]
    if len(equal) == 1:
        model.lit_kd_head = equal[0]  # type: ignore[assignment]


class Watch:
    """Keeps the features of a network's latest pass, whoever runs it.

    Args:
        tapped: The network with its taps.
    """

    def __init__(self, tapped: Tapped) -> None:
        self._seen: dict[str, Tensor] = {}
        self._hooks = tapped.listen(self._seen)

    def features(self, rows: int) -> dict[str, Tensor]:
        """Those of the latest pass, which must have been over so many rows; they are given once."""
        found = dict(self._seen)
        self._seen.clear()
        if len(found) < len(self._hooks) or any(len(one) != rows for one in found.values()):
            shapes = {tap: tuple(one.shape) for tap, one in found.items()}
            raise ValueError(f"expected that the network has just run on this batch of {rows} rows, found {shapes}")
        return found

    def stop(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()


class Replay:
    """Keeps a network's buffers and the random numbers just before a pass, so that the pass can be repeated."""

    def __init__(self, model: nn.Module, taps: Sequence[str] = ()) -> None:
        self.model = model
        self.taps = tuple(taps)
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self.gpus)]

    @property
    def gpus(self) -> list[torch.device]:
        """The network's GPU, if it is on one."""
        device = next(self.model.parameters()).device
        return [device] if device.type == "cuda" else []

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable ones, detached, in at least float32, as bfloat16 cannot hold a small change of them."""
        return {name: full(p.detach()) for name, p in self.model.named_parameters() if p.requires_grad}

    def __call__(self, x: Inputs, changed: Mapping[str, Tensor] | None = None) -> Outputs:
        """Repeat the pass on copies of the buffers, with the same random numbers, in at least float32.

        `changed` replaces some of the parameters by name; if they are float64, so is the pass.
        """
        changed = dict(changed or {})
        double = any(value.dtype == torch.float64 for value in changed.values())

        def cast(tensor: Tensor) -> Tensor:
            return tensor.double() if double and tensor.is_floating_point() else full(tensor)

        own = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        copies = {name: buffer.clone() for name, buffer in self._buffers.items()}
        values = {name: cast(value) for name, value in (copies | own | changed).items()}

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.model, values, args, kwargs)

        gpus = self.gpus
        with torch.random.fork_rng(gpus), torch.autocast(next(iter(own.values())).device.type, enabled=False):
            torch.set_rng_state(self._random[0])
            for gpu, state in zip(gpus, self._random[1:], strict=True):
                torch.cuda.set_rng_state(state, gpu)
            inputs = {k: cast(v) for k, v in x.items()} if isinstance(x, Mapping) else cast(x)
            return Tapped(self.model, self.taps)(inputs, call)


class Composite(nn.Module):
    """Runs a body up to a tapped layer, projects the features and classifies them with another network's head.

    Args:
        body: The network; `build` freezes its own last linear layer.
        tap: The layer, see `Tapped`; it gives vectors (d,) or maps (c, h, w) per sample.
    """

    projector: nn.Sequential
    head: nn.Linear

    def __init__(self, body: nn.Module, tap: str) -> None:
        super().__init__()
        self.body = body
        self.tap = tap
        self._tapped = Tapped(body, (tap,))
        self.spec: dict[str, Any] = {}
        """What `rebuild` needs, as plain values; empty until the student is built."""

    def build(
        self, student_features: Sequence[int], teacher_features: Sequence[int], head: nn.Linear | Sequence[int]
    ) -> None:
        """Make the projector and a frozen copy of the head, a layer or its number of inputs and outputs.

        Maps go through three convolutions with BatchNorm and ReLU [code], pooled first if larger than the teacher's;
        vectors through two linear layers with a ReLU between them [ours].
        """
        given, wanted = tuple(student_features), tuple(teacher_features)
        head = copy.deepcopy(head) if isinstance(head, nn.Linear) else nn.Linear(head[0], head[1])
        if len(given) != len(wanted) or len(given) not in (1, 3) or head.in_features != wanted[0]:
            raise ValueError(
                "expected features of student and teacher that are both (d,) or both (c, h, w), and a head for the "
                f"teacher's; found {given} and {wanted}, and a head of {head.in_features} inputs"
            )
        ends = [head.in_features, head.out_features]
        self.spec = {"tap": self.tap, "student_features": [*given], "teacher_features": [*wanted], "head": ends}
        middle = max(1, wanted[0] // 2)
        layers: list[nn.Module] = []
        if len(given) == 3:
            size = min(given[1], wanted[1]), min(given[2], wanted[2])
            layers += [nn.AdaptiveAvgPool2d(size)] if size != given[1:] else []
            layers += [*_conv(given[0], middle, 1), *_conv(middle, middle, 3), *_conv(middle, wanted[0], 1)]
        else:
            # no last ReLU, which could not reach negative features
            layers += [nn.Linear(given[0], wanted[0]), nn.ReLU(), nn.Linear(wanted[0], wanted[0])]
        self.projector = nn.Sequential(*layers)
        self.head = head.requires_grad_(False).train()  # after the projector: it is the last linear layer
        last_linear(self.body)[1].requires_grad_(False)  # nothing reads its outputs

    def rebuild(self, spec: Mapping[str, Any]) -> None:
        """Build from another one's spec."""
        self.build(spec["student_features"], spec["teacher_features"], spec["head"])

    def forward(self, *x: Tensor, **named: Tensor) -> Tensor:
        """The logits ``(B, K)`` for one tensor, or for a mapping that is passed as keywords."""
        if not self.spec:
            raise ValueError("expected a student whose projector is built, found none: train it, or load a checkpoint")
        features: Tensor = self.projector(self._tapped(x[0] if x else named).features[self.tap])
        logits: Tensor = self.head(features.mean((2, 3)) if features.dim() == 4 else features)
        return logits


def _conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
