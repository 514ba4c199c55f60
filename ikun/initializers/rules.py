"""Initializers that look at a batch: fixed points of the law of h, and the rules made for spiking networks.

Weight layers are drawn in the order of the forward pass; those that feed the same neurons (a recurrent matrix and the
input's) together, with the recurrent one silent at the first look. m = E[f'(h - threshold)^2], pooled over time,
samples and units; decay and gain are those of ikun.neurons.
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

XI = 1.0  # fluctuation: distance of the mean membrane to the threshold in standard deviations
INPUT_SHARE = 0.9  # fluctuation: share of the input in the membrane's variance where there is recurrence


@dataclass(frozen=True)
class Solution:
    """What a rule found for one layer. input_square: E[x^2]; derivative_square: m; both NaN where the rule does not use
    them. variance: of the weights (of an orthogonal matrix: the square of its gain). converged: it changed by less than
    1% in the last pass (lsuv: the output's variance is within 0.1 of 1)."""

    layer: str
    variance: float
    input_square: float
    derivative_square: float
    passes: int
    converged: bool


Draw = Callable[[Weights, torch.Generator], object]
Update = Callable[[Stage, float, float], float]  # (stage, E[x^2], m) -> variance


def constants(model: Neuron | None) -> tuple[float, float]:
    """(decay, gain) of the neurons; (0, 1) for a readout."""
    return (0.0, 1.0) if model is None else (float(model.rates()[0]), float(model.rates()[1]))


def normal(weights: Weights, generator: torch.Generator) -> None:
    weights.weight.normal_(0, 1, generator=generator)


def orthogonal(weights: Weights, generator: torch.Generator) -> None:
    init.orthogonal_(weights.weight, generator=generator)


def require(rule: str, layer: str, input_square: float, derivative: float = 1.0) -> None:
    """Raises ValueError unless both are finite and positive."""
    for what, value in (("input", input_square), ("surrogate derivative", derivative)):
        if not math.isfinite(value):
            problem = f"its {what} is not finite (the values before it overflow)"
        elif value <= 0:
            zero = {"input": "its input is zero (the layer before never fires)"}
            problem = zero.get(what, "the surrogate derivative is zero there")
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
    """Iterate variance -> update(stage, E[x^2], m) with the draws held fixed and only their scales changing.

    start: the first variance, from a look with recurrent weights zero. Both raise ValueError where there is none.
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
        converged = all(abs(math.log(u / v)) < 0.01 for u, v in zip(updates, variances, strict=True))
        # half a step in the logarithm: the plain iteration can oscillate
        variances = [math.sqrt(v * u) for u, v in zip(updates, variances, strict=True)]
    _scale(group, shapes, variances)
    return [
        Solution(s.name, variance, square, m, passes, converged)
        for s, variance, square in zip(group, variances, squares, strict=True)
    ]


def _scale(group: Sequence[Stage], shapes: Sequence[Tensor], variances: Sequence[float]) -> None:
    for s, shape, variance in zip(group, shapes, variances, strict=True):
        s.weights.weight.copy_(shape * math.sqrt(variance))


def ikun(probe: Probe, generator: torch.Generator, alpha: float) -> list[Solution]:
    """Theorem 1 of arXiv 2411.18250, alpha / (fi E[x^2] m), as measured."""

    def start(s: Stage, square: float, m: float) -> float:
        square = 1 if s.recurrent else square
        require("ikun", s.name, square)
        return 1 / (fans(s.weights.weight)[0] * square)

    def update(s: Stage, square: float, m: float) -> float:
        require("ikun", s.name, square, m)
        return alpha / (fans(s.weights.weight)[0] * square * m)

    return [x for group in probe.groups() for x in fixed_point(probe, group, generator, start, update)]


def firing(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Micheli et al. 2024 (arXiv 2410.00580): Var W = 1 / (n P(u > threshold)), u that of the layer before.

    P is the measured share of spikes, E[x^2] of the layer's input (of a real input: its mean square). Their neurons
    have gain 1: ours multiply the current by the gain, so it is gain W that gets this variance.
    """

    def start(s: Stage, square: float, m: float) -> float:
        return update(s, 1 if s.recurrent else square, m)

    def update(s: Stage, square: float, m: float) -> float:
        require("firing", s.name, square)
        return 1 / (constants(s.model)[1] ** 2 * fans(s.weights.weight)[0] * square)

    found = [x for group in probe.groups() for x in fixed_point(probe, group, generator, start, update)]
    return [replace(x, derivative_square=nan) for x in found]


def delta_orthogonal(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Xiao et al. 2018 (arXiv 1806.05393): all taps of a kernel zero but the centre, which is orthogonal: gain times an
    isometry. Linear layers are orthogonal. The gain 1/sqrt(m) keeps the mean square of a gradient that goes through f'
    and W; it is ours, as the paper's networks do not spike.
    """
    for s in probe.drawn:
        fan_in, fan_out = s.weights.weight.shape[1], s.weights.weight.shape[0] // getattr(s.weights, "groups", 1)
        if s.weights.weight.dim() > 2 and fan_out < fan_in:
            raise ValueError(
                f"delta_orthogonal needs at least as many output as input channels: layer {s.name} has {fan_out} for "
                f"{fan_in}; choose orthogonal"
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
    """Of gain 1; each group of channels for itself."""
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
    """Condition IV of Herranz-Celotti & Rouat (arXiv 2202.00282) for the recurrent matrix V [n, n]:

        decay^2 + (gain^2 n E[V^2] + (decay threshold)^2) m = 1

    the mean square of a gradient that goes back one step, by leak, recurrence and subtractive reset, is kept. Theirs,
    for y[t] = d y[t-1] + V s[t-1] - theta s[t-1], has n - 1 for n, as their V has no diagonal; our neurons multiply V
    by the gain and the reset by the decay. For a hard reset (v_reset - h) f', about threshold f' where f' is large,
    stands in its place; a detached reset has no such term. Input matrices and readouts are uniform of Glorot's
    variance, as in the authors' code. V is solved in both m and E[V^2]; theirs is one equation for the surrogate.
    Raises ValueError without a recurrent layer, and where decay^2 + (decay threshold)^2 m >= 1 with V = 0.
    """
    if not any(s.recurrent for s in probe.stages):
        raise ValueError(
            "the gradient_stable rule is about recurrent layers: this network has none, choose another rule"
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


# ---------------------------------------------------------------- no law of h
def lsuv(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Mishkin & Matas 2016 (arXiv 1511.06422): orthonormal, then W <- W / sqrt(Var(out)) until |Var(out) - 1| < 0.1,
    ten times at most. out is the weight layer's own output: what enters a BatchNorm, or the neurons without one.
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
    variance = float(seen.outputs[0].double().var(unbiased=False))
    if not 0 < variance < math.inf:
        problem = "does not vary" if variance == 0 else "is not finite (the values before it overflow)"
        raise ValueError(f"the lsuv rule has no solution for layer {s.name}: its output {problem}")
    return variance


def fluctuation(probe: Probe, generator: torch.Generator) -> list[Solution]:
    """Rossbroich, Gygax & Zenke 2022 (arXiv 2206.10226), centred: mean membrane at rest, its standard deviation
    (threshold - rest) / XI without resets, for inputs that are Poisson trains; where a layer is recurrent INPUT_SHARE
    of the variance comes from the input. XI and the share are those of the authors' examples; readouts without neurons
    get 1 / fi, as there.

    Ours: e1 and e2 are means over the T steps from rest; the rate nu is measured layer by layer (theirs is one number
    for all); a constant current, as of a repeated image, has no fluctuation in time: its spread over samples and
    neurons takes its place.
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
    """(mean, variance) of weights under which Poisson trains of this rate give a membrane without threshold the mean
    `mean` above rest and the standard deviation (distance - mean) / xi; distance: of the threshold from rest. first,
    second: kernel_moments(). Rossbroich, Gygax & Zenke 2022, their e-bar and e-hat. Raises ValueError where the mean
    alone makes more fluctuation than this.
    """
    centre = mean / (fan_in * rate * first)
    variance = ((distance - mean) / xi) ** 2 / (fan_in * rate * second) - centre**2
    if variance < 0:
        raise ValueError(
            f"a mean membrane of {mean:g} fluctuates by more than 1/{xi:g} of its distance to the threshold"
        )
    return centre, variance


def kernel_moments(decay: float, gain: float, steps: int) -> tuple[float, float, float]:
    """(e1, e2, e1^2) of the membrane's response gain decay^k to a unit input k steps ago: its sum, its sum of squares
    and its squared sum, each a mean over t = 1..steps from rest. e1 -> 1 and e2 -> 1/(2 tau - 1) for LIF and many
    steps; both are (steps + 1) / 2 for IF.
    """
    response = gain * decay ** torch.arange(steps, dtype=torch.float64)
    total = response.cumsum(0)
    return float(total.mean()), float(response.square().cumsum(0).mean()), float(total.square().mean())


# ---------------------------------------------------------------- the analytic law
def potential_scale(surrogate: Surrogate, threshold: float, alpha: float, fixed: float = 0.0) -> float:
    """s with (s^2 - fixed) E[f'(N(-threshold, s^2))^2] = alpha: the analytic fixed point. fixed: the part of the
    variance s^2 that comes from a norm, and does not move with the weights.

    The left side grows from 0 with s, without bound. Raises ValueError where no s below 1e6 thresholds solves it.
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
