"""What every layer of a network does on a batch: firing, E[f'^2], variances forward and backward, and their gains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor, nn

from ikun.networks import Network
from ikun.neurons import Neuron


@dataclass(frozen=True)
class LayerStatistics:
    """One weight layer and its neurons, pooled over time steps, samples and units.

    input_square: E[x^2] of the layer's input. derivative_square: E[f'(h - threshold)^2]. dead, saturated: share of the
    neurons that never fire, or fire at every step of every sample. current_variance: variance of what enters the
    neurons (after the norm). gradient_square: mean square of the loss gradient there. forward_gain: current_variance
    over that of the layer before; backward_gain: gradient_square of the layer before over this one's (NaN in layer 1).
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

    def rule_variance(self, alpha: float = 1.0) -> float:
        """Theorem 1 of arXiv 2411.18250: alpha / (fan_in E[x^2] E[f'^2])."""
        denominator = self.fan_in * self.input_square * self.derivative_square
        return alpha / denominator if denominator > 0 else float("inf")


def fans(weight: Tensor) -> tuple[int, int]:
    """(fan in, fan out) of a weight [out, in, ...], the kernel area included."""
    area = weight[0, 0].numel()
    return weight.shape[1] * area, weight.shape[0] * area


def observe(
    network: Network, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> tuple[LayerStatistics, ...]:
    """Statistics of every weight layer from one forward and one backward pass, in the network's present mode."""
    inputs: dict[str, Tensor] = {}
    currents: dict[str, Tensor] = {}
    spikes: dict[str, Tensor] = {}

    def watch_weights(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name] = arguments[0].detach()

        return hook

    def watch_neuron(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            arguments[0].retain_grad()
            currents[name], spikes[name] = arguments[0], output.detach()

        return hook

    stages = list(network.stages())
    handles = [weights.register_forward_hook(watch_weights(name)) for name, weights, _, _, _ in stages]
    handles += [neuron.register_forward_hook(watch_neuron(name)) for _, _, _, name, neuron in stages]
    try:
        with torch.enable_grad():
            value = loss(network(x), y)
            torch.autograd.backward(value, inputs=list(currents.values()))
    finally:
        for handle in handles:
            handle.remove()
    found: list[LayerStatistics] = []
    for name, weights, _, neuron_name, neuron in stages:
        current, fired = currents[neuron_name], spikes[neuron_name]
        fan_in, fan_out = fans(weights.weight)
        rate = fired.mean((0, 1))
        gradient = current.grad if current.grad is not None else torch.zeros_like(current)
        here = LayerStatistics(
            name,
            neuron_name,
            fan_in,
            fan_out,
            float(weights.weight.detach().double().var()),
            _mean_square(inputs[name]),
            derivative_square(neuron, current.detach()),
            float(rate.mean()),
            float((rate == 0).double().mean()),
            float((rate == 1).double().mean()),
            float(current.detach().double().var()),
            _mean_square(gradient),
            *_gains(found, current.detach(), gradient),
        )
        found.append(here)
    return tuple(found)


def derivative_square(neuron: Neuron, current: Tensor) -> float:
    """E[f'(h - threshold)^2] of a layer fed with current [T, N, ...]."""
    h = neuron.membrane(current)
    return _mean_square(neuron.dynamics.surrogate.first(h - neuron.dynamics.threshold))


def _gains(before: list[LayerStatistics], current: Tensor, gradient: Tensor) -> tuple[float, float]:
    if not before:
        return nan, nan
    variance, square = float(current.double().var()), _mean_square(gradient)
    forward = variance / before[-1].current_variance if before[-1].current_variance else nan
    return forward, before[-1].gradient_square / square if square else nan


def _mean_square(x: Tensor) -> float:
    return float(x.detach().double().square().mean())


@contextmanager
def batch_norm_by_batch(net: Network) -> Iterator[None]:
    """Normalize by the batch for a while, the running statistics untouched: what a fresh network does in training."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    before = [(m.training, m.track_running_stats) for m in norms]
    for m in norms:
        m.train()
        m.track_running_stats = False  # while False, not even num_batches_tracked moves
    try:
        yield
    finally:
        for m, (training, tracked) in zip(norms, before, strict=True):
            m.train(training)
            m.track_running_stats = tracked
