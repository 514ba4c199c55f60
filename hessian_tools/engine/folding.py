"""Run the layers of a network that steps through time for all time steps at once.

A forward pass is recorded as a list of calls (`hessian_tools.engine.tape`). What is the same at several steps is
computed once. The steps of a module that hands its state on are one call over time, if its inputs at later steps do not
depend on its outputs. Calls of one function that compute the same from what differs only in time are one call for the
stacked inputs [T, N, ...].
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from hessian_tools.engine.resizing import resized_number
from hessian_tools.engine.rewriting import CONVOLUTIONS, RESHAPES
from hessian_tools.engine.tape import ZEROS, Record, RecordedCall, Ref, State

WEIGHTED = {F.linear} | CONVOLUTIONS
# The first argument and the output have the samples as their first axis, and samples do not depend on one another.
SAMPLEWISE = WEIGHTED | {
    F.batch_norm, F.group_norm, F.layer_norm, F.dropout, F.adaptive_avg_pool2d, torch.max_pool2d, F.max_pool2d,
    F.avg_pool2d, F.max_pool1d, F.avg_pool1d,
}  # fmt: skip
_NAMES = """
    add sub mul div true_divide rsub neg abs exp log sqrt rsqrt square pow sin cos sigmoid tanh relu clamp clamp_min
    clamp_max reciprocal sign where gt ge lt le eq ne maximum minimum float double to detach clone contiguous
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __neg__ __pow__ __gt__ __ge__ __lt__
    __le__ type_as
"""
ELEMENTWISE = {getattr(place, name) for place in (torch, Tensor) for name in _NAMES.split() if hasattr(place, name)}
ELEMENTWISE |= {F.relu, F.gelu, F.silu, F.leaky_relu, F.elu, F.softplus}
SHAPING = RESHAPES | {Tensor.squeeze, torch.squeeze, Tensor.unsqueeze, torch.unsqueeze}
GETTING = {Tensor.__getitem__}
ONCE = SAMPLEWISE | ELEMENTWISE | SHAPING | GETTING
Fetch = Callable[[Ref], Tensor]


@dataclass(frozen=True)
class Item:
    """One or several calls that run at once.

    Attributes:
        calls: The calls.
        kind: "call" for a single one, "steps" of a module, or how calls are stacked: "rows", "each", "shapes" or
            "places" (entries of one tensor along an axis).
    """

    calls: tuple[RecordedCall, ...]
    kind: str

    @property
    def outs(self) -> tuple[Ref, ...]:
        """The outputs that others may use."""
        return tuple(ref for call in self.calls for ref in (call.outs[:1] if self.kind != "call" else call.outs))

    def refs(self) -> set[Ref]:
        """Return what it needs."""
        found = {ref for call in self.calls for ref in call.refs()}
        return found - {ref for call in self.calls for ref in call.outs}


@dataclass(frozen=True, eq=False)
class Folded:
    """A forward pass of stacked calls.

    Attributes:
        record: The forward pass as it was recorded.
        items: The calls in an order in which they can run.
        out: The output.
    """

    record: Record
    items: tuple[Item, ...]
    out: Ref

    def __call__(self, values: Sequence[Tensor], seen: Callable[[Item, Tensor], None] | None = None) -> Tensor:
        """Return the output.

        Args:
            values: Parameters and buffers, then the inputs of the batch.
            seen: Is called with the outputs [T, ...] of the steps of every module.
        """
        known = _Known(self.record, values)
        last = _last_uses(self.items, self.out)
        for i, item in enumerate(self.items):
            if item.kind == "call":
                known.single.update(zip(item.calls[0].outs, _run(item.calls[0], known), strict=True))
            else:
                found = _RUNS[item.kind](item.calls, known)
                known.stacks[item.outs] = found
                known.places.update({ref: (item.outs, t) for t, ref in enumerate(item.outs)})
                if item.kind == "steps" and seen is not None:
                    seen(item, found)
            known.forget(last[i])
        return known(self.out)

    def resized(self, samples: int) -> Folded:
        """Return the forward pass for another number of samples, from one that was recorded for many (`resizing`)."""

        def change(call: RecordedCall) -> RecordedCall:
            args, kwargs = pytree.tree_map_only(int, lambda n: resized_number(n, samples), (call.args, call.kwargs))
            return replace(call, args=args, kwargs=kwargs)

        shapes = {ref: [resized_number(n, samples) for n in t.shape] for ref, t in self.record.meta.items()}
        meta = {ref: torch.empty(shape, device="meta") for ref, shape in shapes.items()}
        record = replace(self.record, calls=[change(call) for call in self.record.calls], meta=meta)
        items = tuple(replace(item, calls=tuple(change(call) for call in item.calls)) for item in self.items)
        return Folded(record, items, self.out)

    def spikes_as(self, values: Sequence[Tensor]) -> bool:
        """Return whether every module gives the same outputs, to the last bit, as step by step.

        Args:
            values: Parameters and buffers, then the inputs of the batch.
        """
        ours: dict[Ref, Tensor] = {}

        def note(item: Item, y: Tensor) -> None:
            ours.update(zip(item.outs, y, strict=True))

        with torch.no_grad():
            self(values, note)
            known = _Known(self.record, values)
            items = [Item((call,), "call") for call in self.record.calls]
            last = _last_uses(items, self.record.out)
            for i, call in enumerate(self.record.calls):
                found = call.run(known)
                known.single.update(zip(call.outs, found, strict=True))
                if call.outs[0] in ours and not torch.equal(ours.pop(call.outs[0]), found[0]):
                    return False
                known.forget(last[i])
        return True


class _Known:
    """The tensors that are computed so far."""

    def __init__(self, record: Record, values: Sequence[Tensor]) -> None:
        self.meta = record.meta
        self.zeros = {ref for call in record.calls if call.func in ZEROS for ref in call.outs}
        self.single = dict(zip(record.values, values, strict=True)) | record.constants
        self.stacks: dict[tuple[Ref, ...], Tensor] = {}
        self.places: dict[Ref, tuple[tuple[Ref, ...], int]] = {}

    def __call__(self, ref: Ref) -> Tensor:
        if ref not in self.single:
            stack, place = self.places[ref]
            self.single[ref] = self.stacks[stack][place]
        return self.single[ref]

    def stacked(self, refs: tuple[Ref, ...]) -> Tensor:
        """Return tensors [N, ...] as one [T, N, ...], or [1, N, ...] if they are the same one."""
        if len(set(refs)) == 1:
            return self(refs[0])[None]
        if refs not in self.stacks:
            return torch.stack([self(ref) for ref in refs])
        return self.stacks[refs]

    def forget(self, refs: set[Ref]) -> None:
        for ref in refs:
            self.single.pop(ref, None)
            if ref in self.places:
                stack, _ = self.places.pop(ref)
                if not any(other in self.places for other in stack):
                    self.stacks.pop(stack, None)


def _last_uses(items: Sequence[Item], out: Ref) -> list[set[Ref]]:
    """Return for every item the tensors that are not needed after it."""
    last: dict[Ref, int] = {}
    for i, item in enumerate(items):
        last.update(dict.fromkeys((*item.refs(), *item.outs), i))
    last.pop(out, None)
    found: list[set[Ref]] = [set() for _ in items]
    for ref, i in last.items():
        found[i].add(ref)
    return found


# ---------------------------------------------------------------- running
def _run(call: RecordedCall, known: _Known) -> list[Tensor]:
    """Run one call. A stack of what is stacked already is not made again."""
    if call.func is torch.stack:
        refs, axis = call.args[0], call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)
        if isinstance(refs, list | tuple) and tuple(refs) in known.stacks:
            stack = known.stacks[tuple(refs)]
            return [stack if axis == 0 else stack.movedim(0, axis)]
    return call.run(known)


def _steps(calls: Sequence[RecordedCall], known: _Known) -> Tensor:
    node: Any = calls[0].node
    x = known.stacked(tuple(call.args[0] for call in calls))
    given = [None if ref in known.zeros and node.rests_at_zero else ref for ref in calls[0].args[1]]
    state: State = tuple(None if ref is None else known(ref) for ref in given)
    return node.over_time(x, len(calls), state)  # type: ignore[no-any-return]


def _operands(calls: Sequence[RecordedCall], known: _Known) -> tuple[Any, Any]:
    """Return the arguments of stacked calls: a tensor that differs between calls is stacked, others are themselves."""
    flat = [pytree.tree_flatten((call.args, call.kwargs))[0] for call in calls]
    found = []
    for column in zip(*flat, strict=True):
        if not isinstance(column[0], Ref):
            found.append(column[0])
        else:
            found.append(known(column[0]) if len(set(column)) == 1 else known.stacked(column))
    structure = pytree.tree_structure((calls[0].args, calls[0].kwargs))
    args, kwargs = pytree.tree_unflatten(found, structure)
    return args, kwargs


def _each(calls: Sequence[RecordedCall], known: _Known) -> Tensor:
    args, kwargs = _operands(calls, known)
    with torch.set_grad_enabled(calls[0].grad and torch.is_grad_enabled()):
        found: Tensor = calls[0].func(*args, **kwargs)
    return found


def _rows(calls: Sequence[RecordedCall], known: _Known) -> Tensor:
    (x, *args), kwargs = _operands(calls, known)
    with torch.set_grad_enabled(calls[0].grad and torch.is_grad_enabled()):
        y: Tensor = calls[0].func(x.reshape(-1, *x.shape[2:]), *args, **kwargs)
        return y.view(len(calls), -1, *y.shape[1:])


def _shapes(calls: Sequence[RecordedCall], known: _Known) -> Tensor:
    x = known.stacked(tuple(call.args[0] for call in calls))
    return x.reshape(len(calls), *known.meta[calls[0].outs[0]].shape)


def _places(calls: Sequence[RecordedCall], known: _Known) -> Tensor:
    x, axis = known(calls[0].args[0]), _place(calls[0])[0]
    places = [_place(call)[1] for call in calls]
    if places == list(range(x.shape[axis])):
        return x.movedim(axis, 0) if axis else x
    return torch.stack([x.select(axis, place) for place in places])


_RUNS: dict[str, Callable[[Sequence[RecordedCall], _Known], Tensor]] = {
    "steps": _steps, "rows": _rows, "each": _each, "shapes": _shapes, "places": _places,
}  # fmt: skip


# ---------------------------------------------------------------- folding
def fold(record: Record) -> Folded | None:
    """Return a forward pass with as many calls as possible stacked; None if there is nothing to stack."""
    calls, out = _live(*_once(record.calls, record.out))
    items = [Item((call,), "call") for call in calls]
    by_node: dict[int, list[RecordedCall]] = defaultdict(list)
    for call in calls:
        if call.node is not None:
            by_node[id(call.node)].append(call)
    for chain in by_node.values():
        if len(chain) > 1 and _handed_on(chain, calls, out):
            items = _contracted(items, chain, "steps")
    for group, kind in _alike(items, record):
        items = _contracted(items, group, kind)
    return Folded(record, tuple(items), out) if any(item.kind != "call" for item in items) else None


def _substituted(call: RecordedCall, other: dict[Ref, Ref]) -> RecordedCall:
    args, kwargs = pytree.tree_map_only(Ref, lambda ref: other.get(ref, ref), (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs)


def _once(calls: Sequence[RecordedCall], out: Ref) -> tuple[list[RecordedCall], Ref]:
    """Compute equal calls once."""
    other: dict[Ref, Ref] = {}
    known: dict[Hashable, RecordedCall] = {}
    kept = []
    for call in calls:
        mine = _substituted(call, other)
        if call.func in ONCE and not _random(call):
            first = known.setdefault(_described(mine, lambda ref: ref), mine)
            if first is not mine:
                other.update(zip(mine.outs, first.outs, strict=True))
                continue
        kept.append(mine)
    return kept, other.get(out, out)


def _live(calls: Sequence[RecordedCall], out: Ref) -> tuple[list[RecordedCall], Ref]:
    """Leave out calls that the output does not need."""
    needed, kept = {out}, []
    for call in reversed(calls):
        if needed & set(call.outs):
            kept.append(call)
            needed |= set(call.refs())
    return kept[::-1], out


def _random(call: RecordedCall) -> bool:
    return call.func is F.dropout and bool(call.kwargs.get("training", (*call.args, True, True)[2]))


def _described(call: RecordedCall, key: Callable[[Ref], Hashable]) -> Hashable:
    """Return what a call computes: equal for equal calls of equal arguments."""
    leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
    return call.func, call.grad, str(structure), tuple(key(a) if isinstance(a, Ref) else repr(a) for a in leaves)


def _handed_on(chain: Sequence[RecordedCall], calls: Sequence[RecordedCall], out: Ref) -> bool:
    """Return whether a module's steps follow one another, and nothing else uses their states."""
    for before, after in pairwise(chain):
        if tuple(after.args[1]) != before.outs[1:] or before.kwargs or after.grad != before.grad:
            return False
    states = {ref for call in chain for ref in call.outs[1:]} - {call.outs[0] for call in chain}
    inside = set(map(id, chain))
    return out not in states and not any(states & set(call.refs()) for call in calls if id(call) not in inside)


def _contracted(items: list[Item], group: Sequence[RecordedCall], kind: str) -> list[Item]:
    """Run some calls at once, if they do not depend on one another."""
    chosen = set(map(id, group))
    rest = [item for item in items if item.kind != "call" or id(item.calls[0]) not in chosen]
    return _ordered([*rest, Item(tuple(group), kind)]) or items


def _ordered(items: Sequence[Item]) -> list[Item] | None:
    """Return items in an order in which they can run, the recorded one where possible; None if there is no order."""
    maker = {ref: i for i, item in enumerate(items) for call in item.calls for ref in call.outs}
    needs = [{maker[ref] for ref in item.refs() if ref in maker} for item in items]
    users: dict[int, list[int]] = defaultdict(list)
    for i, found in enumerate(needs):
        for j in found:
            users[j].append(i)
    first = [min(ref.number for ref in item.outs) for item in items]
    waiting = [len(found) for found in needs]
    ready = [(first[i], i) for i, count in enumerate(waiting) if not count]
    heapq.heapify(ready)
    order = []
    while ready:
        _, i = heapq.heappop(ready)
        order.append(items[i])
        for j in users[i]:
            waiting[j] -= 1
            if not waiting[j]:
                heapq.heappush(ready, (first[j], j))
    return order if len(order) == len(items) else None


# ---------------------------------------------------------------- which calls are alike
def _alike(items: Sequence[Item], record: Record) -> list[tuple[list[RecordedCall], str]]:
    """Return the calls that compute the same from what differs only in time, and how they are stacked."""
    keys: dict[Ref, Hashable] = {}
    numbers: dict[Hashable, int] = {}
    groups: dict[Hashable, list[RecordedCall]] = defaultdict(list)

    def key(ref: Ref) -> Hashable:
        return keys.get(ref, ref)

    for item in items:
        if item.kind == "steps":
            keys.update(dict.fromkeys(item.outs, ("steps", item.outs[0].number)))
            continue
        (call,) = item.calls
        if call.func in GETTING and _place(call) is not None:
            described: Hashable = ("place", call.args[0], _place(call)[0], call.grad)
        else:
            described = _described(call, key)
        number = numbers.setdefault(described, len(numbers))
        keys.update({ref: (number, place) for place, ref in enumerate(call.outs)})
        groups[number].append(call)
    found = [(sorted(group, key=_order), _kind(group[0], record)) for group in groups.values() if len(group) > 1]
    return [(group, kind) for group, kind in found if kind and _fits(group, kind, record)]


def _fits(group: Sequence[RecordedCall], kind: str, record: Record) -> bool:
    """Return whether the arguments that differ between calls can be stacked."""
    leaves = [pytree.tree_leaves((call.args, call.kwargs)) for call in group]
    differ = [place for place, column in enumerate(zip(*leaves, strict=True)) if len(set(map(repr, column))) > 1]
    if kind == "each":
        size = record.meta[group[0].outs[0]].dim()
        return all(record.meta[leaves[0][place]].dim() == size for place in differ)
    return kind == "places" or differ == [0]


def _order(call: RecordedCall) -> int:
    return call.outs[0].number


def _place(call: RecordedCall) -> Any:
    """Return axis and place of an entry along the first or second axis; None for other entries."""
    index = call.args[1]
    if type(index) is int and index >= 0:
        return 0, index
    if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and type(index[1]) is int:
        return (1, index[1]) if index[1] >= 0 else None
    return None


def _kind(call: RecordedCall, record: Record) -> str:
    """Return how calls like this one are stacked; empty if they are not."""
    refs = call.refs()
    if len(call.outs) != 1 or not refs or not call.args or not isinstance(call.args[0], Ref | int | float):
        return ""
    out, sizes = record.meta[call.outs[0]], [record.meta[ref] for ref in refs]
    if call.func in GETTING:
        return "places" if _place(call) is not None else ""
    if call.func in SHAPING:
        return "shapes" if len(refs) == 1 else ""
    if call.func in ELEMENTWISE:
        return "each" if out.dim() and all(t.dim() <= out.dim() for t in sizes) else ""
    if call.func not in SAMPLEWISE or not isinstance(call.args[0], Ref) or _random(call) or _couples(call, record):
        return ""
    x, weights = sizes[0], sizes[1] if len(sizes) > 1 else None
    if x.dim() < 2 or out.dim() < 2 or len(out) != len(x):
        return ""
    if call.func in CONVOLUTIONS and (weights is None or weights.dim() != x.dim()):
        return ""
    return "rows"


def _couples(call: RecordedCall, record: Record) -> bool:
    """Return whether a call may couple samples."""
    if call.func is F.batch_norm:
        return bool(call.kwargs.get("training", (*call.args, *[False] * 6)[5])) or call.args[1] is None
    if call.func is F.layer_norm:
        return (
            len(call.kwargs.get("normalized_shape", call.args[1:2] and call.args[1])) >= record.meta[call.args[0]].dim()
        )
    return False
