"""Compute sums of many matrix products, or of many gradients of one convolution's weights, as one.

The gradient of weights that are used at every time step is a sum over the steps. Together they are one product of the
concatenated factors.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hessian_tools.engine.convolution.winograd import LINEAR

aten = torch.ops.aten
LEAST = 3  # summands that are worth joining


@dataclass(frozen=True)
class _Term:
    """A summand.

    Attributes:
        node: The summand itself.
        key: Terms with the same key are joined.
        left: One factor, samples first: g of a convolution [N, O, ...], or G of G^T X.
        right: The other factor, samples first.
        make: Makes the sum of terms from the concatenated factors.
    """

    node: fx.Node
    key: Hashable
    left: fx.Node
    right: fx.Node
    make: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]


def join_maps(graph: fx.Graph) -> None:
    """Map sums, instead of summing values of one linear map."""
    for root in list(graph.nodes):
        if not is_sum(root) or _inside(root):
            continue
        groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
        leaves = _leaves(root)
        for leaf in leaves:
            linear = leaf.target in LINEAR and len(leaf.users) == 1
            groups[(leaf.target, repr(leaf.args[1:])) if linear else leaf].append(leaf)
        if len(groups) == len(leaves):
            continue
        with graph.inserting_before(root):
            terms = []
            for first, *others in groups.values():
                if others:
                    total = _total(graph, [n.args[0] for n in (first, *others)])
                    made = graph.call_function(first.target, (total, *first.args[1:]))  # type: ignore[arg-type]
                    made.meta["val"] = first.meta["val"]
                terms.append(made if others else first)
            root.replace_all_uses_with(_total(graph, terms))
    graph.eliminate_dead_code()


def _total(graph: fx.Graph, terms: Sequence[Any]) -> fx.Node:
    """Add nodes."""
    total: fx.Node = terms[0]
    for term in terms[1:]:
        value = total.meta["val"]
        total = graph.call_function(aten.add.Tensor, (total, term))
        total.meta["val"] = value
    return total


def join_sums(graph: fx.Graph, stage: dict[fx.Node, int]) -> None:
    """Join the summands of all sums in a graph.

    Args:
        graph: The graph.
        stage: The stage of every node (see `graph.stage_of_nodes`). Only factors of the same stages are joined.
    """
    for root in list(graph.nodes):
        if not is_sum(root) or _inside(root):
            continue
        groups: dict[Hashable, list[_Term]] = defaultdict(list)
        rest = []
        leaves = _leaves(root)
        if (stacked := _stacked(graph, root, leaves)) is not None:
            root.replace_all_uses_with(stacked)
            continue
        for leaf in leaves:
            term = _term(leaf)
            if term is None:
                rest.append(leaf)
            else:
                groups[term.key, stage.get(term.left), stage.get(term.right)].append(term)
        if all(len(group) < LEAST for group in groups.values()):
            continue
        with graph.inserting_before(root):
            for group in groups.values():
                if len(group) < LEAST:
                    rest += [term.node for term in group]
                    continue
                left, right = (_joined(graph, [getattr(t, side) for t in group]) for side in ("left", "right"))
                rest.append(group[0].make(graph, left, right))
                rest[-1].meta["val"] = root.meta["val"]
            root.replace_all_uses_with(_total(graph, rest))
    graph.eliminate_dead_code()


def is_sum(node: fx.Node) -> bool:
    """Return whether a node adds two tensors of its own shape and dtype."""
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    values: list[Any] = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in (node, *node.args)]
    return all(isinstance(t, Tensor) for t in values) and len({(t.shape, t.dtype) for t in values}) == 1


def _inside(node: fx.Node) -> bool:
    """Return whether a sum is only a part of another sum."""
    return len(node.users) == 1 and is_sum(next(iter(node.users)))


def _leaves(root: fx.Node) -> list[fx.Node]:
    found, todo = [], list(root.args)
    while todo:
        node: Any = todo.pop()
        if is_sum(node) and len(node.users) == 1:
            todo += node.args
        else:
            found.append(node)
    return found[::-1]


def _term(leaf: fx.Node) -> _Term | None:
    """Return a summand that can be joined with others, or None."""
    if len(leaf.users) != 1:
        return None
    if leaf.target is operator.getitem and leaf.args[1] == 1:
        call: Any = leaf.args[0]
        if call.target is aten.convolution_backward.default and list(call.args[-1]) == [False, True, False]:
            return _weight_gradient(leaf, call)
    turned = leaf.target is aten.t.default
    product: Any = leaf.args[0] if turned else leaf
    if not isinstance(product, fx.Node) or product.target is not aten.mm.default or len(product.users) != 1:
        return None
    first, second = product.args
    if not isinstance(first, fx.Node) or first.target is not aten.t.default or not isinstance(second, fx.Node):
        return None

    def make(graph: fx.Graph, left: fx.Node, right: fx.Node) -> fx.Node:
        flipped = graph.call_function(aten.t.default, (left,))
        flipped.meta["val"] = left.meta["val"].t()
        made = graph.call_function(aten.mm.default, (flipped, right))
        made.meta["val"] = product.meta["val"]
        return graph.call_function(aten.t.default, (made,)) if turned else made

    left: Any = first.args[0]
    return _Term(leaf, ("mm", turned, str(product.meta["val"].shape)), left, second, make)


def _stacked(graph: fx.Graph, root: fx.Node, leaves: list[fx.Node]) -> fx.Node | None:
    """Return a sum of gradients of all entries along an axis, each zero elsewhere, as one stack."""
    if not all(leaf.target is aten.select_backward.default for leaf in leaves):
        return None
    shape, axis = leaves[0].args[1:3]
    places: dict[Any, Any] = {leaf.args[3]: leaf.args[0] for leaf in leaves}
    if any(leaf.args[1:3] != (shape, axis) for leaf in leaves) or len(places) < len(leaves):
        return None
    if sorted(places) != list(range(root.meta["val"].shape[axis])):
        return None
    with graph.inserting_before(root):
        made = graph.call_function(aten.stack.default, ([places[i] for i in sorted(places)], axis))
    made.meta["val"] = root.meta["val"]
    return made


def _weight_gradient(leaf: fx.Node, call: Any) -> _Term:
    """Return the gradient of a convolution's weights as a summand."""
    g, x, w, *rest = call.args

    def make(graph: fx.Graph, left: fx.Node, right: fx.Node) -> fx.Node:
        return graph.call_function(operator.getitem, (graph.call_function(call.target, (left, right, w, *rest)), 1))

    shape = str((x.meta["val"].shape[1:], w.meta["val"].shape))
    return _Term(leaf, ("convolution", shape, repr(rest)), g, x, make)


def _joined(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    """Concatenate values along their first axis."""
    made = graph.call_function(aten.cat.default, (nodes,))
    values = [n.meta["val"] for n in nodes]
    made.meta["val"] = values[0].new_empty((sum(len(t) for t in values), *values[0].shape[1:]))
    return made
