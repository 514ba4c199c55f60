"""Build the layers of `hessian_tools.chain.layers` from torch modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hessian_tools.chain.affine import Affine, Bilinear, Channelwise, Convolution, Product
from hessian_tools.chain.layers import Elementwise, Fork, Join, Layer, Linear, Make, Skip

SMOOTH = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.SiLU, nn.ELU)


def _bilinear(module: nn.Module) -> Bilinear | None:
    """Return the bilinear map of a module, or None if it is not a supported one."""
    if type(module) is nn.Linear:
        return Product()
    if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return Convolution(list(module.stride), list(module.padding), list(module.dilation), module.groups)
    return None


def _is_norm(module: Any) -> bool:
    """Return whether a module is a batch norm that uses its running statistics."""
    return type(module) in (nn.BatchNorm1d, nn.BatchNorm2d) and not module.training and module.running_mean is not None


class UnknownLayerError(Exception):
    """A layer or an input is not supported."""


def _affine(op: Bilinear, module: Any, norm: Any, x: Tensor) -> tuple[Tensor, Layer]:
    """Return the output and the layer of a linear module and the norm after it; either can be None."""
    if (norm is not None and isinstance(op, Product) and x.dim() != 2) or (
        isinstance(op, Convolution) and x.dim() != 4
    ):
        raise UnknownLayerError  # the norm's channels are not the map's outputs, or there is no batch axis
    y = x if module is None else module(x)
    weight, bias = (None, None) if module is None else (module.weight, module.bias)
    return y if norm is None else norm(y), Affine(x, op, weight, bias, norm)


def _elementwise(module: nn.Module, x: Tensor) -> tuple[Tensor, Layer]:
    """Return the output and the layer of an element-wise module, with its derivatives by autograd."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = module(leaf.clone())
        (first,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        second = None
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), leaf, allow_unused=True)
    return y.detach(), Elementwise(first.detach(), torch.zeros_like(x) if second is None else second)


def _reshaped(module: nn.Module, x: Tensor) -> tuple[Tensor, Layer]:
    """Return the output and the layer of a module that only changes the shape."""
    y: Tensor = module(x)
    return y, Linear(lambda t, shape=y.shape: t.reshape(shape), lambda t, shape=x.shape: t.reshape(shape))  # type: ignore[misc]


def _forked(skip: Skip, x: Tensor) -> tuple[Tensor, Layer]:
    """Begin a residual branch."""
    skip.ahead = x
    return x, Fork(skip)


def _joined(skip: Skip, x: Tensor) -> tuple[Tensor, Layer]:
    """End a residual branch."""
    past, skip.ahead = skip.ahead, None
    assert past is not None
    return x + past, Join(skip)


def layer_makers(items: list[Any]) -> list[Make] | None:
    """Return one function x -> (y, Layer) per layer, or None if a module is not supported.

    Args:
        items: Modules, functions x -> (y, Layer), and lists of items. A list is a branch that is added to its input.
    """
    makers: list[Make] = []
    i = 0
    while i < len(items):
        module, following = items[i], items[i + 1] if i + 1 < len(items) else None
        i += 1
        if isinstance(module, list):
            inner, skip = layer_makers(module), Skip()
            if inner is None:
                return None
            makers += [partial(_forked, skip), *inner, partial(_joined, skip)]
        elif not isinstance(module, nn.Module):
            makers.append(module)
        elif (op := _bilinear(module)) is not None:
            norm = following if _is_norm(following) else None
            i += norm is not None
            makers.append(partial(_affine, op, module, norm))
        elif _is_norm(module):
            makers.append(partial(_affine, Channelwise(), None, module))
        elif type(module) in SMOOTH:
            makers.append(partial(_elementwise, module))
        elif type(module) is nn.Flatten:
            makers.append(partial(_reshaped, module))
        elif not (type(module) is nn.Identity or (isinstance(module, _DropoutNd) and not module.training)):
            return None
    return makers
