"""Fluctuation-driven initialization (Rossbroich, Gygax & Zenke 2022), and the formulas that it uses."""

from __future__ import annotations

import math
from math import nan

import torch
from torch import Tensor

from ikun.initializers.probe import Probe, Stage
from ikun.initializers.rules import Solution, constants, normal, require
from ikun.layer_statistics import fans

XI = 1.0  # distance from the mean potential to the threshold, in standard deviations
INPUT_SHARE = 0.9  # share of the potential's variance that comes from the input of a recurrent layer


def fluctuation(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Rossbroich, Gygax & Zenke 2022 (arXiv 2206.10226), centred version.

    The mean membrane potential is at rest, and its standard deviation without resets is (threshold - rest) / XI, for
    inputs that are Poisson spike trains. In a recurrent layer the share INPUT_SHARE of the variance comes from the
    input. XI and the share are those of the authors' examples. Readouts without neurons get the variance 1 / fi, as in
    the paper.

    Our choices: e1 and e2 are means over the T steps from rest. The rate nu is measured for every layer, while the
    paper uses one number for all. A constant current, such as that of a repeated image, does not fluctuate in time. Its
    spread over samples and neurons is used instead.
    """
    found: list[Solution] = []
    for group in probe.groups():
        forward, feedback = [s for s in group if not s.recurrent], [s for s in group if s.recurrent]
        for s in forward:
            normal(s.weights, generator)
        for s in feedback:
            s.weights.weight.zero_()
        share = INPUT_SHARE if feedback else 1.0
        for part, portion in ((forward, share), (feedback, 1 - share)):
            seen = probe.look(part) if part else None
            for i, s in enumerate(part):
                assert seen is not None
                rate = seen.input_square(i)
                require("fluctuation", s.name, rate)
                variance = _fluctuation_variance(s, rate, seen.current) * portion / len(part)
                if s.recurrent:
                    normal(s.weights, generator)
                s.weights.weight.mul_(math.sqrt(variance))
                found.append(Solution(s.name, variance, rate, nan, 1, True))
    return found


def _fluctuation_variance(s: Stage, rate: float, current: Tensor) -> float:
    """Return the weight variance of the fluctuation rule for a layer with this input rate and current."""
    fan_in, _ = fans(s.weights.weight)
    if s.model is None:
        return 1 / fan_in
    first, second, constant = kernel_moments(*constants(s.model), len(current))
    if not s.recurrent and bool((current == current[:1]).all()):
        second = constant
    distance = s.model.dynamics.threshold - s.model.dynamics.v_reset
    return fluctuation_weights(fan_in, rate, first, second, distance)[1]


def fluctuation_weights(
    fan_in: int, rate: float, first: float, second: float, distance: float, mean: float = 0.0, xi: float = XI
) -> tuple[float, float]:
    """Compute the weight distribution that gives the membrane potential a target mean and standard deviation.

    The inputs are Poisson spike trains and the neurons have no threshold. Source: Rossbroich, Gygax & Zenke 2022, whose
    e-bar and e-hat are `first` and `second`.

    Args:
        fan_in: Number of inputs.
        rate: Firing rate of the inputs, in spikes per step.
        first: First value of `kernel_moments`.
        second: Second value of `kernel_moments`.
        distance: Threshold minus resting potential.
        mean: Target mean of the potential, above rest.
        xi: The target standard deviation is (distance - mean) / xi.

    Returns:
        Mean and variance of the weights.

    Raises:
        ValueError: If the mean weight alone causes a larger standard deviation.
    """
    centre = mean / (fan_in * rate * first)
    variance = ((distance - mean) / xi) ** 2 / (fan_in * rate * second) - centre**2
    if variance < 0:
        raise ValueError(
            f"a mean potential of {mean:g} fluctuates by more than 1/{xi:g} of its distance to the threshold"
        )
    return centre, variance


def kernel_moments(decay: float, gain: float, steps: int) -> tuple[float, float, float]:
    """Return moments of the membrane's response to a unit input, averaged over the steps 1..T from rest.

    The response is gain decay^k after k steps. For many steps, e1 -> 1 and e2 -> 1/(2 tau - 1) for LIF neurons. For IF
    neurons both are (steps + 1) / 2.

    Args:
        decay: Factor of the previous potential.
        gain: Factor of the input current.
        steps: Number of time steps T.

    Returns:
        The means over time of the response's sum (e1), of its sum of squares (e2), and of its squared sum.
    """
    response = gain * decay ** torch.arange(steps, dtype=torch.float64)
    total = response.cumsum(0)
    return float(total.mean()), float(response.square().cumsum(0).mean()), float(total.square().mean())
