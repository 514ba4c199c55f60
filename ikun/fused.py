"""The neuron scans of a curvature product, each one pass over memory, and the layer built from them.

At fixed weights a scan (see neurons.py) is three arrays over [T, M] (M neurons of all samples): f1 = f'(h - theta),
c = dv/dh and e, the coefficient of h' in gh'. With a' the tangent of a, and v' = gv' = 0 at the ends,

    tangent              h' = decay v' + gain x';   s' = f1 h';   v' = c h'
    adjoint              gh = f1 gs + c gv;         gx = gain gh;     gv <- decay gh
    tangent of adjoint   gh' = f1 gs' + c gv' + e h';   gx' = gain gh';   gv' <- decay gh'

           c                              e                                        (gv: the adjoint of v[t])
    hard   (1 - s) + (v_reset - h) f1     (gs + gv (v_reset - h)) f2 - 2 gv f1     detached: 1 - s,  gs f2
    soft   1 - theta f1                   (gs - theta gv) f2                       detached: 1,      gs f2

A learned decay (PLIF: gain = sigmoid(w), decay = 1 - gain) adds, with u[t] = x[t] - v[t-1] + v_reset,

    h' += gain' u;   dL/dgain = sum gh u;   gx' += gain' gh;   gv' -= gain' gh;   (dL/dgain)' = sum gh' u + gh u'

The kernels also select (tangent) and scatter (adjoint) the entries that a max-pooling behind the neurons chose: `index`
[T, Q] holds positions in 0..M-1. An input that repeats over time is one row [1, M]; its adjoint is the sum over T.
Kernels are numba's, on blocks of neurons that fit the cache, one slice of the blocks per thread; plain torch where
numba is missing or the tensors are not on the CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ikun.neurons import Neuron, _step

if TYPE_CHECKING:
    from ikun.networks import MaxPool

BLOCK = 1024  # neurons of a block: [T, BLOCK] local arrays


@dataclass
class Scan:
    """A scan at fixed weights: f1, c, e, u, gh [T, M]; gh: the kept adjoint of h, for a learned decay.

    unit: the size of one pooled plane; blocks are multiples of it, so that no window is cut. static: x is [1, M].
    """

    f1: Tensor
    c: Tensor
    decay: float
    gain: float
    static: bool
    index: Tensor | None
    unit: int
    e: Tensor | None = None
    u: Tensor | None = None
    gh: Tensor | None = None


# ---------------------------------------------------------------- plain torch
def _rows(x: Tensor, steps: int) -> Tensor:
    return x.expand(steps, -1)


def _scatter(g: Tensor, scan: Scan) -> Tensor:
    if scan.index is None:
        return g
    return torch.zeros_like(scan.f1).scatter_(1, scan.index.long(), g)


def _collect(gx: list[Tensor], static: bool) -> Tensor:
    x = torch.stack(gx[::-1])
    return x.sum(0, keepdim=True) if static else x


def torch_tangent(scan: Scan, dx: Tensor, dgain: float) -> Tensor:
    """x' [T or 1, M] -> s' [T, M or Q]."""
    dv, spikes = torch.zeros_like(dx[0]), []
    for t, x in enumerate(_rows(dx, len(scan.f1))):
        dh = scan.decay * dv + scan.gain * x
        if scan.u is not None and dgain:
            dh = dh + dgain * scan.u[t]
        spikes.append(scan.f1[t] * dh)
        dv = scan.c[t] * dh
    out = torch.stack(spikes)
    return out if scan.index is None else out.gather(1, scan.index.long())


def torch_adjoint(scan: Scan, g: Tensor) -> tuple[Tensor, float]:
    """gs [T, M or Q] -> (gx [T or 1, M], dL/dgain or 0)."""
    gs, gx, total = _scatter(g, scan), [], 0.0
    gv = torch.zeros_like(gs[0])
    for t in reversed(range(len(gs))):
        gh = scan.f1[t] * gs[t] + scan.c[t] * gv
        if scan.u is not None:
            total += float((gh * scan.u[t]).sum(dtype=torch.float64))
        gx.append(scan.gain * gh)
        gv = scan.decay * gh
    return _collect(gx, scan.static), total


def torch_adjoint_tangent(scan: Scan, dg: Tensor, dx: Tensor, dgain: float) -> tuple[Tensor, float]:
    """(gs' [T, M or Q], x' [T or 1, M]) -> (gx' [T or 1, M], (dL/dgain)' or 0)."""
    assert scan.e is not None
    gs, gx, total = _scatter(dg, scan), [], 0.0
    dv, hs, us = torch.zeros_like(dx[0]), [], []
    for t, x in enumerate(_rows(dx, len(scan.f1))):
        dh = scan.decay * dv + scan.gain * x
        if scan.u is not None:
            us.append(x - dv)
            dh = dh + dgain * scan.u[t]
        hs.append(dh)
        dv = scan.c[t] * dh
    gv = torch.zeros_like(gs[0])
    for t in reversed(range(len(gs))):
        gh = scan.f1[t] * gs[t] + scan.c[t] * gv + scan.e[t] * hs[t]
        x, gv = scan.gain * gh, scan.decay * gh
        if scan.u is not None and scan.gh is not None:
            total += float((gh * scan.u[t] + scan.gh[t] * us[t]).sum(dtype=torch.float64))
            x, gv = x + dgain * scan.gh[t], gv - dgain * scan.gh[t]
        gx.append(x)
    return _collect(gx, scan.static), total


# ---------------------------------------------------------------- numba: blocks first..last of `block` neurons
def _tangent(x, f1, c, u, decay, gain, dgain, index, block, first, last, out):  # type: ignore[no-untyped-def]
    steps, size = f1.shape
    pooled, learned, static = index.shape[0] > 0, u.shape[0] > 0, x.shape[0] == 1
    v, s = np.empty(block, f1.dtype), np.empty(block, f1.dtype)
    per = index.shape[1] * block // size if pooled else 0
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        v[:] = 0
        for t in range(steps):
            xt, ft, ct = x[0 if static else t, lo : lo + n], f1[t, lo : lo + n], c[t, lo : lo + n]
            target = s[:n] if pooled else out[t, lo : lo + n]
            if learned:
                ut = u[t, lo : lo + n]
                for i in range(n):
                    h = decay * v[i] + gain * xt[i] + dgain * ut[i]
                    v[i] = ct[i] * h
                    target[i] = ft[i] * h
            else:
                for i in range(n):
                    h = decay * v[i] + gain * xt[i]
                    v[i] = ct[i] * h
                    target[i] = ft[i] * h
            if pooled:
                start = b * per
                for j in range(start, min(start + per, index.shape[1])):
                    out[t, j] = s[index[t, j] - lo]


def _adjoint(g, f1, c, u, decay, gain, index, block, first, last, out):  # type: ignore[no-untyped-def]
    steps, size = f1.shape
    pooled, learned, static = index.shape[0] > 0, u.shape[0] > 0, out.shape[0] == 1
    v, s = np.empty(block, f1.dtype), np.empty(block, f1.dtype)
    per = index.shape[1] * block // size if pooled else 0
    total = 0.0
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        v[:] = 0
        if static:
            out[0, lo : lo + n] = 0
        for t in range(steps - 1, -1, -1):
            ft, ct, ot = f1[t, lo : lo + n], c[t, lo : lo + n], out[0 if static else t, lo : lo + n]
            gt = s[:n] if pooled else g[t, lo : lo + n]
            if pooled:
                s[:] = 0
                start = b * per
                for j in range(start, min(start + per, index.shape[1])):
                    s[index[t, j] - lo] = g[t, j]
            if learned:
                ut = u[t, lo : lo + n]
                for i in range(n):
                    total += (ft[i] * gt[i] + ct[i] * v[i]) * ut[i]
            if static:
                for i in range(n):
                    h = ft[i] * gt[i] + ct[i] * v[i]
                    v[i] = decay * h
                    ot[i] += gain * h
            else:
                for i in range(n):
                    h = ft[i] * gt[i] + ct[i] * v[i]
                    v[i] = decay * h
                    ot[i] = gain * h
    return total


def _adjoint_tangent(g, x, f1, c, e, u, gh, decay, gain, dgain, index, block, first, last, out):  # type: ignore[no-untyped-def]
    steps, size = f1.shape
    pooled, learned = index.shape[0] > 0, u.shape[0] > 0
    static_in, static = x.shape[0] == 1, out.shape[0] == 1
    v, s, hs = np.empty(block, f1.dtype), np.empty(block, f1.dtype), np.empty((steps, block), f1.dtype)
    per = index.shape[1] * block // size if pooled else 0
    total = 0.0
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        v[:] = 0
        for t in range(steps):
            xt, ct, ht = x[0 if static_in else t, lo : lo + n], c[t, lo : lo + n], hs[t, :n]
            if learned:
                ut, gt = u[t, lo : lo + n], gh[t, lo : lo + n]
                for i in range(n):
                    total += gt[i] * (xt[i] - v[i])
                    h = decay * v[i] + gain * xt[i] + dgain * ut[i]
                    ht[i] = h
                    v[i] = ct[i] * h
            else:
                for i in range(n):
                    h = decay * v[i] + gain * xt[i]
                    ht[i] = h
                    v[i] = ct[i] * h
        v[:] = 0
        if static:
            out[0, lo : lo + n] = 0
        for t in range(steps - 1, -1, -1):
            ft, ct, et, ht = f1[t, lo : lo + n], c[t, lo : lo + n], e[t, lo : lo + n], hs[t, :n]
            ot = out[0 if static else t, lo : lo + n]
            gt = s[:n] if pooled else g[t, lo : lo + n]
            if pooled:
                s[:] = 0
                start = b * per
                for j in range(start, min(start + per, index.shape[1])):
                    s[index[t, j] - lo] = g[t, j]
            if learned:
                ut, at = u[t, lo : lo + n], gh[t, lo : lo + n]
                for i in range(n):
                    h = ft[i] * gt[i] + ct[i] * v[i] + et[i] * ht[i]
                    total += h * ut[i]
                    v[i] = decay * h - dgain * at[i]
                    if static:
                        ot[i] += gain * h + dgain * at[i]
                    else:
                        ot[i] = gain * h + dgain * at[i]
            elif static:
                for i in range(n):
                    h = ft[i] * gt[i] + ct[i] * v[i] + et[i] * ht[i]
                    v[i] = decay * h
                    ot[i] += gain * h
            else:
                for i in range(n):
                    h = ft[i] * gt[i] + ct[i] * v[i] + et[i] * ht[i]
                    v[i] = decay * h
                    ot[i] = gain * h
    return total


_state = {"broken": False}


@cache
def _compiled() -> dict[str, Callable[..., Any]] | None:
    sources: dict[str, Any] = {"tangent": _tangent, "adjoint": _adjoint, "adjoint_tangent": _adjoint_tangent}
    try:
        import numba

        try:
            return {name: numba.njit(nogil=True, cache=True)(source) for name, source in sources.items()}
        except RuntimeError:  # nowhere to keep the cache
            return {name: numba.njit(nogil=True)(source) for name, source in sources.items()}
    except Exception as error:  # a broken installation may raise anything
        warnings.warn(f"numba is not usable ({error}): curvature products run in plain torch, slower", stacklevel=2)
        return None


def kernels() -> dict[str, Callable[..., Any]] | None:
    """The three kernels by name, compiled when first called; None, after one warning, if numba does not work here."""
    return None if _state["broken"] else _compiled()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="scan")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _launch(
    name: str, scan: Scan, tensors: Sequence[Tensor | None], rates: Sequence[float], out: Tensor
) -> float | None:
    """Run one kernel over all blocks into `out`; the sum of what its slices return, or None where it cannot run."""
    f1 = scan.f1
    if f1.device.type != "cpu" or f1.dtype not in (torch.float32, torch.float64) or (found := kernels()) is None:
        return None
    dtype, size = f1.numpy().dtype, f1.shape[1]
    block = max(1, BLOCK // scan.unit) * scan.unit
    blocks = -(-size // block)
    threads = max(1, min(torch.get_num_threads(), blocks, 1 + f1.numel() // 32768))
    edges = [blocks * i // threads for i in range(threads + 1)]
    arrays = [np.empty((0, 0), dtype) if t is None else t.contiguous().numpy() for t in tensors]
    index = np.empty((0, 0), np.int32) if scan.index is None else scan.index.numpy()
    fixed, target = [*arrays, *(dtype.type(r) for r in rates), index, block], out.numpy()
    kernel, slices = found[name], list(pairwise(edges))
    try:
        others = [_pool(threads - 1).submit(kernel, *fixed, a, b, target) for a, b in slices[1:]]
        totals = [kernel(*fixed, *slices[0], target), *(f.result() for f in others)]
    except Exception as error:  # numba compiles at the first call
        warnings.warn(f"numba failed ({error}): curvature products run in plain torch, slower", stacklevel=2)
        _state["broken"] = True
        return None
    return float(sum(total or 0.0 for total in totals))


def _gx(scan: Scan) -> Tensor:
    return scan.f1.new_empty((1 if scan.static else len(scan.f1), scan.f1.shape[1]))


def tangent(scan: Scan, dx: Tensor, dgain: float = 0.0) -> Tensor:
    """x' [T or 1, M] -> s' [T, M or Q]."""
    out = scan.f1.new_empty((scan.f1 if scan.index is None else scan.index).shape)
    done = _launch("tangent", scan, (dx, scan.f1, scan.c, scan.u), (scan.decay, scan.gain, dgain), out)
    return torch_tangent(scan, dx, dgain) if done is None else out


def adjoint(scan: Scan, g: Tensor) -> tuple[Tensor, float]:
    """gs [T, M or Q] -> (gx [T or 1, M], dL/dgain or 0)."""
    out = _gx(scan)
    total = _launch("adjoint", scan, (g, scan.f1, scan.c, scan.u), (scan.decay, scan.gain), out)
    return torch_adjoint(scan, g) if total is None else (out, total)


def adjoint_tangent(scan: Scan, dg: Tensor, dx: Tensor, dgain: float = 0.0) -> tuple[Tensor, float]:
    """(gs' [T, M or Q], x' [T or 1, M]) -> (gx' [T or 1, M], (dL/dgain)' or 0)."""
    out, tensors = _gx(scan), (dg, dx, scan.f1, scan.c, scan.e, scan.u, scan.gh)
    total = _launch("adjoint_tangent", scan, tensors, (scan.decay, scan.gain, dgain), out)
    return torch_adjoint_tangent(scan, dg, dx, dgain) if total is None else (out, total)


# ---------------------------------------------------------------- the layer
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
            self._keep(_scatter(gs, self.scan))
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
        h, s, v = _step(x[0 if static else t], v, decay, gain, d)
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
