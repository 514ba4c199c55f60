"""Wrap any network as a function of a batch: clear its state, run it through time, and read out one output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
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
        ),
        strict=True,
    )
)


@dataclass(frozen=True)
class TimePlan:
    """How a network is run through time.

    Attributes:
        steps: Number of time steps T. None: the network runs through time by itself, or has no time.
        sequences: Samples are sequences [N, T, ...]. Otherwise x is repeated T times.
        by_step: One call of the network is one time step. Otherwise one call takes all steps.
        time_first: A call that takes all steps has inputs [T, N, ...]. Otherwise they are [N, T, ...].
        carries: The network takes its state as the second argument and returns it as the second output.
        output: The element to use of a tuple (spikes, ..., membrane): "spikes" or "membrane".
        time_axis: The time axis of the network's outputs; None if they have no time.
        readout: How to reduce the outputs over time, one of READOUTS.
    """

    steps: int | None = None
    sequences: bool = False
    by_step: bool = False
    time_first: bool = True
    carries: bool = False
    output: str = "spikes"
    time_axis: int | None = None
    readout: str = "mean"


class InTime(nn.Module):
    """A module that maps inputs x [N, ...] to the outputs [N, K] of a network, with the state cleared before and after.

    Parameters and layers keep their names in the network. `train()` and `eval()` have no effect if the library is
    known: spiking neurons stay in training mode, because some use their surrogate only there, and all other modules
    stay in evaluation mode.

    Args:
        network: The network.
        plan: How it is run through time.
        clear: Clears the state of the network.
        live: Returns the spiking modules of the network; None if they are not known.
    """

    network: nn.Module

    def __init__(
        self,
        network: nn.Module,
        plan: TimePlan,
        clear: Callable[[nn.Module], None],
        live: Callable[[nn.Module], list[nn.Module]] | None,
    ) -> None:
        super().__init__()
        self.plan, self.clear, self.live = plan, clear, live
        vars(self)["network"] = network  # not registered as a submodule, which would prefix all names
        self._parameters, self._buffers, self._modules = network._parameters, network._buffers, network._modules
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self.train(network.training)

    def train(self, mode: bool = True) -> InTime:
        if self.live is None:  # the neurons are not known: obey, as `evaluation_mode` expects
            super().train(mode)
            self.network.training = mode
            return self
        neurons = {id(m) for m in self.live(self.network)}
        for module in [*self.modules(), self.network]:
            module.training = id(module) in neurons
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.clear(self.network)
        try:
            with _default_dtype(x):
                y = self.over_time(x)
        finally:
            self.clear(self.network)
        if self.plan.time_axis is not None:
            y = _READ_OUT[self.plan.readout](y, self.plan.time_axis)
        if y.dim() == 0 or len(y) != len(x):
            raise AdapterError(
                f"{len(x)} samples gave outputs of shape {list(y.shape)}: samples must be the first axis"
            )
        return y

    def over_time(self, x: Tensor) -> Tensor:
        """Return the network's outputs before the readout. Time is the first axis if the loop over time is here."""
        plan = self.plan
        if plan.steps is None:
            return self._chosen(self.network(x))
        if plan.sequences and (x.dim() < 3 or x.shape[1] != plan.steps):
            raise AdapterError(f"samples of {plan.steps} steps are needed, [N, {plan.steps}, ...], not {list(x.shape)}")
        if not plan.by_step:
            series = x if plan.sequences else x.unsqueeze(1).repeat_interleave(plan.steps, 1)
            return self._chosen(self.network(series.transpose(0, 1).contiguous() if plan.time_first else series))
        state, outputs = None, []
        for t in range(plan.steps):
            current = x[:, t] if plan.sequences else x
            raw = self.network(current, state) if plan.carries else self.network(current)
            if plan.carries:
                state = raw[1]
            outputs.append(self._chosen(raw))
        return torch.stack(outputs)

    def _chosen(self, raw: Any) -> Tensor:
        """Return the output to use as one tensor."""
        if isinstance(raw, tuple) and raw:
            raw = raw[-1 if self.plan.output == "membrane" else 0]
        elif self.plan.output == "membrane":
            raise AdapterError(
                "{output} needs a network that returns a tuple (spikes, ..., membrane), but it returns one output",
                output="membrane",
            )
        if isinstance(raw, list) and raw and all(isinstance(part, Tensor) for part in raw):
            raw = torch.stack(raw)  # one tensor per time step
        if not isinstance(raw, Tensor):
            raise AdapterError(f"the network returns {type(raw).__name__}: wrap it in a module that returns a tensor")
        return raw


_before: list[torch.dtype] = []  # the default dtypes that the threads in `_default_dtype` found
_lock = Lock()


@contextmanager
def _default_dtype(x: Tensor) -> Iterator[None]:
    """Set torch's default dtype to that of the inputs, because some networks create their state without a dtype.

    The default dtype is global. It is restored when the last thread leaves.
    """
    with _lock:
        _before.append(torch.get_default_dtype())
        if x.is_floating_point():
            torch.set_default_dtype(x.dtype)
    try:
        yield
    finally:
        with _lock:
            torch.set_default_dtype(_before.pop())


def clear_state(model: nn.Module) -> None:
    """Clear the state of an adapted model. It is the argument `reset` of `make_objective`."""
    if isinstance(model, InTime):
        model.clear(model.network)
