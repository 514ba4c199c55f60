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
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from hessian_tools.engine.convolution.blocks import fuse_blocks
from hessian_tools.engine.graph import StagePart, reuse_memory, stage_of_nodes
from hessian_tools.engine.resizing import bytes_of, resized

MOST_SEGMENTS = 64  # of a product; every segment is a function of its own


@dataclass(frozen=True)
class Segments:
    """A product in segments.

    Attributes:
        forward: One function per segment, with the checkpoints that it makes. The last one has the outputs and their
            tangent as its first outputs.
        backward: One function per segment, in the order of the segments.
        results: Names of the entries of the product. An empty name is an entry that is zero.
        nbytes: About the most memory that a product takes, in bytes.
    """

    forward: list[StagePart]
    backward: list[StagePart]
    results: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class SegmentPlan:
    """How a product is cut.

    Attributes:
        count: Number of segments.
        segment: The segment of every operation.
        forward: The operations of the forward sweep.
        stored: The values that cross a cut, the checkpoints.
        nbytes: About the most memory that a product takes, in bytes.
    """

    count: int
    segment: dict[fx.Node, int]
    forward: set[fx.Node]
    stored: set[fx.Node]
    nbytes: int


def _cut(values: Sequence[fx.Node], sizes: dict[fx.Node, int], count: int) -> dict[fx.Node, int]:
    """Return the segment of every value, so that all segments take about the same memory."""
    total = sum(sizes[n] for n in values) or 1
    segment: dict[Any, int] = {}
    seen = now = 0
    for node in values:
        if node.target is operator.getitem:  # the parts of a result stay together
            segment[node] = segment.get(node.args[0], now)
        else:
            now = max(now, min(count - 1, seen * count // total))
            segment[node] = now
        seen += sizes[node]
    return segment


def plan_of(module: fx.GraphModule, results: Sequence[fx.Node | None], count: int, samples: int = 0) -> SegmentPlan:
    """Assign the operations of a traced product to segments.

    Args:
        module: The simplified graph (see `graph.simplify`).
        results: The outputs of the network, their tangent, and the entries of the product.
        count: Number of segments.
        samples: Number of samples of a batch if the graph is for `resizing.SAMPLES` samples, or 0.
    """
    outputs, tangent, *_ = results
    assert outputs is not None
    assert tangent is not None
    stage = stage_of_nodes(module.graph)
    nodes = [n for n in module.graph.nodes if n.op in ("call_function", "get_attr")]
    owner, sizes = _memory(nodes, samples)
    order = {n: i for i, n in enumerate(nodes)}
    ahead = _ancestors([tangent])
    values = _ancestors([outputs])
    segment = _cut([n for n in nodes if stage[n] == 0 and n in values], sizes, count)
    forward = {n for n in nodes if stage[n] == 0 or (stage[n] == 2 and n in ahead)}
    for n in nodes:  # a tangent or a derivative is computed with the last value that it needs
        if n in forward and n not in segment:
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
    plan = SegmentPlan(count, segment, forward, stored, 0)
    return replace(plan, nbytes=_peak(_parts(nodes, plan, outputs, tangent), owner, sizes))


def _memory(nodes: Sequence[fx.Node], samples: int) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, int]]:
    """Return for every value the one whose memory it is in, itself or one that it is a view or a part of, and sizes."""
    first: dict[int, fx.Node] = {}
    owner: dict[fx.Node, fx.Node] = {}
    sizes = {}
    for n in nodes:
        value = n.meta.get("val")
        source: Any = n.args[0] if n.target is operator.getitem else n
        if isinstance(value, Tensor) and source is n:
            source = first.setdefault(value.untyped_storage()._cdata, n)
        owner[n] = owner.get(source, n)
        once, each = bytes_of(n)
        sizes[n] = once + each * samples if owner[n] is n else 0
    return owner, sizes


@dataclass(frozen=True)
class _Part:
    """The operations of one step of a sweep, the outputs among them, and the values that later steps read."""

    nodes: list[fx.Node]
    ends: list[fx.Node]
    kept: list[fx.Node]


def _parts(nodes: Sequence[fx.Node], plan: SegmentPlan, outputs: fx.Node, tangent: fx.Node) -> list[_Part]:
    """Return the steps of the forward sweep, and then those of the backward sweep, in the order of the segments."""
    here: list[list[fx.Node]] = [[] for _ in range(plan.count)]
    for n in nodes:
        here[plan.segment[n]].append(n)
    ahead, behind = [], []
    for k, some in enumerate(here):
        mine = [n for n in some if n in plan.forward]
        late = [n for n in some if n not in plan.forward]
        ends = [outputs, tangent] if k == plan.count - 1 else []
        ahead.append(_needed(mine, ends, [n for n in mine if n in plan.stored]))
        passed = [n for n in late if any(u.op == "output" or plan.segment[u] < k for u in n.users)]
        behind.append(_needed([*[m for m in mine if m not in plan.stored], *late], [], passed))
    return [*ahead, *behind]


def _needed(nodes: Sequence[fx.Node], ends: list[fx.Node], kept: list[fx.Node]) -> _Part:
    needed = _ancestors([*ends, *kept], set(nodes))
    return _Part([n for n in nodes if n in needed], ends, kept)


def _peak(parts: list[_Part], owner: dict[fx.Node, fx.Node], sizes: dict[fx.Node, int]) -> int:
    """Return the most bytes that are in use at a time, from which values are in use when."""
    half = len(parts) // 2
    run = [*parts[:half], *reversed(parts[half:])]
    last = {owner[a]: i for i, part in enumerate(run) for n in part.nodes for a in n.all_input_nodes if a in owner}
    held: set[fx.Node] = set()
    peak = 0
    for i, part in enumerate(run):
        stays = {owner[n] for n in (*part.kept, *part.ends)} | held
        uses = {owner[a]: n for n in part.nodes for a in (*n.all_input_nodes, n) if a in owner}
        ending: dict[fx.Node, list[fx.Node]] = {}
        for a, n in uses.items():
            ending.setdefault(n, []).append(a)
        live, inside = sum(sizes[a] for a in held), set(held)
        for n in part.nodes:
            if owner[n] not in inside:
                inside.add(owner[n])
                live += sizes[owner[n]]
            peak = max(peak, live)
            gone = [a for a in ending.get(n, ()) if a in inside and a not in stays]
            inside.difference_update(gone)
            live -= sum(sizes[a] for a in gone)
        held = {a for a in stays if last.get(a, i) > i or a not in last}
    return peak


def plan_within(
    module: fx.GraphModule, results: Sequence[fx.Node | None], memory: float, samples: int = 0
) -> SegmentPlan:
    """Return a plan with the fewest segments that take at most `memory` bytes, or else that with the fewest bytes.

    The arguments are those of `plan_of`.
    """
    best = plan_of(module, results, 1, samples)
    count = 2
    while best.nbytes > memory and count <= MOST_SEGMENTS:
        plan = plan_of(module, results, count, samples)
        best = plan if plan.nbytes < best.nbytes else best
        count *= 2
    return best


def segmented(
    module: fx.GraphModule, results: Sequence[fx.Node | None], plan: SegmentPlan, samples: int = 0
) -> Segments:
    """Cut a traced product into segments. The arguments are those of `plan_of`."""
    outputs, tangent, *image = results
    assert outputs is not None
    assert tangent is not None
    nodes = [n for n in module.graph.nodes if n in plan.segment]
    parts = [_function(module, part, samples) for part in _parts(nodes, plan, outputs, tangent)]
    names = tuple("" if n is None else n.name for n in image)
    return Segments(parts[: plan.count], parts[plan.count :], names, plan.nbytes)


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


def _function(module: fx.GraphModule, part: _Part, samples: int) -> StagePart:
    """Return a step as a function."""
    graph, inside, inputs = fx.Graph(), {}, []

    def fetch(node: fx.Node) -> fx.Node:
        if node not in inside:
            inside[node] = graph.placeholder(node.name)
            inputs.append(node.name)
        return inside[node]

    mine = set(part.nodes)
    for node in {a: None for n in part.nodes for a in n.all_input_nodes} | dict.fromkeys(part.ends):
        if node not in mine:
            fetch(node)
    for node in part.nodes:
        inside[node] = graph.node_copy(node, fetch)
    graph.output(tuple(fetch(n) for n in [*part.ends, *part.kept]))
    reuse_memory(graph)
    fuse_blocks(graph)
    made = StagePart(fx.GraphModule(module, graph), tuple(inputs), tuple(n.name for n in part.kept))
    return resized(made, samples) if samples else made


def product(
    segments: Segments, values: dict[str, Tensor], close: Callable[[Tensor, Tensor, dict[str, Tensor]], bool]
) -> list[Tensor | None]:
    """Run a product.

    Args:
        segments: The segments.
        values: The inputs by name, without those that `close` adds.
        close: Gets the outputs, their tangent and the values, and adds the slope and its tangent to the values. It
            returns whether the product can be other than zero.

    Returns:
        The entries of the product, where None is zero; an empty list if all of it is zero.
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
    return [here[name] if name else None for name in segments.results]
