"""Sinabs (Sheik et al. 2023): layers take [N, T, ...] and keep their state in buffers.

The backward pass of its spike functions saves a copy of the potential, so that a second derivative would be 0. The
derivative is a formula, `surrogate_grad_fn(v_mem, threshold)`, from which both derivatives are computed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ikun.adapters.base import Library, Slot, bases
from ikun.adapters.time.loop import default_dtype
from ikun.adapters.two_jet import Jet, two_jet


class SpikeFunction:
    """A spike function of Sinabs that can be differentiated twice by the potential.

    Args:
        own: The spike function.
        jet: The surrogate whose derivatives are used. None: those of the layer's `surrogate_grad_fn`.
    """

    def __init__(self, own: Any, jet: Jet | None = None) -> None:
        self.own, self.jet = own, jet
        self.heard: list[tuple[Tensor, Tensor]] | None = None  # if a list, arguments and spikes of calls are noted

    @property
    def required_states(self) -> list[str]:
        """The states that are the first arguments of `apply`."""
        names: list[str] = self.own.required_states
        return names

    def apply(self, v_mem: Tensor, threshold: Any, gradient: Any) -> Tensor:
        """Return the spikes."""
        level = threshold.detach() if isinstance(threshold, Tensor) else threshold
        c = v_mem.detach()
        with torch.no_grad():
            value: Tensor = self.own.apply(c, level, gradient).to(c.dtype)
        if self.heard is not None:
            self.heard.append((c - level, value))
        if not (torch.is_grad_enabled() and v_mem.requires_grad):
            return value
        found = _slopes(c, level, gradient) if self.jet is None else self.jet.slopes(c - level)
        return two_jet(v_mem, value, *found)


def _slopes(v: Tensor, threshold: Any, gradient: Any) -> tuple[Tensor, Tensor]:
    """Return the derivatives f' and f'' of a surrogate that is given by its derivative."""
    with torch.enable_grad(), default_dtype(v):  # some formulas create constants without a dtype
        v = v.detach().requires_grad_()
        first = gradient(v, threshold).to(v.dtype)
        second = None
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.sum(), v, allow_unused=True)
    return first.detach(), torch.zeros_like(v) if second is None else second.detach()


def _clear(model: nn.Module) -> None:
    """Clear the state. A state of another batch size would be drawn at random from that of the last batch."""
    for module in model.modules():
        if "StatefulLayer" in bases(module):
            for name, state in module._buffers.items():
                if state is not None:
                    module._buffers[name] = state.detach().new_zeros(0)


def _neurons(model: nn.Module) -> list[nn.Module]:
    """Return the layers that spike."""
    return [m for m in model.modules() if "StatefulLayer" in bases(m) and getattr(m, "spike_fn", None) is not None]


def _prepare(model: nn.Module) -> None:
    for module in _neurons(model):
        function: Any = module.spike_fn
        if not isinstance(function, SpikeFunction):
            vars(module)["spike_fn"] = SpikeFunction(function)


def _slots(model: nn.Module) -> Iterator[Slot]:
    names = {id(m): path for path, m in model.named_modules()}
    for module in _neurons(model):
        m: Any = module
        level, gradient, function = m.spike_threshold.detach().clone(), m.surrogate_grad_fn, m.spike_fn
        if level.numel() != 1:
            continue

        def spikes(x: Tensor, level: Any = level, gradient: Any = gradient, function: Any = function) -> Tensor:
            theta = level.to(x.dtype)
            out: Tensor = function.apply(x + theta, theta, gradient)
            return out

        def put(jet: Any, m: Any = m, function: Any = function) -> None:
            vars(m)["spike_fn"] = SpikeFunction(function.own, jet)

        yield Slot(f"{names[id(m)]}.surrogate_grad_fn".strip("."), m, spikes, put, str(gradient))


SINABS = Library(
    package="sinabs",
    clear=_clear,
    prepare=_prepare,
    slots=_slots,
    neurons=_neurons,
    by_step=lambda model: not any("StatefulLayer" in bases(m) for m in model.modules()),
    takes_time=lambda module: False,  # the first axis of its inputs is not time
    time_first=False,
)
