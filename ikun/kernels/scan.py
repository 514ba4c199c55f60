"""The scan over time of a layer of spiking neurons: its parameters, and its passes in plain torch.

`ikun.kernels.dispatch` documents the equations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ikun.neurons import Dynamics
    from ikun.surrogates import Surrogate


BLOCK = 1024  # neurons per block, so that local arrays [T, BLOCK] fit in the cache
PIECE = 65536  # elements per piece, so that the temporaries of a surrogate's formula fit in the cache
F = TypeVar("F", bound=Callable[..., Any])
Number = float | Tensor  # a scalar tensor on a device, because reading its value would synchronize the device


def scalar(t: Tensor | float) -> Number:
    """Return the value of a scalar as a float, or as a detached tensor if it is on a device."""
    return t.detach() if isinstance(t, Tensor) and t.device.type != "cpu" else float(t)


@dataclass
class Scan:
    """The scan over T steps of M neurons (of all samples) at fixed weights.

    Attributes:
        f1: f'(h - threshold) [T, M].
        c: dv/dh [T, M], of the dtype of `dv_dtype`, or of f1's.
        decay: Factor of the previous potential.
        gain: Factor of the input current.
        static: Whether the input is the same at all steps, so that x is [1, M].
        index: Positions of the entries that max-pooling selects [T, Q], or None without pooling.
        unit: Number of neurons in a pooled plane. Blocks of neurons are multiples of it, so that no window is split.
        e: Coefficient of h' in the tangent of the adjoint [T, M], or None before an adjoint that keeps it.
        u: x[t] - v[t-1] + v_reset [T, M] for a learned decay, else None.
        gh: The adjoint of h [T, M], which is kept for a learned decay.
        reset: (a, b) in c = k + (a + b z) f1.
        width: Width of a pooled plane.
        surrogate: The surrogate from which the adjoint computes f'' for e. If None, e already contains f''.
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
    surrogate: Surrogate | None = None


# ---------------------------------------------------------------- plain torch
def _rows(x: Tensor, steps: int) -> Tensor:
    """Expand x [T or 1, M] to [T, M]."""
    return x.expand(steps, -1)


def scatter(g: Tensor, scan: Scan) -> Tensor:
    """Scatter the adjoint of pooled spikes [T, Q] to all neurons [T, M]. Without pooling, return g."""
    if scan.index is None:
        return g
    return torch.zeros_like(scan.f1).scatter_(1, scan.index.long(), g)


def _collect(gx: list[Tensor], static: bool) -> Tensor:
    """Stack gx, which is in reverse time order, and sum it over time for a static input."""
    x = torch.stack(gx[::-1])
    return x.sum(0, keepdim=True) if static else x


def _rest(state: Tensor | None, like: Tensor) -> Tensor:
    """Return the initial state [M]: zeros unless a state is given."""
    return torch.zeros_like(like[0]) if state is None else state[0]


def _leave(state: Tensor | None, end: Tensor) -> None:
    """Store the final state, if a state is used."""
    if state is not None:
        state.copy_(end)


def by_pieces(fill: Callable[..., object], *tensors: Tensor) -> None:
    """Apply an element-wise function that writes to some of its contiguous arguments.

    On the CPU the tensors are processed in pieces that fit in the cache.
    """
    size = PIECE if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    for parts in zip(*(t.view(-1).split(size) for t in tensors), strict=True):
        fill(*parts)


def reset_slope(d: Dynamics) -> tuple[float, float]:
    """Return (a, b) in c = k + (a + b z) f1."""
    if d.detach_reset:
        return 0.0, 0.0
    return (-d.threshold, 0.0) if d.reset == "soft" else (d.v_reset - d.threshold, -1.0)


def dv_dtype(d: Dynamics, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of dv/dh: uint8 where it is 0 or 1 (a detached reset), which takes less memory."""
    return torch.uint8 if d.detach_reset and not d.relaxed else dtype


def torch_slopes(d: Dynamics, z: Tensor, f1: Tensor, c: Tensor) -> None:
    """Write the derivatives f1 and c at z = h - threshold, each [T, M]."""

    def fill(z: Tensor, f1: Tensor, c: Tensor) -> None:
        f1.copy_(d.surrogate.first(z))
        if d.reset == "soft":
            c.fill_(1)
        elif d.relaxed:
            c.copy_(1 - d.surrogate.primitive(z))
        else:
            torch.lt(z, 0, out=c)  # writes numbers directly, which is much faster than converting a mask
        if not d.detach_reset:
            a, b = reset_slope(d)
            c.addcmul_(a + b * z, f1)

    by_pieces(fill, z, f1, c)


def begin_second(scan: Scan, z: Tensor) -> None:
    """Write f'' at z to scan.e, if the scan computes e."""
    if (surrogate := scan.surrogate) is not None and scan.e is not None:
        by_pieces(lambda z, e: e.copy_(surrogate.second(z)), z, scan.e)


def torch_tangent(scan: Scan, dx: Tensor, dgain: Number, state: Tensor | None = None) -> Tensor:
    """Compute the tangent of the spikes.

    Args:
        scan: The scan.
        dx: Tangent x' of the input [T or 1, M].
        dgain: Tangent of a learned gain.
        state: v' before the first step [1, M]. It is replaced by v' after the last step. None: start at 0.

    Returns:
        The tangent s' [T, M or Q].
    """
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
    """Compute the adjoint of the scan.

    Args:
        scan: The scan.
        g: Adjoint gs of the spikes [T, M or Q].
        z: If given, h - threshold [T, M]. scan.e and scan.gh are then computed and kept for `torch_adjoint_tangent`.
        state: gv after the last step [1, M]. It is replaced by gv before the first step. None: start at 0.

    Returns:
        The adjoint gx of the input [T or 1, M], and dL/dgain, which is 0 without a learned decay.
    """
    if z is not None:
        begin_second(scan, z)
    gs, gx, total = scatter(g, scan), [], scalar(0.0)
    gv, (a, b) = _rest(state, gs), scan.reset
    for t in reversed(range(len(gs))):
        gh = scan.f1[t] * gs[t] + scan.c[t] * gv
        if z is not None and scan.e is not None:
            scan.e[t] *= gs[t] + gv * (a + b * z[t])
            scan.e[t] += 2 * b * gv * scan.f1[t]
            if scan.gh is not None:
                scan.gh[t] = gh
        if scan.u is not None:
            total = total + scalar((gh * scan.u[t]).sum(dtype=torch.float64))
        gx.append(scan.gain * gh)
        gv = scan.decay * gh
    _leave(state, gv)
    return _collect(gx, scan.static), total


def torch_adjoint_tangent(
    scan: Scan, dg: Tensor, dx: Tensor, dgain: Number, start: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Number]:
    """Compute the tangent of the adjoint.

    Args:
        scan: The scan, after an adjoint that kept e and gh.
        dg: Tangent gs' of the spikes' adjoint [T, M or Q].
        dx: Tangent x' of the input [T or 1, M].
        dgain: Tangent of a learned gain.
        start: v' before the first step [1, M]. It is not modified.
        state: gv' after the last step [1, M]. It is replaced by gv' before the first step. None: start at 0.

    Returns:
        The tangent gx' [T or 1, M], and (dL/dgain)', which is 0 without a learned decay.
    """
    assert scan.e is not None
    gs, gx, total = scatter(dg, scan), [], scalar(0.0)
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
            total = total + scalar((gh * scan.u[t] + scan.gh[t] * us[t]).sum(dtype=torch.float64))
            x, gv = x + dgain * scan.gh[t], gv - dgain * scan.gh[t]
        gx.append(x)
    _leave(state, gv)
    return _collect(gx, scan.static), total
