"""Neurons, with the max-pooling behind them, as a layer of a curvature product (value, adjoint, tangent, tangent of the
adjoint), on the scans of fused.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ikun.fused import Scan, adjoint, adjoint_tangent, scatter, tangent
from ikun.neurons import Neuron, step

if TYPE_CHECKING:
    from ikun.networks import MaxPool


class Spikes:
    """Neurons, with the max-pooling behind them if there is one, as a layer with second-order passes.

    Implements the protocol of a chain's layer: parameters, adjoint, tangent, adjoint_tangent. Inputs are [T N, ...], or
    [N, ...] for an input that repeats; outputs are [T N, ...], time first.
    """

    def __init__(self, neuron: Neuron, shapes: tuple[torch.Size, torch.Size], z: Tensor, scan: Scan) -> None:
        """shapes: of the layer's input and output; z = h - threshold [T, M]."""
        self.neuron, self.shapes, self.scan = neuron, shapes, scan
        self.z: Tensor | None = z  # until the adjoint is kept

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.neuron.logit,) if self.neuron.kind == "plif" else ()

    def _inputs(self, dx: Tensor | None) -> Tensor:
        if dx is None:
            return torch.zeros_like(self.scan.f1[:1])
        return dx.reshape(1 if self.scan.static else len(self.scan.f1), -1)

    def _outputs(self, g: Tensor) -> Tensor:
        return g.reshape(len(self.scan.f1), -1)

    def _gain(self, dp: Sequence[Tensor | None]) -> float:
        """gain' = gain (1 - gain) w'."""
        return self.scan.gain * self.scan.decay * float(dp[0]) if dp and dp[0] is not None else 0.0

    def _logit(self, total: float, like: Tensor) -> tuple[Tensor, ...]:
        return (like.new_tensor(self.scan.gain * self.scan.decay * total),)

    def tangent(self, dx: Tensor | None, dp: Sequence[Tensor | None]) -> Tensor:
        return tangent(self.scan, self._inputs(dx), self._gain(dp)).reshape(self.shapes[1])

    def adjoint(self, g: Tensor, want: Any, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        gs = self._outputs(g)
        if keep:
            self._keep(scatter(gs, self.scan))
        gx, total = adjoint(self.scan, gs)
        self.total = total
        return gx.reshape(self.shapes[0]), self._logit(total, g) if self.parameters else ()

    def adjoint_tangent(
        self, dg: Tensor, dx: Tensor | None, dp: Sequence[Tensor | None], want: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        dgain = self._gain(dp)
        gx, total = adjoint_tangent(self.scan, self._outputs(dg), self._inputs(dx), dgain)
        if not self.parameters:
            return gx.reshape(self.shapes[0]), ()
        # (gain (1 - gain) G)' with gain' = gain (1 - gain) w'
        (grad,) = self._logit(total, dg)
        return gx.reshape(self.shapes[0]), (grad + (self.scan.decay - self.scan.gain) * dgain * self.total,)

    def _keep(self, gs: Tensor) -> None:
        """Store e, and gh where the decay is learned, for the adjoint that starts from gs [T, M]; frees z."""
        assert self.z is not None
        d, scan = self.neuron.dynamics, self.scan
        second = d.surrogate.second(self.z)
        gv = torch.zeros_like(gs[0])
        gh = torch.empty_like(gs) if scan.u is not None else None
        for t in reversed(range(len(gs))):
            current = scan.f1[t] * gs[t] + scan.c[t] * gv
            if d.detach_reset:
                second[t] *= gs[t]
            elif d.reset == "soft":
                second[t] *= gs[t] - d.threshold * gv
            else:
                second[t] *= gs[t] + gv * (d.v_reset - d.threshold - self.z[t])
                second[t] -= 2 * gv * scan.f1[t]
            if gh is not None:
                gh[t] = current
            gv = scan.decay * current
        scan.e, scan.gh, self.z = second, gh, None


def linearize(neuron: Neuron, steps: int, static: bool, pool: MaxPool | None, x: Tensor) -> tuple[Tensor, Spikes]:
    """The layer at inputs x [N, ...] (static: repeated `steps` times) or [steps N, ...], and its outputs."""
    given, d = x, neuron.dynamics
    x = x[None] if static else x.unflatten(0, (steps, -1))
    decay, gain = neuron.rates()
    v = neuron.start(x)
    membranes, spikes, previous = [], [], []
    for t in range(steps):
        previous.append(v)
        h, s, v = step(x[0 if static else t], v, decay, gain, d)
        membranes.append(h)
        spikes.append(s)
    h, s = torch.stack(membranes), torch.stack(spikes)
    z = h - d.threshold
    f1 = d.surrogate.first(z)
    if d.reset == "soft":
        c = torch.ones_like(f1) if d.detach_reset else 1 - d.threshold * f1
    else:
        c = 1 - s if d.detach_reset else (1 - s) + (d.v_reset - h) * f1
    y = s if pool is None else pool(s)
    scan = Scan(
        f1.flatten(1),
        c.flatten(1),
        float(decay),
        float(gain),
        static,
        None if pool is None else selection(s, pool.ties).flatten(1),
        1 if pool is None else s.shape[-1] * s.shape[-2],
        u=(x - torch.stack(previous) + d.v_reset).flatten(1) if neuron.kind == "plif" else None,
    )
    y = y.flatten(0, 1)
    return y, Spikes(neuron, (given.shape, y.shape), z.flatten(1), scan)


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


def time_mean(steps: int, s: Tensor) -> tuple[Tensor, Mean]:
    """[T N, K] -> [N, K]."""
    return s.unflatten(0, (steps, -1)).mean(0), Mean(steps)


@dataclass(frozen=True)
class Mean:
    """The mean over time as a layer."""

    steps: int
    parameters: tuple[Tensor, ...] = ()

    def tangent(self, dx: Tensor, dp: object) -> Tensor:
        return dx.reshape(self.steps, -1, *dx.shape[1:]).mean(0)

    def adjoint(self, g: Tensor, want: object, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        return (g / self.steps).repeat(self.steps, *(1,) * (g.dim() - 1)), ()

    def adjoint_tangent(self, dg: Tensor, dx: object, dp: object, want: object) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.adjoint(dg, want, False)
