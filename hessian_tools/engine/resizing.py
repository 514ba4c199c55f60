"""Use one traced product for batches of any number of samples.

A product is traced with fake tensors, which take no memory, for a number of samples that is a large prime. Every whole
number in the graph that is a multiple of this prime then counts samples, and is replaced for another number of samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch import config as _config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from hessian_tools.engine.graph import StagePart

SAMPLES = 1_000_003  # a prime that is larger than the sizes that networks have
PARTS = 16  # a number near a multiple of SAMPLES / m, for m up to this, counts a part of the samples


def fake_mode() -> FakeTensorMode:
    """Return a mode for tensors without memory, in which a branch on the value of a tensor raises an error."""
    with _config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        return FakeTensorMode(
            allow_fallback_kernels=True, allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True
        )


def axis_order(t: Tensor) -> tuple[int, ...] | None:
    """Return the axes of a tensor [N, ...] from the largest stride to the smallest, or None if it has gaps."""
    if t.is_contiguous():
        return tuple(range(t.dim()))
    strides = t.stride()
    order = tuple(sorted(range(t.dim()), key=lambda k: (-strides[k], k)))
    return order if t.permute(order).is_contiguous() else None


def enlarged(t: Tensor, order: tuple[int, ...], mode: FakeTensorMode) -> Tensor:
    """Return a fake tensor like t [N, ...] with SAMPLES samples."""
    shape = (SAMPLES, *t.shape[1:])
    with mode:
        made = torch.empty([shape[k] for k in order], dtype=t.dtype, device=t.device)
        return made.permute([order.index(k) for k in range(t.dim())])


def can_resize(module: fx.GraphModule) -> bool:
    """Return whether every whole number in a graph counts either all samples or none, as far as can be seen."""
    numbers: set[int] = set()

    def note(value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            numbers.add(value)
        return value

    for node in module.graph.nodes:
        fx.node.map_aggregate((node.args, node.kwargs), note)
        held = getattr(module, node.target) if node.op == "get_attr" else None
        if isinstance(held, Tensor) and any(_counts_samples(n) for n in held.shape):
            return False
    return not any(_counts_part(abs(n)) for n in numbers if n < sys.maxsize - 1)


def _counts_samples(n: int) -> bool:
    return n != 0 and n % SAMPLES == 0


def _counts_part(n: int) -> bool:
    """Return whether a number seems to count a part of the samples, such as half of them or all but one."""
    if n % SAMPLES == 0 or n < SAMPLES // PARTS:
        return False
    return any(min(n * m % SAMPLES, -n * m % SAMPLES) <= m for m in range(1, PARTS + 1))


def bytes_of(node: fx.Node) -> tuple[int, int]:
    """Return the bytes of a traced value: those that it has once, and those per sample."""
    once = each = 0
    value = node.meta.get("val")
    for t in value if isinstance(value, tuple | list) else [value]:
        if isinstance(t, Tensor):
            size = t.numel() * t.element_size()
            if any(_counts_samples(n) for n in t.shape):
                each += size // SAMPLES
            else:
                once += size
    return once, each


def resized_number(n: int, samples: int) -> int:
    """Return a number of a graph for another number of samples."""
    return n // SAMPLES * samples if _counts_samples(n) else n


def resized(part: StagePart, samples: int) -> StagePart:
    """Return a stage for another number of samples."""

    def change(value: Any) -> Any:
        return resized_number(value, samples) if isinstance(value, int) and not isinstance(value, bool) else value

    return StagePart(with_constants(part.run, change)[0], part.inputs, part.kept)


def with_constants(module: Any, change: Callable[[Any], Any]) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Return a graph with other constants as arguments of its operations, and its nodes by those of the given one."""
    graph = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        made = graph.node_copy(node, inside.__getitem__)
        if node.op == "call_function":
            made.args = fx.node.map_aggregate(made.args, change)
            made.kwargs = fx.node.map_aggregate(made.kwargs, change)
        inside[node] = made
    return fx.GraphModule(module, graph), inside
