"""Check how a network is run through time: the axes of its outputs, its number of steps, and its samples."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hessian_tools import nested
from ikun.adapters.base import AdapterError, Library, run_forward
from ikun.adapters.time.loop import InTime
from ikun.adapters.two_jet import Jet, Steeper
from ikun.adapters.validation import LEAK, coupled


def time_axis_of(wrapped: InTime, few: Any, time_first: bool | None) -> int | None:
    """Return the time axis of the network's outputs, or None. The axis of the samples is the one that grows with N."""
    shapes = []
    for n in (2, 3):
        wrapped.clear(wrapped.network)
        try:
            with torch.no_grad():
                shapes.append(list(run_forward(wrapped.over_time, nested.selected(few, slice(n))).shape))
        except AdapterError as error:
            if not shapes:
                raise
            raise AdapterError("the network runs on 2 samples, but not on 3 after that: " + LEAK, reset=...) from error
    wrapped.clear(wrapped.network)
    two, three = shapes
    axes = [i for i, (a, b) in enumerate(zip(two, three, strict=False)) if (a, b) == (2, 3)]
    if len(two) != len(three) or len(axes) != 1 or axes[0] > 1 or len(three) < 2:
        raise AdapterError(f"3 samples gave outputs of shape {three}: [3, K], [T, 3, K] or [3, T, K] is needed")
    if axes[0] == 1:
        return 0 if len(three) > 2 else _no_classes(three)
    if len(three) == 2:
        return None
    if time_first is False:
        return 1
    if wrapped.plan.steps is None and wrapped.live is not None:
        raise AdapterError(
            "3 samples gave outputs of shape {}: if the network takes one step per call, give {steps} and {sequences}; "
            "if it runs through the second axis as time, give {time_first}",
            three,
            steps=...,
            sequences=True,
            time_first=False,
        )
    raise AdapterError(
        "3 samples gave outputs of shape {}: if the second axis is time, give {time_first}", three, time_first=False
    )


def _no_classes(shape: list[int]) -> int:
    """Raise AdapterError for outputs without an axis of classes."""
    raise AdapterError(f"3 samples gave outputs of shape {shape}, which has no axis for classes: [3, K] is needed")


def check_independence(wrapped: InTime, x: Any, time_first: bool | None, by_step: bool) -> None:
    """Raise AdapterError if the output of a sample depends on others, as if samples were taken for time steps."""
    if not coupled(wrapped, x):
        return
    plan = wrapped.plan
    text = "the output of a sample depends on the others in the batch: "
    if plan.steps is None:
        if not by_step:
            raise AdapterError(text + "the layers take the samples for time steps: give {steps}", steps=...)
        raise AdapterError(text + "the loss is not a mean over samples (batch statistics?)")
    for first in (True, False):
        if (other := replace(plan, by_step=False, carries=False, time_first=first, time_axis=None)) == plan:
            continue
        wrapped.plan = other
        try:
            wrapped.plan = replace(other, time_axis=time_axis_of(wrapped, nested.selected(x, slice(3)), first))
            right = not coupled(wrapped, x)
        except AdapterError:
            right = False
        finally:
            wrapped.plan = plan
        if right:
            raise AdapterError(text + "it takes samples for time steps: give {time_first}", time_first=first)
    raise AdapterError(
        text + "batch statistics, or an axis of samples taken for time (see {time_first})",
        time_first=... if time_first is None else time_first,
    )


def check_steps(wrapped: InTime, kind: Library, few: Any) -> None:
    """Raise AdapterError if one call of the network runs every neuron for a single time step."""
    neurons = [m for m in kind.neurons(wrapped.network) if not isinstance(m, Jet | Steeper)]
    counts: dict[int, int] = {}

    def count(module: nn.Module, *_: Any) -> None:
        counts[id(module)] = counts.get(id(module), 0) + 1

    handles = [m.register_forward_hook(count) for m in neurons]
    try:
        with torch.no_grad():
            run_forward(wrapped, few)
    finally:
        for handle in handles:
            handle.remove()
    if counts and max(counts.values()) == 1 and not any(kind.takes_time(m) for m in neurons):
        raise AdapterError("one call of the network is one time step: give {steps}, the number of them", steps=...)
