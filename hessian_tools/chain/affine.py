"""Layers with weights: convolutions and linear maps, with the batch norm that follows folded into them.

The notation is that of `hessian_tools.chain.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools.chain.layers import Tangents, Want, add


class Bilinear(Protocol):
    """A bilinear map and its two transposes.

    `apply` returns y = B(x, w) + bias. `pull_input` maps gy to gx, and `pull_weight` maps gy to gw; `like` has the
    shape of the result.
    """

    def apply(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor: ...

    def pull_input(self, g: Tensor, w: Tensor, like: Tensor) -> Tensor: ...

    def pull_weight(self, g: Tensor, x: Tensor, like: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Convolution:
    """Two-dimensional convolution with x [N, C, H, W] and w [O, C / groups, kh, kw]."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def apply(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, w, bias, self.stride, self.padding, self.dilation, self.groups)

    def _backward(self, g: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            g, x, w, None, self.stride, self.padding, self.dilation, False, [0, 0], self.groups, mask
        )
        return result

    def pull_input(self, g: Tensor, w: Tensor, like: Tensor) -> Tensor:
        return self._backward(g, like, w, [True, False, False])[0]

    def pull_weight(self, g: Tensor, x: Tensor, like: Tensor) -> Tensor:
        return self._backward(g, x, like, [False, True, False])[1]


@dataclass(frozen=True)
class Product:
    """Matrix product with x [..., in] and w [out, in]."""

    def apply(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, w, bias)

    def pull_input(self, g: Tensor, w: Tensor, like: Tensor) -> Tensor:
        return g @ w

    def pull_weight(self, g: Tensor, x: Tensor, like: Tensor) -> Tensor:
        return g.flatten(0, -2).T @ x.flatten(0, -2)


@dataclass(frozen=True)
class Channelwise:
    """Scaling of channels with x [N, C, ...] and w [C], for a batch norm that does not follow a linear map."""

    def apply(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        y = x * _per_channel(w, x)
        return y if bias is None else y + _per_channel(bias, x)

    def pull_input(self, g: Tensor, w: Tensor, like: Tensor) -> Tensor:
        return g * _per_channel(w, g)

    def pull_weight(self, g: Tensor, x: Tensor, like: Tensor) -> Tensor:
        return _channel_sum(g * x)


def _per_channel(w: Tensor, x: Tensor) -> Tensor:
    """Reshape w [C] to broadcast against x [N, C, ...]."""
    return w.reshape(-1, *(1,) * (x.dim() - 2))


def _channel_sum(g: Tensor) -> Tensor:
    """Sum over all axes but the channels: [N, C, ...] -> [C]."""
    return g.flatten(2).sum((0, 2)) if g.dim() > 2 else g.sum(0)


def _rows(w: Tensor, a: Tensor) -> Tensor:
    """Reshape a [O] to broadcast against w [O, ...]."""
    return a.reshape(-1, *(1,) * (w.dim() - 1))


class Affine:
    """y = B(x, W) + b, followed by y -> (y - mean) gamma / std + beta if there is a batch norm in evaluation mode.

    Both together are one bilinear map with weights A and bias c, and their tangents A' and c':

        A = a W,   c = a (b - mean) + beta,   a = gamma / std  [O]
        A' = a W' + a' W,   c' = a b' + a' (b - mean) + beta'

    The norm therefore adds no cost per sample. Its gradients follow from gA and gc = sum gy, where <., .>_O sums over
    all axes but the output channels:

        gW = a gA,   gb = a gc,   gbeta = gc,   std ggamma = <gA, W>_O + (b - mean) gc
    """

    def __init__(self, x: Tensor, op: Bilinear, weight: nn.Parameter | None, bias: Tensor | None, norm: Any) -> None:
        self.op, self.x, self.norm = op, x, norm
        self.channel = -1 if isinstance(op, Product) else 1
        width = norm.num_features if weight is None else weight.shape[0]
        self.w = x.new_ones(width) if weight is None else weight.detach()
        self.b = None if bias is None else bias.detach()
        slots = [weight, bias, getattr(norm, "weight", None), getattr(norm, "bias", None)]
        self._slots = [i for i, p in enumerate(slots) if p is not None]
        self._parameters = tuple(p for p in slots if p is not None)
        if norm is None:
            self.a, self.offset, self.inverse = None, None, None
            self.folded = self.w
        else:
            self.inverse = (norm.running_var + norm.eps).rsqrt()
            self.a = self.inverse if norm.weight is None else self.inverse * norm.weight.detach()
            self.offset = -norm.running_mean if self.b is None else self.b - norm.running_mean
            self.folded = self.w * _rows(self.w, self.a)
        # gy, gA and gc of the adjoint that `adjoint_tangent` differentiates
        self.g: Tensor | None = None
        self.g_folded: Tensor | None = None
        self.g_bias: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Parameters p, in the order of every sequence of tangents and gradients."""
        return self._parameters

    def _four(self, dp: Tangents) -> list[Tensor | None]:
        """Return the tangents of weight, bias, gamma and beta; None for those that do not exist."""
        four: list[Tensor | None] = [None] * 4
        for i, t in zip(self._slots, dp, strict=True):
            four[i] = t
        return four

    def _fold(self, dp: Tangents) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (A', c', a')."""
        dw, db, dgamma, dbeta = self._four(dp)
        if self.a is None:
            return dw, db, None
        assert self.inverse is not None
        assert self.offset is not None
        da = None if dgamma is None else self.inverse * dgamma
        folded = add(None if dw is None else dw * _rows(dw, self.a), None if da is None else self.w * _rows(self.w, da))
        bias = add(dbeta, None if da is None else self.offset * da)
        return folded, add(bias, None if db is None else self.a * db), da

    def _sum(self, g: Tensor) -> Tensor:
        """Return gc for gy."""
        return g.flatten(0, -2).sum(0) if self.channel == -1 else _channel_sum(g)

    def _unfold(
        self, gf: Tensor | None, gc: Tensor | None, want: Want, da: Tensor | None = None, dp: Tangents | None = None
    ) -> Tangents:
        """Return the gradients of the parameters from gA and gc; with `dp`, their tangents from gA' and gc'."""
        tangent = dp is not None
        dw, db, _, _ = self._four(dp) if dp is not None else (None,) * 4
        wanted = [self._slots[i] for i, w in enumerate(want.parameters) if w]
        grads: dict[int, Tensor | None] = {3: gc, 0: gf, 1: gc}
        if self.a is not None:
            assert self.inverse is not None
            assert self.offset is not None
            if 0 in wanted and gf is not None:
                curved = None if da is None or self.g_folded is None else self.g_folded * _rows(gf, da)
                grads[0] = add(gf * _rows(gf, self.a), curved)
            if 1 in wanted and gc is not None:
                grads[1] = add(self.a * gc, None if da is None or self.g_bias is None else da * self.g_bias)
            if 2 in wanted and gf is not None and gc is not None:
                slope = _row_dot(gf, self.w) + self.offset * gc
                if tangent and dw is not None and self.g_folded is not None:
                    slope = slope + _row_dot(self.g_folded, dw)
                if tangent and db is not None and self.g_bias is not None:
                    slope = slope + db * self.g_bias
                grads[2] = self.inverse * slope
        return [grads.get(i) if w else None for i, w in zip(self._slots, want.parameters, strict=True)]

    def _needs(self, want: Want) -> tuple[bool, bool]:
        """Return whether gA and whether gc are needed."""
        wanted = {self._slots[i] for i, w in enumerate(want.parameters) if w}
        return bool(wanted & {0, 2}), bool(wanted & {1, 2, 3})

    def adjoint(self, g: Tensor, want: Want, keep: bool) -> tuple[Tensor | None, Tangents]:
        weight, bias = self._needs(want)
        if keep and 2 not in self._slots:  # only the tangent of ggamma needs gA and gc
            weight = bias = False
        gf = self.op.pull_weight(g, self.x, self.w) if weight else None
        gc = self._sum(g) if bias else None
        gx = self.op.pull_input(g, self.folded, self.x) if want.input else None
        if keep:
            self.g, self.g_folded, self.g_bias = g, gf, gc
        return gx, self._unfold(gf, gc, want)

    def tangent(self, dx: Tensor | None, dp: Tangents) -> Tensor:
        folded, bias, _ = self._fold(dp)
        if dx is None:
            return self.op.apply(self.x, torch.zeros_like(self.w) if folded is None else folded, bias)
        y = self.op.apply(dx, self.folded, bias)
        return y if folded is None else y.add_(self.op.apply(self.x, folded, None))

    def adjoint_tangent(
        self, dg: Tensor, dx: Tensor | None, dp: Tangents, want: Want
    ) -> tuple[Tensor | None, Tangents]:
        assert self.g is not None
        folded, _, da = self._fold(dp)
        weight, bias = self._needs(want)
        gx = gf = None
        if want.input:
            gx = self.op.pull_input(dg, self.folded, self.x)
            if folded is not None:
                gx += self.op.pull_input(self.g, folded, self.x)
        if weight:
            gf = self.op.pull_weight(dg, self.x, self.w)
            if dx is not None:
                gf += self.op.pull_weight(self.g, dx, self.w)
        return gx, self._unfold(gf, self._sum(dg) if bias else None, want, da, dp)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of a b over all axes but the first."""
    return (a * b).flatten(1).sum(1) if a.dim() > 1 else a * b
