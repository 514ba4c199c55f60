"""Layer statistics of a network on a batch: firing rates, E[f'^2], forward and backward variances, and gains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessian_tools.evaluation import differentiable
from ikun.layers import Recurrent
from ikun.neurons import Neuron

if TYPE_CHECKING:
    from ikun.networks import Network


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one weight layer and of its neurons, pooled over time steps, samples and units.

    The recurrent weights of a layer share all values with its input weights, except name, fan_in, fan_out,
    weight_variance and input_square.

    Attributes:
        name: Name of the weight layer.
        neuron: Name of the neurons.
        fan_in: Number of inputs per unit, including the kernel area.
        fan_out: Number of outputs per input, including the kernel area.
        weight_variance: Variance of the weights.
        input_square: E[x^2] of the layer's input.
        derivative_square: E[f'(h - threshold)^2].
        firing_rate: Mean number of spikes per neuron and time step.
        dead: Fraction of neurons that never fire.
        saturated: Fraction of neurons that fire at every time step of every sample.
        current_variance: Variance of the input current of the neurons, after the norm and including recurrent currents.
        gradient_square: Mean square of the loss gradient with respect to this current.
        forward_gain: current_variance divided by that of the preceding neurons. NaN for the first neurons.
        backward_gain: gradient_square of the preceding neurons divided by that of these. NaN for the first neurons.
        derivative_square_by_step: E[f'(h - threshold)^2] at every time step.
    """

    name: str
    neuron: str
    fan_in: int
    fan_out: int
    weight_variance: float
    input_square: float
    derivative_square: float
    firing_rate: float
    dead: float
    saturated: float
    current_variance: float
    gradient_square: float
    forward_gain: float = nan
    backward_gain: float = nan
    derivative_square_by_step: tuple[float, ...] = ()

    def rule_variance(self, alpha: float = 1.0) -> float:
        """Return the weight variance of Theorem 1 of arXiv 2411.18250, alpha / (fan_in E[x^2] E[f'^2]).

        It is infinite if the denominator is 0.
        """
        denominator = self.fan_in * self.input_square * self.derivative_square
        return alpha / denominator if denominator > 0 else float("inf")


def fans(weight: Tensor) -> tuple[int, int]:
    """Return fan in and fan out of a weight [out, in, ...], both including the kernel area."""
    area = weight[0, 0].numel()
    return weight.shape[1] * area, weight.shape[0] * area


@differentiable
def observe(
    network: Network, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[LayerStatistics, ...]:
    """Compute the statistics of every weight layer with one forward and one backward pass.

    The network stays in its current mode (training or evaluation).

    Args:
        network: The network.
        x: Network inputs.
        y: Labels [N].
        loss: Maps outputs and labels to the loss.

    Returns:
        The statistics of the weight layers in order.
    """
    inputs: dict[nn.Module, list[Tensor]] = {}
    feedback: dict[nn.Module, list[Tensor]] = {}
    currents: dict[nn.Module, Tensor] = {}
    spikes: dict[nn.Module, Tensor] = {}

    def through(m: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.setdefault(m, []).append(arguments[0].detach())
        if isinstance(m, Recurrent):
            feedback.setdefault(m, []).append(output.detach())

    def fire(m: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        arguments[0].retain_grad()
        currents[m], spikes[m] = arguments[0], output.detach()

    stages = list(network.stages())
    neurons = list(dict.fromkeys(neuron for *_, neuron in stages))
    handles = [weights.register_forward_hook(through) for _, weights, *_ in stages]
    handles += [neuron.register_forward_hook(fire) for neuron in neurons]
    try:
        with torch.enable_grad():
            value = loss(network(x), y)
            torch.autograd.backward(value, inputs=list(currents.values()))
    finally:
        for handle in handles:
            handle.remove()
    totals = {neuron: current.detach() for neuron, current in currents.items()}
    for _, weights, *_, neuron in stages:
        if weights in feedback:
            totals[neuron] = totals[neuron] + torch.stack(feedback[weights])
    variances = [float(totals[n].double().var()) for n in neurons]
    gradients = [_mean_square(g) if (g := currents[n].grad) is not None else 0.0 for n in neurons]
    found: list[LayerStatistics] = []
    for name, weights, _, neuron_name, neuron in stages:
        i, rate = neurons.index(neuron), spikes[neuron].mean((0, 1))
        derivative = _derivative(neuron, totals[neuron])
        fan_in, fan_out = fans(weights.weight)
        here = LayerStatistics(
            name,
            neuron_name,
            fan_in,
            fan_out,
            float(weights.weight.detach().double().var()),
            _mean_square(torch.cat(inputs[weights])),
            _mean_square(derivative),
            float(rate.mean()),
            float((rate == 0).double().mean()),
            float((rate == 1).double().mean()),
            variances[i],
            gradients[i],
            variances[i] / variances[i - 1] if i and variances[i - 1] else nan,
            gradients[i - 1] / gradients[i] if i and gradients[i] else nan,
            tuple(derivative.double().square().flatten(1).mean(1).tolist()),
        )
        found.append(here)
    return tuple(found)


def derivative_square(neuron: Neuron, current: Tensor) -> float:
    """Return E[f'(h - threshold)^2] for the input current [T, N, ...], including recurrent currents."""
    return _mean_square(_derivative(neuron, current))


def _derivative(neuron: Neuron, current: Tensor) -> Tensor:
    """Return f'(h - threshold) [T, N, ...]."""
    return neuron.dynamics.surrogate.first(neuron.membrane(current) - neuron.dynamics.threshold)


def _mean_square(x: Tensor) -> float:
    return float(x.detach().double().square().mean())


@contextmanager
def batch_norm_by_batch(net: nn.Module) -> Iterator[None]:
    """Make BatchNorm layers normalize by the batch within this context, without updating the running statistics.

    A network that is not yet trained behaves like this in training mode.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    before = [(m.training, m.track_running_stats) for m in norms]
    for m in norms:
        m.train()
        m.track_running_stats = False  # also keeps num_batches_tracked unchanged
    try:
        yield
    finally:
        for m, (training, tracked) in zip(norms, before, strict=True):
            m.train(training)
            m.track_running_stats = tracked
