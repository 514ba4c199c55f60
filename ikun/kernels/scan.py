"""One neuron scan: its parameters, and its passes in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ikun.neurons import Dynamics
    from ikun.surrogates import Surrogate


BLOCK = 1024  # neurons of a block: [T, BLOCK] local arrays
PIECE = 65536  # elements of a piece: the temporaries of a surrogate's formula stay in the cache
F = TypeVar("F", bound=Callable[..., Any])
Number = float | Tensor  # a Tensor [] on devices: reading it would wait for all that is queued there


def scalar(t: Tensor | float) -> Number:
    """A tensor's only entry, without waiting for a device."""
    return t.detach() if isinstance(t, Tensor) and t.device.type != "cpu" else float(t)


@dataclass
class Scan:
    """A scan at fixed weights: f1, c, e, u, gh [T, M]; gh: the kept adjoint of h, for a learned decay; reset: (a, b).

    unit: the size of one pooled plane; blocks are multiples of it, so that no window is cut. width: of its rows.
    static: x is [1, M]. surrogate: of which the adjoint computes e; without one from the f'' that e holds.
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


def by_pieces(fill: Callable[..., object], *tensors: Tensor) -> None:
    """Run an element-wise function that fills some of its contiguous arguments; on the CPU piece by piece."""
    size = PIECE if tensors[0].device.type == "cpu" else max(1, tensors[0].numel())
    for parts in zip(*(t.view(-1).split(size) for t in tensors), strict=True):
        fill(*parts)


def reset_slope(d: Dynamics) -> tuple[float, float]:
    """(a, b) of c = k + (a + b z) f1."""
    if d.detach_reset:
        return 0.0, 0.0
    return (-d.threshold, 0.0) if d.reset == "soft" else (d.v_reset - d.threshold, -1.0)


def torch_slopes(d: Dynamics, z: Tensor, f1: Tensor, c: Tensor) -> None:
    """Fill f1 and c at z."""

    def fill(z: Tensor, f1: Tensor, c: Tensor) -> None:
        f1.copy_(d.surrogate.first(z))
        if d.reset == "soft":
            c.fill_(1)
        elif d.relaxed:
            c.copy_(1 - d.surrogate.primitive(z))
        else:
            torch.lt(z, 0, out=c)  # into floats: many times faster than a mask and its conversion
        if not d.detach_reset:
            a, b = reset_slope(d)
            c.addcmul_(a + b * z, f1)

    by_pieces(fill, z, f1, c)


def begin_second(scan: Scan, z: Tensor) -> None:
    """Fill scan.e with f'' at z, if the scan is to."""
    if (surrogate := scan.surrogate) is not None and scan.e is not None:
        by_pieces(lambda z, e: e.copy_(surrogate.second(z)), z, scan.e)


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
    """gs [T, M or Q] -> (gx [T or 1, M], dL/dgain or 0); with z [T, M] also fills scan.e and gh.

    state: gv.
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
    """(gs' [T, M or Q], x' [T or 1, M]) -> (gx' [T or 1, M], (dL/dgain)' or 0); start: v', not changed; state: gv'."""
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
