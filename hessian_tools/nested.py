"""Inputs of a batch that are not one tensor: dicts, tuples and lists of tensors, all with the samples first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def tensors(x: Any) -> list[Tensor]:
    """Return the tensors in nested inputs; [x] for a tensor."""
    return [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


def mapped(change: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Return nested inputs with every tensor changed. Mappings of other classes become dicts.

    Values that are not tensors, such as None or a flag, stay as they are.
    """
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, Mapping) and type(x) is not dict:
        x = dict(x)
    return pytree.tree_map_only(Tensor, change, x)


def flattened(x: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any], Hashable]:
    """Return the tensors of nested inputs, a function that puts others in their place, and a key of the structure."""
    leaves, spec = pytree.tree_flatten(mapped(lambda t: t, x))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    rest = tuple(None if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)

    def rebuilt(others: Sequence[Tensor]) -> Any:
        filled = list(leaves)
        for i, t in zip(places, others, strict=True):
            filled[i] = t
        return pytree.tree_unflatten(filled, spec)

    return [leaves[i] for i in places], rebuilt, (str(spec), rest)


def converted(x: Any, like: Tensor) -> Any:
    """Move nested inputs to the device of `like`, and those that are floating-point to its dtype."""
    return mapped(lambda t: _moved(t, like), x)


def _moved(t: Tensor, like: Tensor) -> Tensor:
    t = t.clone() if t.is_inference() and not torch.is_inference_mode_enabled() else t  # else no graph can hold it
    return t.to(like.device, like.dtype if t.is_floating_point() else t.dtype)


def sample_count(x: Any) -> int:
    """Return the number of samples: the first axis of every tensor.

    Raises:
        ValueError: If there is no tensor, or if the tensors differ in the number of samples.
    """
    counts = {len(t) if t.dim() else None for t in tensors(x)}
    count = counts.pop() if len(counts) == 1 else None
    if count is None:
        found = ", ".join(str(list(t.shape)) for t in tensors(x)) or "no tensor"
        raise ValueError(f"every tensor of the inputs must have the samples as its first axis, not {found}")
    return count


def selected(x: Any, index: Tensor | slice) -> Any:
    """Return the samples of nested inputs at an index tensor [n] or a slice."""
    return mapped(lambda t: t[index.to(t.device) if isinstance(index, Tensor) else index], x)


def joined(parts: Sequence[Any]) -> Any:
    """Concatenate nested inputs of the same structure. Values that are not tensors are those of the first part."""
    flat, specs = zip(*(pytree.tree_flatten(part) for part in parts), strict=True)
    if any(spec != specs[0] for spec in specs):
        raise ValueError("all batches must have inputs of the same structure")
    leaves = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in zip(*flat, strict=True)]
    return pytree.tree_unflatten(leaves, specs[0])


def call(model: Callable[..., Any], x: Any) -> Any:
    """Call a model on the inputs of a batch.

    The entries of a dict become keyword arguments and those of a tuple or list become arguments, if the model's forward
    accepts them. Otherwise, and for a tensor, x is the only argument.
    """
    if isinstance(x, Tensor):
        return model(x)
    positional, named = (), {}
    if isinstance(x, Mapping) and all(isinstance(name, str) for name in x):
        named = dict(x)
    elif isinstance(x, tuple | list):
        positional = tuple(x)
    try:
        inspect.signature(getattr(model, "forward", model)).bind(*positional, **named)
    except (TypeError, ValueError):  # other arguments, or a forward that is not written in Python
        return model(x)
    return model(*positional, **named) if positional or named else model(x)


# ---------------------------------------------------------------- batches of inputs and targets
def picked(batches: Sequence[tuple[Any, Tensor]], ends: Tensor, part: Tensor) -> list[tuple[Any, Tensor]]:
    """Return the samples of a part in its order, as one batch per shape.

    Args:
        batches: Batches (inputs, targets).
        ends: The number of samples in the first 1, 2, ... batches.
        part: Indices of samples [n], numbered from 0 in the order of the batches.
    """
    owner = torch.bucketize(part, ends, right=True)
    alike: dict[Any, list[tuple[Tensor, tuple[Any, Tensor]]]] = {}
    for i in owner.unique().tolist():
        places = (owner == i).nonzero().flatten()
        index = part[places] - (int(ends[i - 1]) if i else 0)
        x, y = batches[i]
        alike.setdefault(signature((x, y)), []).append((places, (selected(x, index), y[index.to(y.device)])))
    found = []
    for pieces in alike.values():
        if len(pieces) == 1:
            found.append(pieces[0][1])
            continue
        x, y = joined_batches([batch for _, batch in pieces])
        order = torch.cat([places for places, _ in pieces]).argsort()
        found.append((selected(x, order), y[order.to(y.device)]))
    return found


def joined_batches(batches: Sequence[tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
    """Return several batches of samples of the same shape as one."""
    if len(batches) == 1:
        return batches[0]
    return joined([x for x, _ in batches]), torch.cat([y for _, y in batches])


def signature(batch: tuple[Any, Tensor]) -> tuple[Any, ...]:
    """Return the shapes of the inputs and targets of a sample."""
    return tuple((tuple(t.shape[1:]), t.dtype) for t in (*tensors(batch[0]), batch[1]))
