"""Neurons with dense recurrent weights over time as one node of an autograd graph that can be differentiated twice.

The input current of a step is c[t] = x[t] + V s[t-1], with s[-1] = 0 and the potential at rest. With V fixed the passes
are those of `ikun.kernels.dispatch`, in which V couples the steps:

    tangent              c' = x' + V s'[t-1];  h' = decay v' + gain c';   s' = f1 h';   v' = c h'
    adjoint              gs += V^T gx[t+1];  gh = f1 gs + c gv;   gx = gain gh;   gv <- decay gh
    tangent of adjoint   gs' += V^T gx'[t+1];  gh' = f1 gs' + c gv' + e h';   gx' = gain gh';   gv' <- decay gh'

Everything else is a product over all steps at once: V' s in the tangent of the input, V'^T gx in that of the adjoint,
and the gradient sum over t of gx[t] s[t-1]^T.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ikun.kernels.scan import reset_slope
from ikun.nodes.autograd import Slopes, _Link
from ikun.nodes.passes import ScanSpec, decode_spec, encode_spec, pass_of, register_pass


# ---------------------------------------------------------------- the passes
def recurrent_tangent(dx: Tensor, f1: Tensor, c: Tensor, weight: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """Return the tangents of the spikes and of h [T, N, M] for the tangent dx of the input [T, N, M]."""
    s, ds, dh = decode_spec(spec), torch.empty_like(f1), dx * decode_spec(spec).gain
    turned = weight.t() if s.gain == 1 else weight.t() * s.gain
    v = before = None
    for slope, kept, y, h in zip(f1, c, ds, dh, strict=True):
        if before is not None:
            h.addmm_(before, turned)
            h.add_(v, alpha=s.decay)
        torch.mul(slope, h, out=y)
        v, before = kept * h, y
    return ds, dh


def recurrent_adjoint(g: Tensor, f1: Tensor, c: Tensor, weight: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """Return the adjoints of the input and of the spikes [T, N, M] for the adjoint g of the spikes outside."""
    s, gx, gs = decode_spec(spec), torch.empty_like(f1), g.clone()
    gv = after = None
    for slope, kept, out, x in zip(*(t.unbind(0)[::-1] for t in (f1, c, gs, gx)), strict=True):
        if after is not None:
            out.addmm_(after, weight)
        torch.mul(slope, out, out=x)
        if gv is not None:
            x.addcmul_(kept, gv)
        gv = x * s.decay
        after = x.mul_(s.gain) if s.gain != 1 else x
    return gx, gs


def recurrent_curvature(gx: Tensor, gs: Tensor, z: Tensor, f2: Tensor | None, f1: Tensor, spec: str) -> Tensor:
    """Return e [T, N, M], the coefficient of h' in the tangent of the adjoint, from what the adjoint returns."""
    s = decode_spec(spec)
    a, b = reset_slope(s.dynamics)
    e = s.dynamics.surrogate.second(z) if f2 is None else f2.clone()
    if not (a or b):
        return e.mul_(gs)
    gv = torch.zeros_like(gx)
    torch.mul(gx[1:], s.decay / s.gain, out=gv[:-1])
    e.mul_(gs + gv * (a + b * z))
    return e.addcmul_(gv, f1, value=2 * b) if b else e


def recurrent_adjoint_tangent(
    dg: Tensor | None, dh: Tensor, f1: Tensor, c: Tensor, e: Tensor, weight: Tensor, spec: str
) -> Tensor:
    """Return the tangent of the adjoint of the input [T, N, M]. dg: the tangent of the spikes' adjoint; None: zero."""
    s, gx = decode_spec(spec), e * dh
    gv = after = None
    others = (None,) * len(f1) if dg is None else dg.unbind(0)[::-1]
    for slope, kept, x, g in zip(*(t.unbind(0)[::-1] for t in (f1, c, gx)), others, strict=True):
        if after is not None:
            x.addcmul_(slope, torch.mm(after, weight) if g is None else torch.addmm(g, after, weight))
            x.addcmul_(kept, gv)
        elif g is not None:
            x.addcmul_(slope, g)
        gv = x * s.decay
        after = x.mul_(s.gain) if s.gain != 1 else x
    return gx


register_pass(recurrent_tangent, lambda dx, f1, *_: (torch.empty_like(f1), torch.empty_like(f1)))
register_pass(recurrent_adjoint, lambda g, f1, *_: (torch.empty_like(f1), torch.empty_like(f1)))
register_pass(recurrent_curvature, lambda gx, *_: torch.empty_like(gx))
register_pass(recurrent_adjoint_tangent, lambda dg, dh, *_: torch.empty_like(dh))


# ---------------------------------------------------------------- the node
class _Spikes(torch.autograd.Function):
    """(x, weight) -> spikes [T, N, M], which are given."""

    @staticmethod
    def forward(ctx: Any, link: Tensor, weight: Tensor, y: Tensor, z: Tensor, spec: str, jet: Slopes | None) -> Tensor:
        y = y.clone()
        ctx.save_for_backward(link, weight, z, y)
        ctx.spec, ctx.jet = spec, jet
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        link, weight, z, y = ctx.saved_tensors
        gx = _Adjoint.apply(g, link, weight, y.detach(), z, ctx.spec, ctx.jet)
        gw = _outer(gx[1:], y[:-1]) if ctx.needs_input_grad[1] else None
        return gx, gw, None, None, None, None


class _Adjoint(torch.autograd.Function):
    """(gs, x, weight) -> gx."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, y: Tensor, z: Tensor, spec: str, jet: Slopes | None
    ) -> Tensor:
        f2 = None
        if jet is None:
            f1, c = pass_of("slopes")(z, spec)
        else:
            f1, f2 = jet(z)[:2]
            c = pass_of("reset_slopes")(z, f1, spec)
        gx, gs = pass_of("recurrent_adjoint")(g, f1, c, weight, spec)
        ctx.save_for_backward(gx, gs, weight, y, z, f2, f1, c)
        ctx.spec = spec
        found: Tensor = gx
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> Any:
        gx, gs, weight, y, z, f2, f1, c = ctx.saved_tensors
        ds, dh = pass_of("recurrent_tangent")(dx, f1, c, weight, ctx.spec)
        e = pass_of("recurrent_curvature")(gx, gs, z, f2, f1, ctx.spec)
        second = pass_of("recurrent_adjoint_tangent")(None, dh, f1, c, e, weight, ctx.spec)
        gw = None
        if ctx.needs_input_grad[2]:
            gw = _outer(gx[1:], ds[:-1]) + _outer(second[1:], y[:-1])
        return ds, second, gw, None, None, None, None


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of a^T b over the first axis."""
    return a.reshape(-1, a.shape[-1]).t() @ b.reshape(-1, b.shape[-1])


def recurrent_neurons(
    x: Tensor, weight: Tensor, spec: ScanSpec, y: Tensor, z: Tensor, jet: Slopes | None = None
) -> Tensor:
    """Return the spikes [T, N, M] of recurrent neurons that start at rest. They can be differentiated twice.

    Args:
        x: Input currents [T or 1, N, M], without those of the spikes.
        weight: The recurrent weights V [M, M].
        spec: The parameters of the neurons.
        y: The spikes as other code computed them [T, N, M].
        z: h - threshold [T, N, M].
        jet: The function z -> (f'(z), f''(z)), instead of those of `spec.surrogate`.
    """
    x = x.expand(len(y), *x.shape[1:])
    text = encode_spec(replace(spec, steps=len(y), ends=False, surrogate="" if jet is not None else spec.surrogate))
    link = _Link.apply(x) if x.requires_grad else x.detach()
    found: Tensor = _Spikes.apply(link, weight, y, z, text, jet)
    return found
