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

if TYPE_CHECKING:
    pass

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


def scatter(g: Tensor, scan: Scan) -> Tensor:
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
    gs, gx, total = scatter(g, scan), [], 0.0
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
    gs, gx, total = scatter(dg, scan), [], 0.0
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
