"""Autograd functions that a traced product consists of, each differentiable twice by reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Geometry = tuple[Any, ...]  # stride, padding, dilation, transposed, output padding, groups, as aten.convolution has them
_convolve = torch.ops.aten.convolution
_backward = torch.ops.aten.convolution_backward


class _ConvolutionBackward(torch.autograd.Function):
    """(g, x, w) -> (gx, gw). Its derivative takes four convolutions, those that a Hessian-vector product needs."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, geometry: Geometry, want: Sequence[bool]) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.geometry, ctx.want = geometry, want
        ctx.set_materialize_grads(False)
        return _backward(g, x, w, None, *geometry, [*want, False])[:2]

    @staticmethod
    def backward(ctx: Any, ax: Tensor | None, aw: Tensor | None) -> Any:  # type: ignore[override]
        g, x, w = ctx.saved_tensors
        dg = gx = gw = None
        if ax is not None:
            dg = _convolve(ax, w, None, *ctx.geometry)
            if ctx.needs_input_grad[2]:
                gw = _backward(g, ax, w, None, *ctx.geometry, [False, True, False])[1]
        if aw is not None:
            image = _convolve(x, aw, None, *ctx.geometry)
            dg = image if dg is None else dg + image
            if ctx.needs_input_grad[1]:
                gx = _backward(g, x, aw, None, *ctx.geometry, [True, False, False])[0]
        return dg, gx, gw, None, None


class _Convolution(torch.autograd.Function):
    """Convolution without bias, [N, C, ...] and [O, C / groups, ...] -> [N, O, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        y: Tensor = _convolve(x, w, None, *geometry)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return *_ConvolutionBackward.apply(g, x, w, ctx.geometry, ctx.needs_input_grad[:2]), None


class _Valued(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, equal: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return None, g


def convolution(x: Tensor, w: Tensor, geometry: Geometry) -> Tensor:
    """Return the convolution of x [N, C, ...] with w, without bias."""
    y: Tensor = _Convolution.apply(x, w, geometry)
    return y


def valued(compute: Callable[..., Tensor], equal: Tensor, *args: Any) -> Tensor:
    """Return compute(*args), without its derivatives, with the derivatives of `equal`, which is the same up to rounding.

    The value of `equal` is not used, so that a traced graph does not compute it.
    """
    with torch.no_grad():
        value = compute(*args)
    y: Tensor = _Valued.apply(value, equal)
    return y
