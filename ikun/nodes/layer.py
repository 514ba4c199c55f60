"""The neurons of ikun's own networks as nodes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ikun.neurons import Dynamics, Feedback, Neuron
from ikun.nodes.autograd import neurons
from ikun.nodes.passes import ScanSpec

if TYPE_CHECKING:
    from ikun.layers import MaxPool


@lru_cache(4096)
def _spec(d: Dynamics, kind: str, tau: float, steps: int, static: bool, plane: tuple[int, int, str]) -> ScanSpec:
    rate = 1 / tau if kind == "lif" else 1.0
    return ScanSpec(
        f"{d.surrogate.name}:{d.surrogate.parameter!r}", 1 - rate if kind == "lif" else 1.0, rate, d.threshold,
        d.v_reset, d.reset, d.detach_reset, d.relaxed, steps, static, *plane, ends=False,
    )  # fmt: skip


def spec_of(neuron: Neuron, x: Tensor, steps: int, pool: MaxPool | None = None) -> ScanSpec:
    """Return the parameters of neurons and of the pooling behind them, for currents x [T or 1, N, ...]."""
    plane = (0, 0, "first") if pool is None else (x.shape[-2], x.shape[-1], pool.ties)
    return _spec(neuron.dynamics, neuron.kind, neuron.tau, steps, len(x) < steps, plane)


def fire(
    neuron: Neuron, x: Tensor, steps: int, pool: MaxPool | None = None, feedback: Feedback | None = None
) -> Tensor:
    """Return pool(neuron(x)). The spikes are those of the plain modules, to the last bit.

    Args:
        neuron: The neurons.
        x: Input currents [T, N, ...], or [1, N, ...] for an input that is the same at all steps.
        steps: Number of time steps T.
        pool: The pooling behind the neurons, or None.
        feedback: In a recurrent layer, the map from s[t-1] to V s[t-1]. The pooling is None then.

    Returns:
        The spikes after pooling [T, N, ...].
    """
    gain = torch.sigmoid(neuron.logit) if neuron.kind == "plif" else None
    if feedback is None:
        return neurons(x, spec_of(neuron, x, steps, pool), None, gain)[0]
    spec = replace(spec_of(neuron, x[:1], 1), ends=True)
    v, s, spikes = None, torch.zeros_like(x[0]), []
    for current in x.expand(steps, *x.shape[1:]).unbind(0):
        y, v = neurons((current + feedback(s))[None], spec, v, gain)
        s = y[0]
        spikes.append(s)
    return torch.stack(spikes)
