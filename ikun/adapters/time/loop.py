"""Wrap any network as a function of a batch: clear its state, run it through time, and read out one output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools import nested
from ikun.adapters.base import AdapterError, run_forward
from ikun.adapters.choices import OUTPUTS
from ikun.adapters.time.readout import parted, read_out


@dataclass(frozen=True)
class TimePlan:
    """How a network is run through time.

    Attributes:
        steps: Number of time steps T. None: the network runs through time by itself, or has no time.
        sequences: Samples are sequences [N, T, ...]. Otherwise x is repeated T times.
        by_step: One call of the network is one time step. Otherwise one call takes all steps.
        time_first: A call that takes all steps has inputs [T, N, ...]. Otherwise they are [N, T, ...].
        carries: The network takes its state as the second argument and returns it as the second output.
        output: What to use if the network returns several outputs (see `adapt`).
        floats: Inputs of whole numbers or booleans are converted to the dtype of the parameters.
        valid: Entry of the inputs that is a mask [N, T] or lengths [N] of padded sequences (see `adapt`).
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
    floats: bool = False
    valid: str | None = None


class InTime(nn.Module):
    """A module that maps inputs x [N, ...] to the outputs [N, K] of a network, with the state cleared before and after.

    With the readout "none" the outputs are [N, T, K].

    Parameters and layers keep their names in the network. `train()` and `eval()` have no effect if the library is
    known: the modes stay as `hessian_tools.evaluation.evaluation_mode` sets them.

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

    @property
    def training(self) -> bool:
        return bool(self.network.training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "network" in vars(self):  # not yet in the constructor of nn.Module
            self.network.training = mode

    def train(self, mode: bool = True) -> InTime:
        if self.live is None:  # the neurons are not known: obey
            super().train(mode)
        return self

    def forward(self, x: Any, /) -> Tensor:
        self.clear(self.network)
        x = self.converted(x)
        try:
            with default_dtype(x):
                y = self.over_time(x)
        finally:
            self.clear(self.network)
        if self.plan.time_axis is not None:
            y = read_out(y, self.plan.time_axis, self.plan.readout, parted(x, self.plan.valid, self.network)[1])
        count = nested.sample_count(x)
        if y.dim() == 0 or len(y) != count:
            text = f"{count} samples gave outputs of shape {list(y.shape)}: samples must be the first axis"
            if y.dim() > 2 and y.shape[1] == count:
                raise AdapterError(text + "; if the first axis is time, give {readout}", readout=...)
            raise AdapterError(text)
        return y

    def forward_once(self, x: Any) -> Tensor:
        """Return the outputs before the readout, from a cleared state, with errors of the network in one line."""
        self.clear(self.network)
        try:
            with default_dtype(x):
                return run_forward(self.over_time, x)
        finally:
            self.clear(self.network)

    def converted(self, x: Any) -> Any:
        """Return inputs in the dtype that the network needs."""
        if not self.plan.floats:
            return x
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())
        return nested.mapped(lambda t: t if t.is_floating_point() else t.to(dtype), x)

    def over_time(self, x: Any) -> Tensor:
        """Return the network's outputs before the readout. Time is the first axis if the loop over time is here."""
        plan = self.plan
        x, _ = parted(x, plan.valid, self.network)
        if plan.steps is None:
            return self._chosen(nested.call(self.network, x))
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
        return chosen(raw, self.plan.output, series=self.live is not None or self.plan.steps is not None)


def chosen(raw: Any, output: str, series: bool) -> Tensor:
    """Return the output to use of those that a network returns, as one tensor.

    Args:
        raw: A tensor, or a tuple, list, dict or dataclass of outputs.
        output: See `adapt`.
        series: Whether a list is one tensor per time step.

    Raises:
        AdapterError: If there is no such output, or if it is not clear which is meant.
    """
    if isinstance(raw, tuple) and output in getattr(raw, "_fields", ()):
        return chosen(getattr(raw, output), "spikes", series)
    named = _named(raw)
    if named is not None:
        tensors = [name for name, value in named.items() if isinstance(value, Tensor)]
        known = output if output in named else "spikes"
        if output not in named and output not in OUTPUTS:
            raise AdapterError("{output}: the network returns {}", ", ".join(named) or "nothing", output=output)
        if output not in named and (len(tensors) != 1 or output != "spikes"):
            raise AdapterError("the network returns {}: give {output}, one of them", ", ".join(named), output=...)
        raw = named[known] if known in named else named[tensors[0]]
    elif isinstance(raw, tuple | list) and raw and not (isinstance(raw, list) and series):
        if not output.isdecimal() and output not in OUTPUTS:
            raise AdapterError(
                "{output}: the network returns {} outputs: give a number from 0", len(raw), output=output
            )
        if isinstance(raw, list) and len(raw) > 1 and output == "spikes":
            raise AdapterError(
                "the network returns a list of {} outputs: give {output}, the number of one of them from 0; if they "
                "are time steps, return torch.stack of them",
                len(raw),
                output=...,
            )
        index = int(output) if output.isdecimal() else -1 if output == "membrane" else 0
        if index >= len(raw):
            raise AdapterError("{output}: the network returns {} outputs", len(raw), output=output)
        raw = raw[index]
    elif output != "spikes":
        raise AdapterError(
            "{output} needs a network that returns a tuple (spikes, ..., membrane), but it returns one output",
            output=output,
        )
    if isinstance(raw, list) and raw and all(isinstance(part, Tensor) for part in raw):
        raw = torch.stack(raw)  # one tensor per time step
    if not isinstance(raw, Tensor):
        raise AdapterError(f"the network returns {type(raw).__name__}: wrap it in a module that returns a tensor")
    return raw


def _named(raw: Any) -> dict[str, Any] | None:
    """Return the outputs by name that are not None, of a dict, a dataclass or a namedtuple; None for anything else."""
    if isinstance(raw, Mapping):
        found = {str(name): value for name, value in raw.items()}
    elif dataclasses.is_dataclass(raw) and not isinstance(raw, type):
        found = {field.name: getattr(raw, field.name) for field in dataclasses.fields(raw)}
    else:
        return None
    return {name: value for name, value in found.items() if value is not None}


_before: list[torch.dtype] = []  # the default dtypes that the threads in `default_dtype` found
_lock = Lock()


@contextmanager
def default_dtype(x: Any) -> Iterator[None]:
    """Set torch's default dtype to that of the inputs, because some networks create their state without a dtype.

    The default dtype is global. It is restored when the last thread leaves.
    """
    with _lock:
        _before.append(torch.get_default_dtype())
        if (dtype := next((t.dtype for t in nested.tensors(x) if t.is_floating_point()), None)) is not None:
            torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        with _lock:
            torch.set_default_dtype(_before.pop())


def clear_state(model: nn.Module) -> None:
    """Clear the state of an adapted model. It is the argument `reset` of `make_objective`."""
    if isinstance(model, InTime):
        model.clear(model.network)
