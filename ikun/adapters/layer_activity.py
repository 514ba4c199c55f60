"""Activity of every layer of neurons of an adapted network: firing rates, E[f'^2], and gains from layer to layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ikun.adapters.adapt_network import Adapted
from ikun.adapters.summary import firing_rates, inputs_of
from ikun.nodes.autograd import neurons
from ikun.nodes.recording import groups_of, record_calls


@dataclass(frozen=True)
class NeuronStatistics:
    """Statistics of the neurons of one module, pooled over time steps, samples and neurons.

    Values other than the first three are NaN for neurons whose equations are not known.

    Attributes:
        name: The module.
        firing_rate: Mean number of spikes per neuron and time step.
        dead: Fraction of neurons that never fire.
        derivative_square: E[f'(h - threshold)^2].
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


class _Currents(TorchFunctionMode):
    """Keeps the gradients of the input currents of neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is neurons:
            if args[0].requires_grad:
                args[0].retain_grad()
            self.found.append(args[0])
        return func(*args, **(kwargs or {}))


def layer_activity(
    adapted: Adapted, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[NeuronStatistics, ...]:
    """Compute the statistics of every layer of neurons, with two forward passes and one backward pass.

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
    x = inputs_of(adapted, x)
    _, seen = record_calls(model, x)
    with torch.enable_grad(), _Currents() as currents:
        loss(model(x), y).backward(inputs=[t for t in currents.found if t.requires_grad] or None)
    found: list[NeuronStatistics] = []
    for group in groups_of(seen.calls):
        name = seen.calls[group[0]].place
        if name not in rates:
            continue
        current = torch.cat([seen.calls[i].x.double().flatten() for i in group])
        grads = [t.grad.double().flatten() for i in group if (t := currents.found[i]).grad is not None]
        before = found[-1] if found else None
        variance = float(current.var())
        gradient = float(torch.cat(grads).square().mean()) if grads else 0.0
        found.append(
            NeuronStatistics(
                name,
                rates[name]["firing_rate"],
                rates[name]["dead"],
                float(torch.cat([seen.calls[i].slope().double() for i in group]).square().mean()),
                variance,
                gradient,
                variance / before.current_variance if before and before.current_variance else nan,
                before.gradient_square / gradient if before and gradient else nan,
            )
        )
    known = {s.name for s in found}
    others = [NeuronStatistics(n, r["firing_rate"], r["dead"]) for n, r in rates.items() if n not in known]
    return (*found, *others)
