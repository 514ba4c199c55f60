"""Fuse the passes of spiking neurons with what stands around them while a network is traced."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hessian_tools.engine.programs import Tracing
from hessian_tools.engine.rewriting import Rewriting
from ikun.nodes.autograd import neurons
from ikun.nodes.passes import OPS, ScanSpec, functions

POOLS = (F.max_pool2d, torch.max_pool2d)


class SpikingRewriting(Rewriting):
    """Neurons with an input that is the same at all steps read it once, and a 2 x 2 max-pooling joins the neurons."""

    def __init__(self, hoist: bool = True) -> None:
        super().__init__(hoist)
        self._fired: dict[int, tuple[Tensor, ScanSpec, Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is neurons:
            return self._neurons(*args, **(kwargs or {}))
        if func in POOLS and (y := self._pooled(*args, **(kwargs or {}))) is not None:
            return y
        return super().__torch_function__(func, types, args, kwargs)

    def _neurons(
        self, x: Tensor, spec: ScanSpec, v0: Any = None, gain: Any = None, jet: Any = None, values: Any = None
    ) -> Any:
        once = self.once(x)
        if len(once) < len(x):
            spec = replace(spec, static=True, steps=len(x))
        y, end = neurons(once, spec, v0, gain, jet, values)
        self._fired[id(y)] = once, spec, (v0, gain, jet, values)
        self._alive += [y, once]
        return y, end

    def _pooled(
        self, x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Tensor | None:  # fmt: skip
        fired = self._fired.get(id(self._origin.get(id(x), x)))
        plain = (_pair(kernel_size) == (2, 2) and stride in (None, [], ())) or _pair(stride or kernel_size) == _pair(
            kernel_size
        ) == (2, 2)
        if (
            fired is None
            or not plain
            or _pair(padding) != (0, 0)
            or _pair(dilation) != (1, 1)
            or ceil_mode
            or return_indices
        ):
            return None
        current, spec, others = fired
        if current.dim() < 4 or x.shape[-2:] != current.shape[-2:] or min(x.shape[-2:]) < 2:
            return None
        y, _ = neurons(current, replace(spec, height=x.shape[-2], width=x.shape[-1]), *others)
        flat = y.reshape(*x.shape[:-2], *y.shape[-2:])
        self._origin[id(flat)] = y
        self._alive += [y, flat]
        return flat


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


def _calls(graph: fx.Graph, name: str) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function" and n.target is OPS[name]]


def _read(node: Any, name: str, place: int) -> fx.Node | None:
    """Return the call of `name` whose output number `place` a node is."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or node.args[1] != place:
        return None
    call = node.args[0]
    return call if isinstance(call, fx.Node) and call.target is OPS[name] else None


def join_adjoints(graph: fx.Graph) -> None:
    """Use the adjoint that is computed with what is kept."""
    kept = {(n.args[0], n.args[1], *n.args[4:]): n for n in _calls(graph, "adjoint_kept")}
    for node in _calls(graph, "adjoint"):
        if (other := kept.get(tuple(node.args))) is not None:
            for user in list(node.users):
                user.replace_input_with(node, other)
            _move_before(graph, other, node)


def _move_before(graph: fx.Graph, node: fx.Node, place: fx.Node) -> None:
    """Move a node with all that it needs before another one."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    limit, moved, todo = order[place], [], [node]
    while todo:
        n = todo.pop()
        if order[n] > limit:
            moved.append(n)
            todo += n.all_input_nodes
    for n in sorted(set(moved), key=order.__getitem__):
        place.prepend(n)


def join_tangents(graph: fx.Graph) -> None:
    """Add the tangent of the adjoint and an adjoint of the same neurons by one pass."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.add.Tensor or len(node.args) != 2:
            continue
        for a, b in (node.args, node.args[::-1]):
            second, first = _read(a, "adjoint_tangent", 0), _read(b, "adjoint", 0)
            if second is None or first is None or second.args[0] is not None:
                continue
            if (second.args[5:7], second.args[9:]) != (first.args[2:4], first.args[4:]):
                continue
            later = max(first, second, key=lambda n: order[n])
            with graph.inserting_after(later):
                call = graph.call_function(OPS["adjoint_tangent"], (first.args[0], first.args[1], *second.args[2:]))
            call.meta = dict(second.meta)
            for place in range(3):
                one, other = _part(second, place), _part(first, place)
                if one is None or other is None:
                    continue
                with graph.inserting_after(call):
                    both = graph.call_function(operator.getitem, (call, place))
                both.meta = dict(one.meta)
                for user in list(one.users):
                    if user.target is torch.ops.aten.add.Tensor and set(user.args) == {one, other}:
                        user.replace_all_uses_with(both)
            break


def _part(call: fx.Node, place: int) -> fx.Node | None:
    return next((u for u in call.users if u.target is operator.getitem and u.args[1] == place), None)


def call_directly(graph: fx.Graph) -> None:
    """Call the functions behind torch's operators, which takes less time per call."""
    direct = functions()
    for node in graph.nodes:
        if node.op == "call_function" and node.target in direct:
            node.target = direct[node.target]


TRACING = Tracing(SpikingRewriting, (join_adjoints, join_tangents, call_directly))
