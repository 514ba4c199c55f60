"""The neuron scans, each one pass over memory: the spikes themselves, their adjoint, and those of a curvature product.

At fixed weights a scan (see neurons.py) is three arrays over [T, M] (M neurons of all samples): f1 = f'(h - theta),
c = dv/dh and e, the coefficient of h' in gh'. With a' the tangent of a, and v' = gv' = 0 at the ends of time,

    tangent              h' = decay v' + gain x';   s' = f1 h';   v' = c h'
    adjoint              gh = f1 gs + c gv;         gx = gain gh;     gv <- decay gh
    tangent of adjoint   gh' = f1 gs' + c gv' + e h';   gx' = gain gh';   gv' <- decay gh'

    c = k + (a + b z) f1;   e = (gs + gv (a + b z)) f2 + 2 b gv f1           z = h - theta, gv: the adjoint of v[t]
    hard: k = 1 - s, a + b z = v_reset - h;   soft: k = 1, a + b z = -theta;   detached: a + b z = 0

A learned decay (PLIF: gain = sigmoid(w), decay = 1 - gain) adds, with u[t] = x[t] - v[t-1] + v_reset,

    h' += gain' u;   dL/dgain = sum gh u;   gx' += gain' gh;   gv' -= gain' gh;   (dL/dgain)' = sum gh' u + gh u'

The kernels also do the 2 x 2 max-pooling behind the neurons: choose its entries (value), select them (tangent), scatter
(adjoint); `index` [T, Q] holds their positions in 0..M-1. An input that repeats over time is one row [1, M]; its
adjoint is the sum over T.

A sequence may be run in segments of time: a scan that is given a state [1, M] starts from it in place of rest (v_reset
for v; 0 for v', gv, gv') and leaves its end there; v and v' run forward in time, gv and gv' backward.

Kernels are numba's on the CPU, on blocks of neurons that fit the cache, one slice of the blocks per thread, and
Triton's on CUDA (triton_scans.py); plain torch where there is neither.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, wraps
from itertools import pairwise
from types import ModuleType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # neurons of a block: [T, BLOCK] local arrays

F = TypeVar("F", bound=Callable[..., Any])
Number = float | Tensor  # a Tensor [] on devices: reading it would wait for all that is queued there


def number(t: Tensor | float) -> Number:
    """A tensor's only entry, without waiting for a device."""
    return t.detach() if isinstance(t, Tensor) and t.device.type != "cpu" else float(t)


@dataclass
class Scan:
    """A scan at fixed weights: f1, c, e, u, gh [T, M]; gh: the kept adjoint of h, for a learned decay; reset: (a, b).

    unit: the size of one pooled plane; blocks are multiples of it, so that no window is cut. width: of its rows.
    static: x is [1, M].
    """

    f1: Tensor
    c: Tensor
    decay: Number
    gain: Number
    static: bool
    index: Tensor | None
    unit: int
    e: Tensor | None = None
    u: Tensor | None = None
    gh: Tensor | None = None
    reset: tuple[float, float] = (0.0, 0.0)
    width: int = 1


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


def _rest(state: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like[0]) if state is None else state[0]


def _leave(state: Tensor | None, end: Tensor) -> None:
    if state is not None:
        state.copy_(end)


def torch_tangent(scan: Scan, dx: Tensor, dgain: Number, state: Tensor | None = None) -> Tensor:
    """x' [T or 1, M] -> s' [T, M or Q]; state: v'."""
    dv, spikes = _rest(state, dx), []
    for t, x in enumerate(_rows(dx, len(scan.f1))):
        dh = scan.decay * dv + scan.gain * x
        if scan.u is not None:
            dh = dh + dgain * scan.u[t]
        spikes.append(scan.f1[t] * dh)
        dv = scan.c[t] * dh
    _leave(state, dv)
    out = torch.stack(spikes)
    return out if scan.index is None else out.gather(1, scan.index.long())


def torch_adjoint(scan: Scan, g: Tensor, z: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Number]:
    """gs [T, M or Q] -> (gx [T or 1, M], dL/dgain or 0); with z [T, M] also turns scan.e from f2 into e, fills gh.

    state: gv.
    """
    gs, gx, total = scatter(g, scan), [], number(0.0)
    gv, (a, b) = _rest(state, gs), scan.reset
    for t in reversed(range(len(gs))):
        gh = scan.f1[t] * gs[t] + scan.c[t] * gv
        if z is not None and scan.e is not None:
            scan.e[t] *= gs[t] + gv * (a + b * z[t])
            scan.e[t] += 2 * b * gv * scan.f1[t]
            if scan.gh is not None:
                scan.gh[t] = gh
        if scan.u is not None:
            total = total + number((gh * scan.u[t]).sum(dtype=torch.float64))
        gx.append(scan.gain * gh)
        gv = scan.decay * gh
    _leave(state, gv)
    return _collect(gx, scan.static), total


def torch_adjoint_tangent(
    scan: Scan, dg: Tensor, dx: Tensor, dgain: Number, start: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Number]:
    """(gs' [T, M or Q], x' [T or 1, M]) -> (gx' [T or 1, M], (dL/dgain)' or 0); start: v', not changed; state: gv'."""
    assert scan.e is not None
    gs, gx, total = scatter(dg, scan), [], number(0.0)
    dv, hs, us = _rest(start, dx), [], []
    for t, x in enumerate(_rows(dx, len(scan.f1))):
        dh = scan.decay * dv + scan.gain * x
        if scan.u is not None:
            us.append(x - dv)
            dh = dh + dgain * scan.u[t]
        hs.append(dh)
        dv = scan.c[t] * dh
    gv = _rest(state, gs)
    for t in reversed(range(len(gs))):
        gh = scan.f1[t] * gs[t] + scan.c[t] * gv + scan.e[t] * hs[t]
        x, gv = scan.gain * gh, scan.decay * gh
        if scan.u is not None and scan.gh is not None:
            total = total + number((gh * scan.u[t] + scan.gh[t] * us[t]).sum(dtype=torch.float64))
            x, gv = x + dgain * scan.gh[t], gv - dgain * scan.gh[t]
        gx.append(x)
    _leave(state, gv)
    return _collect(gx, scan.static), total


# ---------------------------------------------------------------- numba: blocks first..last of `block` neurons
def _value(  # type: ignore[no-untyped-def]
    x, z, u, state, decay, gain, offset, threshold, v_reset, hard, after,
    height, width, ties, index, block, first, last, out,
):  # fmt: skip
    # neurons.step, operation by operation: the spikes are the same to the bit; y - y is NaN where y is not finite
    steps, size = z.shape
    pooled, learned, static = index.shape[0] > 0, u.shape[0] > 0, x.shape[0] == 1
    carried = state.shape[0] > 0
    one, zero = z.dtype.type(1), z.dtype.type(0)
    v, s = np.empty(block, z.dtype), np.empty(block, z.dtype)
    across = width // 2
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        if carried:
            v[:n] = state[0, lo : lo + n]
        else:
            v[:] = v_reset
        for t in range(steps):
            xt, zt = x[0 if static else t, lo : lo + n], z[t, lo : lo + n]
            target = s[:n] if pooled else out[t, lo : lo + n]
            if learned:
                ut = u[t, lo : lo + n]
                for i in range(n):
                    ut[i] = xt[i] - v[i] + v_reset
            for i in range(n):
                h = decay * v[i] + gain * xt[i] + offset
                y = h - threshold
                f = (one if y >= zero else zero) + (y - y)
                v[i] = h * (one - hard * f) + after * f
                zt[i] = y
                target[i] = f
            if pooled:
                j = lo // (height * width) * (height // 2) * across
                for plane in range(0, n, height * width):
                    for row in range(height // 2):
                        corner = plane + 2 * row * width
                        upper, lower = s[corner : corner + width], s[corner + width : corner + 2 * width]
                        ot, it = out[t, j : j + across], index[t, j : j + across]
                        for i in range(across):
                            q = 2 * i
                            best, k = upper[q], 0
                            for w, place in ((upper[q + 1], 1), (lower[q], width), (lower[q + 1], width + 1)):
                                better = w >= best if ties else w > best
                                best, k = (w, place) if better else (best, k)
                            ot[i] = best
                            it[i] = lo + corner + q + k
                        j += across
        if carried:
            state[0, lo : lo + n] = v[:n]


def _tangent(x, f1, c, u, state, decay, gain, dgain, index, block, first, last, out):  # type: ignore[no-untyped-def]
    steps, size = f1.shape
    pooled, learned, static = index.shape[0] > 0, u.shape[0] > 0, x.shape[0] == 1
    carried = state.shape[0] > 0
    v, s = np.empty(block, f1.dtype), np.empty(block, f1.dtype)
    per = index.shape[1] * block // size if pooled else 0
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        v[:] = 0
        if carried:
            v[:n] = state[0, lo : lo + n]
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
        if carried:
            state[0, lo : lo + n] = v[:n]


def _adjoint(g, f1, c, u, z, e, gh, state, decay, gain, ra, rb, index, block, first, last, out):  # type: ignore[no-untyped-def]
    steps, size = f1.shape
    pooled, learned, static = index.shape[0] > 0, u.shape[0] > 0, out.shape[0] == 1
    keep, carried = z.shape[0] > 0, state.shape[0] > 0
    v, s = np.empty(block, f1.dtype), np.empty(block, f1.dtype)
    per = index.shape[1] * block // size if pooled else 0
    total = 0.0
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        v[:] = 0
        if carried:
            v[:n] = state[0, lo : lo + n]
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
            if keep:
                zt, et = z[t, lo : lo + n], e[t, lo : lo + n]
                for i in range(n):
                    et[i] = et[i] * (gt[i] + v[i] * (ra + rb * zt[i])) + (rb + rb) * v[i] * ft[i]
                if learned:
                    at = gh[t, lo : lo + n]
                    for i in range(n):
                        at[i] = ft[i] * gt[i] + ct[i] * v[i]
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
        if carried:
            state[0, lo : lo + n] = v[:n]
    return total


def _adjoint_tangent(  # type: ignore[no-untyped-def]
    g, x, f1, c, e, u, gh, begin, state, decay, gain, dgain, index, block, first, last, out
):
    steps, size = f1.shape
    pooled, learned = index.shape[0] > 0, u.shape[0] > 0
    static_in, static = x.shape[0] == 1, out.shape[0] == 1
    begun, carried = begin.shape[0] > 0, state.shape[0] > 0
    v, s, hs = np.empty(block, f1.dtype), np.empty(block, f1.dtype), np.empty((steps, block), f1.dtype)
    per = index.shape[1] * block // size if pooled else 0
    total = 0.0
    for b in range(first, last):
        lo = b * block
        n = min(block, size - lo)
        v[:] = 0
        if begun:
            v[:n] = begin[0, lo : lo + n]
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
        if carried:
            v[:n] = state[0, lo : lo + n]
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
        if carried:
            state[0, lo : lo + n] = v[:n]
    return total


_state = {"broken": False, "triton broken": False}


@cache
def _compiled() -> dict[str, Callable[..., Any]] | None:
    found = (_value, _tangent, _adjoint, _adjoint_tangent)
    sources: dict[str, Any] = {source.__name__.removeprefix("_"): source for source in found}
    try:
        import numba

        try:
            return {name: numba.njit(nogil=True, cache=True)(source) for name, source in sources.items()}
        except RuntimeError:  # nowhere to keep the cache
            return {name: numba.njit(nogil=True)(source) for name, source in sources.items()}
    except Exception as error:  # a broken installation may raise anything
        warnings.warn(f"numba is not usable ({error}): spikes run in plain torch, slower", stacklevel=2)
        return None


def kernels() -> dict[str, Callable[..., Any]] | None:
    """The kernels by name, compiled when first called; None, after one warning, if numba does not work here."""
    return None if _state["broken"] else _compiled()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="scan")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


@cache
def _triton_scans() -> ModuleType | None:
    try:
        from ikun import triton_scans
    except Exception as error:  # as above
        warnings.warn(f"Triton is not usable ({error}): spikes run in plain torch on CUDA, slower", stacklevel=2)
        return None
    return triton_scans


def on_device(like: Tensor) -> ModuleType | None:
    """The module with the kernels for such tensors on their device, if it is no CPU."""
    if like.device.type != "cuda" or like.dtype not in (torch.float32, torch.float64) or _state["triton broken"]:
        return None
    return _triton_scans()


def usable(like: Tensor) -> bool:
    """Whether kernels can run on such tensors here."""
    if like.device.type != "cpu":
        return on_device(like) is not None
    return like.dtype in (torch.float32, torch.float64) and kernels() is not None


def _there_first(function: F) -> F:
    """The function of this name in `on_device`'s module, for such tensors, until Triton fails; `function` elsewhere."""

    @wraps(function)
    def chosen(first: Tensor | Scan, *others: Any, **named: Any) -> Any:
        if (module := on_device(first if isinstance(first, Tensor) else first.f1)) is not None:
            try:
                return getattr(module, function.__name__)(first, *others, **named)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton compiles at the first call
                warnings.warn(f"Triton failed ({error}): spikes run in plain torch on CUDA, slower", stacklevel=2)
                _state["triton broken"] = True
        return function(first, *others, **named)

    return cast(F, chosen)


def _launch(
    name: str,
    like: Tensor,
    unit: int,
    tensors: Sequence[Tensor | None],
    rates: Sequence[Number],
    index: Tensor | None,
    out: Tensor,
    sizes: Sequence[int] = (),
) -> float | None:
    """Run one kernel over all blocks of the neurons of `like` [T, M], in units of `unit`, into `out`.

    Returns the sum of what its slices return, or None where it cannot run.
    """
    if like.device.type != "cpu" or not usable(like) or (found := kernels()) is None:
        return None
    dtype, size = like.numpy().dtype, like.shape[1]
    block = max(1, BLOCK // unit) * unit
    blocks = -(-size // block)
    threads = max(1, min(torch.get_num_threads(), blocks, 1 + like.numel() // 32768))
    edges = [blocks * i // threads for i in range(threads + 1)]
    arrays = [np.empty((0, 0), dtype) if t is None else t.contiguous().numpy() for t in tensors]
    numbers = [*(dtype.type(float(r)) for r in rates), *sizes]
    places = np.empty((0, 0), np.int32) if index is None else index.numpy()
    fixed, target = [*arrays, *numbers, places, block], out.numpy()
    kernel, slices = found[name], list(pairwise(edges))
    try:
        others = [_pool(threads - 1).submit(kernel, *fixed, a, b, target) for a, b in slices[1:]]
        totals = [kernel(*fixed, *slices[0], target), *(f.result() for f in others)]
    except Exception as error:  # numba compiles at the first call
        warnings.warn(f"numba failed ({error}): spikes run in plain torch, slower", stacklevel=2)
        _state["broken"] = True
        return None
    return float(sum(total or 0.0 for total in totals))


@_there_first
def value(
    x: Tensor,
    steps: int,
    rates: Sequence[Number],
    hard: bool,
    plane: tuple[int, int] | None,
    last: bool,
    learned: bool,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None:
    """x [T or 1, M] -> (s [T, M or Q], z [T, M], index [T, Q] or None, u [T, M] or None); None where no kernel can run.

    rates: decay, gain, (1 - decay) v_reset, threshold, v_reset. plane: (height, width) of the planes that are pooled,
    last: the last of equal entries is selected. learned: u is wanted. state: v.
    """
    size = x.shape[1]
    z = x.new_empty((steps, size))
    height, width = plane or (1, 1)
    pooled = size // (height * width) * (height // 2) * (width // 2)
    kind = torch.int32 if size < 2**31 else torch.int64
    index = None if plane is None else torch.empty((steps, pooled), dtype=kind)
    u = torch.empty_like(z) if learned else None
    out = z.new_empty((steps, size if plane is None else pooled))
    rates = (*rates, hard, rates[4] if hard else -rates[3])
    done = _launch("value", z, height * width, (x, z, u, state), rates, index, out, (height, width, last))
    return None if done is None else (out, z, index, u)


def _gx(scan: Scan) -> Tensor:
    return scan.f1.new_empty((1 if scan.static else len(scan.f1), scan.f1.shape[1]))


@_there_first
def tangent(scan: Scan, dx: Tensor, dgain: Number = 0.0, state: Tensor | None = None) -> Tensor:
    """See torch_tangent."""
    out = scan.f1.new_empty((scan.f1 if scan.index is None else scan.index).shape)
    tensors, rates = (dx, scan.f1, scan.c, scan.u, state), (scan.decay, scan.gain, dgain)
    done = _launch("tangent", scan.f1, scan.unit, tensors, rates, scan.index, out)
    return torch_tangent(scan, dx, dgain, state) if done is None else out


@_there_first
def adjoint(scan: Scan, g: Tensor, z: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Number]:
    """See torch_adjoint."""
    out, kept = _gx(scan), (None,) * 3 if z is None else (z, scan.e, scan.gh)
    tensors, rates = (g, scan.f1, scan.c, scan.u, *kept, state), (scan.decay, scan.gain, *scan.reset)
    total = _launch("adjoint", scan.f1, scan.unit, tensors, rates, scan.index, out)
    return torch_adjoint(scan, g, z, state) if total is None else (out, total)


@_there_first
def adjoint_tangent(
    scan: Scan, dg: Tensor, dx: Tensor, dgain: Number = 0.0, start: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Number]:
    """See torch_adjoint_tangent."""
    out, tensors = _gx(scan), (dg, dx, scan.f1, scan.c, scan.e, scan.u, scan.gh, start, state)
    total = _launch("adjoint_tangent", scan.f1, scan.unit, tensors, (scan.decay, scan.gain, dgain), scan.index, out)
    return torch_adjoint_tangent(scan, dg, dx, dgain, start, state) if total is None else (out, total)
