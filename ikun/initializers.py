"""Weight initializers by name, each with its formula and source. fi, fo: fan in and out, the kernel area included.

| name | weights | source |
| --- | --- | --- |
| ikun | N(0, alpha / (fi E[x^2] E[f'(h - threshold)^2])) | Theorem 1 of arXiv 2411.18250 |
| ikun_v1 | N(0, beta / fi), beta = 1 / mean of 1/(1 + x^2) on 1,000 points of [-1, 1] | its released code |
| ikun_v2 | N(0, beta / (fi + fo)) | its released code (which lacks fo of a convolution) |
| xavier | U(-a, a), a^2 = 6 / (fi + fo) | Glorot & Bengio 2010 |
| kaiming | U(-a, a), a^2 = 6 / fi | He et al. 2015, gain for ReLU |
| lecun | N(0, 1 / fi) | LeCun et al. 1998 |
| normal | N(0, 0.02^2) | the comparison of arXiv 2411.18250 |
| orthogonal | orthonormal rows or columns | Saxe et al. 2014 |

The theorem needs the law of the membrane potential h, which itself depends on the weights. law='empirical' (default)
solves this fixed point on a real batch, layer by layer, with h pooled over time, samples and units. law='analytic'
takes h ~ N(0, s^2) and E[x^2] = P(h >= threshold) behind the first layer; the fixed point is then
s^2 E[f'(N(-threshold, s^2))^2] = alpha. Before a BatchNorm the scale of the weights does not reach h, whose law is
the BatchNorm's: measured in the empirical case, N(0, 1) in the analytic one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from scipy import optimize, special
from torch import Tensor, nn
from torch.nn import init

from ikun.networks import Network
from ikun.neurons import Neuron
from ikun.statistics import batch_norm_by_batch, derivative_square, fans
from ikun.surrogates import Surrogate, expected_square

LAWS = ("empirical", "analytic")

Fill = Callable[[Tensor, torch.Generator], object]


def released_beta() -> float:
    """1.2737...: the constant of the released code, 1 / mean of 1/(1 + x^2) over linspace(-1, 1, 1000)."""
    return float(1 / (1 / (1 + torch.linspace(-1, 1, 1000, dtype=torch.float64).square())).mean())


def _normal(variance: Callable[[int, int], float]) -> Fill:
    return lambda w, g: w.normal_(0, math.sqrt(variance(*fans(w))), generator=g)


FILLS: dict[str, Fill] = {
    "ikun_v1": _normal(lambda fan_in, fan_out: released_beta() / fan_in),
    "ikun_v2": _normal(lambda fan_in, fan_out: released_beta() / (fan_in + fan_out)),
    "xavier": lambda w, g: init.xavier_uniform_(w, generator=g),
    "kaiming": lambda w, g: init.kaiming_uniform_(w, nonlinearity="relu", generator=g),
    "lecun": _normal(lambda fan_in, fan_out: 1 / fan_in),
    "normal": _normal(lambda fan_in, fan_out: 0.02**2),
    "orthogonal": lambda w, g: init.orthogonal_(w, generator=g),
}
NAMES = ("ikun", *FILLS)


@dataclass(frozen=True)
class Solution:
    """How the fixed point of one layer came out. converged: the variance changed by less than 1% in the last pass."""

    layer: str
    variance: float
    input_square: float
    derivative_square: float
    passes: int
    converged: bool


def initialize(
    network: Network,
    name: str,
    *,
    generator: torch.Generator,
    x: Tensor | None = None,
    alpha: float = 1.0,
    law: str = "empirical",
) -> tuple[Solution, ...]:
    """Draw all weights of `network` in place; what ikun's fixed points were is returned, () for the others.

    x: a batch of network inputs, needed by ikun. BatchNorm parameters keep torch's own start (1 and 0).
    Raises ValueError for an unknown name or law, alpha <= 0, or ikun without a batch.
    """
    if name not in NAMES:
        raise ValueError(f"unknown initializer '{name}': choose one of {', '.join(NAMES)}")
    if law not in LAWS:
        raise ValueError(f"unknown law '{law}': choose one of {', '.join(LAWS)}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive, not {alpha}")
    with torch.no_grad():
        if name != "ikun":
            for _, weights, _, _, _ in network.stages():
                FILLS[name](weights.weight, generator)
            return ()
        if x is None:
            raise ValueError("the ikun initializer needs a batch of inputs")
        return tuple(_ikun(network, x, alpha, law, generator))


def _ikun(network: Network, x: Tensor, alpha: float, law: str, generator: torch.Generator) -> list[Solution]:
    solutions: list[Solution] = []
    square = float(x.double().square().mean())
    for name, weights, norm, _, neuron in network.stages():
        weights.weight.normal_(0, 1, generator=generator)
        fan_in, _ = fans(weights.weight)
        if law == "analytic":
            solution, square = _analytic(name, fan_in, square, neuron, norm is not None, alpha)
            weights.weight.mul_(math.sqrt(solution.variance))
        else:
            solution = _empirical(name, network, weights, neuron, x, alpha)
        solutions.append(solution)
    return solutions


def _empirical(
    name: str, network: Network, weights: nn.Conv2d | nn.Linear, neuron: Neuron, x: Tensor, alpha: float
) -> Solution:
    """Iterate variance -> alpha / (fi E[x^2] E[f'^2]) with the draws held fixed and only their scale changing."""
    shape = weights.weight.clone()
    fan_in, _ = fans(shape)
    source, current = _capture(network, weights, neuron, x)
    square = float(source.double().square().mean())
    _require_input(name, square)
    variance, moment, converged, passes = 1 / (fan_in * square), 0.0, False, 0
    while passes < 50 and not converged:
        passes += 1
        weights.weight.copy_(shape * math.sqrt(variance))
        _, current = _capture(network, weights, neuron, x)
        moment = derivative_square(neuron, current)
        if moment == 0:
            raise ValueError(f"the ikun rule has no solution for layer {name}: the surrogate derivative is zero there")
        update = alpha / (fan_in * square * moment)
        converged = abs(math.log(update / variance)) < 0.01
        variance = math.sqrt(variance * update)  # half a step in the logarithm: the plain iteration can oscillate
    weights.weight.copy_(shape * math.sqrt(variance))
    return Solution(name, variance, square, moment, passes, converged)


def _require_input(name: str, square: float) -> None:
    if square == 0:
        raise ValueError(
            f"the ikun rule has no solution for layer {name}: its input is zero (the layer before never fires)"
        )


class _FoundError(Exception):
    """Ends a forward pass: what follows the layer of interest is not needed."""


def _capture(network: Network, weights: nn.Module, neuron: Neuron, x: Tensor) -> tuple[Tensor, Tensor]:
    """(input of the weight layer, current [T, N, ...] into its neurons), BatchNorm normalizing by the batch."""
    seen: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])

    def stop(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        note(module, arguments)
        raise _FoundError

    handles = [weights.register_forward_pre_hook(note), neuron.register_forward_pre_hook(stop)]
    try:
        with batch_norm_by_batch(network), suppress(_FoundError):
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0], seen[1]


def potential_scale(surrogate: Surrogate, threshold: float, alpha: float) -> float:
    """s with s^2 E[f'(N(-threshold, s^2))^2] = alpha: the analytic fixed point without a norm.

    The left side grows from 0 with s, without bound. Raises ValueError where no s below 1e6 thresholds solves it.
    """

    def gap(log_s: float) -> float:
        s = math.exp(log_s)
        moment = expected_square(surrogate, -threshold, s)
        return 2 * log_s + math.log(moment) - math.log(alpha) if moment > 0 else -math.inf

    lo, hi = math.log(threshold * 1e-3), math.log(threshold * 1e6)
    while gap(lo) == -math.inf and lo < hi:
        lo += 0.5
    if not gap(lo) < 0 < gap(hi):
        raise ValueError(f"the analytic ikun rule has no solution for surrogate {surrogate} and alpha {alpha}")
    return math.exp(float(optimize.brentq(gap, lo, hi)))


def _analytic(
    name: str, fan_in: int, square: float, neuron: Neuron, normed: bool, alpha: float
) -> tuple[Solution, float]:
    """The layer's solution under the Gaussian law, and the model's E[x^2] = P(h >= threshold) for the next layer."""
    _require_input(name, square)
    surrogate, threshold = neuron.dynamics.surrogate, neuron.dynamics.threshold
    s = 1.0 if normed else potential_scale(surrogate, threshold, alpha)
    moment = expected_square(surrogate, -threshold, s)
    if moment == 0:
        raise ValueError(f"the ikun rule has no solution for layer {name}: the surrogate derivative is zero there")
    return Solution(name, alpha / (fan_in * square * moment), square, moment, 1, True), float(
        special.ndtr(-threshold / s)
    )
