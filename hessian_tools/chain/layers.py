"""Layers with the four passes of a curvature product: value, adjoint, tangent, and tangent of the adjoint.

This module defines the protocol of a layer, and the layers without parameters: element-wise activations, fixed linear
maps, and residual branches. `affine` has the layers with weights. `modules` builds layers from torch modules, and
`second_order` joins them to a network.

Notation: x and y are the input and output of a layer, p its parameters, ga the derivative of the loss with respect to a
(the adjoint of a), and a' the derivative of a along the vector of a product (the tangent of a).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

Tangents = Sequence[Tensor | None]  # one per parameter of a layer; None means no tangent, or no gradient wanted


class Want(NamedTuple):
    """Says which gradients of a layer are used. A layer need not compute the others.

    Attributes:
        input: Whether the gradient with respect to the input is used.
        parameters: Whether the gradient with respect to each parameter is used.
    """

    input: bool
    parameters: tuple[bool, ...]


class Layer(Protocol):
    """One layer at fixed weights and a fixed input x. A tangent x' or p' that is None is zero."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Parameters p, in the order of every sequence of tangents and gradients."""

    def adjoint(self, g: Tensor, want: Want, keep: bool) -> tuple[Tensor | None, Tangents]:
        """Map gy to (gx, gp).

        Args:
            g: gy, of the shape of y.
            want: Which gradients are used.
            keep: Whether `adjoint_tangent` will differentiate this adjoint. Its gp is then not used.
        """

    def tangent(self, dx: Tensor | None, dp: Tangents) -> Tensor:
        """Map (x', p') to y'."""

    def adjoint_tangent(
        self, dg: Tensor, dx: Tensor | None, dp: Tangents, want: Want
    ) -> tuple[Tensor | None, Tangents]:
        """Map (gy', x', p') to (gx', gp')."""


Make = Callable[[Tensor], tuple[Tensor, Layer]]  # x -> (y, the layer at x)


@dataclass
class Carry:
    """What a layer with a state passes from one segment of time to the next. None is the state at rest.

    A pass over a segment replaces the array that it starts from and never writes into it.

    Attributes:
        value: The state, passed forward in time.
        tangent: Tangent of the state, passed forward in time.
        adjoint: Adjoint of the state, passed backward in time.
        adjoint_tangent: Tangent of the adjoint, passed backward in time.
    """

    value: Tensor | None = None
    tangent: Tensor | None = None
    adjoint: Tensor | None = None
    adjoint_tangent: Tensor | None = None


@dataclass(frozen=True)
class Segment:
    """A segment of time: steps first to last - 1.

    Attributes:
        first: The first step.
        last: The step after the last one.
        carries: The carry of every module with a state.
    """

    first: int
    last: int
    carries: defaultdict[nn.Module, Carry]


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return a + b, where None is zero."""
    return b if a is None else a if b is None else a + b


# ---------------------------------------------------------------- element-wise and shape layers
class Elementwise:
    """An element-wise function y = f(x).

    With f1 = f'(x) and f2 = f''(x): y' = f1 x', gx = f1 gy, gx' = f1 gy' + f2 gy x'.
    """

    parameters: tuple[Tensor, ...] = ()

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second

    def adjoint(self, g: Tensor, want: Want, keep: bool) -> tuple[Tensor | None, Tangents]:
        if keep:
            self.second = self.second * g
        return self.first * g, ()

    def tangent(self, dx: Tensor | None, dp: Tangents) -> Tensor:
        assert dx is not None
        return self.first * dx

    def adjoint_tangent(
        self, dg: Tensor, dx: Tensor | None, dp: Tangents, want: Want
    ) -> tuple[Tensor | None, Tangents]:
        assert dx is not None
        return torch.addcmul(self.first * dg, self.second, dx), ()


class Linear:
    """A fixed linear map without parameters, given with its transpose."""

    parameters: tuple[Tensor, ...] = ()

    def __init__(self, forward: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]) -> None:
        self.forward, self.transpose = forward, transpose

    def adjoint(self, g: Tensor, want: Want, keep: bool) -> tuple[Tensor | None, Tangents]:
        return self.transpose(g), ()

    def tangent(self, dx: Tensor | None, dp: Tangents) -> Tensor:
        assert dx is not None
        return self.forward(dx)

    def adjoint_tangent(
        self, dg: Tensor, dx: Tensor | None, dp: Tangents, want: Want
    ) -> tuple[Tensor | None, Tangents]:
        return self.transpose(dg), ()


# ---------------------------------------------------------------- residual branches y = x + g(x)
class Skip(threading.local):
    """The skip connection of a residual branch, which adds the input of the branch to its output.

    `Fork` and `Join`, at the two ends of the branch, exchange values through it during one pass: `ahead` carries the
    input or its tangent forward, `back` carries the adjoint of the output backward. Every thread has its own values,
    because passes for several vectors run in parallel. A chain that begins inside the branch has no Fork: then `ahead`
    is None, and `back` is never read.
    """

    ahead: Tensor | None = None
    back: Tensor | None = None


class Fork:
    """The beginning of a residual branch."""

    parameters: tuple[Tensor, ...] = ()

    def __init__(self, skip: Skip) -> None:
        self.skip = skip

    def adjoint(self, g: Tensor, want: Want, keep: bool) -> tuple[Tensor | None, Tangents]:
        back, self.skip.back = self.skip.back, None
        return add(g, back), ()

    def tangent(self, dx: Tensor | None, dp: Tangents) -> Tensor:
        assert dx is not None
        self.skip.ahead = dx
        return dx

    def adjoint_tangent(
        self, dg: Tensor, dx: Tensor | None, dp: Tangents, want: Want
    ) -> tuple[Tensor | None, Tangents]:
        back, self.skip.back = self.skip.back, None
        return add(dg, back), ()


class Join:
    """The end of a residual branch, y = x + g(x).

    In a chain that begins inside the branch, the input x of the branch has no tangent.
    """

    parameters: tuple[Tensor, ...] = ()

    def __init__(self, skip: Skip) -> None:
        self.skip = skip

    def adjoint(self, g: Tensor, want: Want, keep: bool) -> tuple[Tensor | None, Tangents]:
        self.skip.back = g
        return g, ()

    def tangent(self, dx: Tensor | None, dp: Tangents) -> Tensor:
        assert dx is not None
        past, self.skip.ahead = self.skip.ahead, None
        return dx if past is None else dx + past

    def adjoint_tangent(
        self, dg: Tensor, dx: Tensor | None, dp: Tangents, want: Want
    ) -> tuple[Tensor | None, Tangents]:
        self.skip.back = dg
        return dg, ()
