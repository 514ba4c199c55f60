"""Activity of every layer of neurons of an adapted network: firing rates, E[f'^2], and gains from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from hessian_tools import nested
from ikun.adapters.adapt_network import Adapted
from ikun.adapters.summary import firing_rates, inputs_of, neurons_of
from ikun.nodes.recording import record_calls


@dataclass(frozen=True)
class NeuronStatistics:
    """Statistics of the neurons of one module, pooled over time steps, samples and neurons.

    The current is the input of the module. It does not include the recurrent current of a neuron that computes it
    itself.

    Attributes:
        name: The module.
        firing_rate: Mean number of spikes per neuron and time step.
        dead: Fraction of neurons that never fire.
        derivative_square: E[f'(h - threshold)^2]. NaN for neurons whose equations are not known.
        current_variance: Variance of the input current.
        gradient_square: Mean square of the loss gradient with respect to this current.
        forward_gain: current_variance divided by that of the preceding neurons. NaN for the first neurons.
        backward_gain: gradient_square of the preceding neurons divided by that of these. NaN for the first neurons.
    """

    name: str
    firing_rate: float
    dead: float
    derivative_square: float = nan
    current_variance: float = nan
    gradient_square: float = nan
    forward_gain: float = nan
    backward_gain: float = nan


def layer_activity(
    adapted: Adapted, x: Any, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[NeuronStatistics, ...]:
    """Compute the statistics of every layer of neurons, with three forward passes and one backward pass.

    "Preceding" means in the order of the first call, which is that of the layers unless branches run side by side.

    Args:
        adapted: The network.
        x: Inputs [N, ...].
        y: Targets [N, ...].
        loss: Maps outputs and targets to the loss.

    Returns:
        The statistics, in the order in which the network calls its neurons.
    """
    rates, model = firing_rates(adapted, x), adapted.model
    if not rates:
        return ()
    x = inputs_of(adapted, x)
    with torch.enable_grad():
        _, seen = record_calls(model, x)
        with _currents(adapted) as currents:
            value = loss(nested.call(model, x), y)
        if wanted := [t for found in currents.values() for t in found if t.requires_grad]:
            value.backward(inputs=wanted)
    calls: dict[str, list[Tensor]] = {}
    for call in seen.calls:
        calls.setdefault(call.place, []).append(call.slope().double().flatten())
    slopes = {name: float(torch.cat(parts).square().mean()) for name, parts in calls.items()}
    found: list[NeuronStatistics] = []
    for name, inputs in currents.items():
        if name not in rates:
            continue
        before = found[-1] if found else None
        variance = float(torch.cat([t.detach().double().flatten() for t in inputs]).var())
        grads = [t.grad.double().flatten() for t in inputs if t.grad is not None]
        gradient = float(torch.cat(grads).square().mean()) if grads else 0.0
        found.append(
            NeuronStatistics(
                name,
                rates[name]["firing_rate"],
                rates[name]["dead"],
                slopes.get(name, nan),
                variance,
                gradient,
                variance / before.current_variance if before and before.current_variance else nan,
                before.gradient_square / gradient if before and gradient else nan,
            )
        )
    known = {s.name for s in found}
    others = [NeuronStatistics(n, r["firing_rate"], r["dead"]) for n, r in rates.items() if n not in known]
    return (*found, *others)


@contextmanager
def _currents(adapted: Adapted) -> Iterator[dict[str, list[Tensor]]]:
    """Keep the inputs of all calls of every neuron within this context, by its name, with their gradients."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> Any:
            if not args or not isinstance(args[0], Tensor):
                return None
            current = args[0] * 1  # a residual branch may use the same tensor
            if current.requires_grad:
                current.retain_grad()
            found.setdefault(name, []).append(current)
            return (current, *args[1:])

        return hook

    neurons = {id(m) for m in neurons_of(adapted)}
    handles = [m.register_forward_pre_hook(keep(n)) for n, m in adapted.model.named_modules() if id(m) in neurons]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
