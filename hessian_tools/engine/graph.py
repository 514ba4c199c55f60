"""Simplify a traced product, and split it into stages."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hessian_tools.engine.convolution.blocks import fuse_blocks
from hessian_tools.engine.sums import is_sum, join_maps, join_sums

aten = torch.ops.aten
Rule = Callable[[fx.Graph], None]
# The stage of a value says on which inputs it depends: the weights and data; also the slope of the loss; also the
# vector of the product; also the tangent of the slope.
STAGES = ("values", "slope", "vector", "tangent")


def simplify(graph: fx.Graph, rules: Sequence[Rule], joins: bool = True) -> None:
    """Remove copies, repeated computations and unused values, and apply the rules. The graph must be functional.

    Args:
        graph: The graph.
        rules: Further rules.
        joins: Whether the summands of a gradient are computed by one operation (`sums`).
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and (node.target in (aten.detach.default, aten.alias.default) or _copies(node)):
            _replace(graph, node, node.args[0])
    _merge_views(graph)
    _merge_equal(graph)
    _merge_transposes(graph)
    graph.eliminate_dead_code()
    join_maps(graph)
    if joins:
        join_sums(graph, stage_of_nodes(graph))
    for rule in rules:
        rule(graph)
    graph.eliminate_dead_code()


def _replace(graph: fx.Graph, node: fx.Node, other: Any) -> None:
    node.replace_all_uses_with(other)
    graph.erase_node(node)


def _copies(node: fx.Node) -> bool:
    """Return whether a node only copies a value, in the same order of memory."""
    source = node.args[0] if node.target is aten.clone.default else None
    if not isinstance(source, fx.Node) or "val" not in source.meta or "val" not in node.meta:
        return False
    return bool(source.meta["val"].stride() == node.meta["val"].stride())


def _merge_views(graph: fx.Graph) -> None:
    """Let a view of a view be a view of the first, and remove views without effect."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.view.default:
            continue
        source = node.args[0]
        while source.op == "call_function" and source.target is aten.view.default:
            source = source.args[0]
        value, shape = source.meta.get("val"), node.meta["val"].shape
        if value is None or not value.is_contiguous():
            continue
        if value.shape == shape:
            _replace(graph, node, source)
        elif source is not node.args[0]:
            node.args = (source, list(shape))


def _merge_transposes(graph: fx.Graph) -> None:
    """Transpose the summands instead of a sum, and remove pairs of transposes."""
    for node in reversed(graph.nodes):
        source = node.args[0] if node.target is aten.t.default else None
        if isinstance(source, fx.Node) and is_sum(source) and len(source.users) == 1:
            with graph.inserting_before(node):
                turned = [graph.call_function(aten.t.default, (part,)) for part in source.args]
                for made, part in zip(turned, source.args, strict=True):
                    made.meta["val"] = part.meta["val"].t()  # type: ignore[union-attr]
                total = graph.call_function(aten.add.Tensor, tuple(turned))
            total.meta["val"] = node.meta["val"]
            _replace(graph, node, total)
    for node in list(graph.nodes):
        source = node.args[0] if node.target is aten.t.default else None
        if isinstance(source, fx.Node) and source.target is aten.t.default:
            _replace(graph, node, source.args[0])


def _merge_equal(graph: fx.Graph) -> None:
    """Compute equal expressions once."""
    known: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            first = known.setdefault((node.target, _key(node.args), _key(tuple(node.kwargs.items()))), node)
            if first is not node:
                _replace(graph, node, first)


def _key(value: Any) -> Hashable:
    if isinstance(value, list | tuple):
        return tuple(_key(part) for part in value)
    if isinstance(value, fx.Node):
        return value
    return type(value), repr(value)


ALLOCATING = {
    aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.add.Tensor, aten.add_.Tensor,
    aten.baddbmm_.default, aten.mul.Tensor,
}  # fmt: skip


def _fresh(node: Any) -> bool:
    """Return whether a value is in memory of its own, which nothing else reads."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or len(node.users) != 1:
        return False
    if node.target is operator.getitem:
        call: Any = node.args[0]
        return call.target is aten.convolution_backward.default
    return node.target in ALLOCATING


def reuse_memory(graph: fx.Graph) -> None:
    """Add matrix products to what they are added to, and add in place where a summand is not needed again."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
            continue
        a, b = node.args
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or a is b:
            continue
        shapes = {str(n.meta["val"].shape) for n in (node, a, b) if "val" in n.meta}
        types = {n.meta["val"].dtype for n in (node, a, b) if "val" in n.meta}
        if len(shapes) != 1 or len(types) != 1 or any("val" not in n.meta for n in (a, b)):
            continue
        for one, other in ((a, b), (b, a)):
            if one.meta["val"].stride() != node.meta.get("val", one.meta["val"]).stride():
                continue  # a view of the sum may need its order in memory
            if _fresh(one) and _fresh(other) and other.target is aten.bmm.default:
                node.target, node.args = aten.baddbmm_.default, (one, *other.args)
                graph.erase_node(other)
                break
            if _fresh(one):
                node.target, node.args = aten.add_.Tensor, (one, other)
                break


def stage_of_nodes(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the stage of every node. Placeholders have theirs in `meta["stage"]`."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = node.meta["stage"]
        else:
            found[node] = max((found[n] for n in node.all_input_nodes), default=0)
    return found


@dataclass(frozen=True)
class StagePart:
    """One stage of a product.

    Attributes:
        run: The compiled stage.
        inputs: Names of its inputs, which are placeholders or values of earlier stages.
        kept: Names of its values that later stages use, the last outputs of `run`.
    """

    run: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    kept: tuple[str, ...]


def _delay(stage: dict[fx.Node, int], results: Sequence[fx.Node | None]) -> None:
    """Move what the tangent of the outputs does not need to the last stage, where it is added to other values."""
    todo, needed = [n for n in results if n is not None], set[fx.Node]()
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.all_input_nodes
    for node in stage:
        if stage[node] == 2 and node.op == "call_function" and node not in needed:
            stage[node] = 3


def split(module: fx.GraphModule, results: Sequence[Sequence[fx.Node | None]]) -> list[StagePart]:
    """Split a graph into one function per stage.

    Args:
        module: The graph. Its placeholders have their stage in `meta["stage"]`.
        results: The values of every stage that are outputs, which are the first outputs of the stage's function.
            None stands for an output that is zero.
    """
    stage = stage_of_nodes(module.graph)
    if len(results) == len(STAGES):
        _delay(stage, results[2])
    parts = []
    for k, outputs in enumerate(results):
        wanted = [w for w in outputs if w is not None]
        mine = [n for n in module.graph.nodes if n.op in ("call_function", "get_attr") and stage[n] == k]
        part = fx.Graph()
        inside: dict[fx.Node, fx.Node] = {}
        inputs: list[str] = []

        def fetch(
            node: fx.Node, inside: dict[fx.Node, fx.Node] = inside, inputs: list[str] = inputs, part: fx.Graph = part
        ) -> fx.Node:
            if node not in inside:
                inside[node] = part.placeholder(node.name)
                inputs.append(node.name)
            return inside[node]

        needed = {a: None for n in mine for a in n.all_input_nodes if a.op == "placeholder" or stage[a] < k}
        for node in [*needed, *(w for w in wanted if w.op == "placeholder" or stage[w] < k)]:
            fetch(node)
        for node in mine:
            inside[node] = part.node_copy(node, fetch)
        later = {w for some in results[k + 1 :] for w in some}
        kept = [n for n in mine if n in later or any(u.op != "output" and stage[u] > k for u in n.users)]
        part.output(tuple(None if n is None else fetch(n) for n in [*outputs, *kept]))
        reuse_memory(part)
        fuse_blocks(part)
        parts.append(StagePart(fx.GraphModule(module, part), tuple(inputs), tuple(n.name for n in kept)))
    return parts
