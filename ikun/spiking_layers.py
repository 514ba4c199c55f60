"""Neurons, with the max-pooling behind them, on the scans of fused.py: as a layer of a curvature product (value,
adjoint, tangent, tangent of the adjoint), and as a function that can be differentiated once, for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hessian_tools.chain.layers import Carry
from ikun.kernels import dispatch as fused
from ikun.kernels.dispatch import adjoint, adjoint_tangent, slopes, tangent
from ikun.kernels.scan import Number, Scan, reset_slope, scalar
from ikun.neurons import Neuron, step

if TYPE_CHECKING:
    from ikun.layers import MaxPool


class Spikes:
    """Neurons, with the max-pooling behind them if there is one, as a layer with second-order passes.

    Implements the protocol of a chain's layer: parameters, adjoint, tangent, adjoint_tangent. Inputs are [T N, ...], or
    [N, ...] for an input that repeats; outputs are [T N, ...], time first. With a carry these T steps are a segment of
    time, and the states of its scans come from there.
    """

    def __init__(
        self,
        neuron: Neuron,
        shapes: tuple[torch.Size, torch.Size],
        z: Tensor,
        scan: Scan,
        carry: Carry | None = None,
    ) -> None:
        """shapes: of the layer's input and output; z = h - threshold [T, M]."""
        self.neuron, self.shapes, self.scan, self.carry = neuron, shapes, scan, carry
        self.z: Tensor | None = z  # until the adjoint is kept
        self.start: Tensor | None = None  # v' before the first step
        self.repeats = False  # one input for all steps, of other segments too

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.neuron.logit,) if self.neuron.kind == "plif" else ()

    def _inputs(self, dx: Tensor | None) -> Tensor:
        if dx is None:
            return torch.zeros_like(self.scan.f1[:1])
        return dx.reshape(1 if self.scan.static else len(self.scan.f1), -1)

    def _outputs(self, g: Tensor) -> Tensor:
        return g.reshape(len(self.scan.f1), -1)

    def _gain(self, dp: Sequence[Tensor | None]) -> Number:
        """gain' = gain (1 - gain) w'."""
        return self.scan.gain * self.scan.decay * scalar(dp[0]) if dp and dp[0] is not None else 0.0

    def _state(self, kind: str) -> Tensor | None:
        return None if self.carry is None else carried(self.carry, kind, torch.zeros_like(self.scan.f1[:1]))

    def tangent(self, dx: Tensor | None, dp: Sequence[Tensor | None]) -> Tensor:
        self.start = None if self.carry is None else self.carry.tangent
        state = self._state("tangent")
        return tangent(self.scan, self._inputs(dx), self._gain(dp), state).reshape(self.shapes[1])

    def adjoint(self, g: Tensor, want: Any, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        z = None
        if keep:
            assert self.z is not None
            z, self.z = self.z, None
            self.scan.e = torch.empty_like(z)
            self.scan.gh = None if self.scan.u is None else torch.empty_like(z)
        gx, total = adjoint(self.scan, self._outputs(g), z, self._state("adjoint"))
        self.total = total
        if not self.parameters:
            return gx.reshape(self.shapes[0]), ()
        return gx.reshape(self.shapes[0]), (_like(g, self.scan.gain * self.scan.decay * total),)

    def adjoint_tangent(
        self, dg: Tensor, dx: Tensor | None, dp: Sequence[Tensor | None], want: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        dgain, state = self._gain(dp), self._state("adjoint_tangent")
        gx, total = adjoint_tangent(self.scan, self._outputs(dg), self._inputs(dx), dgain, self.start, state)
        if not self.parameters:
            return gx.reshape(self.shapes[0]), ()
        # (gain (1 - gain) G)' with gain' = gain (1 - gain) w'
        grad = self.scan.gain * self.scan.decay * total + (self.scan.decay - self.scan.gain) * dgain * self.total
        return gx.reshape(self.shapes[0]), (_like(dg, grad),)

    # ---- averages over noise in the weights (hessian_tools/smoothed.py)
    @property
    def static(self) -> bool:
        """One input for all steps."""
        return self.scan.static

    @property
    def threshold(self) -> float:
        return self.neuron.dynamics.threshold

    def fire(self, x: Tensor) -> Tensor:
        """Spikes [T, M], before the pooling, for other inputs x [T, M] or [1, M]."""
        return _value(self.neuron, len(self.scan.f1), None, x)[0]

    def alone(self, fired: Tensor) -> Tensor | None:
        """Where no other entry of the pooling window fires [T, M], for spikes [T, M]; None without pooling."""
        if self.scan.index is None:
            return None
        plane = self._planes(fired)
        others = _widen(4 * F.avg_pool2d(plane, 2), plane.shape) - plane
        return (others == 0).to(fired).view_as(fired)

    def averaged(self, mean: Tensor, spread: Tensor, alone: Tensor | None) -> Spikes | Pooled:
        """The layer of mean spikes where h - threshold [T, M] is normal with this mean and standard deviation.

        E s' = N(0; mean, spread^2) h', and E v' = (P(silent) - (threshold - v_reset) N) h' as h = threshold where a
        spike comes or goes. P(silent) is taken at the layer's own inputs. The reset is felt even if it is detached.
        alone [T, M]: the mean of `alone`, the derivative of the pooled spike by each of its entries.
        """
        assert self.z is not None
        d = self.neuron.dynamics
        f1 = torch.exp(-0.5 * (mean / spread).square()) / (spread * math.sqrt(2 * math.pi))
        c = 1 - d.threshold * f1 if d.reset == "soft" else (self.z < 0).to(f1) - (d.threshold - d.v_reset) * f1
        return self._with(f1, c, alone)

    def responding(self, response: Tensor, alone: Tensor | None) -> Spikes | Pooled:
        """The layer whose spikes change by response [T, M] per unit of a constant current."""
        f1 = response / self.scan.gain
        return self._with(f1, torch.zeros_like(f1), alone)

    def _with(self, f1: Tensor, c: Tensor, alone: Tensor | None) -> Spikes | Pooled:
        assert self.z is not None
        scan = replace(self.scan, f1=f1, c=c, index=None, unit=1)
        if alone is None:
            return Spikes(self.neuron, self.shapes, self.z, scan)
        shape = self._planes(f1).shape
        return Pooled(Spikes(self.neuron, (self.shapes[0], shape), self.z, scan), alone.view(shape))

    def _planes(self, t: Tensor) -> Tensor:
        """[T, M] -> [T N, C, H, W]."""
        return t.reshape(-1, *self.shapes[0][1:])


def _widen(pooled: Tensor, shape: torch.Size) -> Tensor:
    """Every entry of [N, C, H / 2, W / 2] four times in [N, C, H, W]; 0 in a row or column left over."""
    wide = pooled.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return F.pad(wide, (0, shape[-1] - wide.shape[-1], 0, shape[-2] - wide.shape[-2]))


@dataclass(frozen=True)
class Pooled:
    """Neurons and a pooling that passes a share [T N, C, H, W] of every entry's derivative; no second-order pass."""

    neurons: Spikes
    share: Tensor

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return self.neurons.parameters

    def tangent(self, dx: Tensor | None, dp: Sequence[Tensor | None]) -> Tensor:
        return 4 * F.avg_pool2d(self.share * self.neurons.tangent(dx, dp), 2)

    def adjoint(self, g: Tensor, want: Any, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.neurons.adjoint(self.share * _widen(g, self.share.shape), want, keep)

    def adjoint_tangent(self, dg: Tensor, dx: object, dp: object, want: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise NotImplementedError("a Gauss-Newton product has no second-order pass")


def _like(t: Tensor, value: Number) -> Tensor:
    """[], with t's type and place."""
    return torch.as_tensor(value, dtype=t.dtype, device=t.device)


def carried(carry: Carry, kind: str, rest: Tensor) -> Tensor:
    """The state [1, M] for a scan to run on: a copy of what the segment before handed on, or rest. It is what is handed
    on from here."""
    before = getattr(carry, kind)
    state = rest if before is None else before.clone()
    setattr(carry, kind, state)
    return state


def _value(
    neuron: Neuron, steps: int, pool: MaxPool | None, x: Tensor, carry: Carry | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x [T or 1, N, ...] -> (spikes, pooled if there is a pool [T, ...], z [T, M], index [T, Q], u [T, M])."""
    d, learned = neuron.dynamics, neuron.kind == "plif"
    decay, gain = neuron.rates()
    state = None if carry is None else carried(carry, "value", neuron.start(x).reshape(1, -1))
    if not d.relaxed and fused.usable(x):
        plane = None if pool is None else (x.shape[-2], x.shape[-1])
        rates = (scalar(decay), scalar(gain), scalar((1 - decay) * d.v_reset), d.threshold, d.v_reset)
        last = pool is not None and pool.ties == "last"
        found = fused.value(x.flatten(1), steps, rates, d.reset == "hard", plane, last, learned, state)
        if found is not None:
            tail = x.shape[1:] if plane is None else (*x.shape[1:-2], plane[0] // 2, plane[1] // 2)
            return found[0].view(steps, *tail), *found[1:]
    v = neuron.start(x) if state is None else state.view(x.shape[1:])
    membranes, spikes, previous = [], [], []
    for t in range(steps):
        previous.append(v)
        h, s, v = step(x[0 if len(x) == 1 else t], v, decay, gain, d)
        membranes.append(h)
        spikes.append(s)
    z, s = torch.stack(membranes).flatten(1) - d.threshold, torch.stack(spikes)
    u = (x - torch.stack(previous) + d.v_reset).flatten(1) if learned else None
    if state is not None:
        state.copy_(v.reshape(1, -1))
    return (s, z, None, u) if pool is None else (pool(s), z, selection(s, pool.ties).flatten(1), u)


def _scan(
    neuron: Neuron, pool: MaxPool | None, shape: torch.Size, z: Tensor, index: Tensor | None, u: Tensor | None
) -> Scan:
    """The scan's derivatives at z, for inputs of shape [T or 1, N, ...]."""
    (f1, c), (decay, gain) = slopes(neuron.dynamics, z), neuron.rates()
    width, height = (1, 1) if pool is None else (shape[-1], shape[-2])
    rates, reset = (scalar(decay), scalar(gain)), reset_slope(neuron.dynamics)
    surrogate = neuron.dynamics.surrogate
    return Scan(f1, c, *rates, shape[0] == 1, index, width * height, u=u, reset=reset, width=width, surrogate=surrogate)


def linearize_neurons(
    neuron: Neuron, steps: int, static: bool, pool: MaxPool | None, x: Tensor, carry: Carry | None = None
) -> tuple[Tensor, Spikes]:
    """The layer at inputs x [N, ...] (static: repeated `steps` times) or [steps N, ...], and its outputs."""
    timed = x[None] if static else x.unflatten(0, (steps, -1))
    y, z, index, u = _value(neuron, steps, pool, timed, carry)
    y = y.flatten(0, 1)
    layer = Spikes(neuron, (x.shape, y.shape), z, _scan(neuron, pool, timed.shape, z, index, u), carry)
    layer.repeats = static
    return y, layer


class _Fire(torch.autograd.Function):
    """The layer's outputs [T, ...] at x [T or 1, N, ...], with the adjoint as its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logit: Tensor | None, neuron: Neuron, steps: int, pool: MaxPool | None) -> Tensor:
        y, z, index, u = _value(neuron, steps, pool, x.detach())
        ctx.save_for_backward(logit, z, index, u)
        ctx.neuron, ctx.pool, ctx.shape = neuron, pool, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        logit, z, index, u = ctx.saved_tensors
        scan = _scan(ctx.neuron, ctx.pool, ctx.shape, z, index, u)
        gx, total = adjoint(scan, g.flatten(1))
        grad = None if logit is None else _like(logit, scan.gain * scan.decay * total)
        return gx.view(ctx.shape), grad, None, None, None


def fire(neuron: Neuron, steps: int, pool: MaxPool | None, x: Tensor) -> Tensor:
    """pool(neuron(x)) for x [T, N, ...], or [1, N, ...] for an input that repeats: the same spikes in less time.

    Where the kernels run, the result can be differentiated once, in reverse mode; torch raises RuntimeError beyond it.
    """
    if not neuron.dynamics.relaxed and fused.usable(x):
        y: Tensor = _Fire.apply(x, getattr(neuron, "logit", None), neuron, steps, pool)
        return y
    s: Tensor = neuron(x.expand(steps, *x.shape[1:]))
    return s if pool is None else pool.forward(s)


def selection(s: Tensor, ties: str) -> Tensor:
    """Positions, within one step's [N C H W], of the entries that MaxPool selects from s [T, N, C, H, W]."""
    height, width = s.shape[-2] // 2, s.shape[-1] // 2
    cut = s[..., : 2 * height, : 2 * width]
    windows = torch.stack([cut[..., i::2, j::2] for i in (0, 1) for j in (0, 1)])
    best, chosen = windows[0], torch.zeros_like(windows[0], dtype=torch.int32)
    for k in range(1, 4):
        better = windows[k] > best if ties == "first" else windows[k] >= best
        best = torch.where(better, windows[k], best)
        chosen.masked_fill_(better, k)
    kind = torch.int32 if s[0].numel() < 2**31 else torch.int64
    places = torch.arange(s[0].numel(), device=s.device, dtype=kind).view(s.shape[1:])
    corners = places[..., : 2 * height : 2, : 2 * width : 2]
    return corners + (chosen // 2) * s.shape[-1] + chosen % 2


@dataclass(frozen=True)
class Selection:
    """A pooling of its own as a layer: the entries at places [Q] of x [T N, C, H, W], flat."""

    places: Tensor
    shapes: tuple[torch.Size, torch.Size]
    parameters: tuple[Tensor, ...] = ()

    def tangent(self, dx: Tensor, dp: object) -> Tensor:
        return dx.flatten()[self.places].view(self.shapes[1])

    def adjoint(self, g: Tensor, want: object, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        return g.new_zeros(self.shapes[0].numel()).scatter_(0, self.places, g.flatten()).view(self.shapes[0]), ()

    def adjoint_tangent(self, dg: Tensor, dx: object, dp: object, want: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.adjoint(dg, want, False)


def select(pool: MaxPool, x: Tensor) -> tuple[Tensor, Selection]:
    """pool(x) for x [T N, C, H, W] that is not spikes alone, and the layer there."""
    y = pool(x)
    return y, Selection(selection(x[None], pool.ties).flatten().long(), (x.shape, y.shape))


def time_mean(steps: int, total: int, s: Tensor) -> tuple[Tensor, TimeMean]:
    """[steps N, K] -> [N, K]: what these steps add to the mean over `total` steps."""
    mean = TimeMean(steps, total)
    return mean.tangent(s, ()), mean


@dataclass(frozen=True)
class TimeMean:
    """The mean over time as a layer; of a segment, its part of it."""

    steps: int
    total: int
    parameters: tuple[Tensor, ...] = ()

    def tangent(self, dx: Tensor, dp: object) -> Tensor:
        return dx.reshape(self.steps, -1, *dx.shape[1:]).sum(0) / self.total

    def adjoint(self, g: Tensor, want: object, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        return (g / self.total).repeat(self.steps, *(1,) * (g.dim() - 1)), ()

    def adjoint_tangent(self, dg: Tensor, dx: object, dp: object, want: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.adjoint(dg, want, False)
