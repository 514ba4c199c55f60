"""The same network with other neurons or another pooling: relaxed, or with the reversed tie rule.

A variant runs the network in a mode that changes single calls. It needs no knowledge of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ikun.nodes.autograd import neurons
from ikun.nodes.passes import ScanSpec
from ikun.nodes.rewriting import TRACING

POOLS: dict[Any, tuple[Any, int]] = {
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d), (F.max_pool1d, 1)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), (F.max_pool2d, 2)),
    **dict.fromkeys((F.max_pool3d, torch.max_pool3d), (F.max_pool3d, 3)),
}


class Changed(nn.Module):
    """A model that runs in a mode. Its parameters and layers keep their names.

    Args:
        model: The model.
        mode: Makes the mode.
    """

    tracing = TRACING
    model: nn.Module

    def __init__(self, model: nn.Module, mode: Callable[[], TorchFunctionMode]) -> None:
        super().__init__()
        self.mode = mode
        vars(self)["model"] = model  # not registered as a submodule, which would prefix all names
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self._non_persistent_buffers_set = model._non_persistent_buffers_set
        self.training = model.training

    def train(self, mode: bool = True) -> Changed:
        self.model.train(mode)
        self.training = mode
        return self

    def forward(self, x: Tensor) -> Any:
        with self.mode():
            return self.model(x)


class Relaxing(TorchFunctionMode):
    """Neurons return F(h - threshold) instead of spikes, in every step of the recurrence."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is neurons:
            return _relaxed(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _relaxed(x: Tensor, spec: ScanSpec, v0: Any = None, gain: Any = None, jet: Any = None, values: Any = None) -> Any:
    if not spec.surrogate or jet is not None:
        raise ValueError("a surrogate of no known family has no relaxed network: give another surrogate")
    return neurons(x, replace(spec, relaxed=True), v0, gain)


class ReversingTies(TorchFunctionMode):
    """Max-pooling selects the last of several equal entries of a window, in row-major order, not the first."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0  # number of calls of max-pooling

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in POOLS and not kwargs.get("return_indices"):
            self.count += 1
            return _last(*POOLS[func], *args, **kwargs)
        return func(*args, **kwargs)


def _last(
    pool: Any, axes: int, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Tensor:  # fmt: skip
    """Max-pool the reversed input, so that the first of equal entries there is the last here."""
    size, gap, step = (_numbers(value, axes) for value in (kernel_size, dilation, stride or kernel_size))
    with torch.no_grad():
        shape = pool(input, kernel_size, stride or None, padding, dilation, ceil_mode).shape[-axes:]
    edges: list[int] = []
    for i in reversed(range(axes)):
        before = _numbers(padding, axes)[i]
        needed = (shape[i] - 1) * step[i] + gap[i] * (size[i] - 1) + 1
        edges += [before, needed - before - input.shape[i - axes]]  # negative: what no window reads
    whole = F.pad(input, edges, value=-torch.inf) if any(edges) else input
    across = list(range(-axes, 0))
    y: Tensor = pool(whole.flip(across), size, step, 0, gap).flip(across)
    return y


def _numbers(value: Any, count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else [value[0]] * count if len(value) == 1 else list(value)
