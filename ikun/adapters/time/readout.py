"""Reduce the outputs of a network over time, over all steps or over the valid steps of padded sequences."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ikun.adapters.base import AdapterError
from ikun.adapters.choices import READOUTS

_READ_OUT: dict[str, Callable[[Tensor, int], Tensor]] = dict(
    zip(
        READOUTS,
        (
            lambda y, axis: y.mean(axis),
            lambda y, axis: y.sum(axis),
            lambda y, axis: y.select(axis, -1),
            lambda y, axis: y.amax(axis),
            lambda y, axis: y.movedim(axis, 1).contiguous(),
        ),
        strict=True,
    )
)


def read_out(y: Tensor, axis: int, readout: str, valid: Tensor | None) -> Tensor:
    """Reduce outputs over time.

    Args:
        y: Outputs [T, N, ...] or [N, T, ...].
        axis: The axis of time, 0 or 1.
        readout: One of READOUTS. "none" returns [N, T, ...].
        valid: Mask [N, T] of the steps to use, or lengths [N]: the number of steps to use, from the first. None: all.

    Returns:
        Outputs [N, ...], or [N, T, ...] for "none".

    Raises:
        AdapterError: If the mask has another number of steps than the outputs.
    """
    if valid is None:
        return _READ_OUT[readout](y, axis)
    y = y.movedim(axis, 1)
    used = _mask(valid, y.shape[1])
    count = used.sum(1)
    if readout == "last":
        used = used & (used.cumsum(1) == count[:, None])
    unused = ~used.reshape(*used.shape, *[1] * (y.dim() - 2))
    if readout == "max":
        return y.masked_fill(unused, -torch.inf).amax(1)
    total = y.masked_fill(unused, 0).sum(1)
    return total / count.reshape(-1, *[1] * (y.dim() - 2)) if readout == "mean" else total


def _mask(valid: Tensor, steps: int) -> Tensor:
    """Return the mask [N, T] of a mask or of lengths."""
    if valid.dim() == 1:
        return torch.arange(steps, device=valid.device) < valid[:, None]
    if valid.dim() != 2 or valid.shape[1] != steps:
        raise AdapterError(
            "{valid} has shape {}: lengths [N] or a mask [N, {}] is needed, because the outputs have {} steps",
            list(valid.shape),
            steps,
            steps,
            valid=...,
        )
    return valid != 0


def parted(x: Any, valid: str | None, network: nn.Module) -> tuple[Any, Tensor | None]:
    """Return the inputs that the network gets, and the mask or the lengths of padded sequences.

    The network gets the mask only from a dict, and only if its forward has an argument of that name. If one entry is
    left, it is the input itself.

    Args:
        x: Inputs: a dict or a tuple of tensors, or any inputs if `valid` is None.
        valid: Key of the mask or the lengths in a dict, or their number from 0 in a tuple. None: no mask.
        network: The network.

    Raises:
        AdapterError: If the inputs have no such entry.
    """
    if valid is None:
        return x, None
    if isinstance(x, Mapping):
        entries, names = dict(x), ", ".join(map(str, x))
        takes = valid in inspect.signature(network.forward).parameters
        rest: Any = {name: value for name, value in entries.items() if takes or name != valid}
    elif isinstance(x, tuple | list):
        entries, names, takes = {str(i): value for i, value in enumerate(x)}, f"0 to {len(x) - 1}", False
        rest = tuple(value for name, value in entries.items() if name != valid)
    else:
        raise AdapterError(
            "{valid} needs inputs that are a dict or a tuple, with a mask [N, T] or lengths [N] as one entry", valid=...
        )
    found = entries.get(valid)
    if not isinstance(found, Tensor):
        raise AdapterError("{valid} is not a tensor of the inputs, which are {}", names, valid=valid)
    if len(rest) == 1:
        (rest,) = rest.values() if isinstance(rest, dict) else rest
    return rest, found


def check_valid(x: Any, valid: str | None, network: nn.Module) -> None:
    """Raise AdapterError if a sample has no valid step, or more valid steps than the inputs have."""
    inputs, found = parted(x, valid, network)
    if found is None:
        return
    if found.dim() not in (1, 2):
        raise AdapterError("{valid} has shape {}: lengths [N] or a mask [N, T] is needed", list(found.shape), valid=...)
    counts = found if found.dim() == 1 else (found != 0).sum(1)
    if len(empty := torch.nonzero(~(counts >= 1))):
        raise AdapterError("{valid}: sample {} has no valid step", int(empty[0]), valid=...)
    if isinstance(inputs, Tensor) and found.dim() == 1 and inputs.dim() > 1 and counts.max() > inputs.shape[1]:
        raise AdapterError(
            "{valid}: sample {} is longer than the inputs {}",
            int(counts.argmax()),
            list(inputs.shape),
            valid=...,
        )
