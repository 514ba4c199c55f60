"""Follow the calls of spiking neurons in a forward pass, whatever network they are in.

`Recording` notes them. `Averaging` gives them other derivatives. Both count calls and poolings in the order in which
the network runs, so that what one has noted fits the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hessian_tools.engine.nodes import valued
from hessian_tools.engine.rewriting import RESHAPES
from ikun.nodes.autograd import Slopes, neurons
from ikun.nodes.passes import ScanSpec, encode_spec, pass_of

POOLS = (F.max_pool2d, torch.max_pool2d)
PASSING = RESHAPES | {Tensor.__getitem__, Tensor.contiguous, Tensor.squeeze, Tensor.unsqueeze, F.dropout}
Windows = tuple[tuple[int, int], ...]  # size, stride, padding and dilation of pooling, each (height, width)
PLAIN = ((2, 2), (2, 2), (0, 0), (1, 1))


@dataclass(frozen=True)
class Readout:
    """A linear map that neurons read.

    Attributes:
        inputs: Its inputs [..., F].
        weight: Its weights [K, F].
        spikes: Whether the inputs are spikes of other neurons, at most pooled and reshaped.
    """

    inputs: Tensor
    weight: Tensor
    spikes: bool


@dataclass(frozen=True)
class NeuronCall:
    """A call of `neurons`.

    Attributes:
        x: Input currents [T or 1, N, ...].
        spec: The parameters of the neurons, without pooling.
        v0: Potential before the first step, or None.
        gain: A learned gain, or None.
        jet: The function z -> (f'(z), f''(z)), or None for the surrogate of `spec`.
        y: Spikes before pooling [T, N, ...]. Empty where only derivatives are followed.
        z: h - threshold [T, M]. Also empty then.
        before: The earlier call whose last potential is v0; None if there is none.
        place: The module that makes the call; empty if it is not known.
        readout: The linear map that x comes from, at most reshaped; None for anything else.
        behind: Whether x depends on spikes.
        later: How the network resets the neurons at the next step, if they hand on h itself: "subtract", "zero" or
            "none"; empty if they reset themselves.
    """

    x: Tensor
    spec: ScanSpec
    v0: Tensor | None
    gain: Tensor | None
    jet: Slopes | None
    y: Tensor
    z: Tensor
    before: int | None
    place: str
    readout: Readout | None
    behind: bool
    later: str

    @property
    def steps(self) -> int:
        """Number of time steps."""
        return self.spec.steps

    def slope(self) -> Tensor:
        """Return f'(h - threshold) [T, M]."""
        found: Tensor = (pass_of("slopes")(self.z, encode_spec(self.spec)) if self.jet is None else self.jet(self.z))[0]
        return found


class Following(TorchFunctionMode):
    """Base of the modes: knows which tensors are spikes, and which come from a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[NeuronCall] = []
        self.pools = 0
        self.place = self.reset = ""
        self._from: dict[int, bool | Readout] = {}  # True: spikes
        self._ends: dict[int, int] = {}
        self._alive: list[Any] = []  # ids are of living tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is neurons:
            return self._neurons(*args, **kwargs)
        if func in POOLS and (windows := _windows(*args, **kwargs)) and self._source(args[0]) is True:
            return self._note(_mark(self.pooled(func, args[0], windows)), True)
        y = func(*args, **kwargs)
        if any(_behind(part) for part in [*args, *kwargs.values()]):
            _mark(y)
        if func is F.linear:
            inputs, weight = args[:2] if len(args) > 1 else (args[0], kwargs["weight"])
            return self._note(y, Readout(inputs, weight, self._source(inputs) is True))
        if func is F.dropout and kwargs.get("training", args[2] if len(args) > 2 else True):
            return y
        if func in PASSING and isinstance(y, Tensor) and (source := self._source(args[0])) is not None:
            return self._note(y, source)
        if func is torch.stack and all(self._source(part) is True for part in args[0]):
            return self._note(y, True)
        return y

    def _source(self, t: Any) -> bool | Readout | None:
        return self._from.get(id(t))

    def _note(self, t: Tensor, source: bool | Readout) -> Tensor:
        self._from[id(t)] = source
        self._alive.append(t)
        return t

    def _neurons(
        self, x: Tensor, spec: ScanSpec, v0: Any = None, gain: Any = None, jet: Any = None, values: Any = None
    ) -> Any:
        flat = replace(spec, height=0, width=0, steps=spec.steps if spec.static else len(x))
        y, z, end = self.fired(x, flat, v0, gain, values)
        readout = self._source(x)
        later = self.reset if values is not None and self._hands_on(values, flat) else ""
        self.calls.append(
            NeuronCall(
                x, flat, v0, gain, jet, y, z, self._ends.get(id(v0)), self.place,
                readout if isinstance(readout, Readout) else None, _behind(x), later,
            )
        )  # fmt: skip
        self._ends[id(end)] = len(self.calls) - 1
        self._alive.append(end)
        self._note(y, True)
        _mark((y, end))
        if spec.height:
            planes = y.reshape(-1, 1, spec.height, spec.width)
            pooled = self.pooled(F.max_pool2d, planes, PLAIN)
            y = self._note(_mark(pooled.reshape(*y.shape[:-2], *pooled.shape[-2:])), True)
        return y, end

    def _hands_on(self, values: Any, spec: ScanSpec) -> bool:
        return False

    def fired(self, x: Tensor, spec: ScanSpec, v0: Any, gain: Any, values: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return spikes [T, N, ...], h - threshold [T, M] and the last potential [N, ...]."""
        raise NotImplementedError

    def pooled(self, pool: Any, y: Tensor, windows: Windows) -> Tensor:
        """Return pooled spikes for spikes y [B, C, H, W]."""
        raise NotImplementedError


class Recording(Following):
    """Notes the calls of neurons, and where a pooled spike is alone in its window.

    Attributes:
        calls: The calls.
        alone: For every max-pooling of spikes, where no other entry of the window fires: 0 or 1, with the shape of the
            spikes, or [B, C, entries, windows] if windows overlap.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alone: list[Tensor] = []

    def fired(self, x: Tensor, spec: ScanSpec, v0: Any, gain: Any, values: Any) -> tuple[Tensor, Tensor, Tensor]:
        if values is not None:
            y, z, v = values
            return y.clone(), z.reshape(len(z), -1), v[-1].clone()
        start = None if v0 is None else v0.reshape(1, -1)
        y, z, end, _, _ = pass_of("spikes")(x.reshape(len(x), -1), start, gain, encode_spec(spec))
        return y.view(spec.steps, *x.shape[1:]), z, end.view(x.shape[1:]) if spec.ends else end

    def _hands_on(self, values: Any, spec: ScanSpec) -> bool:
        _, z, v = values
        return bool((v.reshape_as(z) - z - spec.threshold).abs().max() <= 1e-3 * max(1.0, abs(spec.threshold)))

    def pooled(self, pool: Any, y: Tensor, windows: Windows) -> Tensor:
        self.alone.append(_alone(y, windows))
        self.pools += 1
        found: Tensor = pool(y, *windows)
        return found


class Averaging(Following):
    """Gives the neurons other derivatives.

    Args:
        slopes: Number of a call -> f', f'', dv/dh and d2v/dh2 [T, M]; f' and dv/dh only if no second derivatives are
            needed.
        share: Number of a pooling -> the share of every entry's derivative that passes, as in `Recording.alone`.
    """

    def __init__(self, slopes: Callable[[int], tuple[Tensor, ...]], share: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.slopes, self.share = slopes, share

    def fired(self, x: Tensor, spec: ScanSpec, v0: Any, gain: Any, values: Any) -> tuple[Tensor, Tensor, Tensor]:
        f1, *others = self.slopes(len(self.calls))
        jet = (f1, *others) if len(others) > 1 else (f1, torch.zeros_like(f1), *others)
        y, end = neurons(x, spec, v0, gain, lambda z: jet, values)
        return y, x.new_empty(0), end

    def pooled(self, pool: Any, y: Tensor, windows: Windows) -> Tensor:
        share = self.share(self.pools)
        self.pools += 1
        if windows == PLAIN:
            equal = 4 * F.avg_pool2d(share * y, 2)
            return valued(lambda: _maximum(y, windows), equal)
        entries = _entries(y, windows)
        value = _maximum(y.detach(), windows)
        return valued(lambda: value, (entries * share).sum(2).view_as(value))


def _behind(value: Any) -> bool:
    """Whether a tensor, or one of several, depends on spikes."""
    if isinstance(value, tuple | list):
        return any(_behind(part) for part in value)
    return isinstance(value, Tensor) and hasattr(value, "_behind_spikes")


def _mark(value: Any) -> Any:
    """Mark tensors as depending on spikes. Returns them."""
    for part in value if isinstance(value, tuple | list) else [value]:
        if isinstance(part, Tensor):
            part._behind_spikes = True  # type: ignore[attr-defined]
    return value


def record_calls(model: nn.Module, x: Tensor) -> tuple[Tensor, Recording]:
    """Run a model without derivatives. Its state must be reset.

    Returns:
        The outputs, and the calls of its neurons.
    """
    mode = Recording()

    def enter(name: str, reset: str) -> Any:
        def note(*_: Any) -> None:
            mode.place, mode.reset = name, reset

        return note

    named = [(name, m) for name, m in model.named_modules() if hasattr(m, "plan") and hasattr(m, "tracing")]
    handles = [m.register_forward_pre_hook(enter(name, _reset_of(m))) for name, m in named]
    handles += [m.register_forward_hook(enter("", "")) for _, m in named]
    try:
        with torch.no_grad(), mode:
            out: Tensor = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return out, mode


def _reset_of(module: Any) -> str:
    """Return how a library's neuron is reset at the next step; empty if it is reset at once."""
    found = getattr(module.plan.more, "reset", "")
    return found if isinstance(found, str) else ""


def groups_of(calls: list[NeuronCall]) -> list[list[int]]:
    """Return the calls of the same neurons, in order of time: those of one module, or with the state handed on."""
    found: dict[Any, list[int]] = {}
    keys: list[Any] = []
    for i, call in enumerate(calls):
        keys.append(call.place or (i if call.before is None else keys[call.before]))
        found.setdefault(keys[-1], []).append(i)
    return list(found.values())


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _windows(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Windows | None:  # fmt: skip
    """Return the geometry of a max-pooling, or None for one that is not known."""
    if input.dim() != 4 or ceil_mode or return_indices:
        return None
    return _pair(kernel_size), _pair(stride or kernel_size), _pair(padding), _pair(dilation)


def _maximum(y: Tensor, windows: Windows) -> Tensor:
    """Max-pool by a function that no mode rewrites."""
    size, stride, padding, dilation = windows
    found: Tensor = F.max_pool2d_with_indices(y, size, stride, padding, dilation)[0]
    return found


def _entries(y: Tensor, windows: Windows) -> Tensor:
    """Return the entries of every window [B, C, entries, windows]."""
    size, stride, padding, dilation = windows
    return F.unfold(y, size, dilation, padding, stride).view(len(y), y.shape[1], size[0] * size[1], -1)


def _alone(y: Tensor, windows: Windows) -> Tensor:
    """Return where no other entry of the window fires."""
    if windows == PLAIN:
        pooled = 4 * F.avg_pool2d(y, 2)
        wide = pooled.repeat_interleave(2, -1).repeat_interleave(2, -2)
        wide = F.pad(wide, (0, y.shape[-1] - wide.shape[-1], 0, y.shape[-2] - wide.shape[-2]))
        return (wide - y == 0).to(y)
    entries = _entries(y, windows)
    return (entries.sum(2, keepdim=True) - entries == 0).to(y)
