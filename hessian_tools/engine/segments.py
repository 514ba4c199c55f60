"""Replay a traced product in segments of the network, in less memory than all values of one batch take.

The values of the network, in the order in which they are computed, are cut into segments. A product makes two sweeps:

- Forward: the values and their tangents, of which only those that cross a cut are kept (checkpoints).
- Backward, when the outputs and with them the slope of the loss are known: the values and tangents of a segment once
  more from the checkpoints, then its adjoints and their tangents, which are passed to the segment before.

That is one more evaluation of values and tangents than a product from scratch (Griewank and Walther 2000). It works for
any traced network: the segments of a loop over time are steps, those of a deep network are layers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from hessian_tools.engine.graph import StagePart, reuse_memory, stage_of_nodes


@dataclass(frozen=True)
class Segments:
    """A product in segments.

    Attributes:
        forward: One function per segment, with the checkpoints that it makes. The last one has the outputs and their
            tangent as its first outputs.
        backward: One function per segment, in the order of the segments.
        results: Names of the entries of the product.
        nbytes: About the most memory that a product takes, in bytes.
    """

    forward: list[StagePart]
    backward: list[StagePart]
    results: tuple[str, ...]
    nbytes: int


def _nbytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _cut(values: Sequence[fx.Node], count: int) -> dict[fx.Node, int]:
    """Return the segment of every value, so that all segments take about the same memory."""
    total = sum(map(_nbytes, values)) or 1
    segment: dict[Any, int] = {}
    seen = now = 0
    for node in values:
        if node.target is operator.getitem:  # the parts of a result stay together
            segment[node] = segment.get(node.args[0], now)
        else:
            now = max(now, min(count - 1, seen * count // total))
            segment[node] = now
        seen += _nbytes(node)
    return segment


def segmented(
    module: fx.GraphModule, outputs: fx.Node, tangent: fx.Node, image: Sequence[fx.Node], count: int
) -> Segments:
    """Cut a traced product into segments.

    Args:
        module: The simplified graph (see `graph.simplify`).
        outputs: The outputs of the network.
        tangent: Their tangent.
        image: The entries of the product.
        count: Number of segments.

    Returns:
        The segments.
    """
    stage = stage_of_nodes(module.graph)
    nodes = [n for n in module.graph.nodes if n.op in ("call_function", "get_attr")]
    order = {n: i for i, n in enumerate(nodes)}
    ahead = _ancestors([tangent])
    values = [n for n in nodes if stage[n] == 0]
    segment = _cut(values, count)
    forward = {n for n in nodes if stage[n] == 0 or (stage[n] == 2 and n in ahead)}
    for n in nodes:  # a tangent is computed with the last value that it needs
        if n in forward and stage[n] > 0:
            segment[n] = max((segment[a] for a in n.all_input_nodes if a in segment), default=0)
    stored = {n for n in forward for u in n.users if u in forward and segment[u] > segment[n]}
    stored |= {n for n in (outputs, tangent) if segment.get(n, count) < count - 1}
    for n in nodes:  # an adjoint is computed with the first value that it needs, but not before its own inputs
        if n in forward:
            continue
        inputs = [a for a in n.all_input_nodes if a in order]
        bound = min((segment[a] for a in inputs if a not in forward), default=count - 1)
        needed = [a for a in inputs if a in forward and a not in stored]
        segment[n] = min([bound, *(segment[a] for a in needed)])
        stored |= {a for a in needed if segment[a] > segment[n]}
    ahead_parts, behind_parts = [], []
    for k in range(count):
        mine = [n for n in nodes if n in forward and segment[n] == k]
        kept = [n for n in mine if n in stored]
        ends = [outputs, tangent] if k == count - 1 else []
        ahead_parts.append(_part(module, mine, ends, kept))
        late = [n for n in nodes if n not in forward and segment[n] == k]
        passed = [n for n in late if any(u.op == "output" or segment[u] < k for u in n.users)]
        behind_parts.append(_part(module, [*[m for m in mine if m not in stored], *late], [], passed))
    held = sum(map(_nbytes, stored))
    most = max(sum(_nbytes(n) for n in nodes if segment[n] == k and n not in stored) for k in range(count))
    return Segments(ahead_parts, behind_parts, tuple(n.name for n in image), held + most)


def _ancestors(nodes: Iterable[fx.Node], among: set[fx.Node] | None = None) -> set[fx.Node]:
    """Return some nodes and all that they depend on, as far as it is `among` others."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found and (among is None or node in among):
            found.add(node)
            todo += node.all_input_nodes
    return found


def _part(
    module: fx.GraphModule, nodes: Sequence[fx.Node], ends: Sequence[fx.Node], kept: Sequence[fx.Node]
) -> StagePart:
    """Return a function of what is needed of some nodes for given results."""
    needed = _ancestors([*ends, *kept], set(nodes))
    graph, inside, inputs = fx.Graph(), {}, []

    def fetch(node: fx.Node) -> fx.Node:
        if node not in inside:
            inside[node] = graph.placeholder(node.name)
            inputs.append(node.name)
        return inside[node]

    mine = [n for n in nodes if n in needed]
    outside = {a: None for n in mine for a in n.all_input_nodes} | dict.fromkeys(ends)
    for node in outside:
        if node not in needed:
            fetch(node)
    for node in mine:
        inside[node] = graph.node_copy(node, fetch)
    graph.output(tuple(fetch(n) for n in [*ends, *kept]))
    reuse_memory(graph)
    return StagePart(fx.GraphModule(module, graph), tuple(inputs), tuple(n.name for n in kept))


def product(
    segments: Segments, values: dict[str, Tensor], close: Callable[[Tensor, Tensor, dict[str, Tensor]], bool]
) -> list[Tensor]:
    """Run a product.

    Args:
        segments: The segments.
        values: The inputs by name, without those that `close` adds.
        close: Gets the outputs, their tangent and the values, and adds the slope and its tangent to the values. It
            returns whether the product can be other than zero.

    Returns:
        The entries of the product; none if it is zero.
    """
    here = dict(values)
    parts = [*segments.forward, *reversed(segments.backward)]
    uses = {name: i for i, part in enumerate(parts) for name in part.inputs}
    for i, part in enumerate(parts):
        found = part.run(*(here[name] for name in part.inputs))
        here.update(zip(part.kept, found[len(found) - len(part.kept) :], strict=True))
        if i == len(segments.forward) - 1 and not close(found[0], found[1], here):
            return []
        del found
        for name in [*part.inputs, *part.kept]:
            if uses.get(name, -1) <= i and name not in segments.results:
                here.pop(name, None)
    return [here[name] for name in segments.results]
