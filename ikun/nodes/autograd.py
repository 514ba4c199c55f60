"""Spiking neurons over time as one node of an autograd graph that can be differentiated twice.

`neurons` runs IF, LIF and PLIF neurons over T steps. It has derivatives by the input, by the initial potential, and by
a learned gain. `ikun.nodes.rewriting` fuses the passes further while a network is traced (`hessian_tools.engine`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from ikun.nodes.passes import ScanSpec, decode_spec, encode_spec, pass_of

# z -> f'(z), f''(z), and dv/dh and d2v/dh2 if they are not those of the equations
Slopes = Callable[[Tensor], tuple[Tensor, ...]]
Values = tuple[Tensor, Tensor, Tensor]  # spikes, h - threshold, and potentials after the step, each [T, N, ...]


class _Link(torch.autograd.Function):
    """x -> zeros of its shape that take no memory. Kept in place of x, whose values no derivative needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # a gradient has none, and zeros of the size of x would be kept and added
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        return g


class _Spikes(torch.autograd.Function):
    """(x, v0, gain) -> (spikes, last potential)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, link: Tensor, v0: Tensor | None, gain: Tensor | None, spec: str, jet: Slopes | None,
        values: Values | None,
    ) -> Any:  # fmt: skip
        computed = pass_of("spikes")(x, v0, gain, spec) if values is None else _given(x, v0, gain, spec, values)
        y, z, end, index, u = computed
        ctx.save_for_backward(link, v0, gain, z, index, u)
        ctx.spec, ctx.jet = spec, jet
        ctx.set_materialize_grads(False)
        return y, end

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, gv: Tensor | None) -> Any:
        link, v0, gain, z, index, u = ctx.saved_tensors
        if g is None and gv is None:
            return (None,) * 7
        g = z.new_zeros((index if index.numel() else z).shape) if g is None else g
        gx, gv0, ggain = _Adjoint.apply(g, gv, link, v0, gain, z, index, u, ctx.spec, ctx.jet)
        return gx, None, gv0 if v0 is not None else None, ggain if gain is not None else None, None, None, None


class _Adjoint(torch.autograd.Function):
    """(gs, gv, x, v0, gain) -> (gx, gv0, ggain). Its derivative by x, v0 and gain is the second-order pass."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, gv: Tensor | None, x: Tensor, v0: Tensor | None, gain: Tensor | None,
        z: Tensor, index: Tensor, u: Tensor, spec: str, jet: Slopes | None,
    ) -> Any:  # fmt: skip
        f2, given = None, []
        if jet is None:
            f1, c = pass_of("slopes")(z, spec)
        else:
            f1, f2, *given = jet(z)
            c = given[0] if given else pass_of("reset_slopes")(z, f1, spec)
        ctx.save_for_backward(g, gv, gain, z, f2, f1, c, index, u, given[1] if len(given) > 1 else None)
        ctx.spec = spec
        ctx.set_materialize_grads(False)
        return pass_of("adjoint")(g, gv, f1, c, index, u, gain, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, dv: Tensor | None, dgain: Tensor | None) -> Any:
        g, gv, gain, z, f2, f1, c, index, u, c2 = ctx.saved_tensors
        dx = torch.zeros_like(f1[:1]) if dx is None else dx
        at = (index, u, gain, ctx.spec)
        ds, dend = pass_of("tangent")(dx, dv, dgain, f1, c, *at)
        *_, e, gh = pass_of("adjoint_kept")(g, gv, z, f2, f1, c, *at)
        if c2 is not None:
            e = _curvature(g, gv, f1, f2, c, c2, decode_spec(ctx.spec).decay if gain is None else 1 - gain)
        gx, gv0, ggain = pass_of("adjoint_tangent")(None, None, dx, dv, dgain, f1, c, e, gh, *at)
        found = (ds, dend, gx, gv0, ggain)
        return *(t if n else None for t, n in zip(found, ctx.needs_input_grad, strict=False)), *(None,) * 5


def _curvature(
    g: Tensor, gv: Tensor | None, f1: Tensor, f2: Tensor, c: Tensor, c2: Tensor, decay: Tensor | float
) -> Tensor:
    """Return e = f'' gs + (d2v/dh2) gv [T, M], the coefficient of h' in the tangent of the adjoint."""
    v, found = torch.zeros_like(f1[:1]) if gv is None else gv, []
    for t in reversed(range(len(f1))):
        found.append(f2[t : t + 1] * g[t : t + 1] + c2[t : t + 1] * v)
        v = decay * (f1[t : t + 1] * g[t : t + 1] + c[t : t + 1] * v)
    return torch.cat(found[::-1])


def _given(x: Tensor, v0: Tensor | None, gain: Tensor | None, spec: str, values: Values) -> tuple[Tensor, ...]:
    """Return what the pass `spikes` returns, from given values."""
    s = decode_spec(spec)
    y, z, v = (t.reshape(len(t), -1) for t in values)
    index, u = torch.empty(0, dtype=torch.int32, device=x.device), x.new_empty(0)
    if s.plane is not None:
        y, index = pass_of("select")(y, spec)
    if gain is not None:
        start = torch.full_like(v[:1], s.v_reset) if v0 is None else v0
        u = x - torch.cat([start, v[:-1]]) + s.v_reset
    return y.clone(), z, v[-1:].clone() if s.ends else x.new_empty(0), index, u


def neurons(
    x: Tensor,
    spec: ScanSpec,
    v0: Tensor | None = None,
    gain: Tensor | None = None,
    jet: Slopes | None = None,
    values: Values | None = None,
) -> tuple[Tensor, Tensor]:
    """Run neurons over time. The result can be differentiated twice.

    Args:
        x: Input currents [T, N, ...], or [1, N, ...] if `spec.static`.
        spec: The parameters of the neurons. Pooling needs planes as the last two axes.
        v0: Potential before the first step [N, ...]; None: v_reset.
        gain: A learned gain []; the decay is then 1 - gain. None: `spec.gain` and `spec.decay`.
        jet: The function z -> (f'(z), f''(z)), instead of those of `spec.surrogate`. It may also return dv/dh, and then
            d2v/dh2, without which second derivatives are not exact. Pooling must not be fused then.
        values: Spikes, h - threshold, and potentials after the step, each [T, N, ...], as other code computed them.
            They are used instead of own values, from which they differ by rounding.

    Returns:
        The spikes [T, N, ...] and the last potential [N, ...], which is empty unless `spec.ends`.
    """
    if has_torch_function((x,)):
        found: tuple[Tensor, Tensor] = handle_torch_function(neurons, (x,), x, spec, v0, gain, jet, values)
        return found
    steps = spec.steps if spec.static else len(x)
    if steps != spec.steps or jet is not None:
        spec = replace(spec, steps=steps, surrogate="" if jet is not None else spec.surrogate)
    start = None if v0 is None else v0.reshape(1, -1)
    flat = x.reshape(len(x), -1)
    link = _Link.apply(flat) if flat.requires_grad else flat.detach()[:0]
    y, end = _Spikes.apply(flat, link, start, gain, encode_spec(spec), jet, values)
    tail = (*x.shape[1:-2], spec.height // 2, spec.width // 2) if spec.height else x.shape[1:]
    return y.view(steps, *tail), end.view(x.shape[1:]) if spec.ends else end
