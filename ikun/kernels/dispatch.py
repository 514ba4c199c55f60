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

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from itertools import pairwise
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ikun.kernels import numba_kernels as numba_scans
from ikun.kernels.openmp import side_by_side
from ikun.kernels.scan import (
    BLOCK,
    F,
    Number,
    Scan,
    begin_second,
    reset_slope,
    torch_adjoint,
    torch_adjoint_tangent,
    torch_slopes,
    torch_tangent,
)
from ikun.neurons import Dynamics
from ikun.surrogates import Surrogate

GRAIN = 32768  # elements that are worth a thread
KERNELS = ("value", "slopes", "tangent", "adjoint", "adjoint_tangent")
# ---------------------------------------------------------------- kernels
_state = {"broken": False, "triton broken": False}


@cache
def _compiled() -> dict[str, Callable[..., Any]] | None:
    sources: dict[str, Any] = {name: getattr(numba_scans, name) for name in KERNELS}
    try:
        import numba

        try:
            return {
                name: numba.njit(nogil=True, cache=True, error_model="numpy")(source)
                for name, source in sources.items()
            }
        except RuntimeError:  # nowhere to keep the cache
            return {name: numba.njit(nogil=True, error_model="numpy")(source) for name, source in sources.items()}
    except Exception as error:  # a broken installation may raise anything
        warnings.warn(f"numba is not usable ({error}): spikes run in plain torch, slower", stacklevel=2)
        return None


def kernels() -> dict[str, Callable[..., Any]] | None:
    """The kernels by name, compiled when first called; None, after one warning, if numba does not work here."""
    return None if _state["broken"] else _compiled()


@cache
def _triton_scans() -> ModuleType | None:
    try:
        from ikun.kernels import triton_kernels as triton_scans
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


def _on_threads(
    kernel: Callable[..., Any], arguments: Sequence[Any], out: Sequence[Any], count: int, size: int
) -> float:
    """kernel(*arguments, first, last, *out) over 0..count, one slice a thread, for `size` elements in all; the sum of
    what the slices return."""
    threads = max(1, min(torch.get_num_threads(), count, 1 + size // GRAIN))
    edges = [count * i // threads for i in range(threads + 1)]
    slices = [partial(kernel, *arguments, first, last, *out) for first, last in pairwise(edges)]
    return float(sum(total or 0.0 for total in side_by_side(slices)))


def _broken(error: Exception) -> None:
    """numba compiles at the first call, and may fail then."""
    warnings.warn(f"numba failed ({error}): spikes run in plain torch, slower", stacklevel=2)
    _state["broken"] = True


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
    arrays = [np.empty((0, 0), dtype) if t is None else t.contiguous().numpy() for t in tensors]
    numbers = [*(dtype.type(float(r)) for r in rates), *sizes]
    places = np.empty((0, 0), np.int32) if index is None else index.numpy()
    try:
        fixed = (*arrays, *numbers, places, block)
        return _on_threads(found[name], fixed, (out.numpy(),), -(-size // block), like.numel())
    except Exception as error:
        _broken(error)
        return None


def jet(surrogate: Surrogate) -> tuple[int, float, float, float] | None:
    """(family, p, q, k) of the kernels, None for a surrogate that they do not know.

    f'' = k z f'^2 (LORENTZ), k sign(z) f'^1.5 (BUMP), k sign(z) (TRIANGLE).
    """
    width = surrogate.parameter
    match surrogate.name:
        case "atan":
            q = (math.pi * width / 2) ** 2
            return numba_scans.LORENTZ, surrogate.peak, q, -2 * q / surrogate.peak
        case "fast_sigmoid" | "superspike" | "softsign":
            return numba_scans.BUMP, surrogate.peak, width, -2 * width / math.sqrt(surrogate.peak)
        case "triangle" | "linear":
            return numba_scans.TRIANGLE, 1 / width, width**-2, -(width**-2)
        case "rect":
            return numba_scans.RECT, 1 / width, width / 2, 0.0
        case _:
            return None


def slopes(d: Dynamics, z: Tensor) -> tuple[Tensor, Tensor]:
    """(f1, c) [T, M] at z [T, M]."""
    f1, c = torch.empty_like(z), torch.empty_like(z)
    known = None if d.relaxed or z.device.type != "cpu" or not usable(z) else jet(d.surrogate)
    if known is not None and (found := kernels()) is not None:
        flat = [t.view(-1).numpy() for t in (z, f1, c)]
        numbers = [flat[0].dtype.type(r) for r in (*known[1:3], *reset_slope(d))]
        try:
            fixed = (flat[0], known[0], *numbers, d.reset == "soft")
            _on_threads(found["slopes"], fixed, flat[1:], z.numel(), z.numel())
            return f1, c
        except Exception as error:
            _broken(error)
    torch_slopes(d, z, f1, c)
    return f1, c


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
    known = None if scan.surrogate is None else jet(scan.surrogate)
    if z is not None and known is None:
        begin_second(scan, z)
    family, k = (-1, 0.0) if known is None else (known[0], known[3])
    tensors, rates = (g, scan.f1, scan.c, scan.u, *kept, state), (scan.decay, scan.gain, *scan.reset, k)
    total = _launch("adjoint", scan.f1, scan.unit, tensors, rates, scan.index, out, (family,))
    return torch_adjoint(scan, g, z, state) if total is None else (out, total)


@_there_first
def adjoint_tangent(
    scan: Scan, dg: Tensor, dx: Tensor, dgain: Number = 0.0, start: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Number]:
    """See torch_adjoint_tangent."""
    out, tensors = _gx(scan), (dg, dx, scan.f1, scan.c, scan.e, scan.u, scan.gh, start, state)
    total = _launch("adjoint_tangent", scan.f1, scan.unit, tensors, (scan.decay, scan.gain, dgain), scan.index, out)
    return torch_adjoint_tangent(scan, dg, dx, dgain, start, state) if total is None else (out, total)
