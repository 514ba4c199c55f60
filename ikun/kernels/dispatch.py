"""The scans of spiking neurons over time, each as one pass over memory.

There are four scans: the spikes (value), their adjoint, their tangent and the tangent of the adjoint. At fixed weights
a scan (see `ikun.neurons`) is described by three arrays [T, M], with M the number of neurons of all samples. These are
f1 = f'(h - theta), c = dv/dh, and e, the coefficient of h' in gh'. Let a' be the tangent of a and ga the adjoint of a.
At the ends of the sequence, v' = gv' = 0. Then

    tangent              h' = decay v' + gain x';   s' = f1 h';   v' = c h'
    adjoint              gh = f1 gs + c gv;         gx = gain gh;     gv <- decay gh
    tangent of adjoint   gh' = f1 gs' + c gv' + e h';   gx' = gain gh';   gv' <- decay gh'

    c = k + (a + b z) f1;   e = (gs + gv (a + b z)) f2 + 2 b gv f1           z = h - theta, gv: the adjoint of v[t]
    hard: k = 1 - s, a + b z = v_reset - h;   soft: k = 1, a + b z = -theta;   detached: a + b z = 0

A learned decay (PLIF: gain = sigmoid(w), decay = 1 - gain) adds the following terms, in which
u[t] = x[t] - v[t-1] + v_reset:

    h' += gain' u;   dL/dgain = sum gh u;   gx' += gain' gh;   gv' -= gain' gh;   (dL/dgain)' = sum gh' u + gh u'

The kernels include the 2 x 2 max-pooling that may follow the neurons. They choose the entries (value), select them
(tangent) and scatter to them (adjoint). `index` [T, Q] contains the positions of the entries in 0..M-1. An input that
is the same at all steps is a single row [1, M], and its adjoint is the sum over T.

A sequence can be processed in segments of time. A scan with a state [1, M] starts from this state instead of the rest
state (v_reset for v, and 0 for v', gv and gv') and writes its final state to it. The scans of v and v' run forward in
time, those of gv and gv' backward.

On the CPU the kernels are compiled by numba. They process blocks of neurons that fit in the cache, and every thread
processes some of the blocks. On CUDA the kernels are those of `ikun.kernels.triton_kernels`. The fallback is plain
torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from itertools import pairwise
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hessian_tools.runtime.openmp import side_by_side
from ikun.kernels.families import family_constants
from ikun.kernels.scan import (
    BLOCK,
    F,
    Number,
    Scan,
    dv_dtype,
    reset_slope,
    torch_adjoint,
    torch_adjoint_tangent,
    torch_slopes,
    torch_tangent,
)
from ikun.neurons import Dynamics
from ikun.pooling import selection

GRAIN = 32768  # elements per thread; below this, another thread is not worth its overhead
KERNELS = ("value", "slopes", "select", "tangent", "adjoint", "adjoint_tangent")
# Set to True after a kernel has failed to compile; plain torch is used from then on.
_state = {"broken": False, "triton broken": False}


@cache
def _compiled() -> dict[str, Callable[..., Any]] | None:
    """Return the numba kernels by name, or None after a warning if numba cannot be used."""
    try:
        import numba

        from ikun.kernels import numba_kernels

        sources: dict[str, Any] = {name: getattr(numba_kernels, name) for name in KERNELS}
        try:
            return {
                name: numba.njit(nogil=True, cache=True, error_model="numpy")(source)
                for name, source in sources.items()
            }
        except RuntimeError:  # no writable directory for the cache
            return {name: numba.njit(nogil=True, error_model="numpy")(source) for name, source in sources.items()}
    except Exception as error:  # a broken installation may raise any exception
        warnings.warn(f"numba is not usable ({error}): spikes run in plain torch, slower", stacklevel=2)
        return None


def kernels() -> dict[str, Callable[..., Any]] | None:
    """Return the numba kernels by name, or None if numba does not work. They are compiled at the first call."""
    return None if _state["broken"] else _compiled()


@cache
def _triton_scans() -> ModuleType | None:
    """Return the module of the Triton kernels, or None after a warning if Triton cannot be imported."""
    try:
        from ikun.kernels import triton_kernels as triton_scans
    except Exception as error:  # a broken installation may raise any exception
        warnings.warn(f"Triton is not usable ({error}): spikes run in plain torch on CUDA, slower", stacklevel=2)
        return None
    return triton_scans


def on_device(like: Tensor) -> ModuleType | None:
    """Return the module with the kernels for tensors on a CUDA device. None for other tensors or without Triton."""
    if like.device.type != "cuda" or like.dtype not in (torch.float32, torch.float64) or _state["triton broken"]:
        return None
    return _triton_scans()


def usable(like: Tensor) -> bool:
    """Return whether kernels can run on tensors with this dtype and device."""
    if like.device.type != "cpu":
        return on_device(like) is not None
    return like.dtype in (torch.float32, torch.float64) and kernels() is not None


def _triton_if_possible(function: F) -> F:
    """Decorate a scan to use the Triton function of the same name for CUDA tensors, until Triton fails."""

    @wraps(function)
    def chosen(first: Tensor | Scan, *others: Any, **named: Any) -> Any:
        if (module := on_device(first if isinstance(first, Tensor) else first.f1)) is not None:
            try:
                return getattr(module, function.__name__)(first, *others, **named)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton compiles at the first call and may fail then
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise  # what a graph cannot contain may still run without one
                warnings.warn(f"Triton failed ({error}): spikes run in plain torch on CUDA, slower", stacklevel=2)
                _state["triton broken"] = True
        return function(first, *others, **named)

    return cast(F, chosen)


def _on_threads(
    kernel: Callable[..., Any], arguments: Sequence[Any], out: Sequence[Any], count: int, size: int
) -> float:
    """Call kernel(*arguments, first, last, *out) on consecutive parts of 0..count, one thread per part.

    Args:
        kernel: The compiled kernel.
        arguments: Its input arguments.
        out: Its output arrays.
        count: Number of blocks or elements to divide among the threads.
        size: Number of elements in total, which determines the number of threads.

    Returns:
        The sum of the return values.
    """
    threads = max(1, min(torch.get_num_threads(), count, 1 + size // GRAIN))
    edges = [count * i // threads for i in range(threads + 1)]
    slices = [partial(kernel, *arguments, first, last, *out) for first, last in pairwise(edges)]
    return float(sum(total or 0.0 for total in side_by_side(slices)))


def _numba_failed(error: Exception) -> None:
    """Warn and stop using numba. numba compiles at the first call, and may fail then."""
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
    """Run one numba kernel over all blocks of neurons.

    Args:
        name: Name of the kernel.
        like: A tensor [T, M] with the dtype and device of the scan.
        unit: Number of neurons in a pooled plane. A block is a multiple of it.
        tensors: Input tensors. None becomes an empty array.
        rates: Scalar arguments in the dtype of `like`.
        index: Positions of the pooled entries [T, Q], or None without pooling.
        out: The output tensor.
        sizes: Integer arguments.

    Returns:
        The sum of the kernel's return values, or None if the kernel cannot run.
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
        _numba_failed(error)
        return None


def slopes(d: Dynamics, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the derivatives f1 and c [T, M] at z = h - threshold [T, M]. c has the dtype of `dv_dtype`."""
    f1, c = torch.empty_like(z), torch.empty_like(z, dtype=dv_dtype(d, z.dtype))
    if not d.relaxed and z.device.type == "cpu" and usable(z) and (found := kernels()) is not None:
        flat = [t.view(-1).numpy() for t in (z, f1, c)]
        family, p, q, _ = family_constants(d.surrogate)
        numbers = [flat[0].dtype.type(r) for r in (p, q, *reset_slope(d))]
        try:
            fixed = (flat[0], family, *numbers, d.reset == "soft", d.detach_reset)
            _on_threads(found["slopes"], fixed, flat[1:], z.numel(), z.numel())
            return f1, c
        except Exception as error:
            _numba_failed(error)
    torch_slopes(d, z, f1, c)
    return f1, c


@_triton_if_possible
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
    """Compute the spikes.

    Args:
        x: Input currents [T or 1, M].
        steps: Number of time steps T.
        rates: decay, gain, (1 - decay) v_reset, threshold, v_reset.
        hard: Whether the reset is hard.
        plane: Height and width of a pooled plane, or None without pooling.
        last: Whether max-pooling selects the last of several equal entries instead of the first.
        learned: Whether to compute u, for a learned decay.
        state: v before the first step [1, M]. It is replaced by v after the last step. None: start at v_reset.

    Returns:
        The spikes [T, M or Q], z [T, M], index [T, Q] or None, and u [T, M] or None. The result is None if no kernel
        can run.
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


def select(s: Tensor, plane: tuple[int, int], ties: str) -> tuple[Tensor, Tensor]:
    """Pool spikes.

    Args:
        s: Spikes [T, M].
        plane: Height and width of a pooled plane.
        ties: Tie rule, "first" or "last".

    Returns:
        The pooled spikes [T, Q], and their positions in 0..M-1.
    """
    height, width = plane
    if s.device.type == "cpu" and usable(s) and s.shape[1] < 2**31 and (found := kernels()) is not None:
        planes, each = s.shape[1] // (height * width), (height // 2) * (width // 2)
        y = s.new_empty(len(s), planes, each)
        index = torch.empty(y.shape, dtype=torch.int32)
        flat = s.contiguous().view(len(s), planes, -1).numpy()
        try:
            fixed = flat, height, width, ties == "last"
            _on_threads(found["select"], fixed, (y.numpy(), index.numpy()), planes, s.numel())
            return y.flatten(1), index.flatten(1)
        except Exception as error:
            _numba_failed(error)
    index = selection(s.view(len(s), -1, *plane), ties).flatten(1)
    return s.gather(1, index.long()), index


def _gx(scan: Scan) -> Tensor:
    """Return an empty tensor for the adjoint of the input [T or 1, M]."""
    return scan.f1.new_empty((1 if scan.static else len(scan.f1), scan.f1.shape[1]))


@_triton_if_possible
def tangent(scan: Scan, dx: Tensor, dgain: Number = 0.0, state: Tensor | None = None) -> Tensor:
    """Compute the tangent of the spikes. See `ikun.kernels.scan.torch_tangent`."""
    out = scan.f1.new_empty((scan.f1 if scan.index is None else scan.index).shape)
    tensors, rates = (dx, scan.f1, scan.c, scan.u, state), (scan.decay, scan.gain, dgain)
    done = _launch("tangent", scan.f1, scan.unit, tensors, rates, scan.index, out)
    return torch_tangent(scan, dx, dgain, state) if done is None else out


@_triton_if_possible
def adjoint(scan: Scan, g: Tensor, z: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Number]:
    """Compute the adjoint of the scan. See `ikun.kernels.scan.torch_adjoint`."""
    out, kept = _gx(scan), (None,) * 3 if z is None else (z, scan.e, scan.gh)
    family, _, q, k = (-1, 0.0, 0.0, 0.0) if scan.surrogate is None else family_constants(scan.surrogate)
    tensors, rates = (g, scan.f1, scan.c, scan.u, *kept, state), (scan.decay, scan.gain, *scan.reset, q, k)
    total = _launch("adjoint", scan.f1, scan.unit, tensors, rates, scan.index, out, (family,))
    return torch_adjoint(scan, g, z, state) if total is None else (out, total)


@_triton_if_possible
def adjoint_tangent(
    scan: Scan, dg: Tensor, dx: Tensor, dgain: Number = 0.0, start: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Number]:
    """Compute the tangent of the adjoint. See `ikun.kernels.scan.torch_adjoint_tangent`."""
    out, tensors = _gx(scan), (dg, dx, scan.f1, scan.c, scan.e, scan.u, scan.gh, start, state)
    total = _launch("adjoint_tangent", scan.f1, scan.unit, tensors, (scan.decay, scan.gain, dgain), scan.index, out)
    return torch_adjoint_tangent(scan, dg, dx, dgain, start, state) if total is None else (out, total)
