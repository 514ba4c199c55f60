"""Autograd functions that a traced product consists of, each differentiable twice by reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hessian_tools.engine.convolution import winograd

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
    """Return the convolution of x [N, C, ...] with w and a bias. Its derivatives use a faster form where there is one.

    The form depends on the shapes only, so that products are the same bits in every run.
    """
    if 0 in x.shape or 0 in w.shape:
        return _convolved(x, w, bias, geometry)
    small, fewer = trimmed(x, w, geometry)
    if _is_product(x, small, fewer):
        y = F.linear(x.flatten(1), small.flatten(1), bias).view(len(x), len(w), *[1] * (x.dim() - 2))
    elif _is_pointwise(x, small, fewer):
        y = torch.matmul(small.flatten(1), x.flatten(2)).view(len(x), len(w), *x.shape[2:])
        y = y if bias is None else y + bias.view(-1, *[1] * (x.dim() - 2))
    elif winograd.suits(x, small, fewer):
        y = winograd.fast_convolution(x, small, bias, fewer[1][0])
    elif small is w:
        return _convolved(x, w, bias, geometry)
    else:
        y = _convolved(x, small, bias, fewer)
    return valued(_convolve, y, x, w, bias, *geometry)


def _convolved(x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    y: Tensor = _Convolution.apply(x, w, bias, geometry)
    return y


def trimmed(x: Tensor, w: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """Return the weights without the rows and columns that meet padding only, and the geometry for them."""
    stride, padding, dilation, transposed, extra, groups = geometry
    if transposed or x.dim() != w.dim():
        return w, geometry
    kept, pads = w, list(padding)
    for i, n in enumerate(x.shape[2:]):
        k, s, p, d = w.shape[2 + i], stride[i], padding[i], dilation[i]
        count = (n + 2 * p - d * (k - 1) - 1) // s + 1
        used = [j for j in range(k) if any(0 <= m * s + j * d - p < n for m in range(count))]
        if not used or len(used) == k:
            continue
        first, size = used[0], used[-1] + 1 - used[0]
        pad = p - first * d
        if pad >= 0 and (n + 2 * pad - d * (size - 1) - 1) // s + 1 == count:
            kept, pads[i] = kept.narrow(2 + i, first, size), pad
    if kept is w:
        return w, geometry
    return kept, (stride, pads, dilation, transposed, extra, groups)


def _is_product(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Return whether a convolution is one product of matrices, because its output is a single position."""
    _, padding, dilation, transposed, _, groups = geometry
    whole = x.dim() > 2 and x.shape[2:] == w.shape[2:] and not any(padding) and set(dilation) == {1}
    return bool(whole and not transposed and groups == 1)


def _is_pointwise(x: Tensor, w: Tensor, geometry: Geometry) -> bool:
    """Return whether a convolution is the same product of matrices at every position, which is faster on the CPU."""
    stride, padding, _, transposed, _, groups = geometry
    plain = x.device.type == "cpu" and 2 < x.dim() == w.dim() and not transposed and groups == 1
    return plain and set(w.shape[2:]) == {1} and set(stride) == {1} and not any(padding)


def valued(compute: Callable[..., Tensor], equal: Tensor, *args: Any) -> Tensor:
    """Return compute(*args), without its derivatives, with those of `equal`, the same up to rounding.

    The value of `equal` is not used, so that a traced graph does not compute it.
    """
    with torch.no_grad():
        value = compute(*args)
    y: Tensor = _Valued.apply(value, equal)
    return y
