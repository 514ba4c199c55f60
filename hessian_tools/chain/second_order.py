"""Curvature products without a double-backward graph: hand-written forward tangents and tangents of the adjoint.

Writing a' for the tangent of a along v, a network o = f_n(... f_1(x)) and its loss need four passes:

    value                  y = f(x, p)
    adjoint                gx = (dy/dx)' gy,  gp = (dy/dp)' gy
    tangent                y' = (dy/dx) x' + (dy/dp) p'
    tangent of adjoint     gx', gp' = the derivative of the adjoint along x', p' and gy'

The first two are done once per set of weights; a Hessian product is the last two, a Gauss-Newton or Fisher product
tangent and adjoint. A layer brings all four (layers.py). A model that is no
plain nn.Sequential offers its layers by a method

    second_order_chain(x) -> None | (x, [item, ...])       item: one of those modules, a function x -> (y, Layer), or a
                                                           list of items: a branch whose output is added to its input

`linearize` returns None for everything else; the caller then goes through autograd. A model that has an attribute
`second_order_steps`, T, takes a second argument: a Segment of its T steps (segments.py). The layers before the first
one with an attribute `repeats` that is true are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hessian_tools.chain.layers import Layer, Segment, Tangents, Want, add
from hessian_tools.chain.modules import UnknownLayerError, layer_makers

if TYPE_CHECKING:
    from hessian_tools.objective import Batch, Loss, Objective


def _plain(module: nn.Module) -> bool:
    """True if calling the module is nothing but its class's forward."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in vars(module) and not any(getattr(module, name) for name in hooks)


def _items(model: nn.Module, x: Tensor, *segment: Segment) -> tuple[Tensor, list[Any]] | None:
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
Swept = tuple[Tensor, list[Tensor | None], list[Tangents]]  # o', every layer's x', every layer's p'


class Chain:
    """The layers of a network at fixed weights and inputs, from the first one with a parameter of the objective on."""

    def __init__(self, objective: Objective, layers: list[Layer]) -> None:
        self.objective = objective
        self.layers = layers
        self.index = {id(p): i for i, p in enumerate(objective.parameters.values())}
        self.wants = [
            Want(i > 0, tuple(id(p) in self.index for p in layer.parameters)) for i, layer in enumerate(layers)
        ]

    def _gather(self, v: Tensor) -> list[Tangents]:
        parts = self.objective.split(v)
        return [
            [parts[self.index[id(p)]] if id(p) in self.index else None for p in layer.parameters]
            for layer in self.layers
        ]

    def _flat(self, grads: list[Tangents]) -> Tensor:
        total: list[Tensor | None] = [None] * len(self.index)
        for layer, group in zip(self.layers, grads, strict=True):
            for p, g in zip(layer.parameters, group, strict=True):
                if g is not None and (i := self.index.get(id(p))) is not None:
                    total[i] = add(total[i], g)
        return self.objective.flatten(total)

    def tangent(self, v: Tensor) -> Swept:
        """Along v [P]."""
        dps = self._gather(v)
        dx: Tensor | None = None
        inputs: list[Tensor | None] = []
        for layer, dp in zip(self.layers, dps, strict=True):
            inputs.append(dx)
            dx = layer.tangent(dx, dp)
        assert dx is not None
        return dx, inputs, dps

    def adjoint(self, g: Tensor, keep: bool = False) -> Tensor:
        """go -> the gradient [P]."""
        grads: list[Tangents] = []
        for layer, want in zip(reversed(self.layers), reversed(self.wants), strict=True):
            gx, group = layer.adjoint(g, want, keep)
            grads.append(group)
            g = g if gx is None else gx
        return self._flat(grads[::-1])

    def adjoint_tangent(self, dg: Tensor, inputs: list[Tensor | None], dps: list[Tangents]) -> Tensor:
        """go' with what `tangent` returned -> the tangent of the gradient, H v [P]."""
        grads: list[Tangents] = []
        for layer, want in zip(reversed(self.layers), reversed(self.wants), strict=True):
            dgx, group = layer.adjoint_tangent(dg, inputs.pop(), dps.pop(), want)
            grads.append(group)
            dg = dg if dgx is None else dgx
        return self._flat(grads[::-1])

    @property
    def nbytes(self) -> int:
        """Bytes held, beyond the weights."""
        own = {p.untyped_storage().data_ptr() for p in self.objective.model.parameters()}
        held: dict[int, int] = {}
        for layer in self.layers:
            for t in _tensors(layer):  # of the data, which all batches share, its own part
                storage = t.untyped_storage()
                size = min(t.nbytes, storage.nbytes())
                held[storage.data_ptr()] = max(size, held.get(storage.data_ptr(), 0))
        return sum(size for key, size in held.items() if key not in own)


def _tensors(thing: object) -> Iterator[Tensor]:
    """The tensors a layer holds, directly, in a dataclass or in a layer of its own."""
    for value in vars(thing).values():
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value) or hasattr(value, "tangent"):
            yield from _tensors(value)


@dataclass(frozen=True)
class Linearized:
    """One batch's product v [P] -> A v [P]; nbytes is the memory it holds."""

    product: Callable[[Tensor], Tensor]
    nbytes: int

    def __call__(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self.product(v)


def layers_at(
    model: nn.Module, x: Tensor, *segment: Segment, behind: tuple[int, Tensor] | None = None
) -> tuple[Tensor, list[tuple[Tensor, Layer]]] | None:
    """(the model's outputs, its layers at inputs x, each with its own input); None if it has an unknown layer.

    segment: for its steps of time alone. behind: (n, the output of layer n): only the layers behind the first n.
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
    """The product of `kind` (hessian, ggn, fisher) on one batch, or None if the model has an unknown layer."""
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
    """The chain from the first layer with a parameter of the objective on; None if a parameter belongs to no layer.

    fixed: parameters without a derivative here, which count as zeros. Empty chains are None as well.
    """
    known = {id(p) for p in objective.parameters.values()} - {id(p) for p in fixed}
    owners = [i for i, layer in enumerate(layers) if any(id(p) in known for p in layer.parameters)]
    if not owners or known - {id(p) for layer in layers for p in layer.parameters}:
        return None
    return Chain(objective, layers[owners[0] :])


def output_form(kind: str, loss: Loss, outputs: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """(the gradient of the loss by the outputs, o' -> go'); None for a loss that does not depend on them.

    go' is H_out o', and for the Fisher matrix (g_i . o'_i) g_i / n with g_i the gradient of sample i's loss.
    """
    with torch.enable_grad():
        outputs = outputs.detach().requires_grad_()
        if kind == "fisher":
            losses = torch.func.vmap(lambda o, t: loss(o[None], t[None]))(outputs, y)
            value = losses.sum() / len(y)
        else:
            value = loss(outputs, y)
        if not value.requires_grad:
            return None
        (slope,) = torch.autograd.grad(value, outputs, create_graph=kind != "fisher")
    if kind != "fisher":
        return slope.detach(), lambda do: curved(slope, outputs, do)

    def along(do: Tensor) -> Tensor:
        dot = (slope * do).flatten(1).sum(1) * len(y)
        return slope * dot.reshape(-1, *(1,) * (slope.dim() - 1))

    return slope, along


def curved(slope: Tensor, outputs: Tensor, do: Tensor) -> Tensor:
    """H_out o'; zeros for a loss that is linear in the outputs."""
    if not slope.requires_grad:
        return torch.zeros_like(do)
    (image,) = torch.autograd.grad(slope, outputs, do, retain_graph=True, allow_unused=True)
    return torch.zeros_like(do) if image is None else image
