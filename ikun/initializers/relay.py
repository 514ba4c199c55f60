"""Weights with which every hidden layer repeats the spikes of the layer before it.

A layer whose inputs are spikes, and that has as many output as input channels, starts as a multiple of the identity,
W = a I, and a convolution as a times the identity at the centre of its kernel. From a = (threshold - rest) / gain on,
where gain is the factor of the neurons' current, one spike drives its neuron over the threshold. Without spikes the
potential stays at rest. The spikes are then the same in all these layers, at any depth and for any a, and keep all that
the first layer tells about the input. The forward pass leaves a free, and the backward pass determines it: the squared
norm of a gradient is the same before the first and after the last of these layers (`ikun.initializers.two_sided`
defines it). If the gradient shrinks with the smallest a, or the reset is soft, so that a larger a would leave potential
after a spike, the smallest a is kept. All other layers, such as the first one and the readout, are normal with a
current of variance (threshold - rest)^2.

Source: identity weights are those of Le et al. 2015 (arXiv 1504.00941) and Zagoruyko & Komodakis 2017 (arXiv
1706.00388) for other networks. The scale by threshold and backward gain is our own choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from math import nan

import torch
from torch.nn import init

from ikun.initializers.probe import Probe, Stage
from ikun.initializers.rules import Solution, constants
from ikun.initializers.two_sided import TOLERANCE, draw_unit_current, measure_gains

MARGIN = 1.0001  # on the smallest a, if round-off would keep a neuron below its threshold
LARGEST = 4.0  # of a, relative to its smallest value
PASSES = 12


def relay(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Draw the weights.

    Args:
        probe: The module and the batch.
        generator: Source of random numbers.

    Returns:
        The solutions. The variance of a layer that repeats spikes is the mean square of its weights, and the layer has
        converged if the backward gain over all of them is within TOLERANCE of 1 (in the logarithm).

    Raises:
        ValueError: If a layer is recurrent, no layer can repeat spikes, a current does not vary, or a gradient is zero
            or not finite.
    """
    groups = probe.groups()
    for s in (s for group in groups for s in group if s.recurrent):
        raise ValueError(f"the relay rule has no solution for the recurrent layer {s.name}: choose gradient_stable")
    repeating = [i for i, group in enumerate(groups) if i and _repeats(group)]
    if not repeating:
        raise ValueError(
            "the relay rule needs a hidden layer without a norm and with as many output as input channels, and this "
            "network has none: choose two_sided"
        )
    for i, group in enumerate(groups):
        if i in repeating:
            _identity(group[0])
        else:
            draw_unit_current(probe, group, generator)
    start, scale, error = generator.get_state(), 1.0, 0.0
    low, high, passes = 1.0, LARGEST, 0
    free = all(_hard(groups[i][0]) for i in repeating)
    for passes in range(PASSES + 1):
        generator.set_state(start)  # the same gradient at the last layer in every pass
        backward = measure_gains(probe, groups, generator).backward
        error = sum(math.log(backward[i - 1]) for i in repeating)
        if abs(error) < TOLERANCE or (error < 0 and scale == 1) or not free or passes == PASSES:
            break
        low, high = (scale, high) if error > 0 else (low, scale)
        wanted = math.sqrt(low * high)
        for i in repeating:
            groups[i][0].weights.weight.mul_(wanted / scale)
        scale = wanted
    found = [
        Solution(s.name, float(s.weights.weight.double().square().mean()), nan, nan, passes, True)
        for group in groups
        for s in group
    ]
    names = {groups[i][0].name for i in repeating}
    return [replace(x, converged=x.layer not in names or abs(error) < TOLERANCE) for x in found]


def _repeats(group: Sequence[Stage]) -> bool:
    """Whether a layer can repeat the spikes that it hears, if it does not feed its neurons with others."""
    s = group[0]
    fitting = s.weights.weight.shape[0] == s.weights.weight.shape[1]
    return len(group) == 1 and s.norm is None and s.model is not None and fitting


def _hard(s: Stage) -> bool:
    """Whether a spike resets the potential to rest, whatever a is. A subtractive reset leaves a rest that adds up."""
    return s.model is not None and s.model.dynamics.reset == "hard"


def _identity(s: Stage) -> None:
    """Set the weights to the smallest multiple of the identity that repeats spikes."""
    assert s.model is not None
    w = s.weights.weight
    if w.dim() == 2:
        init.eye_(w)
    else:
        init.dirac_(w)
    dynamics = s.model.dynamics
    smallest = torch.full_like(w[:1, :1], (dynamics.threshold - dynamics.v_reset) / constants(s.model)[1])
    below = bool((s.model.membrane(smallest.flatten(1)) < dynamics.threshold).any())
    w.mul_(smallest.flatten()[0] * (MARGIN if below else 1.0))
