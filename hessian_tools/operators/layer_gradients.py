"""The gradients of single samples by the parameters of known layers, from one backward pass for all samples.

No sample depends on another, so the gradient by a layer's outputs holds those of all samples. Which of its entries
belong to which sample is found by backward passes for a few of them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hessian_tools import nested
from hessian_tools.objective import Objective

SAMPLES = 5  # with which the samples of a layer's outputs are told apart


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> None:  # fmt: skip
    """Name the arguments of F.conv2d."""


NORMS: set[Any] = {F.batch_norm, F.layer_norm, F.group_norm}
SIGNATURES = {
    **{f: inspect.signature(f) for f in NORMS},
    F.linear: inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("input", "weight")]
        + [inspect.Parameter("bias", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)]
    ),
    F.conv2d: inspect.signature(_conv2d),
}


@dataclass(eq=False)
class LayerUse:
    """A call of a layer's function with parameters. places: name of the parameter by argument."""

    func: Any
    args: dict[str, Any]
    y: Tensor
    version: int
    places: dict[str, str]


class _Uses(TorchFunctionMode):
    """Notes in which calls the parameters are used.

    Attributes:
        uses: The calls of layers that are known.
        others: Names of parameters that are used in other ways too.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names, self.uses, self.others = names, list[LayerUse](), set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        mine = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and id(t) in self.names]
        if not mine or not any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(y)):
            return y
        if (signature := SIGNATURES.get(func)) is not None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            named = dict(bound.arguments)
            places = {
                name: self.names[id(t)] for name, t in named.items() if isinstance(t, Tensor) and id(t) in self.names
            }
            if set(places) <= {"weight", "bias"} and not (
                named.get("training") or isinstance(named.get("padding"), str)
            ):
                named["input"] = named["input"].detach()
                self.uses.append(LayerUse(func, named, y, y._version, places))
                return y
        self.others.update(self.names[id(t)] for t in mine)
        return y


def forward_with_uses(objective: Objective, x: Any) -> tuple[Tensor, list[LayerUse], set[str]]:
    """Run the network on inputs. Returns its outputs, the uses of parameters in layers, and the other parameters."""
    mode = _Uses({id(p): name for name, p in objective.parameters.items()})
    with mode:
        outputs = objective.outputs(x)
    changed = {name for use in mode.uses if use.y._version != use.version for name in use.places.values()}
    uses, others = mode.uses, mode.others | changed
    while left := [use for use in uses if others.intersection(use.places.values())]:
        others |= {name for use in left for name in use.places.values()}
        uses = [use for use in uses if use not in left]
    return outputs, uses, others


def sample_strides(objective: Objective, x: Any, uses: list[LayerUse]) -> list[int] | None:
    """Return for every use how many rows of its outputs come before those of the next sample; None if it is unclear.

    The sample of row r is then r // stride % n. It is found by one backward pass for each of a few samples.
    """
    if not uses:
        return []
    few = nested.selected(x, slice(SAMPLES))
    outputs, own, _ = forward_with_uses(objective, few)
    n = len(outputs)
    if len(own) != len(uses):
        return None
    sample = [torch.full((len(_rows(use, use.y)),), -1) for use in own]
    for i in range(n):
        u = torch.zeros_like(outputs)
        u[i] = torch.randn(u[i].shape, generator=torch.Generator().manual_seed(i)).to(u)
        grads = torch.autograd.grad(outputs, [use.y for use in own], u, retain_graph=True, allow_unused=True)
        for use, g, known in zip(own, grads, sample, strict=True):
            if g is not None:
                touched = (_rows(use, g) != 0).any(1).cpu()
                if (known[touched] >= 0).any():
                    return None  # samples depend on one another
                known[touched] = i
    found = []
    for use, known in zip(own, sample, strict=True):
        steps, rest = divmod(len(known), n)
        strides = [s for s in [*_inner(use, n), *range(1, steps + 1)] if not rest and steps % s == 0]
        place = torch.arange(len(known))
        fits = [s for s in strides if bool(((place // s % n == known) | (known < 0)).all())]
        if not fits:
            return None
        found.append(fits[0])
    return found


def _rows(use: LayerUse, t: Tensor) -> Tensor:
    """Return outputs of a call, or what has their shape, as [rows, ...] without the axes that the layer acts on."""
    if use.func is F.linear:
        return t.reshape(-1, t.shape[-1])
    if use.func is F.layer_norm:
        return t.reshape(-1, *use.args["normalized_shape"]).flatten(1)
    return t.reshape(len(t), -1)


def _inner(use: LayerUse, n: int) -> Iterator[int]:
    """Yield how many rows lie between samples if one axis counts them."""
    last = {F.linear: 1, F.layer_norm: len(use.args.get("normalized_shape", ()))}.get(use.func, use.y.dim() - 1)
    axes = use.y.shape[: use.y.dim() - last]
    for k, size in enumerate(axes):
        if size == n:
            yield math.prod(axes[k + 1 :])


def by_sample(use: LayerUse, t: Tensor, n: int, stride: int) -> Tensor:
    """Return inputs or outputs of a call as [n, T, ...], with the axes that the layer acts on at the end."""
    axes = {F.linear: 1, F.layer_norm: len(use.args.get("normalized_shape", ()))}.get(use.func, t.dim() - 1)
    t = t.reshape(-1, n, stride, *t.shape[t.dim() - axes :])
    return t.transpose(0, 1).flatten(1, 2)


def gradient_rows(use: LayerUse, place: str, a: Tensor, b: Tensor) -> Tensor:
    """Return the gradients [n, p] of one argument of a layer for every sample.

    Args:
        use: The call.
        place: "weight" or "bias".
        a: Inputs [n, T, ...].
        b: Gradients by the outputs [n, T, ...].
    """
    n, args = len(b), use.args
    if use.func is F.linear:
        g = b.reshape(n, -1, b.shape[-1])
        return g.sum(1) if place == "bias" else (g.mT @ a.reshape(n, -1, a.shape[-1])).flatten(1)
    if use.func is F.conv2d:
        if place == "bias":
            return b.sum((1, -2, -1))
        return torch.stack([_conv_weight(args, a[i], b[i]).flatten() for i in range(n)])
    if place == "weight":
        b = b * _normalized(use, a)
    axes = len(args["normalized_shape"]) if use.func is F.layer_norm else 0
    return b.reshape(n, -1, *b.shape[-axes:]).sum(1).flatten(1) if axes else b.reshape(*b.shape[:3], -1).sum((1, 3))


def _conv_weight(args: dict[str, Any], a: Tensor, b: Tensor) -> Tensor:
    """Return the gradient of a convolution's weight for one sample's inputs a [T, ...] and slopes b [T, ...]."""
    sizes = [[v, v] if isinstance(v, int) else list(v) for v in (args["stride"], args["padding"], args["dilation"])]
    found: Tensor = torch.ops.aten.convolution_backward(
        b.contiguous(), a.contiguous(), args["weight"].detach(), None, *sizes, False, [0, 0], args["groups"],
        [False, True, False],
    )[1]  # fmt: skip
    return found


def _normalized(use: LayerUse, a: Tensor) -> Tensor:
    """Return the outputs [n, T, ...] of a norm without its weight and bias."""
    args = {**use.args, "weight": None, "bias": None, "input": a.flatten(0, 1)}
    found: Tensor = use.func(**args)
    return found.view_as(a)
