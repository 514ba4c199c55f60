"""Rewrite a forward pass while it is traced, so that its derivatives need fewer operations.

The values keep the operations of the network, in their order. What changes are the derivatives:

- A batch norm in evaluation mode is folded into the weights of the convolution or linear map before it, if these are
  fewer than the activations. Its tangent is then a tangent of the weights, without a pass over the activations.
- Where an input is the same at all T time steps, the layers up to the first neurons run once.
- A convolution is differentiated by the four convolutions that a product needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hessian_tools.engine.nodes import convolution, valued

BATCH = 64  # samples (of all steps) with whose values weights are compared; a trace is for any number of them
Linear = tuple[Callable[[Tensor, Tensor | None], Tensor], Tensor, Tensor | None]  # (w, b) -> B(x, w) + b, w, b
RESHAPES = {
    Tensor.view,
    Tensor.reshape,
    torch.reshape,
    Tensor.flatten,
    torch.flatten,
    Tensor.unflatten,
    torch.unflatten,
}
CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}
SAMPLEWISE = {
    F.linear,
    F.batch_norm,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    torch.relu,
    F.relu,
} | CONVOLUTIONS


class Rewriting(TorchFunctionMode):
    """The mode in which a network is traced.

    Args:
        hoist: Whether layers before the first neurons run once if the input is the same at all time steps.
    """

    def __init__(self, hoist: bool = True) -> None:
        super().__init__()
        self.hoist = hoist
        self._linear: dict[int, Linear] = {}
        self._origin: dict[int, Tensor] = {}  # of a reshaped tensor
        self._repeated: dict[int, tuple[Tensor, int]] = {}  # base [N, ...] and T of a tensor [T, N, ...] or [T N, ...]
        self._alive: list[Tensor] = []  # ids are of living tensors
        self._versions: dict[int, list[tuple[Tensor, int]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x: Any = args[0] if args else None
        self._forget_changed(x)
        if self.hoist and isinstance(x, Tensor) and id(x) in self._repeated and func in SAMPLEWISE:
            base, steps = self._repeated[id(x)]
            if len(x) == steps * len(base):
                return self._repeat(self.__torch_function__(func, types, (base, *args[1:]), kwargs), steps)
        if func in CONVOLUTIONS:
            return self._convolution(func, *args, **kwargs)
        if func is F.linear:
            return self._linear_map(*args, **kwargs)
        if func is F.batch_norm:
            return self._norm(*args, **kwargs)
        y = func(*args, **kwargs)
        if func in RESHAPES:
            return self._reshaped(x, y)
        if self.hoist and func is Tensor.repeat:
            self._note_repeat(x, y)
        return y

    def _remember(self, y: Tensor, *others: Tensor) -> None:
        """Keep what is known of y until y or one of the others is changed in place."""
        self._alive.append(y)
        self._versions[id(y)] = [(t, t._version) for t in (y, *others)]

    def _forget_changed(self, y: Any) -> None:
        """Forget what is known of a tensor if it was changed in place."""
        if any(t._version != version for t, version in self._versions.get(id(y), ())):
            for known in (self._linear, self._origin, self._repeated, self._versions):
                known.pop(id(y), None)

    # ---------------------------------------------------------------- shapes and repetitions
    def _reshaped(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y, or the tensor that x was reshaped from if it has the shape of y."""
        origin = self._origin.get(id(x), x)
        if origin.shape == y.shape:
            return origin
        self._origin[id(y)] = origin
        if (found := self._repeated.get(id(x))) is not None:
            base, steps = found
            if y.shape in ((steps, *base.shape), (steps * len(base), *base.shape[1:])):
                self._repeated[id(y)] = found
            elif y.shape[0] == steps * len(base):
                self._repeated[id(y)] = base.reshape(len(base), *y.shape[1:]), steps
            elif y.shape[:2] == (steps, len(base)):
                self._repeated[id(y)] = base.reshape(len(base), *y.shape[2:]), steps
        self._remember(y, origin, *(found or ())[:1])
        return y

    def _note_repeat(self, x: Tensor, y: Tensor) -> None:
        if y.dim() == x.dim() > 1 and len(x) == 1 and y.shape[1:] == x.shape[1:] and len(y) > 1:
            self._repeated[id(y)] = x[0], len(y)
            self._remember(y, x)

    def _repeat(self, base: Tensor, steps: int) -> Tensor:
        """Return base [N, ...] repeated to [T N, ...]."""
        y = base.expand(steps, *base.shape).reshape(-1, *base.shape[1:])
        self._repeated[id(y)] = base, steps
        self._remember(y, base)
        return y

    def once(self, x: Tensor) -> Tensor:
        """Return the input [1, N, ...] of neurons if x [T, N, ...] is the same at all steps, else x."""
        found = self._repeated.get(id(x))
        if found is None or x.shape != (found[1], *found[0].shape):
            return x
        return found[0][None]

    # ---------------------------------------------------------------- linear maps and norms
    def _known(self, y: Tensor, linear: Linear, x: Tensor) -> Tensor:
        self._linear[id(y)] = linear
        self._remember(y, x)
        return y

    def _convolution(
        self, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        n = weight.dim() - 2
        x, w = input, weight
        if isinstance(padding, str) or x.dim() != w.dim():
            y: Tensor = func(x, w, bias, stride, padding, dilation, groups)
            return y
        geometry = (*(_tuple(v, n) for v in (stride, padding, dilation)), False, [0] * n, groups)
        y = convolution(x, w, bias, geometry)
        return self._known(y, (lambda other, shift: convolution(x, other, shift, geometry), w, bias), x)

    def _linear_map(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(input, weight, bias)
        if input.dim() != 2:
            return y
        return self._known(y, (lambda other, shift: F.linear(input, other, shift), weight, bias), input)

    def _norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
        bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        self._forget_changed(input)
        if training or running_mean is None or running_var is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        a = (running_var + eps).rsqrt()
        a = a if weight is None else a * weight
        known = self._linear.get(id(input))
        if known is None or known[1].numel() > BATCH * math.prod(input.shape[1:]):  # more weights than values
            shift = -a * running_mean
            y = input * _channels(a, input) + _channels(shift if bias is None else shift + bias, input)
        else:
            through, w, b = known
            shift = a * (-running_mean if b is None else b - running_mean)
            y = through(w * a.reshape(-1, *(1,) * (w.dim() - 1)), shift if bias is None else shift + bias)
        return valued(F.batch_norm, y, input, running_mean, running_var, weight, bias, False, momentum, eps)


def _tuple(value: int | Sequence[int], n: int) -> list[int]:
    return [value] * n if isinstance(value, int) else list(value)


def _channels(a: Tensor, y: Tensor) -> Tensor:
    """Reshape a [C] to broadcast against y [N, C, ...]."""
    return a.reshape(1, -1, *(1,) * (y.dim() - 2))
