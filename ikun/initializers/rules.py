"""Initializers that measure on a batch: fixed points of the law of h, and rules for spiking networks.

Weight layers are drawn in the order of the forward pass. Layers that feed the same neurons, such as the input weights
and the recurrent weights of a layer, are drawn together, and the recurrent weights are zero in the first measurement.
m = E[f'(h - threshold)^2] is pooled over time, samples and units. decay and gain are those of `ikun.neurons`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import nan

import torch
from scipy import optimize
from torch import Tensor
from torch.nn import init

from ikun.initializers.probe import Probe, Seen, Stage, Weights
from ikun.layer_statistics import fans
from ikun.neurons import Neuron
from ikun.surrogates import Surrogate, expected_square


@dataclass(frozen=True)
class Solution:
    """What a rule found for one layer.

    Attributes:
        layer: Name of the layer.
        variance: Variance of the weights. For an orthogonal matrix, the square of its gain.
        input_square: E[x^2] of the layer's input. NaN if the rule does not use it.
        derivative_square: m. NaN if the rule does not use it.
        passes: Number of iterations.
        converged: Whether the variance changed by less than 1% in the last iteration. For lsuv, whether the variance of
            the output is within 0.1 of 1.
    """

    layer: str
    variance: float
    input_square: float
    derivative_square: float
    passes: int
    converged: bool


LEAST_VARIANCE = 1e-30  # of weights; their squares must be normal numbers of float32
Draw = Callable[[Weights, torch.Generator], object]
Update = Callable[[Stage, float, float], float]  # (stage, E[x^2], m) -> variance


def constants(model: Neuron | None) -> tuple[float, float]:
    """Return decay and gain of the neurons, or (0, 1) for a readout without neurons."""
    return (0.0, 1.0) if model is None else (float(model.rates()[0]), float(model.rates()[1]))


def normal(weights: Weights, generator: torch.Generator) -> None:
    """Draw standard normal weights."""
    weights.weight.normal_(0, 1, generator=generator)


def orthogonal(weights: Weights, generator: torch.Generator) -> None:
    """Draw an orthogonal weight matrix."""
    init.orthogonal_(weights.weight, generator=generator)


def require(rule: str, layer: str, input_square: float, derivative: float = 1.0) -> None:
    """Raise ValueError unless E[x^2] and m are finite and positive.

    Args:
        rule: Name of the rule.
        layer: Name of the layer.
        input_square: E[x^2] of the layer's input.
        derivative: m of its neurons.
    """
    for what, value in (("input", input_square), ("surrogate derivative", derivative)):
        if not math.isfinite(value):
            problem = f"its {what} is not finite (an earlier value overflows)"
        elif value <= 0:
            zero = {"input": "its input is zero (the preceding layer never fires)"}
            problem = zero.get(what, "the surrogate derivative is zero at its potentials")
        else:
            continue
        raise ValueError(f"the {rule} rule has no solution for layer {layer}: {problem}")


# ---------------------------------------------------------------- fixed points
def fixed_point(
    probe: Probe,
    group: Sequence[Stage],
    generator: torch.Generator,
    start: Update,
    update: Update,
    draw: Draw = normal,
) -> list[Solution]:
    """Iterate variance -> update(stage, E[x^2], m) for layers that feed the same neurons.

    The random draws are kept, and only their scales change.

    Args:
        probe: The module and the batch.
        group: The layers.
        generator: Source of random numbers.
        start: Computes the first variance, from a measurement with recurrent weights of zero.
        update: Computes the next variance.
        draw: Draws weights of variance 1.

    Returns:
        The solutions of the layers.

    Raises:
        ValueError: If start or update finds no solution, or a variance is beyond the range of float32.
    """
    for s in group:
        draw(s.weights, generator)
    shapes = [s.weights.weight.clone() for s in group]
    for s in group:
        if s.recurrent:
            s.weights.weight.zero_()
    seen = probe.look(group)
    squares, m = [seen.input_square(i) for i in range(len(group))], seen.derivative_square()
    variances = [start(s, square, m) for s, square in zip(group, squares, strict=True)]
    converged, passes = False, 0
    while passes < 50 and not converged:
        passes += 1
        _scale(group, shapes, variances)
        seen = probe.look(group)
        squares, m = [seen.input_square(i) for i in range(len(group))], seen.derivative_square()
        updates = [update(s, square, m) for s, square in zip(group, squares, strict=True)]
        for s, u in zip(group, updates, strict=True):
            if not LEAST_VARIANCE <= u <= 1 / LEAST_VARIANCE:
                raise ValueError(
                    f"the variance of the weights of layer {s.name} would be {u:.3g}, beyond the range of float32: "
                    "choose an alpha nearer to 1, or another initializer"
                )
        converged = all(abs(math.log(u / v)) < 0.01 for u, v in zip(updates, variances, strict=True))
        # half a step in the logarithm, because full steps can oscillate
        variances = [math.sqrt(v * u) for u, v in zip(updates, variances, strict=True)]
    _scale(group, shapes, variances)
    return [
        Solution(s.name, variance, square, m, passes, converged)
        for s, variance, square in zip(group, variances, squares, strict=True)
    ]


def _scale(group: Sequence[Stage], shapes: Sequence[Tensor], variances: Sequence[float]) -> None:
    """Set the weights to the draws, scaled to the given variances."""
    for s, shape, variance in zip(group, shapes, variances, strict=True):
        s.weights.weight.copy_(shape * math.sqrt(variance))


def ikun(probe: Probe, generator: torch.Generator, alpha: float) -> list[Solution]:
    """Theorem 1 of arXiv 2411.18250 with measured moments: Var W = alpha / (fi E[x^2] m).

    Args:
        probe: The module and the batch.
        generator: Source of random numbers.
        alpha: Factor of the variance.

    Returns:
        The solutions of the layers.

    Raises:
        ValueError: If there is no solution.
    """

    def start(s: Stage, square: float, m: float) -> float:
        square = 1 if s.recurrent else square
        require("ikun", s.name, square)
        return 1 / (fans(s.weights.weight)[0] * square)

    def update(s: Stage, square: float, m: float) -> float:
        require("ikun", s.name, square, m)
        return alpha / (fans(s.weights.weight)[0] * square * m)

    return [x for group in probe.groups() for x in fixed_point(probe, group, generator, start, update)]


def firing(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Micheli et al. 2024 (arXiv 2410.00580): Var W = 1 / (n P(u > threshold)).

    u is the potential of the preceding layer. P is measured as the fraction of spikes, which is E[x^2] of the layer's
    input. For a real-valued input it is the mean square. The neurons of the paper have gain 1. Ours multiply the
    current by the gain, so this is the variance of gain W.
    """

    def start(s: Stage, square: float, m: float) -> float:
        return update(s, 1 if s.recurrent else square, m)

    def update(s: Stage, square: float, m: float) -> float:
        require("firing", s.name, square)
        return 1 / (constants(s.model)[1] ** 2 * fans(s.weights.weight)[0] * square)

    found = [x for group in probe.groups() for x in fixed_point(probe, group, generator, start, update)]
    return [replace(x, derivative_square=nan) for x in found]


def delta_orthogonal(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Xiao et al. 2018 (arXiv 1806.05393): kernels are zero except at the centre, which is a gain times an isometry.

    Linear layers are orthogonal. The gain 1/sqrt(m) preserves the mean square of a gradient that passes through f' and
    W. It is our choice, because the networks of the paper do not spike.
    """
    for s in probe.drawn:
        fan_in, fan_out = s.weights.weight.shape[1], s.weights.weight.shape[0] // getattr(s.weights, "groups", 1)
        if s.weights.weight.dim() > 2 and fan_out < fan_in:
            raise ValueError(
                f"delta_orthogonal needs at least as many output as input channels: layer {s.name} has "
                f"{fan_out} output and {fan_in} input channels; choose orthogonal"
            )

    def start(s: Stage, square: float, m: float) -> float:
        return 1.0

    def update(s: Stage, square: float, m: float) -> float:
        require("delta_orthogonal", s.name, 1.0, m)
        return 1 / m

    found: list[Solution] = []
    for group in probe.groups():
        found += fixed_point(probe, group, generator, start, update, draw_delta_orthogonal)
    return [replace(x, input_square=nan) for x in found]


def draw_delta_orthogonal(weights: Weights, generator: torch.Generator) -> None:
    """Draw delta-orthogonal weights of gain 1, independently for each group of channels."""
    w = weights.weight
    if w.dim() == 2:
        orthogonal(weights, generator)
        return
    w.zero_()
    for part in w.chunk(getattr(weights, "groups", 1)):
        centre = part
        for _ in w.shape[2:]:
            centre = centre.select(2, centre.shape[2] // 2)
        centre.copy_(init.orthogonal_(torch.empty_like(centre), generator=generator))


def gradient_stable(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Condition IV of Herranz-Celotti & Rouat (arXiv 2202.00282) for the recurrent weights V [n, n].

        decay^2 + (gain^2 n E[V^2] + (decay threshold)^2) m = 1

    This preserves the mean square of a gradient that goes back one step through leak, recurrence and subtractive reset.
    The condition of the paper, for y[t] = d y[t-1] + V s[t-1] - theta s[t-1], has n - 1 instead of n, because its V has
    no diagonal. Our neurons multiply V by the gain and the reset by the decay. A hard reset has (v_reset - h) f' in
    place of the reset term, which is about threshold f' where f' is large. A detached reset has no such term. Input
    weights and readouts are uniform with Glorot's variance, as in the authors' code. We solve for V with m and E[V^2]
    both unknown; the paper uses the condition as one equation for the surrogate.

    Args:
        probe: The module and the batch.
        generator: Source of random numbers.

    Returns:
        The solutions of the recurrent layers.

    Raises:
        ValueError: If there is no recurrent layer, or decay^2 + (decay threshold)^2 m >= 1 with V = 0.
    """
    if not any(s.recurrent for s in probe.stages):
        raise ValueError(
            "the gradient_stable rule is for recurrent layers, and this network has none: choose another initializer"
        )

    def rule(s: Stage, square: float, m: float) -> float:
        assert s.model is not None
        decay, gain = constants(s.model)
        dynamics = s.model.dynamics
        rest = dynamics.v_reset if dynamics.reset == "hard" else 0.0
        reset = 0.0 if dynamics.detach_reset else decay * (dynamics.threshold - rest)
        kept = decay**2 + reset**2 * m
        if kept >= 1:
            raise ValueError(
                f"the gradient_stable rule has no solution for layer {s.name}: decay^2 + (decay threshold)^2 E[f'^2] "
                f"is {kept:.4g}, not below 1; choose lif neurons, a smaller tau or a flatter surrogate"
            )
        require("gradient_stable", s.name, 1.0, m)
        return (1 - kept) / (gain**2 * fans(s.weights.weight)[0] * m)

    found: list[Solution] = []
    for group in probe.groups():
        feedback = [s for s in group if s.recurrent]
        for s in group:
            if not s.recurrent:
                init.xavier_uniform_(s.weights.weight, generator=generator)
        if feedback:
            found += fixed_point(probe, feedback, generator, rule, rule)
    return [replace(x, input_square=nan) for x in found]


# ---------------------------------------------------------------- rules that need no law of h
def lsuv(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Mishkin & Matas 2016 (arXiv 1511.06422): orthonormal weights, scaled to an output variance of 1.

    W <- W / sqrt(Var(out)) is repeated until |Var(out) - 1| < 0.1, at most ten times. out is the output of the weight
    layer itself, before a BatchNorm or the neurons.
    """
    found: list[Solution] = []
    for group in probe.groups():
        for s in group:
            s.weights.weight.zero_()
        for s in group:
            orthogonal(s.weights, generator)
            passes, gain = 0, 1.0
            variance = _output_variance(probe.look([s]), s)
            while abs(variance - 1) >= 0.1 and passes < 10:
                passes += 1
                s.weights.weight.div_(math.sqrt(variance))
                gain /= math.sqrt(variance)
                variance = _output_variance(probe.look([s]), s)
            found.append(Solution(s.name, gain**2, nan, nan, passes, abs(variance - 1) < 0.1))
    return found


def _output_variance(seen: Seen, s: Stage) -> float:
    """Return the variance of a layer's output. Raises ValueError if it is 0 or not finite."""
    variance = float(seen.outputs[0].double().var(unbiased=False))
    if not 0 < variance < math.inf:
        problem = "does not vary" if variance == 0 else "is not finite (an earlier value overflows)"
        raise ValueError(f"the lsuv rule has no solution for layer {s.name}: its output {problem}")
    return variance


# ---------------------------------------------------------------- the analytic law
def potential_scale(surrogate: Surrogate, threshold: float, alpha: float, fixed: float = 0.0) -> float:
    """Solve (s^2 - fixed) E[f'(N(-threshold, s^2))^2] = alpha for s, the fixed point of the analytic law.

    The left side increases from 0 without bound.

    Args:
        surrogate: The surrogate derivative f'.
        threshold: Threshold of the neurons.
        alpha: Right side of the equation.
        fixed: The part of the variance s^2 that comes from a norm and does not depend on the weights.

    Returns:
        s, the standard deviation of the membrane potential.

    Raises:
        ValueError: If there is no solution below 1e6 thresholds.
    """

    def scale(log_free: float) -> float:
        return math.sqrt(fixed + math.exp(2 * log_free))

    def gap(log_free: float) -> float:
        moment = expected_square(surrogate, -threshold, scale(log_free))
        return 2 * log_free + math.log(moment) - math.log(alpha) if moment > 0 else -math.inf

    lo, hi = math.log(threshold * 1e-3), math.log(threshold * 1e6)
    while gap(lo) == -math.inf and lo < hi:
        lo += 0.5
    if not gap(lo) < 0 < gap(hi):
        raise ValueError(f"the analytic ikun rule has no solution for surrogate {surrogate} and alpha {alpha}")
    return scale(float(optimize.brentq(gap, lo, hi)))
