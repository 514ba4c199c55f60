"""Curvature products by hand-written forward tangents and tangents of the adjoint, without a double-backward graph.

Let a' be the tangent of a along v. A network o = f_n(... f_1(x)) and its loss need four passes:

    value                  y = f(x, p)
    adjoint                gx = (dy/dx)^T gy,  gp = (dy/dp)^T gy
    tangent                y' = (dy/dx) x' + (dy/dp) p'
    tangent of adjoint     gx', gp' = the derivative of the adjoint along x', p' and gy'

The first two are computed once per set of weights. A Hessian product takes the last two; a Gauss-Newton or Fisher
product takes a tangent and an adjoint. Each layer provides all four (`hessian_tools.chain.layers`).

A model that is not a plain nn.Sequential provides its layers by a method

    second_order_chain(x) -> None | (x, [item, ...])

where an item is a supported module, a function x -> (y, Layer), or a list of items (a branch whose output is added to
its input). For any other model `linearize` returns None, and the caller uses autograd.

A model with an attribute `second_order_steps`, the number T of time steps, takes a second argument: a `Segment` of its
steps (`hessian_tools.chain.segments`). The layers before the first one whose attribute `repeats` is true compute the
same values at all steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hessian_tools.chain.layers import Layer, Segment, Tangents, Want, add
from hessian_tools.chain.modules import UnknownLayerError, layer_makers
from hessian_tools.engine.linearized import Linearized, output_form

if TYPE_CHECKING:
    from hessian_tools.objective import Batch, Objective


def _plain(module: nn.Module) -> bool:
    """Return whether calling the module runs only the forward method of its class."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in vars(module) and not any(getattr(module, name) for name in hooks)


def _items(model: nn.Module, x: Tensor, *segment: Segment) -> tuple[Tensor, list[Any]] | None:
    """Return the chain's input and its items, or None if the model does not provide them."""
    if not all(_plain(m) for m in model.modules()):
        return None
    if type(model) is nn.Sequential:
        items: list[Any] = []
        for module in model:
            nested = _items(module, x) if type(module) is nn.Sequential else (x, [module])
            if nested is None:
                return None
            items += nested[1]
        return x, items
    offer = getattr(model, "second_order_chain", None)
    return None if offer is None else offer(x, *segment)


# ---------------------------------------------------------------- the chain
Swept = tuple[Tensor, list[Tensor | None], list[Tangents]]  # o', the x' of every layer, the p' of every layer


class Chain:
    """The layers of a network at fixed weights and inputs, from the first one with a selected parameter."""

    def __init__(self, objective: Objective, layers: list[Layer]) -> None:
        self.objective = objective
        self.layers = layers
        self.index = {id(p): i for i, p in enumerate(objective.parameters.values())}
        self.wants = [
            Want(i > 0, tuple(id(p) in self.index for p in layer.parameters)) for i, layer in enumerate(layers)
        ]

    def _gather(self, v: Tensor) -> list[Tangents]:
        """Split v [P] into the tangents of every layer's parameters."""
        parts = self.objective.split(v)
        return [
            [parts[self.index[id(p)]] if id(p) in self.index else None for p in layer.parameters]
            for layer in self.layers
        ]

    def _flat(self, grads: list[Tangents]) -> Tensor:
        """Collect the gradients of every layer's parameters into [P]."""
        total: list[Tensor | None] = [None] * len(self.index)
        for layer, group in zip(self.layers, grads, strict=True):
            for p, g in zip(layer.parameters, group, strict=True):
                if g is not None and (i := self.index.get(id(p))) is not None:
                    total[i] = add(total[i], g)
        return self.objective.flatten(total)

    def tangent(self, v: Tensor) -> Swept:
        """Return the tangents along v [P]: o', the x' of every layer, and the p' of every layer."""
        dps = self._gather(v)
        dx: Tensor | None = None
        inputs: list[Tensor | None] = []
        for layer, dp in zip(self.layers, dps, strict=True):
            inputs.append(dx)
            dx = layer.tangent(dx, dp)
        assert dx is not None
        return dx, inputs, dps

    def adjoint(self, g: Tensor, keep: bool = False) -> Tensor:
        """Map the gradient with respect to the outputs to the gradient [P].

        Args:
            g: go, of the shape of the outputs.
            keep: Whether `adjoint_tangent` will differentiate this adjoint.
        """
        grads: list[Tangents] = []
        for layer, want in zip(reversed(self.layers), reversed(self.wants), strict=True):
            gx, group = layer.adjoint(g, want, keep)
            grads.append(group)
            g = g if gx is None else gx
        return self._flat(grads[::-1])

    def adjoint_tangent(self, dg: Tensor, inputs: list[Tensor | None], dps: list[Tangents]) -> Tensor:
        """Return the tangent of the gradient [P], which is H v for the Hessian H.

        Args:
            dg: go', of the shape of the outputs.
            inputs: The x' of every layer, from `tangent`. The list is emptied.
            dps: The p' of every layer, from `tangent`. The list is emptied.
        """
        grads: list[Tangents] = []
        for layer, want in zip(reversed(self.layers), reversed(self.wants), strict=True):
            dgx, group = layer.adjoint_tangent(dg, inputs.pop(), dps.pop(), want)
            grads.append(group)
            dg = dg if dgx is None else dgx
        return self._flat(grads[::-1])

    @property
    def nbytes(self) -> int:
        """Bytes that the chain holds in addition to the weights."""
        own = {p.untyped_storage().data_ptr() for p in self.objective.model.parameters()}
        held: dict[int, int] = {}
        for layer in self.layers:
            for t in _tensors(layer):  # a batch is a view of the data: count only its part of the shared storage
                storage = t.untyped_storage()
                size = min(t.nbytes, storage.nbytes())
                held[storage.data_ptr()] = max(size, held.get(storage.data_ptr(), 0))
        return sum(size for key, size in held.items() if key not in own)


def _tensors(thing: object) -> Iterator[Tensor]:
    """Yield the tensors that a layer holds, including those in its dataclasses and inner layers."""
    for value in vars(thing).values():
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value) or hasattr(value, "tangent"):
            yield from _tensors(value)


def layers_at(
    model: nn.Module, x: Tensor, *segment: Segment, behind: tuple[int, Tensor] | None = None
) -> tuple[Tensor, list[tuple[Tensor, Layer]]] | None:
    """Evaluate a model's layers at inputs x.

    Args:
        model: The model.
        x: Inputs of one batch.
        segment: The segment of time to evaluate. None given evaluates all steps.
        behind: (n, the output of layer n) to evaluate only the layers after the first n.

    Returns:
        The model's outputs, and its layers, each with its input. None if a layer is not supported.
    """
    with torch.no_grad():
        offered = _items(model, x, *segment)
        makers = None if offered is None else layer_makers(offered[1])
        if offered is None or makers is None:
            return None
        skipped, value = behind or (0, offered[0])
        layers = []
        for make in makers[skipped:]:
            try:
                following, layer = make(value)
            except UnknownLayerError:
                return None
            layers.append((value, layer))
            value = following
        return value, layers


def linearize(objective: Objective, batch: Batch, kind: str) -> Linearized | None:
    """Return the curvature product of one batch, or None if a layer of the model is not supported.

    Args:
        objective: The objective.
        batch: Inputs and targets.
        kind: "hessian", "ggn" or "fisher".
    """
    if objective.reset is not None:
        return None
    x, y = batch
    found = layers_at(objective.model, x)
    chain = None if found is None else chain_of(objective, [layer for _, layer in found[1]])
    if found is None or chain is None:
        return None
    form = output_form(kind, objective.loss, found[0], y)
    if form is None:
        return Linearized(torch.zeros_like, 0)
    slope, curve = form
    if kind == "hessian":
        with torch.no_grad():
            chain.adjoint(slope, keep=True)

    def product(v: Tensor) -> Tensor:
        do, inputs, dps = chain.tangent(v)
        return chain.adjoint_tangent(curve(do), inputs, dps) if kind == "hessian" else chain.adjoint(curve(do))

    return Linearized(product, chain.nbytes)


def chain_of(objective: Objective, layers: list[Layer], fixed: Sequence[Tensor] = ()) -> Chain | None:
    """Return the chain that begins at the first layer with a selected parameter.

    Args:
        objective: The objective, which selects the parameters.
        layers: All layers of the model.
        fixed: Parameters without a derivative here, which count as zeros.

    Returns:
        The chain, or None if it is empty or if a selected parameter belongs to no layer.
    """
    known = {id(p) for p in objective.parameters.values()} - {id(p) for p in fixed}
    owners = [i for i, layer in enumerate(layers) if any(id(p) in known for p in layer.parameters)]
    if not owners or known - {id(p) for layer in layers for p in layer.parameters}:
        return None
    return Chain(objective, layers[owners[0] :])
