"""A module as the initializers see it: its weight layers in order, their inputs, and the currents of their neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ikun.layer_statistics import batch_norm_by_batch, derivative_square
from ikun.layers import Recurrent
from ikun.neurons import Neuron

if TYPE_CHECKING:
    from ikun.networks import Network

Weights = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
Reset = Callable[[nn.Module], object]
Arguments = tuple[Tensor, ...]


@dataclass(frozen=True)
class Stage:
    """A weight layer with the BatchNorm that follows it and the neurons that it feeds.

    Attributes:
        name: Name of the weight layer.
        weights: The weight layer.
        norm: The BatchNorm after it, or None.
        neuron: The neurons, or None.
        model: ikun neurons that compute the membrane potential h: `neuron` itself if it is ikun's, else a model of it.
            None without neurons. h is then the layer's output, and f' = 1.
        recurrent: Whether the input of the layer is the output of the neurons that it feeds.
    """

    name: str
    weights: Weights
    norm: _BatchNorm | None = None
    neuron: nn.Module | None = None
    model: Neuron | None = None
    recurrent: bool = False

    @property
    def frozen(self) -> bool:
        """Whether the weight has requires_grad=False, so that it is not changed."""
        weight = self.weights._parameters.get("weight")  # None for a computed weight, which is not frozen
        return weight is not None and not weight.requires_grad


def stages_of(network: Network) -> tuple[Stage, ...]:
    """Return the stages of one of ikun's networks."""
    return tuple(
        Stage(name, weights, norm, neuron, neuron, isinstance(weights, Recurrent))  # type: ignore[arg-type]
        for name, weights, norm, _, neuron in network.stages()
    )


def reset_states(module: nn.Module) -> None:
    """Reset the state of every neuron.

    SpikingJelly's neurons have reset(), snnTorch's have reset_mem() (their `reset` is a tensor). ikun's neurons keep no
    state.
    """
    for m in module.modules():
        bases = {c.__name__ for c in type(m).__mro__}
        name = "reset_mem" if "SpikingNeuron" in bases else "reset" if "MemoryModule" in bases else ""
        if callable(getattr(m, name, None)):
            getattr(m, name)()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation mode within this context, and restore the mode of every submodule afterwards."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


def forward(module: nn.Module, x: Tensor) -> None:
    """Call module(x). Raise ValueError with a clear message if x has another dtype than the parameters."""
    try:
        module(x)
    except RuntimeError as error:
        kinds = list(dict.fromkeys(p.dtype for p in module.parameters() if p.is_floating_point()))
        if kinds and x.is_floating_point() and x.dtype not in kinds:
            raise ValueError(f"x is {x.dtype}, the module's parameters are {kinds[0]}: convert one of them") from error
        raise


def entering(arguments: Arguments, named: dict[str, Tensor]) -> Tensor:
    """Return the first argument of a call, whether it is positional or named."""
    return arguments[0] if arguments else next(iter(named.values()))


class _FoundError(Exception):
    """Ends a forward pass early, after the layers of interest."""


@dataclass(frozen=True)
class Seen:
    """What one forward pass shows of stages that feed the same neurons.

    Attributes:
        inputs: Input of each weight layer, with all its calls in one tensor.
        outputs: Output of each weight layer, with all its calls in one tensor.
        current: Input current of the neurons [T, N, ...].
        model: ikun neurons that model the neurons, or None without neurons.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    current: Tensor
    model: Neuron | None

    def input_square(self, i: int = 0) -> float:
        """Return E[x^2] of the input of weight layer i."""
        return float(self.inputs[i].double().square().mean())

    def derivative_square(self) -> float:
        """Return m = E[f'(h - threshold)^2] of the neurons. It is 1 without neurons."""
        return 1.0 if self.model is None else derivative_square(self.model, self.current)


class Probe:
    """A module with its stages and a batch to measure on. It counts the forward passes.

    Args:
        module: The module.
        stages: Its stages in order.
        x: A batch, or None for initializers that do not measure.
        reset: Function that resets the module's state.
    """

    def __init__(
        self, module: nn.Module, stages: Sequence[Stage], x: Tensor | None = None, reset: Reset = reset_states
    ) -> None:
        self.module, self.stages, self.x, self.reset = module, tuple(stages), x, reset
        self.drawn = tuple(s for s in self.stages if not s.frozen)
        self.passes = 0

    def groups(self) -> list[tuple[Stage, ...]]:
        """Return the stages that are drawn, grouped by the neurons that they feed.

        The position of a group is that of its last stage that is not recurrent, whether frozen or not.
        """
        found: dict[nn.Module, list[Stage]] = {}
        place: dict[nn.Module, int] = {}
        for i, s in enumerate(self.stages):
            key = s.weights if s.neuron is None else s.neuron
            found.setdefault(key, []).append(s)
            place[key] = place.get(key, i) if s.recurrent else i
        whole = (found[key] for key in sorted(found, key=lambda key: place[key]))
        return [drawn for group in whole if (drawn := tuple(s for s in group if not s.frozen))]

    def look(self, group: Sequence[Stage]) -> Seen:
        """Run one forward pass as far as needed, and return what it shows of the given stages.

        One call of ikun's neurons, and of neurons with step_mode 'm' (SpikingJelly), covers all time steps. One call of
        other neurons is one step.

        Args:
            group: Stages that feed the same neurons. The state of the module must be reset, and it is reset afterwards.

        Returns:
            Inputs, outputs and currents of the stages.

        Raises:
            ValueError: If there is no batch, or the forward pass does not call a layer and its neurons.
        """
        if self.x is None:
            raise ValueError("this initializer needs a batch of inputs: pass x")
        neuron = group[0].neuron
        inside = set() if neuron is None else set(neuron.modules())
        feedback = [
            s
            for s in self.stages
            if s.recurrent and s.neuron is neuron and (isinstance(neuron, Neuron) or s.weights in inside)
        ]  # recurrent layers whose output the neurons add to their input current
        layers = list(dict.fromkeys(s.weights for s in (*group, *feedback)))
        inputs: dict[nn.Module, list[Tensor]] = {w: [] for w in layers}
        outputs: dict[nn.Module, list[Tensor]] = {w: [] for w in layers}
        currents: list[Tensor] = []

        def through(m: nn.Module, arguments: Arguments, named: dict[str, Tensor], output: Tensor) -> None:
            inputs[m].append(entering(arguments, named))
            outputs[m].append(output)

        def enter(_: nn.Module, arguments: Arguments, named: dict[str, Tensor]) -> None:
            currents.append(entering(arguments, named))
            if isinstance(neuron, Neuron) and not feedback:
                raise _FoundError

        def leave(_: nn.Module, arguments: Arguments, output: Tensor) -> None:
            if isinstance(neuron, Neuron):
                raise _FoundError
            if neuron is None:
                currents.append(output)

        handles = [w.register_forward_hook(through, with_kwargs=True) for w in layers]
        if neuron is not None:
            handles.append(neuron.register_forward_pre_hook(enter, with_kwargs=True))
        last = neuron if neuron is not None else group[0].norm if group[0].norm is not None else group[0].weights
        handles.append(last.register_forward_hook(leave))
        self.passes += 1
        try:
            # as at the start of training, BatchNorm normalizes by the batch; dropout is off
            with evaluating(self.module), batch_norm_by_batch(self.module), torch.no_grad(), suppress(_FoundError):
                forward(self.module, self.x)
        finally:
            for handle in handles:
                handle.remove()
        self.reset(self.module)  # for the next pass, and for the caller
        if not currents or any(not inputs[s.weights] for s in group):
            raise ValueError(f"the forward pass does not call layer {group[0].name} and its neurons")
        whole = isinstance(neuron, Neuron) or getattr(neuron, "step_mode", "s") == "m"
        current = _joined(currents) if whole else torch.stack(currents)
        for s in feedback:
            current = current + torch.stack(outputs[s.weights])
        joined = [tuple(_joined(seen[s.weights]) for s in group) for seen in (inputs, outputs)]
        return Seen(joined[0], joined[1], current, group[0].model)


def _joined(calls: list[Tensor]) -> Tensor:
    """Concatenate the tensors of all calls."""
    return calls[0] if len(calls) == 1 else torch.cat(calls)
