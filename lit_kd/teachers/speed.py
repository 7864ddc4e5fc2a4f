"""Faster ways to run a network: the same numbers up to rounding, and the network itself stays as it is."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from inspect import signature
from typing import Literal, NamedTuple

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lit_kd.models.taps import Tapped
from lit_kd.types import PENULTIMATE, Outputs

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
KNOWN = {"torch", "torchvision", "timm", "lit_kd"}
"""Packages whose networks do not depend on the layout of their tensors."""
ISOLATED = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
"""So that a network's compiled versions do not count towards the limit of others."""


class Speed(NamedTuple):
    """How networks are run.

    Attributes:
        channels_last: Whether 2d convolutions work on that layout. ``None``: in teachers that give the same outputs so,
            and in students all of whose layers are from the `KNOWN` packages; but not where layers are tapped whose
            features have that layout too.
        compile: Whether student and teachers are compiled; tapped layers and what holds them are left out.
        teacher_precision: ``"bf16"``: teachers run under autocast to bfloat16, and give float32.
    """

    channels_last: bool | None = None
    compile: bool = False
    teacher_precision: Literal["bf16"] | None = None


USUAL = Speed()


def reads_channels_last(student: nn.Module, taps: Sequence[str], speed: Speed) -> bool:
    """Whether a student is given its images channels last: its convolutions then work so, and its weights stay.

    Args:
        student: The student.
        taps: Layers whose features are wanted: their readers may depend on the layout.
        speed: Where the layout is left open, it is channels last for networks of the `KNOWN` packages.
    """
    if speed.channels_last is not None:
        return speed.channels_last
    return set(taps) <= {PENULTIMATE} and all(_is_known(m) for m in student.modules())


def _is_known(layer: nn.Module) -> bool:
    made_of_others = isinstance(layer, (fx.GraphModule, torch.jit.ScriptModule))
    return type(layer).__module__.split(".")[0] in KNOWN and not made_of_others


def channels_last(x: Tensor | Mapping[str, Tensor]) -> Tensor | Mapping[str, Tensor]:
    """Images ``(B, C, H, W)`` in that layout; other inputs as they are."""
    if isinstance(x, Tensor) and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def compile_in_place(student: nn.Module, taps: Sequence[str]) -> None:
    """Compile a student: its keys and values stay."""
    _compile(student, set(Tapped(student, taps).layers.values()))


def _compile(model: nn.Module, tapped: set[nn.Module]) -> None:
    """Compile a network in place, but leave out what holds a tapped layer: compiled code may not know of its hooks."""
    if not tapped.isdisjoint(model.modules()) or isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        for part in model.children():
            _compile(part, tapped)
    elif model._compiled_call_impl is None:
        model.compile(**ISOLATED)


class Frozen:
    """A network in eval mode that is only read, run as fast as it goes.

    At its first batch a second network is made that shares the first one's tensors, but has BatchNorm folded into the
    convolution before it and convolutions laid out channels last. It takes the first one's place if it gives the same
    outputs; else, where it cannot be made, or where the network takes notes while it runs, that runs as it is. Changed
    weights or layers are noticed; but what is written through ``.data`` only when `forget` is called, which a distiller
    does at the start of each epoch.

    Args:
        model: The network, without gradients.
        taps: Layers whose features are wanted, see `lit_kd.models.taps.Tapped`.
        speed: How it is run.
    """

    def __init__(self, model: nn.Module, taps: Sequence[str], speed: Speed) -> None:
        self._plain = Tapped(model, taps)
        self._taps = tuple(taps)
        self.speed = speed
        self.forget()

    def forget(self) -> None:
        """The network has changed, or is somewhere else."""
        self._run: Tapped | None = None
        self._state: list[tuple[int, ...]] = []

    def __call__(self, x: Tensor | Mapping[str, Tensor]) -> Outputs:
        """The outputs for a batch; with ``teacher_precision`` calculated in that, and given in float32."""
        low = self.speed.teacher_precision == "bf16"
        with torch.no_grad(), _bf16(x) if low else nullcontext():
            if self._run is None or (self._state and _state(self._plain.model) != self._state):
                self._run = self._fastest(x)
            outputs = self._run(x)
        if not low:
            return outputs
        features = {tap: f.float() if isinstance(f, Tensor) else f for tap, f in outputs.features.items()}
        return Outputs(outputs.logits.float(), features)

    def _fastest(self, x: Tensor | Mapping[str, Tensor]) -> Tapped:
        self.forget()
        model, run = self._plain.model, self._plain
        last = self.speed.channels_last
        if last is None:
            last = set(self._taps) <= {PENULTIMATE}
        try:
            fast = folded(model, self._taps, last)
            if fast is not None and self._same(fast, x):
                run, self._state = Tapped(fast, self._taps), _state(model)
        except Exception:  # whatever a foreign network does: it runs as it is, and then says what is wrong
            pass
        if self.speed.compile and not isinstance(model, torch.jit.ScriptModule):
            run = Tapped(_twin(model) if run is self._plain else run.model, self._taps)
            _compile(run.model, set(run.layers.values()))
        return run

    def _same(self, fast: nn.Module, x: Tensor | Mapping[str, Tensor]) -> bool:
        """Whether it gives the same outputs, and none of the network's layers keeps anything of a batch."""
        model = self._plain.model
        with isolate_rng():  # extra passes, which a resumed run takes at another time
            held, state = [(m, dict(vars(m))) for m in model.modules()], _state(model)
            expected = self._plain(x)
            notes = any(vars(m).get(k) is not v for m, kept in held for k, v in kept.items())
            notes = notes or any(len(vars(m)) != len(kept) for m, kept in held) or _state(model) != state
            return not notes and _agree(Tapped(fast, self._taps)(x), expected)


def _state(model: nn.Module) -> list[tuple[int, ...]]:
    """Changes where a layer or tensor is replaced, or written to other than through ``.data``."""
    tensors = ((m, t) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()))
    return [(id(m), id(t), t.data_ptr(), t._version) if t is not None else (id(m),) for m, t in tensors]


def _bf16(x: Tensor | Mapping[str, Tensor]) -> torch.autocast:
    first = x if isinstance(x, Tensor) else next(iter(x.values()))
    return torch.autocast(first.device.type, torch.bfloat16)


def folded(model: nn.Module, taps: Iterable[str] = (), channels_last: bool = True) -> nn.Module | None:
    """A network for inference that shares all other tensors with a given one.

    Args:
        model: In eval mode.
        taps: Layers whose outputs must stay as they are: no convolution is folded whose own output they give.
        channels_last: Whether the weights of 2d convolutions are laid out channels last.

    Returns:
        The network; ``None`` where there is nothing to fold or lay out.
    """
    twin, changed = _twin(model), False
    for conv_path, norm_path in _pairs(model, tuple(taps)):
        conv, norm = model.get_submodule(conv_path), model.get_submodule(norm_path)
        assert isinstance(conv, CONVOLUTIONS)
        assert isinstance(norm, BATCH_NORMS)
        mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        fused = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias)
        frozen = [nn.Parameter(tensor, requires_grad=False) for tensor in fused]
        twin.get_submodule(conv_path)._parameters = dict(zip(("weight", "bias"), frozen, strict=True))
        parent, _, name = norm_path.rpartition(".")
        twin.get_submodule(parent)._modules[name] = nn.Identity().eval()
        changed = True
    for layer in twin.modules():
        if channels_last and type(layer) is nn.Conv2d:
            laid_out = layer.weight.contiguous(memory_format=torch.channels_last)
            layer._parameters["weight"] = nn.Parameter(laid_out, requires_grad=False)
            changed = True
    return twin if changed else None


def _twin(model: nn.Module, memo: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A network of its own that shares all tensors, and whatever else modules hold."""
    memo = {} if memo is None else memo
    if model not in memo:
        twin = memo[model] = model.__class__.__new__(model.__class__)
        twin.__dict__ = model.__dict__.copy()
        for name in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[name] = model.__dict__[name].copy()
        twin._modules = {name: m if m is None else _twin(m, memo) for name, m in model._modules.items()}
    return memo[model]


def _pairs(model: nn.Module, taps: tuple[str, ...]) -> list[tuple[str, str]]:
    """Paths of convolutions and of the BatchNorm that alone reads each of them."""
    modules = dict(model.named_modules())
    if not any(type(m) in BATCH_NORMS for m in modules.values()):
        return []
    try:
        with warnings.catch_warnings(action="ignore"), isolate_rng():
            graph = fx.Tracer().trace(_twin(model))  # whose layers may keep what they are given
    except Exception:  # control flow that depends on the data, inputs that are no tensors, ...
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]  # weights that are used in other ways

    def plain(path: str, types: tuple[type[nn.Module], ...]) -> bool:
        layer = modules[path]
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        return type(layer) in types and calls[path] == 1 and not hooked and not any(_inside(r, path) for r in read)

    pairs = []
    for node in graph.nodes:
        conv = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(conv, fx.Node) or conv.op != "call_module" or len(conv.users) != 1:
            continue
        first, second = str(conv.target), str(node.target)
        norm = modules[second]
        if not plain(first, CONVOLUTIONS) or not plain(second, BATCH_NORMS) or norm.running_mean is None:
            continue
        if not any(_inside(first, tap) and not _inside(second, tap) for tap in taps):
            pairs.append((first, second))
    return pairs


def _inside(path: str, layer: str) -> bool:
    return f"{path}.".startswith(f"{layer}.")


def _agree(found: Outputs, expected: Outputs) -> bool:
    def close(a: Tensor, b: Tensor) -> bool:
        limit = 1e-2 if b.dtype in (torch.float32, torch.float64) else 0.1  # GPUs round convolutions in float32 too
        return a.shape == b.shape and bool((a.float() - b.float()).norm() <= limit * b.float().norm())

    pairs = [(found.features[tap], kept) for tap, kept in expected.features.items() if isinstance(kept, Tensor)]
    return all(close(a, b) for a, b in [(found.logits, expected.logits), *pairs])
