"""The passes of a layer of spiking neurons as operators of torch, over the scans of `ikun.kernels`.

A traced graph contains each pass as one operation. The notation is that of `ikun.kernels.dispatch`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ikun.kernels import dispatch as fused
from ikun.kernels.scan import Scan, dv_dtype, reset_slope, scalar
from ikun.neurons import Dynamics, step
from ikun.surrogates import Surrogate


@dataclass(frozen=True)
class ScanSpec:
    """The fixed parameters of a layer of neurons.

    Attributes:
        surrogate: The surrogate as text (see `Surrogate.parse`). Empty: f' and f'' are given.
        decay: Factor of the previous potential. It is 1 - gain if the gain is learned.
        gain: Factor of the input current.
        threshold: The neuron fires where h >= threshold.
        v_reset: Potential at rest and after a hard reset.
        reset: "hard" or "soft".
        detach_reset: Whether derivatives ignore the spike in the reset.
        relaxed: Whether spikes are F(h - threshold) instead of 0 or 1.
        steps: Number of time steps T.
        static: Whether the input is the same at all steps, so that x is [1, M].
        height: Height of the planes that a 2 x 2 max-pooling behind the neurons reads. 0 without pooling.
        width: Their width.
        ties: Which of several equal entries max-pooling selects, "first" or "last".
        ends: Whether the last potential is used. Otherwise it is empty, as are its derivatives and those of the first,
            which is v_reset then.
    """

    surrogate: str = "atan:2"
    decay: float = 1.0
    gain: float = 1.0
    threshold: float = 1.0
    v_reset: float = 0.0
    reset: str = "hard"
    detach_reset: bool = False
    relaxed: bool = False
    steps: int = 1
    static: bool = False
    height: int = 0
    width: int = 0
    ties: str = "first"
    ends: bool = True

    @property
    def dynamics(self) -> Dynamics:
        """The parameters of one time step."""
        surrogate = Surrogate.parse(self.surrogate or "atan:2")
        return Dynamics(surrogate, self.threshold, self.v_reset, self.reset, self.detach_reset, self.relaxed)

    @property
    def plane(self) -> tuple[int, int] | None:
        """Height and width of the pooled planes, or None without pooling."""
        return (self.height, self.width) if self.height else None

    def outputs(self, size: int) -> int:
        """Return the number of outputs per step of `size` neurons."""
        return size // (self.height * self.width) * (self.height // 2) * (self.width // 2) if self.height else size


@lru_cache(4096)
def decode_spec(text: str) -> ScanSpec:
    return ScanSpec(**json.loads(text))


@lru_cache(4096)
def encode_spec(spec: ScanSpec) -> str:
    return json.dumps(asdict(spec))


def _given(t: Tensor) -> Tensor | None:
    """Operators of torch return tensors only: an empty one stands for None."""
    return t if t.numel() else None


def _scan(
    spec: ScanSpec,
    f1: Tensor,
    c: Tensor,
    index: Tensor,
    u: Tensor,
    gain: Tensor | None,
    e: Tensor | None = None,
    gh: Tensor | None = None,
    known: bool = False,
) -> Scan:
    d = spec.dynamics
    rates = (spec.decay, spec.gain) if gain is None else (scalar(1 - gain), scalar(gain))
    return Scan(
        f1, c, *rates, spec.static, _given(index), max(1, spec.height * spec.width), e=e, u=_given(u), gh=gh,
        reset=reset_slope(d), width=max(1, spec.width), surrogate=d.surrogate if spec.surrogate and known else None,
    )  # fmt: skip


def _state(like: Tensor, start: Tensor | None, spec: str) -> Tensor | None:
    """Return the state of a scan to start from, or None if it starts at rest and its end is not used."""
    if start is None:
        return torch.zeros_like(like[:1]) if decode_spec(spec).ends else None
    return start.clone()


def _end(like: Tensor, state: Tensor | None) -> Tensor:
    return like.new_empty(0) if state is None else state


def _total(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like.dtype).reshape(())
    return like.new_full((), value)  # does not copy from the host, which a captured graph must not


# ---------------------------------------------------------------- the passes
def spikes(
    x: Tensor, v0: Tensor | None, gain: Tensor | None, spec: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the neurons.

    Args:
        x: Input currents [T or 1, M].
        v0: Potential before the first step [1, M]; None: v_reset.
        gain: A learned gain [], or None.
        spec: The encoded `ScanSpec`.

    Returns:
        The spikes [T, Q], z = h - threshold [T, M], the last potential [1, M], the entries that pooling selects [T, Q],
        and u [T, M] for a learned gain. The last two are empty if they are not used.
    """
    s = decode_spec(spec)
    d = s.dynamics
    state = v0.clone() if v0 is not None else torch.full_like(x[:1], s.v_reset) if s.ends else None
    decay, rate = (s.decay, s.gain) if gain is None else (1 - gain, gain)
    none = x.new_empty(0)
    if not s.relaxed and fused.usable(x):
        rates = (scalar(decay), scalar(rate), scalar((1 - decay) * s.v_reset), s.threshold, s.v_reset)
        found = fused.value(x, s.steps, rates, s.reset == "hard", s.plane, s.ties == "last", gain is not None, state)
        if found is not None:
            y, z, index, u = found
            index = x.new_empty(0, dtype=torch.int32) if index is None else index
            return y, z, _end(x, state), index, none if u is None else u
    v, zs, ss, us = torch.full_like(x[0], s.v_reset) if state is None else state[0], [], [], []
    for t in range(s.steps):
        current = x[0 if len(x) == 1 else t]
        us.append(current - v + s.v_reset)
        h, spike, v = step(current, v, decay, rate, d)
        zs.append(h - s.threshold)
        ss.append(spike)
    y, index = torch.stack(ss), x.new_empty(0, dtype=torch.int32)
    if s.plane is not None:
        y, index = fused.select(y, s.plane, s.ties)
    return (
        y,
        torch.stack(zs),
        v[None].clone() if s.ends else x.new_empty(0),
        index,
        torch.stack(us) if gain is not None else none,
    )


def select(y: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """Return the spikes [T, Q] that max-pooling selects among spikes [T, M], and their positions [T, Q]."""
    s = decode_spec(spec)
    return fused.select(y, (s.height, s.width), s.ties)


def slopes(z: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """Return f1 = f'(z) and c = dv/dh [T, M]."""
    return fused.slopes(decode_spec(spec).dynamics, z)


def reset_slopes(z: Tensor, f1: Tensor, spec: str) -> Tensor:
    """Return c = dv/dh [T, M] for given f'."""
    d = decode_spec(spec).dynamics
    a, b = reset_slope(d)
    k = torch.ones_like(z) if d.reset == "soft" else (z < 0).to(z)
    return k.to(torch.uint8) if d.detach_reset else k.addcmul_(a + b * z, f1)


def tangent(
    dx: Tensor,
    dv: Tensor | None,
    dgain: Tensor | None,
    f1: Tensor,
    c: Tensor,
    index: Tensor,
    u: Tensor,
    gain: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor]:
    """Return the tangents of the spikes [T, Q] and of the last potential [1, M]."""
    state = _state(f1, dv, spec)
    rate = 0.0 if dgain is None else scalar(dgain)
    return fused.tangent(_scan(decode_spec(spec), f1, c, index, u, gain), dx, rate, state), _end(f1, state)


def adjoint(
    g: Tensor, gv: Tensor | None, f1: Tensor, c: Tensor, index: Tensor, u: Tensor, gain: Tensor | None, spec: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the adjoints of the input [T or 1, M], of the first potential [1, M] and of the gain []."""
    state = _state(f1, gv, spec)
    gx, total = fused.adjoint(_scan(decode_spec(spec), f1, c, index, u, gain), g, None, state)
    return gx, _end(f1, state), _total(total, f1)


def adjoint_kept(
    g: Tensor,
    gv: Tensor | None,
    z: Tensor,
    f2: Tensor | None,
    f1: Tensor,
    c: Tensor,
    index: Tensor,
    u: Tensor,
    gain: Tensor | None,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `adjoint` does, and e and gh [T, M], of which gh is empty without a learned gain."""
    state = _state(f1, gv, spec)
    e = torch.empty_like(z) if f2 is None else f2.clone()
    gh = None if gain is None else torch.empty_like(z)
    gx, total = fused.adjoint(_scan(decode_spec(spec), f1, c, index, u, gain, e, gh, f2 is None), g, z, state)
    return gx, _end(f1, state), _total(total, f1), e, f1.new_empty(0) if gh is None else gh


def adjoint_tangent(
    dg: Tensor | None, dgv: Tensor | None, dx: Tensor, dv: Tensor | None, dgain: Tensor | None,
    f1: Tensor, c: Tensor, e: Tensor, gh: Tensor, index: Tensor, u: Tensor, gain: Tensor | None, spec: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the tangents of what `adjoint` returns. A tangent that is None is zero."""
    state = _state(f1, dgv, spec)
    scan = _scan(decode_spec(spec), f1, c, index, u, gain, e, _given(gh))
    rate = 0.0 if dgain is None else scalar(dgain)
    dg = f1.new_zeros((index if index.numel() else f1).shape) if dg is None else dg
    gx, total = fused.adjoint_tangent(scan, dg, dx, rate, dv, state)
    return gx, _end(f1, state), _total(total, f1)


PASSES = (spikes, select, slopes, reset_slopes, tangent, adjoint, adjoint_kept, adjoint_tangent)
_ops: dict[str, Any] = {}
OPS: dict[str, Any] = {}
_direct: dict[str, Callable[..., Any]] = {}


def register_pass(function: Callable[..., Any], fake: Callable[..., Any] | None = None) -> None:
    """Make a function an operator of torch. fake: returns tensors of the shapes of its results."""
    name = function.__name__
    _ops[name] = torch.library.custom_op(f"ikun::{name}", function, mutates_args=())
    OPS[name] = getattr(torch.ops.ikun, name).default
    _direct[name] = function
    if fake is not None:
        _ops[name].register_fake(fake)


for _pass in PASSES:
    register_pass(_pass)


def functions() -> dict[Any, Callable[..., Any]]:
    """Return the functions behind the operators of torch."""
    return {OPS[name]: function for name, function in _direct.items()}


def pass_of(name: str) -> Any:
    """Return a pass as torch's operator while a graph is traced, else as the function behind it, which is faster."""
    return (OPS if torch._C._len_torch_dispatch_stack() else _direct)[name]


def _like_end(like: Tensor, spec: str) -> Tensor:
    return like.new_empty((1, like.shape[1]) if decode_spec(spec).ends else (0,))


@_ops["spikes"].register_fake
def _(x: Tensor, v0: Any, gain: Any, spec: str) -> Any:
    s, m = decode_spec(spec), x.shape[1]
    q = s.outputs(m)
    return (
        x.new_empty(s.steps, q),
        x.new_empty(s.steps, m),
        _like_end(x, spec),
        x.new_empty((s.steps, q) if s.height else (0,), dtype=torch.int32),
        x.new_empty((0,) if gain is None else (s.steps, m)),
    )


@_ops["select"].register_fake
def _(y: Tensor, spec: str) -> Any:
    shape = len(y), decode_spec(spec).outputs(y.shape[1])
    return y.new_empty(shape), y.new_empty(shape, dtype=torch.int32)


@_ops["slopes"].register_fake
def _(z: Tensor, spec: str) -> Any:
    return torch.empty_like(z), torch.empty_like(z, dtype=dv_dtype(decode_spec(spec).dynamics, z.dtype))


@_ops["reset_slopes"].register_fake
def _(z: Tensor, f1: Tensor, spec: str) -> Any:
    return torch.empty_like(z, dtype=torch.uint8 if decode_spec(spec).detach_reset else None)


@_ops["tangent"].register_fake
def _(dx: Any, dv: Any, dgain: Any, f1: Tensor, c: Any, index: Tensor, u: Any, gain: Any, spec: str) -> Any:
    return f1.new_empty((index if index.numel() else f1).shape), _like_end(f1, spec)


def _like_adjoint(f1: Tensor, spec: str) -> tuple[Tensor, Tensor, Tensor]:
    s = decode_spec(spec)
    return f1.new_empty(1 if s.static else s.steps, f1.shape[1]), _like_end(f1, spec), f1.new_empty(())


@_ops["adjoint"].register_fake
def _(g: Any, gv: Any, f1: Tensor, c: Any, index: Any, u: Any, gain: Any, spec: str) -> Any:
    return _like_adjoint(f1, spec)


@_ops["adjoint_kept"].register_fake
def _(g: Any, gv: Any, z: Any, f2: Any, f1: Tensor, c: Any, index: Any, u: Any, gain: Any, spec: str) -> Any:
    return *_like_adjoint(f1, spec), torch.empty_like(f1), f1.new_empty((0,) if gain is None else f1.shape)


@_ops["adjoint_tangent"].register_fake
def _(
    dg: Any,
    dgv: Any,
    dx: Any,
    dv: Any,
    dgain: Any,
    f1: Tensor,
    c: Any,
    e: Any,
    gh: Any,
    index: Any,
    u: Any,
    gain: Any,
    spec: str,
) -> Any:
    return _like_adjoint(f1, spec)
