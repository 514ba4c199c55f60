"""A network of any make as a function of a batch: state cleared, time run through, one output read out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from ikun.adapters.base import AdapterError

OUTPUTS = ("spikes", "membrane")
READOUTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda y, axis: y.mean(axis),
    "sum": lambda y, axis: y.sum(axis),
    "last": lambda y, axis: y.select(axis, -1),
    "max": lambda y, axis: y.amax(axis),
}


@dataclass(frozen=True)
class TimePlan:
    """How a network is run.

    steps: T, for a network that is given its time from here; None for one that runs through time by itself (or has no
    time). sequences: the samples are sequences, x [N, T, ...]; otherwise x is repeated T times. by_step: one call is
    one step; otherwise one call takes all steps, [T, N, ...] if time_first, else [N, T, ...]. carries: the state is the
    second output and the second input. output: which of (spikes, ..., membrane) counts. time_axis: of what the
    network returns, None if it has no time any more. readout: over that axis.
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
    """x [N, ...] -> outputs [N, K] of a network, from a state cleared before and after.

    Parameters and layers have the names that they have in the network. Whatever mode is asked for, spiking neurons
    are in training mode, where the surrogate lives, and everything else evaluates.
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
        vars(self)["network"] = network  # not as a submodule: that would put its name before all others
        self._parameters, self._buffers, self._modules = network._parameters, network._buffers, network._modules
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self.train(network.training)

    def train(self, mode: bool = True) -> InTime:
        if self.live is None:  # nothing is known of it: as objective.evaluation_mode has it
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
            y = READOUTS[self.plan.readout](y, self.plan.time_axis)
        if y.dim() == 0 or len(y) != len(x):
            raise AdapterError(f"{len(x)} samples gave outputs of shape {list(y.shape)}: the first axis must be theirs")
        return y

    def over_time(self, x: Tensor) -> Tensor:
        """What the network returns, with its time if it has one; time first where the loop is here."""
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
        if isinstance(raw, tuple) and raw:
            raw = raw[-1 if self.plan.output == "membrane" else 0]
        elif self.plan.output == "membrane":
            raise AdapterError("the network returns one output: output='membrane' needs (spikes, ..., membrane)")
        if isinstance(raw, list) and raw and all(isinstance(part, Tensor) for part in raw):
            raw = torch.stack(raw)  # a step each
        if not isinstance(raw, Tensor):
            raise AdapterError(f"the network returns {type(raw).__name__}: wrap it in a module that returns a tensor")
        return raw


_before: list[torch.dtype] = []  # the default dtype as each thread inside found it
_lock = Lock()


@contextmanager
def _default_dtype(x: Tensor) -> Iterator[None]:
    """States that a network makes for itself get the dtype of its inputs: some are made without one.

    The default is one for all threads: what the first in found comes back when the last is out.
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
    """The `reset` of make_objective for an adapted model."""
    if isinstance(model, InTime):
        model.clear(model.network)
