"""Autograd functions that a traced product consists of, each differentiable twice by reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Geometry = tuple[
    Any, ...
]  # stride, padding, dilation, transposed, output padding, groups, as aten.convolution has them
_convolve = torch.ops.aten.convolution
_backward = torch.ops.aten.convolution_backward


class _ConvolutionBackward(torch.autograd.Function):
    """(g, x, w) -> (gx, gw, gb). Its derivative takes four convolutions, those that a Hessian-vector product needs."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, want: Sequence[bool]) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        gx, gw, _ = _backward(g, x, w, None, *geometry, [*want[:2], False])
        return gx, gw, g.sum((0, *range(2, g.dim()))) if want[2] else None

    @staticmethod
    def backward(ctx: Any, ax: Tensor | None, aw: Tensor | None, ab: Tensor | None) -> Any:
        g, x, w = ctx.saved_tensors
        dg = gx = gw = None
        if ax is not None:
            dg = _convolve(ax, w, None if aw is not None else ab, *ctx.geometry)
            if ctx.needs_input_grad[2]:
                gw = _backward(g, ax, w, None, *ctx.geometry, [False, True, False])[1]
        if aw is not None:
            image = _convolve(x, aw, ab, *ctx.geometry)
            dg = image if dg is None else dg + image
            if ctx.needs_input_grad[1]:
                gx = _backward(g, x, aw, None, *ctx.geometry, [True, False, False])[0]
        if ax is None and aw is None and ab is not None:
            dg = ab.reshape(1, -1, *(1,) * (g.dim() - 2)).expand_as(g)
        return dg, gx, gw, None, None


class _Convolution(torch.autograd.Function):
    """Convolution, [N, C, ...] with weights [O, C / groups, ...] and bias [O] -> [N, O, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        y: Tensor = _convolve(x, w, bias, *geometry)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return *_ConvolutionBackward.apply(g, x, w, ctx.geometry, ctx.needs_input_grad[:3]), None


class _Valued(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, equal: Tensor) -> Tensor:
        return value.clone()  # a view could not be changed in place; simplifying removes the copy

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, g


def convolution(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return the convolution of x [N, C, ...] with w and a bias."""
    y: Tensor = _Convolution.apply(x, w, bias, geometry)
    return y


def valued(compute: Callable[..., Tensor], equal: Tensor, *args: Any) -> Tensor:
    """Return compute(*args), without its derivatives, with those of `equal`, the same up to rounding.

    The value of `equal` is not used, so that a traced graph does not compute it.
    """
    with torch.no_grad():
        value = compute(*args)
    y: Tensor = _Valued.apply(value, equal)
    return y
