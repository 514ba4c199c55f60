"""Run a convolution by Winograd's algorithm a few samples at a time, so that its tiles stay in the processor's cache.

A transformed tensor [36, channels, samples * tiles] has 2.25 times the entries of its images. To write it to memory and
read it again in the next operation takes longer than the arithmetic. `fuse_blocks` therefore replaces the operations
that share tiles by one call of `run_blocks`, which runs them for a block of samples before it goes on to the next.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from hessian_tools.engine.convolution import winograd
from hessian_tools.runtime.openmp import side_by_side

aten = torch.ops.aten
BLOCK_BYTES = 2**21  # of the tiles of one block
REUSE = 4  # a block needs channels / REUSE tiles, or its weights are read more often than that saves
TO_TILES = {winograd.OPS["winograd_inputs"]: True, winograd.OPS["winograd_outputs_adjoint"]: False}  # whether of inputs
TO_IMAGES = {winograd.OPS["winograd_inputs_adjoint"]: True, winograd.OPS["winograd_outputs"]: False}
PRODUCTS = {aten.bmm.default, aten.baddbmm_.default}
Image = tuple[Any, int, bool]  # images [N, C, H, W], their padding, and whether they are inputs or gradients by outputs
Tiles = tuple[Any, bool]  # [36, C, N * tiles], or transposed
Sum = tuple[tuple[int, int], ...]  # pairs (a, b) of the products a b' over all tiles


# ---------------------------------------------------------------- find operations that share tiles
@dataclass
class _Group:
    """Operations of one convolution that share tiles.

    Attributes:
        last: The transform to images.
        images: Transforms to tiles.
        tiles: Tiles that other operations made, or views of them that are transposed.
        products: The products whose sum is transformed to images.
        sums: Chains of products over all tiles. Every chain is one gradient by weights.
    """

    last: fx.Node
    images: list[fx.Node] = field(default_factory=list)
    tiles: list[fx.Node] = field(default_factory=list)
    products: list[fx.Node] = field(default_factory=list)
    sums: list[list[fx.Node]] = field(default_factory=list)

    def inside(self) -> set[fx.Node]:
        return {self.last, *self.images, *self.products, *(n for some in self.sums for n in some)}

    def number(self, node: fx.Node) -> int:
        """Return the number of tiles: those of images come first."""
        if node in self.images:
            return self.images.index(node)
        if node not in self.tiles:
            self.tiles.append(node)
        return len(self.images) + self.tiles.index(node)


def _chain(node: Any) -> list[fx.Node]:
    """Return the products of which a value is the sum, in their order. It is empty if there are other summands."""
    found: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.target in PRODUCTS and len(node.users) == 1:
        found.insert(0, node)
        if node.target is aten.bmm.default:
            return found
        node = node.args[0]
    return []


def _is_turned(node: Any) -> bool:
    return node.target is aten.transpose.int and node.args[1:] == (1, 2)


def _source(node: Any, images: Sequence[fx.Node]) -> fx.Node:
    """Return tiles, for a transposed view of tiles that are transformed here."""
    found: fx.Node = node.args[0] if _is_turned(node) and node.args[0] in images else node
    return found


def _group_of(last: fx.Node) -> _Group | None:
    """Return the operations that are computed together with a transform to images."""
    group = _Group(last, products=_chain(last.args[0]))
    for product in group.products:
        tiles: Any = product.args[-1]
        if tiles.target in TO_TILES and tiles not in group.images:
            group.images.append(tiles)
    if not group.products:
        return None
    for tiles in group.images:
        for user in tiles.users:
            if user.target in PRODUCTS and user.args[-2] is tiles and not any(user in some for some in group.sums):
                group.sums.append(_sum_around(user, group.images))
    return group


def _sum_around(product: fx.Node, images: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the products a b' that are added to one another, and whose tiles are those of images or known before."""

    def known(node: Any) -> bool:
        source = node.args[0] if _is_turned(node) else node
        return source in images or source.op in ("placeholder", "get_attr")

    found = [product]
    while found[0].target is aten.baddbmm_.default:
        before: Any = found[0].args[0]
        if before.target not in PRODUCTS or len(before.users) != 1 or not all(map(known, before.args[-2:])):
            break
        found.insert(0, before)
    while len(found[-1].users) == 1:
        (after,) = found[-1].users
        if after.target is not aten.baddbmm_.default or after.args[0] is not found[-1]:
            break
        if not all(map(known, after.args[-2:])):
            break
        found.append(after)
    return found


def fuse_blocks(graph: fx.Graph) -> None:
    """Compute what shares tiles by one call of `run_blocks`, wherever the order of operations allows it.

    Args:
        graph: A stage of a product. Products that are added have been merged (`graph.reuse_memory`).
    """
    for last in list(graph.nodes):
        if last.target in TO_IMAGES and (group := _group_of(last)) is not None:
            _fuse(graph, group)
    graph.eliminate_dead_code()


def _fuse(graph: fx.Graph, group: _Group) -> None:
    inside = group.inside()
    of_inputs = TO_IMAGES[group.last.target]
    shape, pad, bias = (
        (group.last.args[1], group.last.args[2], None) if of_inputs else (group.last.args[2], 0, group.last.args[1])
    )
    images = tuple((n.args[0], n.args[1] if len(n.args) > 1 else 0, TO_TILES[n.target]) for n in group.images)
    products = tuple((n.args[-2], group.number(n.args[-1])) for n in group.products)  # type: ignore[arg-type]
    sums = []
    for chain in group.sums:
        pairs = []
        for node in chain:
            left, right = (_source(n, group.images) for n in node.args[-2:])
            pairs.append((group.number(left), group.number(right)))
        sums.append(tuple(pairs))
    rights = {n for some in sums for _, n in some}
    tiles = tuple((n, len(group.images) + i in rights) for i, n in enumerate(group.tiles))
    stored = [
        i for i, n in enumerate(group.images)
        if any(u not in inside and not (_is_turned(u) and set(u.users) <= inside) for u in n.users)
    ]  # fmt: skip
    results = [group.last, *(chain[-1] for chain in group.sums), *(group.images[i] for i in stored)]
    order = {n: i for i, n in enumerate(graph.nodes)}
    arguments = (images, tiles, products, (of_inputs, shape, pad, bias), tuple(sums), tuple(stored))
    needed = [chain[0].args[0] for chain in group.sums if chain[0].target is aten.baddbmm_.default]
    fx.node.map_arg(arguments, needed.append)
    users = [u for n in results for u in n.users if u not in inside]
    if not users or any(n in inside for n in needed):
        return
    first = min(users, key=order.__getitem__)
    if max(order[n] for n in needed) >= order[first]:
        return
    starts = [chain[0].args[0] if chain[0].target is aten.baddbmm_.default else None for chain in group.sums]
    with graph.inserting_before(first):
        call = graph.call_function(run_blocks, arguments)
        made = [graph.call_function(operator.getitem, (call, i)) for i in range(len(results))]
        for i, start in enumerate(starts, 1):
            if start is not None:  # it was added to in place before
                made[i] = graph.call_function(aten.add_.Tensor, (start, made[i]))
    for old, new in zip(results, made, strict=True):
        new.meta = dict(old.meta)
        old.replace_all_uses_with(new, delete_user_cb=lambda u: u not in inside)
    for node in sorted(inside, key=order.__getitem__, reverse=True):
        for view in list(node.users):
            graph.erase_node(view)  # a transposed view that only the erased operations used
        graph.erase_node(node)


# ---------------------------------------------------------------- run them
def run_blocks(
    images: Sequence[Image], tiles: Sequence[Tiles], products: Sequence[tuple[Tensor, int]],
    last: tuple[bool, list[int], int, Tensor | None], sums: Sequence[Sum], stored: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """Transform images to tiles, multiply them with weights, and transform the sum to images, block by block.

    Args:
        images: Images that are transformed. Their tiles have the numbers 0, 1, ...
        tiles: Tiles that have the numbers after these.
        products: Matrices [36, O, C] and the numbers of tiles that are multiplied with them. The products are added.
        last: Whether the result is inputs' gradients or outputs, its shape, padding, and a bias or None.
        sums: Pairs of tiles (a, b), of whose products a b' over all tiles the sum is returned.
        stored: Numbers of tiles that are returned.

    Returns:
        The images [N, ...], the sums [36, O, C], and the stored tiles.
    """
    of_inputs, shape, pad, bias = last
    down, across = winograd.tile_counts(shape, pad if of_inputs else 1)
    size, count = down * across, shape[0]
    widths = [x.shape[1] for x, _, _ in images] + [shape[1]]
    like = products[0][0]
    each = 36 * size * sum(widths) * like.element_size()
    threads = torch.get_num_threads()
    together = winograd.samples_together(across)
    held = together * max(1, BLOCK_BYTES // (each * together))
    if held * size * REUSE < max(widths) or count < max(2, threads) * held:
        held = count
    out = like.new_empty(shape)
    kept = [like.new_empty(36, widths[i], count * size) for i in stored]
    blocks = [(a, min(a + held, count)) for a in range(0, count, held)]
    many = 1 if len(blocks) == 1 else min(threads, len(blocks))
    inner = 0 if len(blocks) == 1 else 1  # threads of a transform; 0: as many as it is worth

    def work(first: int, end: int) -> list[Tensor]:
        space = [like.new_empty(36 * width * held * size) for width in widths]
        totals: list[Tensor] = []
        for a, b in blocks[first:end]:
            p, q = a * size, b * size
            views = [flat[: 36 * w * (q - p)].view(36, w, q - p) for flat, w in zip(space, widths, strict=True)]
            here = views[:-1]
            for (x, around, inputs), v in zip(images, here, strict=True):
                winograd.to_tiles(x[a:b], around, inputs, v, inner)
            for i, whole in zip(stored, kept, strict=True):
                whole[:, :, p:q] = here[i]
            here += [t[:, p:q].transpose(1, 2) if turned else t[:, :, p:q] for t, turned in tiles]
            m = views[-1]
            for k, (w, i) in enumerate(products):
                torch.bmm(w, here[i], out=m) if k == 0 else m.baddbmm_(w, here[i])
            winograd.to_images(m, bias, pad, of_inputs, out[a:b], inner)
            for j, pairs in enumerate(sums):
                for i, k in pairs:
                    if j == len(totals):
                        totals.append(torch.bmm(here[i], here[k].transpose(1, 2)))
                    else:
                        totals[j].baddbmm_(here[i], here[k].transpose(1, 2))
        return totals

    edges = [len(blocks) * i // many for i in range(many + 1)]
    parts = side_by_side([partial(work, *edge) for edge in pairwise(edges)])
    totals = parts[0]
    for others in parts[1:]:
        for total, other in zip(totals, others, strict=True):
            total.add_(other)
    return [out, *totals, *kept]
